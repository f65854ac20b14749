//! Blobs from hosts that redirect, ignore, shorten, stretch, stall and break.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use nydus_backend::Credential;
use nydus_backend::http::HttpError;
use nydus_backend::registry::{BlobRequest, ClientOptions, RegistryError};

use crate::server::{How, Reply, Seen, Server, client, digest, sample};

fn name() -> String {
    digest(b"blob")
}

#[tokio::test]
async fn redirects_of_every_kind_lead_to_the_bytes() {
    for status in [301, 302, 303, 307, 308] {
        let store = Server::start(|seen| Reply::ranged(seen, &sample(1000))).await;
        let target = store.url("/bucket/x?signature=s");
        let registry = Server::start(move |seen: &Seen| match seen.path() {
            // Relative, on the same host, then elsewhere.
            path if path.ends_with("/hop") => Reply::new(status).header("Location", target.clone()),
            _ => Reply::new(status).header("Location", "hop?a=b"),
        })
        .await;
        let client = registry.client();
        for _ in 0..2 {
            assert_eq!(client.blob_range("r", &name(), 10..30).await.unwrap(), sample(1000).slice(10..30));
        }
        // The second read went to the store directly.
        assert_eq!((registry.seen().len(), store.seen().len()), (2, 2), "{status}");
        assert_eq!(store.seen()[0].query()["signature"], "s");
    }
}

#[tokio::test]
async fn authorization_stays_with_scheme_host_and_port() {
    let store = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    let target = store.url("/x");
    let registry = Server::start(move |seen: &Seen| match seen.header("authorization") {
        "" => Reply::new(401).header("WWW-Authenticate", "Basic"),
        _ if seen.path() == "/here" => Reply::new(307).header("Location", target.clone()),
        _ => Reply::new(307).header("Location", "/here"),
    })
    .await;
    let credential = Credential::Basic { user: "u".into(), password: "p".into() };
    let client = client(&registry.host(), ClientOptions { credential, ..ClientOptions::default() });
    client.blob_range("r", &name(), 0..5).await.unwrap();
    assert!(registry.seen().iter().any(|seen| seen.path() == "/here" && !seen.header("authorization").is_empty()));
    assert!(store.seen().iter().all(|seen| seen.header("authorization").is_empty()));
}

#[tokio::test]
async fn a_target_that_expired_is_dropped_and_the_registry_asked_again() {
    for status in [400, 401, 403, 404, 410, 500] {
        let old = Server::start({
            let calls = AtomicUsize::new(0);
            move |seen| match calls.fetch_add(1, SeqCst) {
                0 => Reply::ranged(seen, &sample(100)),
                _ => Reply::new(status),
            }
        })
        .await;
        let new = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
        let targets = Mutex::new(vec![new.url("/x"), old.url("/x")]);
        let registry =
            Server::start(move |_| Reply::new(307).header("Location", targets.lock().unwrap().pop().unwrap())).await;
        let client = registry.client();
        for _ in 0..3 {
            assert_eq!(client.blob_range("r", &name(), 1..9).await.unwrap(), sample(100).slice(1..9), "{status}");
        }
        assert_eq!((registry.seen().len(), old.seen().len(), new.seen().len()), (2, 2, 2), "{status}");
    }
}

#[tokio::test]
async fn a_dropped_target_stays_dropped_when_the_registry_serves_the_blob_itself() {
    let calls = AtomicUsize::new(0);
    let store = Server::start(move |seen| match calls.fetch_add(1, SeqCst) {
        0 => Reply::ranged(seen, &sample(100)),
        _ => Reply::new(403),
    })
    .await;
    let (target, asked) = (store.url("/x"), AtomicUsize::new(0));
    let registry = Server::start(move |seen| match asked.fetch_add(1, SeqCst) {
        0 => Reply::new(307).header("Location", target.clone()),
        _ => Reply::ranged(seen, &sample(100)),
    })
    .await;
    let client = registry.client();
    for _ in 0..4 {
        client.blob_range("r", &name(), 1..9).await.unwrap();
    }
    assert_eq!(store.seen().len(), 2);
}

#[tokio::test]
async fn one_callers_redirect_is_not_used_for_another() {
    let store = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    let target = store.url("/x");
    let registry = Server::start(move |seen: &Seen| match seen.header("authorization") {
        "Bearer may" => Reply::new(307).header("Location", target.clone()),
        _ => Reply::new(403),
    })
    .await;
    let client = registry.client();
    let mut request = BlobRequest::range(0..5);
    request.authorization = Some("Bearer may".parse().unwrap());
    client.blob("r", &name(), &request).await.unwrap();
    request.authorization = Some("Bearer may-not".parse().unwrap());
    assert_eq!(client.blob("r", &name(), &request).await.unwrap_err().status().unwrap(), 403);
}

#[tokio::test]
async fn redirects_in_a_circle_to_nowhere_and_to_other_schemes_are_errors() {
    for location in ["/v2/r/again", "ftp://store.example/x", "http://"] {
        let registry = Server::start(move |_| Reply::new(302).header("Location", location)).await;
        let error = registry.client().blob_range("r", &name(), 0..5).await.unwrap_err();
        assert!(matches!(error, RegistryError::Redirect { .. }), "{location}: {error}");
        assert!(registry.seen().len() <= 12);
    }
    let registry = Server::start(|_| Reply::new(302)).await;
    assert!(registry.client().blob_range("r", &name(), 0..5).await.is_err());
}

#[tokio::test]
async fn redirects_go_where_the_configuration_says() {
    let store = Server::start(|seen| Reply::ranged(seen, &sample(100))).await;
    let registry = Server::start(|_| Reply::new(307).header("Location", "https://store.example/x?y=z")).await;
    let options = ClientOptions {
        blob_url_scheme: Some("http".into()),
        blob_redirected_host: Some(store.host()),
        ..ClientOptions::default()
    };
    client(&registry.host(), options).blob_range("r", &name(), 0..5).await.unwrap();
    assert_eq!(store.seen()[0].target, "/x?y=z");
}

/// Reads bytes 10..20 of 100 from a host that answers with `reply`.
async fn read(reply: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Result<bytes::Bytes, RegistryError> {
    let registry = Server::start(reply).await;
    registry.client().blob_range("r", &name(), 10..20).await
}

fn partial(body: bytes::Bytes) -> Reply {
    Reply::new(206).header("Content-Range", "bytes 10-19/100").body(body)
}

#[tokio::test]
async fn the_bytes_come_out_exactly_however_they_are_sent() {
    let all = || Reply::new(200).body(sample(100));
    let part = || partial(sample(100).slice(10..20));
    let good: Vec<Reply> = vec![
        part(),
        part().how(How::Chunked),
        part().how(How::UntilClose),
        all(),
        all().how(How::Chunked),
        all().how(How::UntilClose),
        // Longer than it says, without end: what was not asked for is not read.
        partial(sample(100).slice(10..100)).header("X", "y").how(How::Chunked),
        all().how(How::Endless),
    ];
    for reply in good {
        let text = format!("{reply:?}");
        assert_eq!(read(move |_| reply.clone()).await.unwrap(), sample(100).slice(10..20), "{text}");
    }
}

#[tokio::test]
async fn what_cannot_be_believed_is_an_error() {
    let bytes = || sample(100).slice(10..20);
    let bad: Vec<(Reply, &str)> = vec![
        (partial(bytes()).how(How::Cut(3)), "broke"),
        (partial(bytes()).how(How::Stall(3)), "nothing for"),
        (partial(bytes()).how(How::Never), "did not answer"),
        (partial(bytes().slice(..9)).how(How::Chunked), "9 bytes"),
        (partial(bytes().slice(..9)), "contradicts"),
        (Reply::new(206).header("Content-Range", "bytes 20-29/100").body(bytes()), "bytes 20..30"),
        (Reply::new(206).header("Content-Range", "bytes 10-14/15").body(bytes().slice(..5)), "5 bytes"),
        (Reply::new(206).header("Content-Range", "nonsense").body(bytes()), "nonsense"),
        (Reply::new(200).body(sample(15)), "5 bytes"),
        (Reply::new(200).body(sample(15)).how(How::Chunked), "5 bytes"),
        (partial(bytes()).header("Content-Encoding", "gzip"), "gzip"),
        (Reply::new(200).header("Content-Type", "text/html").body(sample(100)), "web page"),
        (Reply::new(204), "204"),
        (Reply::new(416), "416"),
        (Reply::new(503).body(r#"{"errors":[{"code":"UNAVAILABLE","message":"later"}]}"#), "later"),
    ];
    for (reply, part) in bad {
        let text = format!("{reply:?}");
        let error = read(move |_| reply.clone()).await.unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
}

#[tokio::test]
async fn no_encoding_is_accepted_and_no_signature_is_printed() {
    let store = Server::start(|_| Reply::new(403).body("denied")).await;
    let target = store.url("/x?signature=hidden");
    let registry = Server::start(move |_| Reply::new(307).header("Location", target.clone())).await;
    let error = registry.client().blob_range("r", &name(), 0..5).await.unwrap_err();
    assert!(!error.to_string().contains("hidden") && !format!("{error:?}").contains("hidden"), "{error:?}");
    assert!(error.to_string().contains(&store.host()), "{error}");
    assert_eq!(store.seen()[0].header("accept-encoding"), "identity");
}

#[tokio::test]
async fn a_connection_that_died_while_idle_costs_no_failure() {
    let calls = Arc::new(AtomicUsize::new(0));
    let registry = Server::start(move |seen| {
        // Every second request finds the connection dead.
        let reply = Reply::ranged(seen, &sample(100));
        if calls.fetch_add(1, SeqCst) % 2 == 1 { reply.how(How::Slam) } else { reply }
    })
    .await;
    let client = registry.client();
    for _ in 0..5 {
        client.blob_range("r", &name(), 0..5).await.unwrap();
    }
    assert!(registry.seen().len() > 5);
}

#[tokio::test]
async fn a_host_that_always_hangs_up_is_asked_twice() {
    let registry = Server::start(|_| Reply::new(200).how(How::Slam)).await;
    let error = registry.client().blob_range("r", &name(), 0..5).await.unwrap_err();
    assert!(matches!(error, RegistryError::Http(HttpError::Broken { .. })), "{error}");
    assert!((2..=3).contains(&registry.seen().len()), "{}", registry.seen().len());
}

#[tokio::test]
async fn whether_a_blob_is_there_and_its_size_are_found_without_head() {
    for refusal in [Reply::new(405), Reply::new(403), Reply::new(200).how(How::UntilClose)] {
        let head = refusal.clone();
        let registry = Server::start(move |seen: &Seen| match seen.method.as_str() {
            "HEAD" => head.clone(),
            _ => Reply::ranged(seen, &sample(1234)),
        })
        .await;
        assert_eq!(registry.client().blob_size("r", &name()).await.unwrap(), 1234);
        assert!(registry.client().has_blob("r", &name()).await.unwrap());
    }
    for (status, there) in [(404, Some(false)), (416, Some(true)), (403, None)] {
        let registry = Server::start(move |seen: &Seen| match seen.method.as_str() {
            "HEAD" => Reply::new(405),
            _ => Reply::new(status),
        })
        .await;
        assert_eq!(registry.client().has_blob("r", &name()).await.ok(), there, "{status}");
    }
    let registry = Server::start(|_| Reply::new(200).header("Content-Type", "text/html; charset=utf-8")).await;
    let error = registry.client().has_blob("r", &name()).await.unwrap_err();
    assert!(error.to_string().contains("web page"), "{error}");
    let registry = Server::start(|_| Reply::new(404)).await;
    assert_eq!(registry.client().blob_size("r", &name()).await.unwrap_err().status().unwrap(), 404);
    assert_eq!(registry.seen().len(), 1);
    let registry = Server::start(|_| Reply::new(200).header("Content-Length", "77")).await;
    assert_eq!(registry.client().blob_size("r", &name()).await.unwrap(), 77);
}

#[tokio::test]
async fn names_cannot_leave_their_place_in_the_url() {
    let registry = Server::start(|_| Reply::new(200)).await;
    let client = registry.client();
    for (repository, digest) in
        [("../x", "sha256:a"), ("a//b", "sha256:a"), ("a?b", "sha256:a"), ("a", "x/../y"), ("", "x"), ("a", "%2e")]
    {
        let error = client.blob_range(repository, digest, 0..1).await.unwrap_err();
        assert!(matches!(error, RegistryError::Name(_)), "{error}");
    }
    assert_eq!(registry.seen().len(), 0);
}

#[tokio::test]
async fn a_whole_blob_streams_and_tells_its_size() {
    let registry = Server::start(|seen| Reply::ranged(seen, &sample(5000))).await;
    let stream = registry.client().blob("r", &name(), &BlobRequest::default()).await.unwrap();
    assert_eq!((stream.total(), stream.len(), stream.ignores_ranges()), (Some(5000), Some(5000), false));
    assert_eq!(stream.read(5000).await.unwrap(), sample(5000));
    let stream = registry.client().blob("r", &name(), &BlobRequest::default()).await.unwrap();
    assert!(stream.read(4999).await.is_err());
}
