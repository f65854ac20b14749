use proptest::prelude::*;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::api::Client;
use crate::daemon::Settings;
use crate::fuse::filesystem::Mode;
use crate::fuse::session;
use crate::log::LevelControl;

fn daemon() -> Daemon {
    let settings = Settings {
        id: None,
        supervisor: None,
        backend_source: None,
        session: session::Options { mountpoint: PathBuf::from("/nonexistent"), threads: 1, mode: Mode::Shared },
        log: LevelControl::none(),
    };
    Daemon::new(settings, tokio::runtime::Handle::current())
}

async fn call(daemon: &Daemon, method: &str, uri: &str, body: &str) -> (u16, String) {
    let request = Request::builder().method(method).uri(uri).body(Body::from(body.to_owned())).unwrap();
    let response = answer(State(daemon.clone()), request).await;
    assert_eq!(response.headers()["server"], "Nydus API");
    let status = response.status().as_u16();
    let body = to_bytes(response.into_body(), usize::MAX).await.unwrap();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn refusals_have_the_known_statuses_and_texts() {
    let daemon = daemon();
    let mount = r#"{"fs_type":"rafs","source":"/nonexistent/boot","config":"{\"device\":{\"backend\":{\"type\":\"localfs\",\"config\":{\"dir\":\"/nonexistent\"}},\"cache\":{\"type\":\"blobcache\",\"config\":{\"work_dir\":\"WORK\"}}},\"mode\":\"direct\"}"}"#;
    let dir = tempfile::tempdir().unwrap();
    let mount = mount.replace("WORK", dir.path().to_str().unwrap());
    let missing = r#"QueryString("'mountpoint' should be specified in query string")"#;
    for (method, uri, body, status, message) in [
        ("GET", "/nowhere", "", 404, "NoRoute"),
        ("POST", "/api/v1/daemon", "", 400, "BadRequest"),
        ("GET", "/api/v1/daemon", "x", 400, "BadRequest"),
        ("PUT", "/api/v1/daemon", "", 400, "BadRequest"),
        ("PUT", "/api/v1/daemon/start", "{}", 400, "BadRequest"),
        ("POST", "/api/v1/mount", &mount, 400, missing),
        ("DELETE", "/api/v1/mount", "", 400, missing),
        ("GET", "/api/v1/daemon/backend", "", 400, missing),
        (
            "POST",
            "/api/v1/mount?mountpoint=/m",
            r#"{"fs_type":"rafs","source":"/s"}"#,
            400,
            r#"ParseBody(Error("missing field `config`", line: 1, column: 32))"#,
        ),
        (
            "POST",
            "/api/v1/mount?mountpoint=/m",
            r#"{"fs_type":"zzz","source":"/s","config":""}"#,
            500,
            r#"Mount(MountFilesystem(Other("invalid argument `only 'rafs' and 'passthrough_fs' are supported, but zzz was specified`")))"#,
        ),
        (
            "POST",
            "/api/v1/mount?mountpoint=/m",
            &mount,
            500,
            "Mount(MountFilesystem(Other(\"RAFS failed to handle request, Failed to fill superBlock: No such file or \
             directory (os error 2) (/nonexistent/boot)`\")))",
        ),
        (
            "DELETE",
            "/api/v1/mount?mountpoint=/m",
            "",
            500,
            r#"Mount(MountFilesystem(Other("object or filesystem doesn't exist")))"#,
        ),
        (
            "PUT",
            "/api/v1/mount?mountpoint=/m",
            &mount,
            500,
            r#"Mount(MountFilesystem(Other("object or filesystem doesn't exist")))"#,
        ),
        ("GET", "/api/v1/metrics", "", 404, "GlobalMetrics(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/metrics?id=/x", "", 404, "GlobalMetrics(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/metrics/files", "", 404, "FsFilesMetrics(Metrics(Stats(NoCounter)))"),
        ("GET", "/api/v1/metrics/blobcache", "", 404, "BlobcacheMetrics(Metrics(Stats(NoCounter)))"),
        ("PUT", "/api/v1/daemon", r#"{"log_level":"loud"}"#, 500, "Configure(ResponsePayloadType)"),
        ("PUT", "/api/v1/daemon/start", "", 400, r#"Configure(DaemonAbnormal(UnexpectedEvent("Start")))"#),
        ("PUT", "/api/v1/daemon/fuse/sendfd", "", 503, "Upgrade(DaemonAbnormal(NotReady))"),
        ("PUT", "/api/v1/daemon/fuse/takeover", "", 501, "Upgrade(DaemonAbnormal(Unsupported))"),
        ("PUT", "/api/v1/config?id=/x", r#"{"registry_auth":"x"}"#, 500, "Configure(ResponsePayloadType)"),
        ("GET", "/api/v2/blobs", "", 400, "BadRequest"),
        ("PUT", "/api/v2/blobs", "{}", 501, "BlobObjects(DaemonAbnormal(Unsupported))"),
    ] {
        let (got, body) = call(&daemon, method, uri, body).await;
        let error: ErrorBody = serde_json::from_str(&body).unwrap();
        assert_eq!((got, error.message.as_str()), (status, message), "{method} {uri}");
        assert_eq!(error.code, "UNDEFINED");
    }
}

#[tokio::test]
async fn answers_have_the_known_keys() {
    let daemon = daemon();
    let (status, body) = call(&daemon, "GET", "/api/v1/daemon", "").await;
    assert_eq!(status, 200);
    let keys =
        ["version", "id", "supervisor", "state", "backend_collection"].map(|key| body.find(&format!("\"{key}\":")));
    assert!(keys.iter().all(Option::is_some) && keys.is_sorted(), "{body}");
    let info: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(info["state"], "INIT");
    assert!(info["backend_collection"].is_null());
    assert_eq!(call(&daemon, "GET", "/api/v1/metrics/inflight", "").await, (204, String::new()));
    assert_eq!(call(&daemon, "PUT", "/api/v1/daemon", r#"{"log_level":"Debug"}"#).await, (204, String::new()));
    let (status, body) = call(&daemon, "GET", "/api/v1/daemon/events", "").await;
    insta::assert_snapshot!("events", format!("{status} {body}"));
    assert_eq!(call(&daemon, "GET", "/api/v1/config", "").await, (200, "{}".to_owned()));
    let all = serde_json::to_string_pretty(&(
        crate::api::types::FsMetrics::default(),
        crate::api::types::BackendMetrics::default(),
        crate::api::types::CacheMetrics::default(),
        crate::api::types::AccessPattern::default(),
        crate::api::types::Inflight::default(),
        crate::api::types::FileMetrics::default(),
    ));
    insta::assert_snapshot!("metrics", all.unwrap());
}

#[tokio::test]
async fn a_body_that_is_too_long_is_refused() {
    let (status, body) = call(&daemon(), "POST", "/api/v1/mount?mountpoint=/m", &"x".repeat(MAX_BODY + 1)).await;
    assert_eq!(status, 400);
    assert!(body.contains("UNDEFINED"), "{body}");
}

#[tokio::test]
async fn the_exit_call_asks_for_an_end_that_leaves_the_mount() {
    let daemon = daemon();
    assert_eq!(call(&daemon, "PUT", "/api/v1/daemon/exit", "").await.0, 204);
    assert!(daemon.ending().is_cancelled());
}

#[test]
fn queries_are_decoded() {
    let got = query("mountpoint=/a%20b&id=x+y&flag");
    assert_eq!((got["mountpoint"].as_str(), got["id"].as_str(), got["flag"].as_str()), ("/a b", "x y", ""));
    assert_eq!(query("a=%zz%4")["a"], "%zz%4");
}

/// A served socket, below a folder that goes with it.
fn served() -> (tempfile::TempDir, PathBuf, Api) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let api = serve(&path, daemon()).unwrap();
    (dir, path, api)
}

/// Sends `bytes` and returns what is answered until the connection ends.
async fn send(path: &Path, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(path).await.unwrap();
    // The daemon may have heard enough before it has heard all.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn clients_that_stop_in_the_middle_are_cut_off_and_keep_nobody_from_being_answered() {
    let (_dir, path, api) = served();
    let halves: [&[u8]; 4] = [
        b"",
        b"GET /api/v1/dae",
        b"GET /api/v1/daemon HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /api/v1/mount?mountpoint=/m HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    ];
    // More than there may be connections: the last ones wait for the first to be cut off.
    let slow: Vec<_> = (0..300)
        .map(|at| {
            let path = path.clone();
            tokio::spawn(async move { send(&path, halves[at % halves.len()]).await })
        })
        .collect();
    let client = Client::new(&path).with_timeout(Duration::from_secs(20));
    client.info().await.unwrap();
    for slow in slow {
        let answer =
            tokio::time::timeout(Duration::from_secs(25), slow).await.expect("a slow client was kept").unwrap();
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 408"),
            "{answer}"
        );
    }
    api.close().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn bodies_without_end_and_noise_are_refused_and_the_next_call_is_answered() {
    let (_dir, path, _api) = served();
    let client = Client::new(&path).with_timeout(Duration::from_secs(5));
    let mut endless = b"PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n".to_vec();
    endless.resize(4 << 20, b' ');
    let chunked = b"PUT /api/v1/daemon HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nx".to_vec();
    let long_head = [b"GET /".to_vec(), vec![b'a'; 1 << 20]].concat();
    let many_headers = [b"GET / HTTP/1.1\r\n".to_vec(), b"A: b\r\n".repeat(5000), b"\r\n".to_vec()].concat();
    for bytes in [endless, [chunked, vec![b'x'; 1 << 20]].concat(), long_head, many_headers, vec![0; 4096]] {
        let answer = tokio::time::timeout(Duration::from_secs(5), send(&path, &bytes)).await.expect("it ends");
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
        client.info().await.unwrap();
    }
}

#[tokio::test]
async fn only_a_socket_is_taken_out_of_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "kept").unwrap();
    let error = format!("{:#}", serve(&path, daemon()).unwrap_err());
    assert!(error.contains("precious") && error.contains("--apisock"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "kept");
    let socket = dir.path().join("socket");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    serve(&socket, daemon()).unwrap().close().await;
}

#[tokio::test]
async fn a_pipe_is_no_bootstrap_and_keeps_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let config = serde_json::json!({"device": {"backend": {"type": "localfs", "config": {"dir": "/nonexistent"}},
        "cache": {"type": "blobcache", "config": {"work_dir": dir.path()}}}, "mode": "direct"});
    let body = serde_json::to_string(&MountRequest::rafs(pipe.to_str().unwrap(), config.to_string())).unwrap();
    let began = std::time::Instant::now();
    let (status, answer) = call(&daemon(), "POST", "/api/v1/mount?mountpoint=/m", &body).await;
    assert!(status == 500 && answer.contains("not a regular file"), "{status} {answer}");
    assert!(began.elapsed() < PATIENCE);
}

proptest! {
    #[test]
    fn no_call_makes_the_reader_panic(
        method in prop::sample::select(vec!["GET", "PUT", "POST", "DELETE", "HEAD", "PATCH"]),
        path in prop::sample::select(vec![
            "/api/v1/daemon", "/api/v2/daemon", "/api/v1/daemon/exit", "/api/v1/mount", "/api/v1/config", "/api/v2/blobs",
            "/api/v1/metrics/files", "/x",
        ]),
        text in "(mountpoint|id|latest)?[=&%]?\\PC{0,40}",
        body in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "[{}\\[\\]:,\"a-z0-9_ ]{0,200}".prop_map(String::into_bytes),
            "\\{\"(log_level|fs_type|source|config)\":[\"{}a-z0-9]{0,40}\\}".prop_map(String::into_bytes),
        ],
    ) {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        if let Err(refusal) = Call::read(&method, path, &query(&text), &body) {
            prop_assert!(refusal.status.is_client_error() && !refusal.message.is_empty());
        }
    }
}
