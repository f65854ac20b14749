//! The mirror as its callers see it: a real one, between a real client and registries that misbehave on demand.

mod auth;
mod disk;
mod origin;
mod ranges;
mod upstreams;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method};
use tokio::task::JoinHandle;

use super::*;
use origin::{Mode, Origin};

const MIB: usize = 1 << 20;

/// Returns `size` bytes that are different for every `seed` and have no period.
fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; size];
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes());
    hash.finalize_xof().fill(&mut bytes);
    bytes
}

/// A mirror with its own data directory.
struct Node {
    at: SocketAddr,
    metrics: SocketAddr,
    health: SocketAddr,
    registry: String,
    quit: CancellationToken,
    running: JoinHandle<()>,
    client: reqwest::Client,
}

fn config(dir: &Path, origins: &[&Arc<Origin>], more: &str) -> Config {
    let mut text = format!(
        "listen = \"127.0.0.1:0\"\nhealth_listen = \"127.0.0.1:0\"\nmetrics_listen = \"127.0.0.1:0\"\ndata_dir = \"{}\"\n{more}\n",
        dir.display()
    );
    for origin in origins {
        text += &format!("[[registry]]\nname = \"{0}\"\nurl = \"http://{0}\"\n", origin.name());
    }
    Config::parse(&text, Path::new("test")).unwrap().checked().unwrap()
}

impl Node {
    async fn start(dir: &Path, origin: &Arc<Origin>, more: &str) -> Self {
        Self::with(config(dir, &[origin], more), origin.name()).await
    }

    async fn with(config: Config, registry: String) -> Self {
        let mut tries = 0..500;
        let mirror = loop {
            match Mirror::open(config.clone()).await {
                Ok(mirror) => break mirror,
                // The one before may still be letting go; a process would have ended.
                Err(MirrorError::Store(StoreError::Taken { .. })) if tries.next().is_some() => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        let [at, health, metrics] = mirror.addresses().map(Option::unwrap);
        let quit = CancellationToken::new();
        let running = tokio::spawn(mirror.run(quit.clone()));
        Self {
            at,
            metrics,
            health,
            registry,
            quit,
            running,
            client: reqwest::Client::builder().no_proxy().build().unwrap(),
        }
    }

    /// Stops as SIGTERM does; the data directory can be opened again then.
    async fn stop(self) {
        self.quit.cancel();
        drop(self.client);
        self.running.await.unwrap();
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client
            .request(method, format!("http://{}{path}", self.at))
            .header("X-Dragonfly-Registry", format!("http://{}", self.registry))
    }

    fn get(&self, path: &str) -> reqwest::RequestBuilder {
        self.request(Method::GET, path)
    }

    /// Reads the whole, which must be there.
    async fn whole(&self, path: &str) -> Vec<u8> {
        let answer = self.get(path).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
        answer.bytes().await.unwrap().to_vec()
    }

    async fn part(&self, path: &str, range: &str) -> (u16, HeaderMap, Vec<u8>) {
        tell(self.get(path).header("Range", range)).await
    }

    async fn metric(&self, name: &str) -> u64 {
        let text =
            self.client.get(format!("http://{}/metrics", self.metrics)).send().await.unwrap().text().await.unwrap();
        let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    }

    /// Waits until a metric has a value.
    async fn until(&self, name: &str, value: u64) {
        for _ in 0..1000 {
            if self.metric(name).await == value {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{name} is {}, not {value}", self.metric(name).await);
    }
}

async fn tell(request: reqwest::RequestBuilder) -> (u16, HeaderMap, Vec<u8>) {
    let answer = request.send().await.unwrap();
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    (status, headers, answer.bytes().await.unwrap().to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_callers_at_once_cost_each_piece_one_request() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = Arc::new(noise(11 * MIB + 77, 1));
    let path = origin.blob("a/b", &content);
    origin.set(Mode::Gated);
    let node = Arc::new(Node::start(dir.path(), &origin, "").await);
    let callers: Vec<_> = (0..50_usize)
        .map(|caller| {
            let (node, path, content) = (node.clone(), path.clone(), content.clone());
            tokio::spawn(async move {
                let start = caller * 200_000;
                let end = (start + (1 + caller % 5) * MIB).min(content.len());
                let (status, _, bytes) = if caller % 7 == 0 {
                    tell(node.get(&path)).await
                } else {
                    node.part(&path, &format!("bytes={start}-{}", end - 1)).await
                };
                let wanted = if status == 200 { &content[..] } else { &content[start..end] };
                assert!(bytes == wanted, "caller {caller}: {} bytes", bytes.len());
            })
        })
        .collect();
    while origin.bodies.load(std::sync::atomic::Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    origin.open_gate();
    for caller in callers {
        caller.await.unwrap();
    }
    let mut gets = origin.gets();
    gets.sort_unstable();
    let mut next = 0;
    for (first, last) in gets {
        assert_eq!(first, next, "pieces are asked for once, and all of them");
        next = last + 1;
    }
    assert_eq!(next, content.len() as u64);
    assert_eq!(origin.count(&Method::HEAD), 0, "the first request for bytes is the question about the right as well");
    node.until("nydus_p2p_finished_blobs_total", 1).await;
    assert!(node.metric("nydus_p2p_joins_total").await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_does_not_take_the_bytes_of_others_away() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(3 * MIB, 2);
    let path = origin.blob("a", &content);
    origin.set(Mode::Gated);
    let node = Arc::new(Node::start(dir.path(), &origin, "").await);
    let first = {
        let (node, path) = (node.clone(), path.clone());
        tokio::spawn(async move { node.whole(&path).await })
    };
    node.until("nydus_p2p_source_bytes_total{source=\"registry\"}", 64 << 10).await;
    let second = {
        let (node, path) = (node.clone(), path.clone());
        tokio::spawn(async move { node.whole(&path).await })
    };
    node.until("nydus_p2p_joins_total", 3).await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    origin.open_gate();
    assert!(second.await.unwrap() == content);
    assert_eq!(origin.gets().len(), 1, "the fetch of the one who left went on for the other");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_s_bytes_are_not_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(64 * MIB, 3);
    let path = origin.blob("a", &content);
    origin.set(Mode::Gated);
    let node = Node::start(dir.path(), &origin, "").await;
    let mut answer = node.get(&path).header("Range", "bytes=5-").send().await.unwrap();
    assert_eq!(answer.status(), 206);
    assert!(answer.chunk().await.unwrap().is_some());
    drop(answer);
    origin.open_gate();
    while origin.bodies.load(std::sync::atomic::Ordering::SeqCst) > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(origin.gets().len(), 1, "no further window is asked for");
    assert!(node.metric("nydus_p2p_disk_usage_bytes").await <= 8 * MIB as u64);
    // What was got is used by the next who asks.
    assert!(node.whole(&path).await == content);
    node.until("nydus_p2p_finished_blobs_total", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ranged_request_brings_the_whole_blob_if_so_configured() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(20 * MIB + 5, 4);
    let path = origin.blob("a", &content);
    let node = Node::start(dir.path(), &origin, "prefetch = true").await;
    let (status, _, bytes) = node.part(&path, "bytes=9000000-9000009").await;
    assert_eq!((status, &bytes[..]), (206, &content[9_000_000..9_000_010]));
    node.until("nydus_p2p_finished_blobs_total", 1).await;
    assert_eq!(node.metric("nydus_p2p_source_bytes_total{source=\"registry\"}").await, content.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_names_the_registry_in_the_query() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let path = origin.blob("a", b"hello");
    let node = Node::start(dir.path(), &origin, "").await;
    let url = |ns: &str| format!("http://{}{path}?ns={ns}", node.at);
    let answer = node.client.get(url(&origin.name())).send().await.unwrap();
    assert_eq!(answer.text().await.unwrap(), "hello");
    let (status, _, body) = tell(node.client.get(url("evil.example"))).await;
    let body = String::from_utf8(body).unwrap();
    assert!(status == 403 && body.contains("evil.example") && body.contains("[[registry]]"), "{status} {body}");
    let (status, _, _) = tell(node.client.get(format!("http://{}{path}", node.at))).await;
    assert_eq!(status, 400, "no registry named, no default");
    let (status, headers, _) = tell(node.request(Method::HEAD, &path)).await;
    assert_eq!((status, headers["content-length"].to_str().unwrap()), (200, "5"));
    assert_eq!(headers["docker-content-digest"].to_str().unwrap(), origin::sha256(b"hello"));
    let (status, ..) = tell(node.request(Method::PUT, &path)).await;
    assert_eq!(status, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_our_own_not_the_registry_s() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    origin.set(Mode::Status(500));
    let node = Node::start(dir.path(), &origin, "").await;
    let healthy =
        async || node.client.get(format!("http://{}/healthy", node.health)).send().await.unwrap().status().as_u16();
    assert_eq!(healthy().await, 200);
    std::fs::remove_dir_all(dir.path()).unwrap();
    assert_eq!(healthy().await, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_are_kept_by_digest_and_tags_are_asked_again() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let by_digest = origin.manifest("a/b", "v1", "{\"one\":1}");
    let node = Node::start(dir.path(), &origin, "").await;
    for _ in 0..2 {
        let (status, headers, body) = tell(node.get(&by_digest)).await;
        assert_eq!((status, &body[..]), (200, &b"{\"one\":1}"[..]));
        assert_eq!(headers["content-type"], "application/vnd.oci.image.manifest.v1+json");
    }
    assert_eq!(origin.seen().len(), 1, "the second came from memory");
    let tag = "/v2/a/b/manifests/v1";
    assert_eq!(node.whole(tag).await, b"{\"one\":1}");
    origin.manifest("a/b", "v1", "{\"two\":2}");
    assert_eq!(node.whole(tag).await, b"{\"two\":2}", "a tag that moved is followed");
    origin.set(Mode::Status(503));
    assert_eq!(node.whole(tag).await, b"{\"two\":2}", "a registry that is down leaves its last answer");
    let (status, headers, body) = tell(node.request(Method::HEAD, tag)).await;
    assert_eq!((status, body.len()), (200, 0));
    assert_eq!(headers["docker-content-digest"].to_str().unwrap(), origin::sha256(b"{\"two\":2}"));
    let (status, ..) = tell(node.get(tag).header("Authorization", "Bearer x")).await;
    assert_eq!(status, 502, "but only to whom it was given");
    origin.set(Mode::Plain);
    assert_eq!(tell(node.get("/v2/a/b/manifests/v2")).await.0, 404);
    origin.set(Mode::Lies);
    let other = origin.manifest("a/b", "v3", "{\"three\":3}");
    assert_eq!(tell(node.get(&other)).await.0, 502, "a manifest that is not what its digest says is not passed on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_is_told_to_stop_finishes_what_it_sends() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(2 * MIB, 5);
    let path = origin.blob("a", &content);
    origin.set(Mode::Gated);
    let node = Node::start(dir.path(), &origin, "").await;
    let answer = node.get(&path).send().await.unwrap();
    node.quit.cancel();
    origin.open_gate();
    assert!(answer.bytes().await.unwrap() == content);
    node.stop().await;
    let origin_bytes = origin.sent.load(std::sync::atomic::Ordering::SeqCst);
    let node = Node::start(dir.path(), &origin, "").await;
    assert!(node.whole(&path).await == content);
    assert_eq!(origin.sent.load(std::sync::atomic::Ordering::SeqCst), origin_bytes, "all of it was kept");
}
