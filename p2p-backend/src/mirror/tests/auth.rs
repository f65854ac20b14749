//! Who gets what.

use std::sync::atomic::Ordering;

use super::origin::{CHALLENGE, Mode};
use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_private_blob_is_for_those_alone_whom_the_registry_lets_in() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(2 * MIB, 10);
    let path = origin.blob("private/x", &content);
    let digest = path.rsplit('/').next().unwrap();
    origin.only("private/x", "Bearer good");
    origin.only("own/y", "Bearer other");
    let node = Node::start(dir.path(), &origin, "").await;

    let (status, headers, _) = tell(node.get(&path)).await;
    assert_eq!(status, 401);
    assert_eq!(headers["www-authenticate"], CHALLENGE, "the challenge is passed on as it is");
    assert!(!headers.contains_key("x-dragonfly-error-type"), "it is the registry's answer, not our trouble");
    let (status, _, body) = tell(node.get(&path).header("Authorization", "Bearer good")).await;
    assert!(status == 200 && body == content);
    node.until("nydus_p2p_finished_blobs_total", 1).await;
    let served = node.metric("nydus_p2p_served_bytes_total").await;

    let own = format!("/v2/own/y/blobs/{digest}");
    let open = format!("/v2/open/z/blobs/{digest}");
    for (path, authorization, wanted) in [
        (&path, None, 401),
        (&path, Some("Bearer bad"), 401),
        (&path, Some("Bearer other"), 401),
        (&path, Some("Basic Z29vZA=="), 401),
        (&own, Some("Bearer other"), 404),
        (&own, Some("Bearer good"), 401),
        (&open, None, 404),
        (&open, Some("Bearer good"), 404),
    ] {
        for range in [None, Some("bytes=0-9")] {
            for method in [Method::GET, Method::HEAD] {
                let mut request = node.request(method, path);
                if let Some(authorization) = authorization {
                    request = request.header("Authorization", authorization);
                }
                if let Some(range) = range {
                    request = request.header("Range", range);
                }
                let (status, _, body) = tell(request).await;
                assert_eq!(status, wanted, "{path} as {authorization:?}");
                assert!(!body.windows(8).any(|window| content.windows(8).take(64).any(|known| known == window)));
            }
        }
    }
    assert_eq!(node.metric("nydus_p2p_served_bytes_total").await, served, "not a byte went out");

    let sent = origin.sent.load(Ordering::SeqCst);
    let (status, _, body) = tell(node.get(&path).header("Authorization", "Bearer good")).await;
    assert!(status == 200 && body == content);
    assert_eq!(origin.sent.load(Ordering::SeqCst), sent, "who may, gets it from the cache");

    origin.set(Mode::Status(503));
    let (status, _, body) = tell(node.get(&path).header("Authorization", "Bearer good")).await;
    assert!(status == 200 && body == content, "a known grant outlives the registry");
    let (status, headers, _) = tell(node.get(&path).header("Authorization", "Bearer new")).await;
    assert_eq!(status, 503, "whom nobody can vouch for is refused");
    assert_eq!(headers["x-dragonfly-error-type"], "proxy");
    origin.set(Mode::Status(429));
    let (status, headers, _) = tell(node.get(&path).header("Authorization", "Bearer new")).await;
    assert_eq!((status, headers["retry-after"].to_str().unwrap()), (429, "7"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_anybody_may_read_costs_the_next_caller_no_question() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let path = origin.blob("open", b"for all");
    let node = Node::start(dir.path(), &origin, "").await;
    assert_eq!(node.whole(&path).await, b"for all");
    let before = origin.seen().len();
    let (status, _, body) = tell(node.get(&path).header("Authorization", "Bearer anything")).await;
    assert_eq!((status, &body[..]), (200, &b"for all"[..]));
    assert_eq!(origin.seen().len(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_goes_to_its_registry_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let (origin, other) = (Origin::start().await, Origin::start().await);
    let content = noise(3 * MIB, 11);
    let path = origin.blob("private", &content);
    other.blob("private", &content);
    origin.only("private", "Bearer good");
    origin.set(Mode::Elsewhere(format!("http://{}", other.address)));
    let node = Node::start(dir.path(), &origin, "").await;
    for range in ["bytes=0-9", "bytes=2097152-2097160"] {
        let (status, _, _) = tell(node.get(&path).header("Authorization", "Bearer good").header("Range", range)).await;
        assert_eq!(status, 206);
    }
    assert!(other.seen().iter().all(|seen| seen.authorization.is_none()));
    assert_eq!(origin.seen().len(), 1, "the second piece was asked where the first was found: {:?}", origin.seen());
    // The place dies; the registry is asked again.
    other.set(Mode::Status(403));
    origin.set(Mode::Plain);
    let request = node.get(&path).header("Authorization", "Bearer good").header("Range", "bytes=1048576-1048580");
    assert_eq!(tell(request).await.2, content[MIB..MIB + 5]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_starts_while_the_registry_is_down_serves_those_whom_it_let_in_before() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(2 * MIB, 12);
    let (private, open) = (origin.blob("private", &content), origin.blob("open", &content));
    origin.only("private", "Bearer good");
    let get = async |node: &Node, path: &str, token: &str| {
        let (status, _, body) = tell(node.get(path).header("Authorization", token)).await;
        (status, body == content)
    };
    let node = Node::start(dir.path(), &origin, "").await;
    assert_eq!(get(&node, &private, "Bearer good").await, (200, true));
    assert!(node.whole(&open).await == content);
    node.stop().await;
    origin.set(Mode::Status(503));
    let node = Node::start(dir.path(), &origin, "").await;
    assert_eq!(get(&node, &private, "Bearer good").await, (200, true));
    assert_eq!(get(&node, &open, "Bearer any").await, (200, true));
    assert_eq!(get(&node, &private, "Bearer other").await, (503, false), "whom nobody can vouch for is refused");
    // The registry is back and has changed its mind: its word counts, not what was written down.
    origin.set(Mode::Plain);
    origin.only("private", "Bearer new");
    assert_eq!(get(&node, &private, "Bearer good").await, (401, false));
}

/// A node that lends `puller` with the password `pass`.
async fn lender(dir: &Path, origin: &Arc<Origin>) -> Node {
    let password = dir.join("password");
    std::fs::write(&password, "pass\n").unwrap();
    let mut config = config(&dir.join("data"), &[origin], "");
    for registry in &mut config.registries {
        registry.lend = Some(config::Account { username: "puller".into(), password_file: password.clone() });
    }
    Node::with(config, origin.name()).await
}

/// `puller:pass`.
const PULLER: &str = "Basic cHVsbGVyOnBhc3M=";

#[tokio::test(flavor = "multi_thread")]
async fn a_lent_account_is_used_for_callers_without_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let path = origin.blob("private", b"secret thing");
    origin.only("private", PULLER);
    origin.challenge("Basic realm=\"r\"");
    let node = lender(dir.path(), &origin).await;
    assert_eq!(node.whole(&path).await, b"secret thing");
    let (status, ..) = tell(node.get(&path).header("Authorization", "Basic bad")).await;
    assert_eq!(status, 200, "who asks with a wrong name could have asked with none");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lent_account_gets_tokens_and_callers_with_their_own_are_told_the_challenge() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let (path, other) = (origin.blob("private", b"secret thing"), origin.blob("closed", b"other thing"));
    origin.only("private", "Bearer lent");
    origin.only("closed", "Bearer theirs");
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let noted = asked.clone();
    let service = Router::new().fallback(move |request: Request| {
        let proof = request.headers().get("authorization").map(|value| value.to_str().unwrap().to_owned());
        noted.lock().unwrap().push((request.uri().to_string(), proof));
        async { "{\"token\":\"lent\"}" }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let challenge = format!("Bearer realm=\"http://{}/t\",service=\"s\"", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, service).await });
    origin.challenge(&challenge);
    let node = lender(dir.path(), &origin).await;
    assert_eq!(node.whole(&path).await, b"secret thing");
    assert_eq!(*asked.lock().unwrap(), [("/t".to_owned(), Some(PULLER.to_owned()))]);
    let (status, headers, _) = tell(node.get(&other).header("Authorization", "Bearer wrong")).await;
    assert_eq!((status, headers["www-authenticate"].to_str().unwrap()), (401, &*challenge), "theirs is relayed");
    assert_eq!(asked.lock().unwrap().len(), 1, "and no token is got in their name");
}
