//! Registries and mirrors that are slow, odd, dead or lying.

use std::sync::atomic::Ordering;

use super::*;

const QUICK: &str = "[timeouts]\nfirst_byte_registry = \"300ms\"\nfirst_byte_mirror = \"300ms\"\nstall = \"1500ms\"";

fn behind(mirror: &str, trusted: bool) -> String {
    format!("[[mirror]]\nurl = \"http://{mirror}\"\ntrusted = {trusted}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_node_gets_its_bytes_from_the_first() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let origin = Origin::start().await;
    let content = noise(5 * MIB + 3, 60);
    let path = origin.blob("private", &content);
    origin.only("private", "Bearer good");
    let first = Node::start(dirs[0].path(), &origin, "").await;
    let second = Node::start(dirs[1].path(), &origin, &behind(&first.at.to_string(), true)).await;
    let third = Node::start(dirs[2].path(), &origin, &behind(&second.at.to_string(), false)).await;
    let get = async |node: &Node| tell(node.get(&path).header("Authorization", "Bearer good")).await;
    assert!(get(&first).await.2 == content);
    let seen = origin.seen().len();
    assert!(get(&second).await.2 == content);
    assert_eq!(origin.seen().len(), seen, "a trusted mirror answers for rights and bytes");
    second.until("nydus_p2p_source_bytes_total{source=\"mirror\"}", content.len() as u64).await;
    second.until("nydus_p2p_finished_blobs_total", 1).await;
    assert_eq!(tell(second.get(&path)).await.0, 401, "and refuses as the registry does");

    // Without trust it never sees the token, so it cannot help with what is private.
    assert!(get(&third).await.2 == content);
    assert_eq!(third.metric("nydus_p2p_source_bytes_total{source=\"registry\"}").await, content.len() as u64);
    assert_eq!(third.metric("nydus_p2p_source_bytes_total{source=\"mirror\"}").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untrusted_mirror_helps_with_what_is_public() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let origin = Origin::start().await;
    let content = noise(3 * MIB, 61);
    let path = origin.blob("open", &content);
    let first = Node::start(dirs[0].path(), &origin, "").await;
    let second = Node::start(dirs[1].path(), &origin, &behind(&first.at.to_string(), false)).await;
    assert!(first.whole(&path).await == content);
    let sent = origin.sent.load(Ordering::SeqCst);
    assert!(second.whole(&path).await == content);
    assert_eq!(origin.sent.load(Ordering::SeqCst), sent, "no byte of the blob left the registry");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_mirror_is_found_out_when_the_blob_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (origin, liar) = (Origin::start().await, Origin::start().await);
    let content = noise(4 * MIB, 62);
    let path = origin.blob("open", &content);
    liar.blob("open", &content);
    liar.set(Mode::Lies);
    let node = Node::start(dir.path(), &origin, &behind(&liar.name(), false)).await;
    assert!(node.whole(&path).await != content, "nobody can know before the blob is whole");
    node.until("nydus_p2p_refuted_blobs_total", 1).await;
    assert!(node.whole(&path).await == content, "its bytes are gone and it is not asked again for this blob");
    node.until("nydus_p2p_finished_blobs_total", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_found_a_bad_chunk_gets_the_registry_s_own_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (origin, liar) = (Origin::start().await, Origin::start().await);
    let content = noise(8 * MIB, 63);
    let path = origin.blob("open", &content);
    liar.blob("open", &content);
    liar.set(Mode::Lies);
    let node = Node::start(dir.path(), &origin, &behind(&liar.name(), false)).await;
    let range = "bytes=2097000-3145800";
    assert!(node.part(&path, range).await.2 != content[2_097_000..=3_145_800]);
    let again = tell(node.get(&path).header("Range", range).header("X-Shoal-No-Peer", "1")).await;
    assert!(again.2 == content[2_097_000..=3_145_800]);
    // Two requests where the last piece of the first answer was still being stored; no piece twice either way.
    let mut asked = origin.gets();
    asked.sort_unstable();
    assert_eq!((asked[0].0, asked[asked.len() - 1].1), (1 << 20, (4 << 20) - 1), "the pieces concerned: {asked:?}");
    assert!(asked.windows(2).all(|pair| pair[0].1 + 1 == pair[1].0), "each once: {asked:?}");
    assert!(node.part(&path, range).await.2 == content[2_097_000..=3_145_800], "and they are kept");
    assert_eq!(origin.gets().len(), asked.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_mirror_breaks_off_the_registry_goes_on() {
    for mode in
        [Mode::CutAfter(1_500_000), Mode::Gated, Mode::Silent, Mode::GetStatus(500), Mode::WrongRange, Mode::Html]
    {
        let dir = tempfile::tempdir().unwrap();
        let (origin, broken) = (Origin::start().await, Origin::start().await);
        let content = noise(3 * MIB, 64);
        let path = origin.blob("open", &content);
        broken.blob("open", &content);
        broken.set(mode.clone());
        let node = Node::start(dir.path(), &origin, &format!("{}\n{QUICK}", behind(&broken.name(), false))).await;
        assert!(node.whole(&path).await == content, "{mode:?}");
        let from = |source| format!("nydus_p2p_source_bytes_total{{source=\"{source}\"}}");
        let (mirror, registry) = (node.metric(&from("mirror")).await, node.metric(&from("registry")).await);
        if !matches!(mode, Mode::Html) {
            assert_eq!(mirror + registry, content.len() as u64, "{mode:?}: not a byte twice");
        }
        if mode == Mode::CutAfter(1_500_000) {
            assert!(mirror > 1 << 20, "what the mirror gave is used");
        }
        node.until("nydus_p2p_finished_blobs_total", 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_breaks_off_is_asked_for_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(4 * MIB, 65);
    let path = origin.blob("open", &content);
    origin.set(Mode::CutAfter(700_000));
    let node = Node::start(dir.path(), &origin, "").await;
    assert!(node.whole(&path).await == content);
    assert!(origin.gets().len() > 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_registries_are_an_error_that_is_not_remembered() {
    for (mode, wanted) in [
        (Mode::WrongRange, 502),
        (Mode::Encoded, 502),
        (Mode::GetStatus(500), 503),
        (Mode::GetStatus(404), 404),
        (Mode::GetStatus(403), 403),
        (Mode::Silent, 503),
        (Mode::Status(500), 503),
        (Mode::Html, 503),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let origin = Origin::start().await;
        let content = noise(2 * MIB, 66);
        let path = origin.blob("open", &content);
        origin.set(mode.clone());
        let node = Node::start(dir.path(), &origin, QUICK).await;
        let (status, headers, body) = node.part(&path, "bytes=0-9").await;
        let body = String::from_utf8_lossy(&body).into_owned();
        assert_eq!(status, wanted, "{mode:?}: {body}");
        assert!(body.contains(&origin.name()), "names who failed: {body}");
        assert_eq!(headers.contains_key("x-dragonfly-error-type"), wanted >= 500);
        origin.set(Mode::Plain);
        let retry = node.part(&path, "bytes=0-9").await;
        assert_eq!((retry.0, &retry.2[..]), (206, &content[..10]), "{mode:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_without_ranges_is_read_once() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(6 * MIB + 1, 67);
    let path = origin.blob("open", &content);
    origin.set(Mode::NoRanges);
    let node = Node::start(dir.path(), &origin, "").await;
    for start in [5_000_000, 100, 3_000_000] {
        let (status, _, part) = node.part(&path, &format!("bytes={start}-{}", start + 9)).await;
        assert_eq!((status, &part[..]), (206, &content[start..start + 10]));
    }
    node.until("nydus_p2p_finished_blobs_total", 1).await;
    assert_eq!(origin.sent.load(Ordering::SeqCst), content.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_refuses_head_is_asked_for_one_byte() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let path = origin.blob("open", b"0123456789");
    let empty = origin.blob("open", b"");
    origin.set(Mode::NoHead);
    let node = Node::start(dir.path(), &origin, "").await;
    assert_eq!(node.part(&path, "bytes=3-4").await.2, b"34");
    assert_eq!(node.whole(&empty).await, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_to_the_metadata_service_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let path = origin.blob("open", b"0123456789");
    origin.set(Mode::Elsewhere("http://169.254.169.254".into()));
    let node = Node::start(dir.path(), &origin, "").await;
    let (status, _, body) = node.part(&path, "bytes=3-4").await;
    let body = String::from_utf8(body).unwrap();
    assert!(status >= 500 && body.contains("link-local"), "{status} {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_that_name_each_other_do_not_wait_for_each_other() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let origin = Origin::start().await;
    let content = Arc::new(noise(6 * MIB, 68));
    let path = origin.blob("open", &content);
    // Two ports that are free now: each must know the other's before it starts.
    let free = async || TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let ports = [free().await, free().await];
    let mut nodes = Vec::new();
    for number in 0..2 {
        // No limit that would dissolve a deadlock by giving up.
        let patient = "[timeouts]\nfirst_byte_mirror = \"600s\"\nheaders = \"600s\"\nstall = \"600s\"";
        let more = format!("{}\n{patient}", behind(&ports[1 - number].to_string(), true));
        let mut config = config(dirs[number].path(), &[&origin], &more);
        config.listen = ports[number];
        nodes.push(Arc::new(Node::with(config, origin.name()).await));
    }
    let callers: Vec<_> = (0..16)
        .map(|caller| {
            let (node, path, content) = (nodes[caller % 2].clone(), path.clone(), content.clone());
            tokio::spawn(async move { assert!(node.whole(&path).await == *content) })
        })
        .collect();
    for caller in callers {
        tokio::time::timeout(Duration::from_secs(60), caller).await.expect("deadlock").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wedged_mirror_leaves_time_for_the_registry() {
    let dir = tempfile::tempdir().unwrap();
    let (origin, wedged) = (Origin::start().await, Origin::start().await);
    let content = noise(2 * MIB, 69);
    let path = origin.blob("open", &content);
    wedged.set(Mode::Silent);
    // The mirror may take longer to answer than callers wait for headers.
    let limits = "[timeouts]\nfirst_byte_mirror = \"20s\"\nheaders = \"2s\"";
    let node = Node::start(dir.path(), &origin, &format!("{}\n{limits}", behind(&wedged.name(), true))).await;
    assert!(node.whole(&path).await == content);
    assert_eq!(wedged.seen().len(), 1, "it is asked once, and then left alone for a while");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_takes_nothing_is_cut_off_and_its_blob_can_leave() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    // More than the buffers of two sockets hold.
    let contents: Vec<Vec<u8>> = (0..2).map(|seed| noise(40 * MIB, 70 + seed)).collect();
    let paths: Vec<String> = contents.iter().map(|content| origin.blob("open", content)).collect();
    let node = Node::start(dir.path(), &origin, &format!("quota = \"48MiB\"\n{QUICK}")).await;
    assert!(node.whole(&paths[0]).await == contents[0]);
    let mut idle = tokio::net::TcpStream::connect(node.at).await.unwrap();
    let ask = format!("GET {}?ns={} HTTP/1.1\r\nHost: x\r\n\r\n", paths[0], node.registry);
    idle.write_all(ask.as_bytes()).await.unwrap();
    idle.readable().await.unwrap();
    // It holds its blob until it is cut off; then another one has room.
    let mut evicted = false;
    for _ in 0..100 {
        assert!(node.whole(&paths[1]).await == contents[1]);
        evicted = node.metric("nydus_p2p_evictions_total").await > 0;
        if evicted {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(evicted, "the blob stays pinned");
    let mut got = Vec::new();
    let _ = idle.read_to_end(&mut got).await;
    assert!(got.len() < contents[0].len(), "all {} bytes came to a caller that did not read", got.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_come_before_the_bytes_and_a_body_without_bytes_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(4 * MIB, 73);
    let path = origin.blob("open", &content);
    let limits = "[timeouts]\nheaders = \"300ms\"\nfirst_byte_registry = \"60s\"\nstall = \"1s\"";
    let node = Node::start(dir.path(), &origin, limits).await;
    assert_eq!(node.part(&path, "bytes=0-9").await.2, content[..10]);
    origin.set(Mode::Silent);
    // Who may is known, and the bytes are on their way, or not.
    let begin = Instant::now();
    let answer = node.get(&path).header("Range", "bytes=3145728-3145737").send().await.unwrap();
    assert_eq!(answer.status(), 206);
    assert!(begin.elapsed() < Duration::from_secs(5), "headers took {:?}", begin.elapsed());
    assert!(answer.bytes().await.is_err(), "a body that never came is not whole");
    // Whether another may cannot be found out, and is told as soon.
    let (status, ..) = tell(node.get(&path.replace("/open/", "/other/"))).await;
    assert_eq!(status, 503);
    origin.set(Mode::Plain);
    assert_eq!(node.part(&path, "bytes=3145728-3145737").await.2, content[3 * MIB..3 * MIB + 10]);
}
