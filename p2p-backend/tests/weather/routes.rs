//! Routes: mirrors that come and go, a registry that does the same, and readers who must not notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use nydus_backend::memory::{Fault, Memory};
use nydus_backend::{Avoid, Config, Credential, CredentialSource, Route, RouteOptions, SourceError, Urgency};
use nydus_rafs::BlobId;
use serde_json::{Value, json};

use crate::server::{How, Reply, Seen, Server, hasty, sample};

fn blob() -> BlobId {
    "b10b".parse().unwrap()
}

fn options() -> RouteOptions {
    RouteOptions {
        deadline: Duration::from_secs(20),
        mirror_limits: hasty(),
        registry_limits: hasty(),
        ..RouteOptions::default()
    }
}

fn impatient(millis: u64) -> RouteOptions {
    RouteOptions { deadline: Duration::from_millis(millis), ..options() }
}

fn route(origin: &str, mirrors: Value, options: RouteOptions) -> Route {
    let table = json!({"scheme": "http", "host": origin, "repo": "a/b", "mirrors": mirrors});
    Route::open(&Config::from_parts("registry", table).unwrap(), options).unwrap()
}

fn good(seen: &Seen) -> Reply {
    Reply::ranged(seen, &sample(1000))
}

async fn read(route: &Route) -> Result<bytes::Bytes, SourceError> {
    route.read(&blob(), 10..20, Urgency::Demand).await
}

fn expected() -> bytes::Bytes {
    sample(1000).slice(10..20)
}

#[tokio::test]
async fn a_mirror_is_asked_first_with_its_headers_and_ours() {
    let (origin, mirror) = (Server::start(good).await, Server::start(good).await);
    let mirrors = json!([{"host": mirror.url(""), "headers": {"X-Own": "1"}}]);
    let route = route(&origin.host(), mirrors, options());
    let served = route.read_from(&blob(), 10..20, Urgency::Demand, Avoid::Nothing).await.unwrap();
    assert_eq!((served.bytes, served.from_mirror), (expected(), true));
    assert_eq!(&*served.source, mirror.url(""));
    route.read(&blob(), 10..20, Urgency::Prefetch).await.unwrap();
    assert!(origin.seen().is_empty());
    let seen = mirror.seen();
    assert_eq!(seen[0].path(), "/v2/a/b/blobs/sha256:b10b");
    assert_eq!((seen[0].header("x-own"), seen[0].header("x-dragonfly-use-p2p")), ("1", "true"));
    assert_eq!(seen[0].header("x-dragonfly-registry"), origin.url(""));
    assert_eq!(seen[0].header("x-shoal-verifies"), "1");
    assert_eq!((seen[0].header("x-dragonfly-priority"), seen[1].header("x-dragonfly-priority")), ("6", "3"));
    let counts = route.counters().snapshot();
    assert_eq!((counts.reads, counts.errors, counts.from_mirrors, counts.from_origin), (2, 0, 20, 0));
}

#[tokio::test]
async fn whatever_a_mirror_answers_the_next_source_is_asked() {
    let replies = [
        Reply::new(500),
        Reply::new(503).header("X-Dragonfly-Error-Type", "proxy"),
        Reply::new(404),
        Reply::new(403),
        Reply::new(401),
        Reply::new(429).header("Retry-After", "3600"),
        Reply::new(416),
        Reply::new(200).header("Content-Type", "text/html").body("<html>"),
        Reply::new(206).header("Content-Range", "bytes 10-19/1000").body(expected()).how(How::Cut(3)),
        Reply::new(206).header("Content-Range", "bytes 10-19/1000").body(expected()).how(How::Stall(3)),
        Reply::new(200).how(How::Never),
        Reply::new(200).how(How::Slam),
    ];
    for reply in replies {
        let text = format!("{reply:?}");
        let origin = Server::start(good).await;
        let mirror = Server::start(move |_| reply.clone()).await;
        let route = route(&origin.host(), json!([{"host": mirror.url("")}]), options());
        let served = route.read_from(&blob(), 10..20, Urgency::Demand, Avoid::Nothing).await.unwrap();
        assert_eq!((served.bytes, served.from_mirror), (expected(), false), "{text}");
        assert_eq!(origin.count("/blobs/"), 1, "{text}");
    }
}

#[tokio::test]
async fn a_silent_mirror_costs_one_reader_and_is_asked_again_when_it_says_that_it_is_well() {
    let wedged = Arc::new(AtomicBool::new(true));
    let state = Arc::clone(&wedged);
    let mirror = Server::start(move |seen: &Seen| match state.load(SeqCst) {
        true => Reply::new(200).how(How::Never),
        false if seen.path() == "/healthy" => Reply::new(200),
        false => good(seen),
    })
    .await;
    let origin = Server::start(good).await;
    let mirrors = json!([{"host": mirror.url(""), "ping_url": mirror.url("/healthy"), "health_check_interval": 1}]);
    let route = route(&origin.host(), mirrors, options());
    for _ in 0..3 {
        assert_eq!(read(&route).await.unwrap(), expected());
    }
    assert_eq!(mirror.count("/blobs/"), 1);
    wedged.store(false, SeqCst);
    for _ in 0..200 {
        let served = route.read_from(&blob(), 10..20, Urgency::Demand, Avoid::Nothing).await.unwrap();
        if served.from_mirror {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the mirror was never asked again");
}

#[tokio::test]
async fn a_mirror_that_refuses_connections_is_skipped_after_its_limit() {
    let origin = Server::start(good).await;
    let nobody = Server::nobody().await;
    let mirrors = json!([{"host": format!("http://{nobody}"), "failure_limit": 2, "health_check_interval": 1}]);
    let route = route(&origin.host(), mirrors, options());
    for _ in 0..4 {
        read(&route).await.unwrap();
    }
    let counts = route.counters().snapshot();
    assert_eq!((counts.reads, counts.errors), (6, 2));
    // It comes up, and is found.
    let mirror = Server::start_at(nobody, good).await;
    for _ in 0..200 {
        read(&route).await.unwrap();
        if mirror.count("/blobs/") > 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the mirror was never asked again");
}

#[tokio::test]
async fn a_mirrors_challenge_is_answered_by_asking_the_token_service_directly() {
    let service = Server::start(|_| Reply::new(200).body(r#"{"token":"t"}"#)).await;
    let challenge = format!("Bearer realm=\"{}\",service=\"s\"", service.url("/token"));
    let mirror = Server::start(move |seen: &Seen| match seen.header("authorization") {
        "Bearer t" => good(seen),
        _ => Reply::new(401).header("WWW-Authenticate", challenge.clone()),
    })
    .await;
    let nobody = Server::nobody().await.to_string();
    let table = json!({"scheme": "http", "host": nobody, "repo": "a/b", "auth": "dTpw",
        "mirrors": [{"host": mirror.url(""), "auth_through": false}]});
    let route = Route::open(&Config::from_parts("registry", table).unwrap(), options()).unwrap();
    assert_eq!(read(&route).await.unwrap(), expected());
    assert_eq!((service.seen().len(), mirror.count("/token")), (1, 0));
    assert_eq!(service.seen()[0].header("authorization"), "Basic dTpw");
}

#[tokio::test]
async fn a_proxy_sees_plain_requests_and_is_gone_round() {
    let origin = Server::start(good).await;
    let proxy = Server::start(good).await;
    let table = json!({"scheme": "http", "host": origin.host(), "repo": "a/b",
        "proxy": {"url": proxy.url(""), "use_http": true}});
    let route = Route::open(&Config::from_parts("registry", table.clone()).unwrap(), options()).unwrap();
    assert_eq!(read(&route).await.unwrap(), expected());
    assert_eq!(proxy.seen()[0].target, origin.url("/v2/a/b/blobs/sha256:b10b"));
    assert!(origin.seen().is_empty());
    proxy.stop().await;
    assert_eq!(read(&route).await.unwrap(), expected());
    let mut alone = table;
    alone["proxy"]["fallback"] = json!(false);
    let route = Route::open(&Config::from_parts("registry", alone).unwrap(), impatient(700)).unwrap();
    assert!(read(&route).await.is_err());
    assert_eq!(origin.count("/blobs/"), 1);
}

#[tokio::test]
async fn a_registry_that_comes_back_in_time_is_never_noticed() {
    let address = Server::nobody().await;
    let route = route(&address.to_string(), json!([]), options());
    let reading = tokio::spawn({
        let route = route.clone();
        async move { read(&route).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let calls = AtomicUsize::new(0);
    let _server = Server::start_at(address, move |seen| match calls.fetch_add(1, SeqCst) {
        0 => Reply::new(503),
        1 => Reply::new(429).header("Retry-After", "1"),
        _ => good(seen),
    })
    .await;
    assert_eq!(reading.await.unwrap().unwrap(), expected());
}

#[tokio::test]
async fn a_read_ends_at_its_deadline_and_the_next_one_asks_again() {
    for how in [How::Never, How::Slam] {
        let broken = Arc::new(AtomicBool::new(true));
        let state = Arc::clone(&broken);
        let origin = Server::start(move |seen| match state.load(SeqCst) {
            true => Reply::new(200).how(how),
            false => good(seen),
        })
        .await;
        let route = route(&origin.host(), json!([]), impatient(900));
        let error = read(&route).await.unwrap_err();
        assert!(matches!(error, SourceError::Deadline { .. }), "{error}");
        let text = error.to_string();
        for part in [origin.host().as_str(), "a/b", "b10b", "; "] {
            assert!(text.contains(part), "{text}");
        }
        broken.store(false, SeqCst);
        assert_eq!(read(&route).await.unwrap(), expected());
    }
}

#[tokio::test]
async fn in_a_long_outage_reads_wait_a_short_time_and_notice_its_end() {
    let address = Server::nobody().await;
    let outage = Duration::from_millis(300);
    let options = RouteOptions { outage, outage_wait: Duration::from_millis(500), ..options() };
    let route = route(&address.to_string(), json!([]), options);
    // Enough failures to call the registry down.
    for _ in 0..2 {
        assert!(route.read(&blob(), 0..5, Urgency::Prefetch).await.is_err());
    }
    tokio::time::sleep(outage).await;
    let error = read(&route).await.unwrap_err();
    let SourceError::Deadline { after, .. } = error else { panic!("{error}") };
    assert!(after < Duration::from_secs(10), "the deadline is 20 s, and it waited {after:?}");
    let _server = Server::start_at(address, good).await;
    assert_eq!(read(&route).await.unwrap(), expected());
}

#[tokio::test]
async fn a_trickle_cannot_use_up_the_time_of_the_source_behind_it() {
    // Each byte comes within the stall time, the whole range never.
    let mirror = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = format!("http://{}", mirror.local_addr().unwrap());
    let trickle = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut stream, _) = mirror.accept().await.unwrap();
        // An answer before the request would be no answer.
        assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
        let head = "HTTP/1.1 206 x\r\nContent-Range: bytes 10-909/1000\r\nContent-Length: 900\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        while stream.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let origin = Server::start(good).await;
    let route = route(&origin.host(), json!([{"host": host}]), impatient(2000));
    let served = route.read_from(&blob(), 10..910, Urgency::Demand, Avoid::Nothing).await.unwrap();
    assert!(!served.from_mirror);
    trickle.abort();
}

#[tokio::test]
async fn a_wait_longer_than_the_deadline_is_not_begun() {
    let origin = Server::start(|_| Reply::new(429).header("Retry-After", "3600")).await;
    let route = route(&origin.host(), json!([]), options());
    let error = read(&route).await.unwrap_err();
    assert!(error.to_string().contains("429"), "{error}");
    assert_eq!(origin.seen().len(), 1);
}

#[tokio::test]
async fn the_registrys_word_about_a_blob_is_final_for_one_read() {
    let status = Arc::new(AtomicUsize::new(404));
    let state = Arc::clone(&status);
    let origin = Server::start(move |seen| match state.load(SeqCst) {
        200 => good(seen),
        status => Reply::new(u16::try_from(status).unwrap()),
    })
    .await;
    let route = route(&origin.host(), json!([]), options());
    assert!(read(&route).await.unwrap_err().is_missing());
    status.store(403, SeqCst);
    assert!(read(&route).await.unwrap_err().is_denied());
    assert_eq!(origin.seen().len(), 2);
    status.store(200, SeqCst);
    assert_eq!(read(&route).await.unwrap(), expected());
}

#[tokio::test]
async fn answers_without_sense_are_not_asked_for_until_the_deadline() {
    let origin = Server::start(|_| Reply::new(200).body(sample(15))).await;
    let route = route(&origin.host(), json!([]), options());
    let error = read(&route).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    assert_eq!(origin.seen().len(), 4);
}

#[tokio::test]
async fn a_new_credential_is_used_by_mirrors_and_registry_alike() {
    let guarded = |seen: &Seen| match seen.header("authorization") {
        "Basic dTpw" => good(seen),
        _ => Reply::new(401).header("WWW-Authenticate", "Basic"),
    };
    let (origin, mirror) = (Server::start(guarded).await, Server::start(guarded).await);
    let route = route(&origin.host(), json!([{"host": mirror.url("")}]), options());
    assert!(read(&route).await.unwrap_err().is_denied());
    route.set_credential(Credential::from_auth("dTpw").unwrap());
    let served = route.read_from(&blob(), 10..20, Urgency::Demand, Avoid::Nothing).await.unwrap();
    assert!(served.from_mirror);
}

/// A registry that believes one password at a time, `u:` and the number.
fn turning(believed: &Arc<AtomicUsize>) -> impl Fn(&Seen) -> Reply + Send + Sync + use<> {
    let believed = Arc::clone(believed);
    move |seen: &Seen| {
        let right = basic(believed.load(SeqCst)).basic_header().unwrap();
        if seen.header("authorization") == right {
            good(seen)
        } else {
            Reply::new(401).header("WWW-Authenticate", "Basic")
        }
    }
}

fn basic(number: usize) -> Credential {
    Credential::Basic { user: "u".into(), password: number.to_string() }
}

/// Options with a source that knows the password `known`, and counts how often it is asked.
fn renewing(known: &Arc<AtomicUsize>, asked: &Arc<AtomicUsize>) -> RouteOptions {
    let (known, asked) = (Arc::clone(known), Arc::clone(asked));
    let source = CredentialSource::new(move || {
        asked.fetch_add(1, SeqCst);
        let credential = basic(known.load(SeqCst));
        async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Ok(credential)
        }
    });
    RouteOptions { credential: Some(basic(1)), renewal: Some(source), ..options() }
}

#[tokio::test]
async fn a_refused_credential_is_replaced_by_the_current_one_within_the_same_read() {
    let [believed, known, asked] = [1, 1, 0].map(|number| Arc::new(AtomicUsize::new(number)));
    let (origin, mirror) = (Server::start(turning(&believed)).await, Server::start(turning(&believed)).await);
    let route = route(&origin.host(), json!([{"host": mirror.url("")}]), renewing(&known, &asked));
    assert_eq!(read(&route).await.unwrap(), expected());
    assert_eq!(asked.load(SeqCst), 0, "nobody is asked while the credential is good");
    believed.store(2, SeqCst);
    known.store(2, SeqCst);
    let readers = (0..20).map(|_| read(&route));
    for outcome in futures::future::join_all(readers).await {
        assert_eq!(outcome.unwrap(), expected());
    }
    assert_eq!(asked.load(SeqCst), 1, "readers that are refused together ask once");
}

#[tokio::test]
async fn a_refusal_stands_while_there_is_no_other_credential_and_nobody_asks_in_a_tight_loop() {
    let [believed, known, asked] = [2, 1, 0].map(|number| Arc::new(AtomicUsize::new(number)));
    let origin = Server::start(turning(&believed)).await;
    let route = route(&origin.host(), json!([]), renewing(&known, &asked));
    let begun = std::time::Instant::now();
    for round in 1..=2 {
        for outcome in futures::future::join_all((0..20).map(|_| read(&route))).await {
            assert!(outcome.unwrap_err().is_denied());
        }
        assert_eq!(asked.load(SeqCst), round);
    }
    assert!(begun.elapsed() >= Duration::from_secs(1), "two questions are a second apart");
    known.store(2, SeqCst);
    assert_eq!(read(&route).await.unwrap(), expected(), "the refusal was not remembered");
}

#[tokio::test]
async fn a_source_of_credentials_that_hangs_or_fails_costs_a_bounded_time() {
    let [believed, never] = [2, 0].map(|number| Arc::new(AtomicUsize::new(number)));
    let origin = Server::start(turning(&believed)).await;
    for hangs in [true, false] {
        let asked = Arc::clone(&never);
        let source = CredentialSource::new(move || {
            asked.fetch_add(1, SeqCst);
            async move {
                if hangs {
                    std::future::pending::<()>().await;
                }
                Err("the snapshotter is not there".to_owned())
            }
        });
        let options = RouteOptions { credential: Some(basic(1)), renewal: Some(source), ..impatient(1500) };
        let begun = std::time::Instant::now();
        assert!(read(&route(&origin.host(), json!([]), options)).await.unwrap_err().is_denied());
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    assert_eq!(never.load(SeqCst), 2);
}

#[tokio::test]
async fn a_read_that_must_avoid_mirrors_asks_the_registry_and_tells_mirrors_why() {
    let (origin, mirror) = (Server::start(good).await, Server::start(good).await);
    let route = route(&origin.host(), json!([{"host": mirror.url("")}]), options());
    let served = route.read_from(&blob(), 10..20, Urgency::Demand, Avoid::Mirrors).await.unwrap();
    assert!(!served.from_mirror);
    origin.stop().await;
    let served = route.read_from(&blob(), 10..20, Urgency::Demand, Avoid::Mirrors).await.unwrap();
    assert!(served.from_mirror);
    assert_eq!(mirror.seen()[0].header("cache-control"), "no-cache");
    assert_eq!(mirror.seen()[0].header("x-shoal-no-peer"), "1");
}

#[tokio::test]
async fn a_prefetch_gives_up_early_and_does_not_go_past_a_mirror_that_is_busy() {
    let origin = Server::start(|_| Reply::new(503)).await;
    let from = route(&origin.host(), json!([]), options());
    assert!(from.read(&blob(), 0..5, Urgency::Prefetch).await.is_err());
    assert_eq!(origin.seen().len(), 2);
    let mirror = Server::start(|_| Reply::new(429)).await;
    let origin = Server::start(good).await;
    let from = route(&origin.host(), json!([{"host": mirror.url("")}]), options());
    assert!(from.read(&blob(), 0..5, Urgency::Prefetch).await.is_err());
    assert!(origin.seen().is_empty());
    from.read(&blob(), 0..5, Urgency::Demand).await.unwrap();
}

#[tokio::test]
async fn a_host_that_ignores_ranges_is_pointed_out() {
    let origin = Server::start(|_| Reply::new(200).body(sample(1000))).await;
    let route = route(&origin.host(), json!([]), options());
    let served = route.read_from(&blob(), 10..20, Urgency::Demand, Avoid::Nothing).await.unwrap();
    assert_eq!((served.bytes, served.ignores_ranges), (expected(), true));
}

#[tokio::test]
async fn a_whole_blob_streams_from_every_kind_of_source() {
    let origin = Server::start(|_| Reply::new(200).body(sample(3_000_000))).await;
    let mirror = Server::start(|_| Reply::new(502)).await;
    let memory = Memory::new();
    memory.insert(blob(), sample(3_000_000));
    let by_registry = route(&origin.host(), json!([{"host": mirror.url("")}]), options());
    for route in [by_registry, Route::from(memory)] {
        let mut stream = route.stream(&blob(), Urgency::Demand).await.unwrap();
        assert_eq!(stream.size(), Some(3_000_000));
        let mut all = Vec::new();
        while let Some(piece) = stream.next().await.unwrap() {
            all.extend_from_slice(&piece);
        }
        assert_eq!(all, sample(3_000_000));
        assert_eq!(route.counters().snapshot().from_origin, 3_000_000);
    }
}

#[tokio::test]
async fn the_size_of_a_blob_goes_the_same_way() {
    let origin = Server::start(good).await;
    let mirror = Server::start(|_| Reply::new(500)).await;
    let route = route(&origin.host(), json!([{"host": mirror.url("")}]), options());
    assert_eq!(route.size(&blob()).await.unwrap(), 1000);
}

#[tokio::test]
async fn opening_a_route_connects_to_nobody_and_names_what_is_missing() {
    let origin = Server::start(good).await;
    drop(route(&origin.host(), json!([{"host": origin.url("")}]), options()));
    assert!(origin.seen().is_empty());
    for (table, part) in [
        (json!({"repo": "a"}), "`host`"),
        (json!({"host": "h"}), "`repo`"),
        (json!({"host": "h/x", "repo": "a"}), "`host`"),
        (json!({"host": "h", "repo": "a", "auth": "*"}), "`auth`"),
        (json!({"host": "h", "repo": "a", "mirrors": [{"host": "127.0.0.1:1"}]}), "mirrors[0]"),
        (json!({"host": "h", "repo": "a", "mirrors": [{"host": "http://m", "headers": {"a b": ""}}]}), "a b"),
        (json!({"host": "h", "repo": "a", "mirrors": [{"host": "http://m"}], "proxy": {"url": "http://p"}}), "both"),
        (json!({"host": "h", "repo": "a", "ca_cert_files": ["/nonexistent/ca"]}), "/nonexistent/ca"),
    ] {
        let config = Config::from_parts("registry", table).unwrap();
        let error = Route::open(&config, options()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn a_store_in_memory_keeps_deadlines_too() {
    let memory = Memory::new();
    memory.insert(blob(), sample(1000));
    let route = Route::memory(memory.clone(), impatient(100));
    memory.inject([Fault::Hang, Fault::Short(1), Fault::Fail]);
    assert!(matches!(read(&route).await, Err(SourceError::Deadline { .. })));
    assert!(matches!(read(&route).await, Err(SourceError::Outside { .. })));
    assert!(matches!(read(&route).await, Err(SourceError::Injected { .. })));
    assert_eq!(read(&route).await.unwrap(), expected());
    assert_eq!(route.size(&blob()).await.unwrap(), 1000);
}

#[tokio::test]
async fn each_way_to_fail_says_what_to_do() {
    let page = || Reply::new(200).header("Content-Type", "text/html").body("<html>");
    let service = Server::start(|_| Reply::new(503)).await;
    let challenge = format!("Bearer realm=\"{}\"", service.url("/token"));
    let answers: Vec<(Reply, &str)> = vec![
        (Reply::new(401), "check the credential"),
        (Reply::new(401).header("WWW-Authenticate", challenge), "check the token service"),
        (Reply::new(403), "check the credential"),
        (Reply::new(404), "check `repo`"),
        (Reply::new(410), "check `repo`"),
        (Reply::new(416), "push the image again"),
        (Reply::new(407), "HTTPS_PROXY"),
        (Reply::new(429).header("Retry-After", "3600"), "use a mirror"),
        (Reply::new(500), "log of the registry"),
        (page(), "login page"),
        (Reply::new(200).body(sample(15)), "push the image again"),
        (Reply::new(302).header("Location", "/v2/again"), "is that host a registry"),
        (Reply::new(200).how(How::Slam), "check the network"),
        (Reply::new(200).how(How::Never), "check its load"),
        (Reply::new(206).header("Content-Range", "bytes 10-19/1000").body(expected()).how(How::Stall(3)), "its load"),
    ];
    // One pool, because making them all at once takes longer than the limits of a loopback host.
    let second = Duration::from_secs(1);
    let limits = nydus_backend::http::Timeouts { connect: second, first_byte: second, stall: second };
    let options = RouteOptions { registry_limits: limits, ..impatient(4000) };
    let _held = route("127.0.0.1:9", json!([]), options.clone());
    let cases = answers.into_iter().map(async |(reply, advice)| {
        let text = format!("{reply:?}");
        let origin = Server::start(move |_| reply.clone()).await;
        let error = read(&route(&origin.host(), json!([]), options.clone())).await.unwrap_err().to_string();
        for part in [origin.host().as_str(), "repository a/b", "b10b", advice] {
            assert!(error.contains(part), "{text}: `{part}` is not in `{error}`");
        }
        assert!(!error.contains('\n'), "{error}");
    });
    futures::future::join_all(cases).await;
}

#[tokio::test]
async fn a_deadline_holds_however_many_sources_are_silent() {
    let mut silent = Vec::new();
    for _ in 0..6 {
        silent.push(Server::start(|_| Reply::new(200).how(How::Never)).await);
    }
    // The registry answers, and its token service does not.
    let challenge = format!("Bearer realm=\"{}\"", silent[5].url("/token"));
    let origin = Server::start(move |_| Reply::new(401).header("WWW-Authenticate", challenge.clone())).await;
    let mirrors: Vec<Value> = silent[..5].iter().map(|mirror| json!({"host": mirror.url("")})).collect();
    let limit = Duration::from_secs(60);
    let long = nydus_backend::http::Timeouts { connect: limit, first_byte: limit, stall: limit };
    let options = RouteOptions { mirror_limits: long, registry_limits: long, ..impatient(1500) };
    let error = read(&route(&origin.host(), Value::Array(mirrors), options)).await.unwrap_err();
    let SourceError::Deadline { after, .. } = error else { panic!("{error}") };
    assert!(after < Duration::from_secs(10), "the limits add up to 7 minutes, and it waited {after:?}");
}

/// Who says 429.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Busy {
    Registry,
    TokenService,
    Store,
}

/// Reads through a registry, its token service and its store, of which one is busy once.
async fn read_past(busy: Busy, wish: Option<&str>) -> Result<bytes::Bytes, SourceError> {
    let once = Arc::new(AtomicBool::new(true));
    let reply = wish.into_iter().fold(Reply::new(429), |reply, wish| reply.header("Retry-After", wish));
    let at = |place: Busy| {
        let (once, reply) = (Arc::clone(&once), reply.clone());
        move || (busy == place && once.swap(false, SeqCst)).then(|| reply.clone())
    };
    let (at_store, at_service, at_registry) = (at(Busy::Store), at(Busy::TokenService), at(Busy::Registry));
    let store = Server::start(move |seen| at_store().unwrap_or_else(|| good(seen))).await;
    let token = || Reply::new(200).body(r#"{"token":"t"}"#);
    let service = Server::start(move |_| at_service().unwrap_or_else(token)).await;
    let (challenge, target) = (format!("Bearer realm=\"{}\"", service.url("/t")), store.url("/x"));
    let origin = Server::start(move |seen| match seen.header("authorization") {
        "Bearer t" => at_registry().unwrap_or_else(|| Reply::new(307).header("Location", target.clone())),
        _ => Reply::new(401).header("WWW-Authenticate", challenge.clone()),
    })
    .await;
    read(&route(&origin.host(), json!([]), options())).await
}

#[tokio::test]
async fn whoever_asks_for_patience_gets_it_within_the_deadline_and_not_beyond() {
    let date = |seconds| httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(seconds));
    let (soon, late) = (date(2), date(3600));
    let mut cases = Vec::new();
    for busy in [Busy::Registry, Busy::TokenService, Busy::Store] {
        for (wish, comes) in [(None, true), (Some("1"), true), (Some(&*soon), true), (Some(&*late), false)] {
            cases.push(async move { (busy, wish, comes, read_past(busy, wish).await) });
        }
    }
    for (busy, wish, comes, outcome) in futures::future::join_all(cases).await {
        match outcome {
            Ok(bytes) => assert!(comes && bytes == expected(), "{busy:?} {wish:?}"),
            Err(error) => assert!(!comes && error.to_string().contains("429"), "{busy:?} {wish:?}: {error}"),
        }
    }
}
