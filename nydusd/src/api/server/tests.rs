use serde_json::Value;

use super::*;
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
