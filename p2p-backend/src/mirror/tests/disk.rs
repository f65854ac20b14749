//! What the disk keeps, loses, and refuses.

use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::*;

fn data_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let all = std::fs::read_dir(dir.join("blobs")).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.extension().is_some_and(|extension| extension == "data")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_what_is_good_and_reads_again_what_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let content = noise(4 * MIB + 9, 20);
    let path = origin.blob("a", &content);
    let node = Node::start(dir.path(), &origin, "").await;
    assert!(node.whole(&path).await == content);
    node.until("nydus_p2p_finished_blobs_total", 1).await;
    node.stop().await;
    let [data] = &data_files(dir.path())[..] else { panic!("one file per blob") };

    for (round, damage) in ["nothing", "a flipped byte", "a torn map", "a stray file"].into_iter().enumerate() {
        let before = origin.sent.load(Ordering::SeqCst);
        let lost = match round {
            0 => 0,
            1 => {
                let file = std::fs::OpenOptions::new().write(true).open(data).unwrap();
                file.write_all_at(&[!content[MIB + 5]], MIB as u64 + 5).unwrap();
                MIB
            }
            2 => {
                let map = data.with_extension("pieces");
                let length = map.metadata().unwrap().len();
                std::fs::OpenOptions::new().write(true).open(map).unwrap().set_len(length - 1).unwrap();
                content.len()
            }
            _ => {
                std::fs::write(dir.path().join("blobs/stray"), "x").unwrap();
                0
            }
        };
        let node = Node::start(dir.path(), &origin, "").await;
        assert!(node.whole(&path).await == content, "after {damage}");
        assert_eq!(origin.sent.load(Ordering::SeqCst) - before, lost as u64, "after {damage}");
        if lost > 0 {
            node.until("nydus_p2p_finished_blobs_total", 1).await;
        }
        node.stop().await;
    }
    assert!(!dir.path().join("blobs/stray").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_owns_a_data_directory() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let node = Node::start(dir.path(), &origin, "").await;
    let error = Mirror::open(config(dir.path(), &[&origin], "")).await.unwrap_err().to_string();
    assert!(error.contains("in use by another nydus-p2p"), "{error}");
    node.stop().await;
    Node::start(dir.path(), &origin, "").await.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_quota_evicts_what_was_unused_for_longest_and_never_what_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let origin = Origin::start().await;
    let contents: Vec<Vec<u8>> = (0..4).map(|seed| noise(6 * MIB, 30 + seed)).collect();
    let paths: Vec<String> = contents.iter().map(|content| origin.blob("a", content)).collect();
    let node = Node::start(dir.path(), &origin, "quota = \"20MiB\"").await;
    for number in [0, 1, 2, 0] {
        assert!(node.whole(&paths[number]).await == contents[number]);
    }
    let before = origin.sent.load(Ordering::SeqCst);
    assert!(node.whole(&paths[3]).await == contents[3]);
    assert_eq!(node.metric("nydus_p2p_evictions_total").await, 1);
    assert!(node.metric("nydus_p2p_disk_usage_bytes").await <= 20 << 20);
    assert!(node.whole(&paths[0]).await == contents[0]);
    assert_eq!(origin.sent.load(Ordering::SeqCst) - before, 6 << 20, "the one that was read again stayed");
    assert!(node.whole(&paths[1]).await == contents[1]);
    assert_eq!(origin.sent.load(Ordering::SeqCst) - before, 12 << 20, "the one that was not is gone");

    // A blob larger than the whole quota, while others are evicted for it, is still served.
    let large = noise(30 * MIB, 40);
    let path = origin.blob("a", &large);
    assert!(node.whole(&path).await == large);
    assert!(node.metric("nydus_p2p_disk_usage_bytes").await <= 20 << 20);
    assert!(node.metric("nydus_p2p_unkept_pieces_total").await > 0);
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_does_not_stand_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let flags = nix::mount::MsFlags::empty();
    if let Err(error) = nix::mount::mount(Some("tmpfs"), dir.path(), Some("tmpfs"), flags, Some("size=4m")) {
        assert!(
            std::env::var_os("CI").is_none(),
            "no tmpfs can be mounted ({error}), and in CI nothing may be skipped"
        );
        eprintln!("skipped: mounting a small tmpfs is not allowed here: {error}");
        return;
    }
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
        }
    }
    let _mounted = Mounted(dir.path());
    let origin = Origin::start().await;
    let node = Node::start(dir.path(), &origin, "").await;
    for seed in [50, 51] {
        let content = noise(9 * MIB + 1, seed);
        let path = origin.blob("a", &content);
        assert!(node.whole(&path).await == content);
        let (status, _, part) = node.part(&path, "bytes=8388600-8388700").await;
        assert_eq!((status, &part[..]), (206, &content[8_388_600..=8_388_700]));
    }
    assert!(node.metric("nydus_p2p_unkept_pieces_total").await > 0);
    assert!(node.metric("nydus_p2p_disk_usage_bytes").await <= 4 << 20);
    let health = node.client.get(format!("http://{}/healthy", node.health)).send().await.unwrap();
    assert_eq!(health.status(), 200, "a full disk is met");
    node.stop().await;
}
