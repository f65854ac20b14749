//! Pushing to registries that redirect, decline and forget.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use nydus_backend::registry::Mounted;

use crate::server::{How, Reply, Seen, Server, digest, sample};

/// A registry with upload sessions, whose addresses are relative, have a query and change with every step.
#[derive(Default)]
struct Sessions {
    open: HashMap<String, Vec<u8>>,
    done: HashMap<String, Vec<u8>>,
    next: u32,
    /// So many steps fail with "no such session".
    forget: u32,
}

impl Sessions {
    fn answer(&mut self, seen: &Seen) -> Reply {
        let query = seen.query();
        if seen.method == "HEAD" {
            let wanted = seen.path().rsplit('/').next().unwrap_or("");
            return if self.done.contains_key(wanted) { Reply::new(200) } else { Reply::new(404) };
        }
        if seen.method == "POST" {
            if let Some(digest) = query.get("mount")
                && query.get("from").map(String::as_str) == Some("known")
            {
                self.done.insert(digest.clone(), Vec::new());
                return Reply::new(201);
            }
            return self.step(Vec::new(), 202);
        }
        if seen.method == "GET" {
            let state = query.get("state").cloned().unwrap_or_default();
            return match self.open.get(&state) {
                Some(bytes) => Reply::new(204).header("Range", format!("0-{}", bytes.len().saturating_sub(1))),
                None => Reply::new(404),
            };
        }
        let begin: Option<usize> =
            seen.header("content-range").split_once('-').and_then(|(begin, _)| begin.parse().ok());
        let session = query.get("state").and_then(|state| self.open.remove(state));
        if let (Some(begin), Some(bytes)) = (begin, &session)
            && bytes.len() != begin
        {
            return Reply::new(416);
        }
        let Some(mut bytes) = session.filter(|_| self.forget == 0) else {
            self.forget = self.forget.saturating_sub(1);
            return Reply::new(404).body(r#"{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}"#);
        };
        bytes.extend_from_slice(&seen.body);
        match query.get("digest") {
            Some(wanted) if *wanted == digest(&bytes) => {
                self.done.insert(wanted.clone(), bytes);
                Reply::new(201)
            }
            Some(_) => Reply::new(400).body(r#"{"errors":[{"code":"DIGEST_INVALID","message":"no"}]}"#),
            None => self.step(bytes, 202),
        }
    }

    fn step(&mut self, bytes: Vec<u8>, status: u16) -> Reply {
        self.next += 1;
        let state = format!("s {}", self.next);
        self.open.insert(state.clone(), bytes);
        let state = state.replace(' ', "%20");
        Reply::new(status).header("Location", format!("/v2/r/blobs/uploads/u?state={state}"))
    }
}

async fn registry(forget: u32) -> (Server, Arc<Mutex<Sessions>>) {
    let sessions = Arc::new(Mutex::new(Sessions { forget, ..Sessions::default() }));
    let inner = Arc::clone(&sessions);
    (Server::start(move |seen| inner.lock().unwrap().answer(seen)).await, sessions)
}

#[tokio::test]
async fn a_blob_in_memory_arrives_and_is_not_sent_twice() {
    let (server, sessions) = registry(0).await;
    let blob = sample(700_000);
    let client = server.client();
    client.push_blob("r", &digest(&blob), blob.clone()).await.unwrap();
    assert_eq!(sessions.lock().unwrap().done[&digest(&blob)], blob);
    let before = server.seen().len();
    client.push_blob("r", &digest(&blob), blob.clone()).await.unwrap();
    assert_eq!(server.seen().len(), before + 1);
    let empty = Bytes::new();
    client.push_blob("r", &digest(&empty), empty).await.unwrap();
}

#[tokio::test]
async fn a_stream_of_unknown_length_arrives() {
    for length in [None, Some(30_000)] {
        let (server, sessions) = registry(0).await;
        let blob = sample(30_000);
        let pieces: Vec<Result<Bytes, std::io::Error>> =
            (0..3).map(|at| Ok(blob.slice(at * 10_000..(at + 1) * 10_000))).collect();
        let mut upload = server.client().start_upload("r").await.unwrap();
        upload.stream(length, futures::stream::iter(pieces)).await.unwrap();
        assert_eq!(upload.sent(), 30_000);
        upload.finish(&digest(&blob), Bytes::new()).await.unwrap();
        assert_eq!(sessions.lock().unwrap().done[&digest(&blob)], blob);
    }
}

#[tokio::test]
async fn an_upload_that_broke_off_goes_on_with_what_has_not_arrived() {
    let (server, sessions) = registry(0).await;
    let blob = sample(30_000);
    let mut upload = server.client().start_upload("r").await.unwrap();
    let lost = std::io::Error::other("the link is gone");
    assert!(upload.stream(Some(30_000), futures::stream::iter([Ok(blob.slice(..9000)), Err(lost)])).await.is_err());
    // As a registry has it that keeps what came.
    sessions.lock().unwrap().open.insert("s 1".into(), blob.slice(..7000).to_vec());
    assert_eq!(upload.resume().await.unwrap(), 7000);
    let rest = futures::stream::iter([Ok::<_, std::io::Error>(blob.slice(7000..))]);
    upload.part(23_000, rest).await.unwrap();
    upload.finish(&digest(&blob), Bytes::new()).await.unwrap();
    assert_eq!(sessions.lock().unwrap().done[&digest(&blob)], blob);
    let seen = server.seen();
    let last = seen.iter().rfind(|seen| seen.method == "PATCH").unwrap();
    assert_eq!((last.header("content-range"), last.body.len()), ("7000-29999", 23_000));
    assert!(!upload.resume().await.unwrap_err().is_transient(), "a session that is closed is gone");
}

#[tokio::test]
async fn a_session_that_the_registry_forgot_is_started_again() {
    let (server, sessions) = registry(1).await;
    let blob = sample(100);
    server.client().push_blob("r", &digest(&blob), blob.clone()).await.unwrap();
    assert_eq!(sessions.lock().unwrap().done[&digest(&blob)], blob);
    let (server, _) = registry(5).await;
    let error = server.client().push_blob("r", &digest(&blob), blob.clone()).await.unwrap_err();
    assert!(error.to_string().contains("BLOB_UPLOAD_UNKNOWN"), "{error}");
}

#[tokio::test]
async fn a_wrong_digest_is_the_registrys_last_word() {
    let (server, _) = registry(0).await;
    let error = server.client().push_blob("r", &digest(b"other"), sample(10)).await.unwrap_err();
    assert!(error.to_string().contains("DIGEST_INVALID"), "{error}");
    assert_eq!(server.seen().iter().filter(|seen| seen.method == "POST").count(), 1);
}

#[tokio::test]
async fn a_blob_of_another_repository_is_mounted_or_an_upload_opened() {
    let (server, sessions) = registry(0).await;
    let client = server.client();
    let blob = sample(10);
    assert!(matches!(client.mount_blob("r", &digest(b"m"), "known").await.unwrap(), Mounted::Done));
    let Mounted::Upload(upload) = client.mount_blob("r", &digest(&blob), "unknown").await.unwrap() else {
        panic!("it cannot be mounted")
    };
    upload.finish(&digest(&blob), blob.clone()).await.unwrap();
    assert!(sessions.lock().unwrap().done.contains_key(&digest(&blob)));
    let deaf = Server::start(|seen: &Seen| match seen.query().contains_key("mount") {
        true => Reply::new(405),
        false => Reply::new(202).header("Location", "/u?x"),
    })
    .await;
    assert!(matches!(deaf.client().mount_blob("r", &digest(b"m"), "known").await.unwrap(), Mounted::Upload(_)));
}

#[tokio::test]
async fn a_manifest_is_put_with_its_type() {
    let server = Server::start(|_| Reply::new(201)).await;
    let body = Bytes::from_static(b"{}");
    let kind = "application/vnd.oci.image.manifest.v1+json";
    assert_eq!(server.client().put_manifest("r", "v1", kind, body.clone()).await.unwrap(), digest(&body));
    let seen = server.seen().pop().unwrap();
    assert_eq!((seen.method.as_str(), seen.path(), seen.header("content-type")), ("PUT", "/v2/r/manifests/v1", kind));
    assert_eq!(seen.body, body);
    let server = Server::start(|_| Reply::new(413).body("too large")).await;
    let error = server.client().put_manifest("r", "v1", kind, body).await.unwrap_err();
    assert!(error.to_string().contains("413"), "{error}");
    assert!(!error.is_transient());
}

#[tokio::test]
async fn a_source_that_fails_fails_the_upload() {
    let (server, _) = registry(0).await;
    let pieces = vec![Ok(sample(10)), Err(std::io::Error::other("the disk is gone"))];
    let mut upload = server.client().start_upload("r").await.unwrap();
    assert!(upload.stream(None, futures::stream::iter(pieces)).await.is_err());
    let server = Server::start(|seen: &Seen| match seen.method.as_str() {
        "POST" => Reply::new(202).header("Location", "/u"),
        _ => Reply::new(200).how(How::Slam),
    })
    .await;
    let upload = server.client().start_upload("r").await.unwrap();
    assert!(upload.finish(&digest(b"x"), sample(10)).await.is_err());
}
