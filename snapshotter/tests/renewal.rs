//! The pull credential expires while containers live: the next cold read finds the current one.

#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

#[expect(dead_code, reason = "each test file uses a part of the bed")]
#[path = "bed/bed.rs"]
mod bed;
#[expect(dead_code, reason = "each test file uses a part of it")]
#[path = "bed/golden.rs"]
mod golden;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_RANGE, RANGE, WWW_AUTHENTICATE};
use axum::response::Response;
use base64::Engine as _;
use bed::{Bed, labels, mounted};
use golden::{Golden, pull_as};

/// A registry with tokens; both passwords and tokens are good until the next is current.
#[derive(Clone)]
struct Registry {
    host: String,
    current: Arc<AtomicUsize>,
    blobs: PathBuf,
}

fn auth(number: usize) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("puller:{}", password(number)))
}

fn password(number: usize) -> String {
    format!("pass-word-{number}")
}

impl Registry {
    async fn start(blobs: PathBuf) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let host = listener.local_addr().expect("bound").to_string();
        let registry = Self { host, current: Arc::new(AtomicUsize::new(1)), blobs };
        let router = Router::new().fallback(answer).with_state(registry.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        registry
    }

    fn image(&self) -> String {
        format!("{}/team/golden:1", self.host)
    }

    fn template(&self) -> String {
        // Small requests, so that most of the image stays cold.
        r#"{"device":{"backend":{"type":"registry","config":{"scheme":"http"}},"cache":{"type":"blobcache","config":{}}},
            "mode":"direct","digest_validate":false,"enable_xattr":true,"amplify_io":4096,"read_deadline":20}"#
            .to_owned()
    }

    fn docker_config(&self, number: usize) -> String {
        format!(r#"{{"auths":{{"{}":{{"auth":"{}"}}}}}}"#, self.host, auth(number))
    }
}

async fn answer(State(registry): State<Registry>, request: Request) -> Response {
    let shown = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let current = registry.current.load(SeqCst);
    let reply = Response::builder();
    let path = request.uri().path();
    if path == "/token" {
        let right = shown == format!("Basic {}", auth(current));
        let body = if right { format!(r#"{{"token":"token-{current}","expires_in":300}}"#) } else { "{}".to_owned() };
        return reply.status(if right { 200 } else { 401 }).body(Body::from(body)).expect("a reply");
    }
    if shown != format!("Bearer token-{current}") {
        let challenge = format!(
            r#"Bearer realm="http://{}/token",service="golden",scope="repository:team/golden:pull""#,
            registry.host
        );
        return reply.status(401).header(WWW_AUTHENTICATE, challenge).body(Body::empty()).expect("a reply");
    }
    let Some(bytes) = path.rsplit_once("sha256:").and_then(|(_, blob)| fs::read(registry.blobs.join(blob)).ok()) else {
        return reply.status(404).body(Body::empty()).expect("a reply");
    };
    let range = request.headers().get(RANGE).and_then(|value| value.to_str().ok()?.strip_prefix("bytes="));
    let Some((first, last)) = range.and_then(|range| range.split_once('-')) else {
        return reply.body(Body::from(bytes)).expect("a reply");
    };
    let (first, last): (usize, usize) = (first.parse().expect("a number"), last.parse().expect("a number"));
    let last = last.min(bytes.len() - 1);
    reply
        .status(206)
        .header(CONTENT_RANGE, format!("bytes {first}-{last}/{}", bytes.len()))
        .body(Body::from(bytes[first..=last].to_vec()))
        .expect("a reply")
}

/// Regular files below `at` that are larger than a chunk's worth of neighbours, each with other chunks.
fn files(at: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![at.to_path_buf()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory).expect("read").flatten() {
            let kind = entry.file_type().expect("told");
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if kind.is_file() && entry.metadata().expect("told").len() > 0 {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

/// Reads files in order until one fails; returns how many could be read.
fn readable(files: &[PathBuf]) -> usize {
    files.iter().take_while(|file| fs::read(file).is_ok()).count()
}

async fn off_the_runtime<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(act).await.expect("no panic")
}

/// A bed whose user is logged in with the first password, unless this machine cannot.
async fn ready(flags: &[&str]) -> Option<(Bed, Golden, Registry)> {
    let nydusd = bed::nydusd()?;
    let golden = Golden::unpack()?;
    let registry = Registry::start(golden.blobs()).await;
    let bed = Bed::new(&nydusd, &registry.template(), flags).await;
    let docker = bed.dir.path().join("docker");
    fs::create_dir(&docker).expect("made");
    fs::write(docker.join("config.json"), registry.docker_config(1)).expect("written");
    Some((bed, golden, registry))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_of_one_image_asks_for_its_image() {
    let Some((mut bed, golden, registry)) = ready(&["--daemon-mode", "dedicated"]).await else { return };
    let reference = registry.image();
    let named = [("containerd.io/snapshot/cri.image-ref", reference.as_str())];
    let image = pull_as(&mut bed, &golden, "one", &named).await;
    let at = mounted(&bed.prepare("c", &image, labels(&[])).await.expect("prepared"));
    registry.current.store(2, SeqCst);
    fs::write(bed.dir.path().join("docker/config.json"), registry.docker_config(2)).expect("written");
    let whole = at.path().to_path_buf();
    off_the_runtime(move || golden.compare(&whole)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_outlives_the_credential_that_it_was_made_with() {
    let Some((mut bed, golden, registry)) = ready(&[]).await else { return };
    let docker = bed.dir.path().join("docker");
    let reference = registry.image();
    let named = [("containerd.io/snapshot/cri.image-ref", reference.as_str())];
    let image = pull_as(&mut bed, &golden, "one", &named).await;
    let at = mounted(&bed.prepare("c", &image, labels(&[])).await.expect("prepared"));
    let all = files(at.path());
    assert!(fs::read(&all[0]).is_ok(), "the first credential is good");

    // Revoked, and not replaced yet: an error, once per read, and none that is remembered.
    registry.current.store(2, SeqCst);
    let waiting = all.clone();
    let begun = Instant::now();
    let before = off_the_runtime(move || readable(&waiting)).await;
    assert!(before < all.len(), "everything was read with a revoked credential");
    assert!(begun.elapsed() < Duration::from_secs(20), "a refusal is told at once");
    assert!(bed.log().contains("log in again"), "nobody is told what to do:\n{}", bed.log());

    // Replaced where docker keeps it: the same mount reads on.
    fs::write(docker.join("config.json"), registry.docker_config(2)).expect("written");
    let (cold, rest) = (all[before].clone(), all[before..].to_vec());
    assert!(off_the_runtime(move || fs::read(cold).is_ok()).await, "the current credential is not used");
    let config = bed.root().join("config/shared/3/config.json");
    assert!(
        fs::read_to_string(&config).expect("read").contains(&auth(2)),
        "a restarted nydusd would begin with the old"
    );
    assert_eq!(config.metadata().expect("told").permissions().mode() & 0o777, 0o600);

    // Revoked again, and another pull of the repository brings a new one in its labels.
    registry.current.store(3, SeqCst);
    let waiting = rest.clone();
    let again = off_the_runtime(move || readable(&waiting)).await;
    assert!(again < rest.len(), "nothing was cold any more");
    let secret = password(3);
    let pulled = [
        ("containerd.io/snapshot/cri.image-ref", reference.as_str()),
        ("containerd.io/snapshot.ref", "sha256:other"),
        ("containerd.io/snapshot/pullusername", "puller"),
        ("containerd.io/snapshot/pullsecret", &secret),
    ];
    bed.prepare("two/extract", "", labels(&pulled)).await.expect("prepared");
    let whole = at.path().to_path_buf();
    off_the_runtime(move || golden.compare(&whole)).await;

    let own = bed.root().join("socket/own.sock");
    assert_eq!(own.metadata().expect("bound").permissions().mode() & 0o077, 0, "only root may ask for credentials");
    let daemon = fs::read_to_string(bed.root().join("logs/shared/nydusd.log")).expect("read");
    for secret in (1..=3).flat_map(|number| [password(number), auth(number), format!("token-{number}")]) {
        assert!(!bed.log().contains(&secret) && !daemon.contains(&secret), "a secret is in a log");
    }
}
