//! Images served by a real nydusd: a golden image over the backend of plain files.

#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

#[expect(dead_code, reason = "each test file uses a part of the bed")]
#[path = "bed/bed.rs"]
mod bed;
#[path = "bed/golden.rs"]
mod golden;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use bed::{Bed, code, mounted, signal};
use golden::{Golden, LAYERS, pull};
use nix::sys::signal::Signal;
use tonic::Code;

fn none() -> HashMap<String, String> {
    HashMap::new()
}

/// A bed with the golden image, unless this machine cannot.
async fn ready(flags: &[&str]) -> Option<(Bed, Golden)> {
    let nydusd = bed::nydusd()?;
    let golden = Golden::unpack()?;
    let bed = Bed::new(&nydusd, &golden.template(), flags).await;
    Some((bed, golden))
}

async fn eventually(what: &str, limit: Duration, mut check: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !check() {
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_container_sees_the_image_and_writes_beside_it() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let image = pull(&mut bed, &golden, "one").await;
    assert!(bed.nydusds().is_empty(), "a pull alone starts nothing");
    let mounts = bed.prepare("c", &image, none()).await.expect("prepared");
    let rafs = bed.root().join("mnt/3");
    assert!(mounts[0].options.contains(&format!("lowerdir={}", rafs.display())), "{mounts:?}");
    let at = mounted(&mounts);
    golden.compare(at.path());
    fs::write(at.path().join("new"), "x").expect("a container may write");
    assert!(!rafs.join("new").exists());
    drop(at);

    let config = bed.root().join("config/shared/3/config.json");
    assert_eq!(config.metadata().expect("written").permissions().mode() & 0o777, 0o600);
    let text = fs::read_to_string(config).expect("read");
    let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(config["device"]["id"], "/3");
    assert_eq!(config["device"]["cache"]["config"]["work_dir"], bed.root().join("cache").to_string_lossy().as_ref());

    let view = mounted(&bed.view("v", &image).await.expect("viewed"));
    golden.compare(view.path());
    fs::write(view.path().join("y"), "").expect_err("a view is read-only");
    drop(view);
    assert_eq!(bed.nydusds().len(), 1, "one daemon for all");
    assert!(bed.root().join("logs/shared/nydusd.log").exists());
}

#[tokio::test]
async fn a_second_image_and_many_containers_at_once_share_the_daemon() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let one = pull(&mut bed, &golden, "one").await;
    let two = pull(&mut bed, &golden, "two").await;
    let calls = (0..12).map(|number| {
        let mut client = bed.client.clone();
        let parent = if number % 2 == 0 { one.clone() } else { two.clone() };
        async move {
            let request = containerd_snapshots::api::snapshots::v1::PrepareSnapshotRequest {
                snapshotter: String::new(),
                key: format!("c{number}"),
                parent,
                labels: HashMap::new(),
            };
            client.prepare(request).await.expect("prepared")
        }
    });
    futures::future::join_all(calls).await;
    assert_eq!(bed.nydusds().len(), 1);
    for key in ["c0", "c1"] {
        golden.compare(mounted(&bed.mounts(key).await.expect("mounts")).path());
    }
}

#[tokio::test]
async fn layers_above_an_image_are_stacked_on_it() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let image = pull(&mut bed, &golden, "one").await;
    for (name, parent) in [("first", image.as_str()), ("second", "first")] {
        let key = format!("{name}-key");
        let at = mounted(&bed.prepare(&key, parent, none()).await.expect("prepared"));
        fs::write(at.path().join(name), name).expect("written");
        drop(at);
        bed.commit(name, &key, none()).await.expect("committed");
    }
    for mounts in
        [bed.prepare("c", "second", none()).await, bed.view("v", "second").await, bed.view("w", "first").await]
    {
        let at = mounted(&mounts.expect("given"));
        golden.compare(at.path());
        assert_eq!(fs::read_to_string(at.path().join("first")).expect("read"), "first");
    }
    bed.kill();
    bed.start().await;
    let at = mounted(&bed.mounts("c").await.expect("mounts"));
    assert_eq!(fs::read_to_string(at.path().join("second")).expect("read"), "second");
}

#[tokio::test]
async fn a_restarted_snapshotter_adopts_the_living_daemon() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let image = pull(&mut bed, &golden, "one").await;
    let mounts = bed.prepare("c", &image, none()).await.expect("prepared");
    let at = mounted(&mounts);
    let before = bed.nydusds();
    assert_eq!(before.len(), 1);
    for gentle in [true, false] {
        if gentle {
            bed.stop().await;
        } else {
            bed.kill();
        }
        golden.compare(at.path());
        bed.start().await;
        assert_eq!(bed.nydusds(), before);
        assert_eq!(bed.mounts("c").await.expect("mounts"), mounts);
        golden.compare(at.path());
    }
    let again = bed.prepare("d", &image, none()).await.expect("prepared");
    golden.compare(mounted(&again).path());
    assert_eq!(bed.nydusds(), before);
}

#[tokio::test]
async fn a_dead_daemon_is_replaced_and_new_containers_work() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let image = pull(&mut bed, &golden, "one").await;
    let old = mounted(&bed.prepare("c", &image, none()).await.expect("prepared"));
    for round in 0..3 {
        let before = bed.nydusds();
        signal(before[0], Signal::SIGKILL);
        let root = bed.root();
        eventually("the dead mount answers with an error", Duration::from_secs(5), || {
            fs::read_dir(old.path()).is_err() || fs::read(old.path().join("deep")).is_err()
        })
        .await;
        eventually("a new daemon mounts the image", Duration::from_secs(5), || {
            fs::read_dir(root.join("mnt/3")).is_ok_and(|entries| entries.count() > 0) && bed.nydusds() != before
        })
        .await;
        let fresh = mounted(&bed.prepare(&format!("d{round}"), &image, none()).await.expect("prepared"));
        golden.compare(fresh.path());
    }
    assert_eq!(bed.nydusds().len(), 1);
    drop(old);
    golden.compare(mounted(&bed.mounts("c").await.expect("mounts")).path());
}

#[tokio::test]
async fn after_a_reboot_an_existing_container_gets_its_image_back() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let image = pull(&mut bed, &golden, "one").await;
    let mounts = bed.prepare("c", &image, none()).await.expect("prepared");
    bed.kill();
    for pid in bed.nydusds() {
        signal(pid, Signal::SIGKILL);
    }
    bed.start().await;
    // Before the first request was served.
    assert!(fs::read_dir(bed.root().join("mnt/3")).expect("mounted").count() > 0);
    assert_eq!(bed.mounts("c").await.expect("mounts"), mounts);
    golden.compare(mounted(&mounts).path());
    assert_eq!(bed.nydusds().len(), 1);
}

#[tokio::test]
async fn removing_an_image_unmounts_it_and_reclaims_its_cache() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let image = pull(&mut bed, &golden, "one").await;
    let other = pull(&mut bed, &golden, "two").await;
    for (key, parent) in [("c", &image), ("d", &other)] {
        let at = mounted(&bed.prepare(key, parent, none()).await.expect("prepared"));
        golden.compare(at.path());
    }
    let cached = |bed: &Bed| {
        let entries = fs::read_dir(bed.root().join("cache")).expect("there").flatten();
        entries.filter(|entry| LAYERS.iter().any(|blob| entry.file_name().to_string_lossy().starts_with(blob))).count()
    };
    assert!(cached(&bed) >= 2);
    let usage = bed.usage("sha256:chain0").await.expect("measured");
    assert!(usage.size > 100_000, "a data layer uses what is cached of it: {usage:?}");
    for key in ["c", "one/sha256:top"] {
        bed.remove(key).await.expect("removed");
    }
    // The other nydusd keeps an empty directory there.
    assert!(fs::read_dir(bed.root().join("mnt/3")).map_or(true, |entries| entries.count() == 0), "unmounted");
    assert!(!bed.root().join("config/shared/3").exists());
    assert!(cached(&bed) >= 2, "the other image uses the same blobs");
    golden.compare(mounted(&bed.mounts("d").await.expect("mounts")).path());
    for key in ["d", "two/sha256:top", "sha256:chain1", "sha256:chain0"] {
        bed.remove(key).await.expect("removed");
    }
    bed.cleanup().await.expect("cleaned up");
    assert_eq!(cached(&bed), 0, "nobody uses them any more");
    assert_eq!(bed.directories(), Vec::<String>::new());
    // And everything again.
    let image = pull(&mut bed, &golden, "one").await;
    golden.compare(mounted(&bed.prepare("c", &image, none()).await.expect("prepared")).path());
}

#[tokio::test]
async fn each_image_can_have_its_own_daemon() {
    let Some((mut bed, golden)) = ready(&["--daemon-mode", "dedicated"]).await else { return };
    let one = pull(&mut bed, &golden, "one").await;
    let two = pull(&mut bed, &golden, "two").await;
    for (key, image) in [("c", &one), ("d", &two)] {
        golden.compare(mounted(&bed.prepare(key, image, none()).await.expect("prepared")).path());
    }
    let both = bed.nydusds();
    assert_eq!(both.len(), 2);
    bed.kill();
    bed.start().await;
    assert_eq!(bed.nydusds(), both);
    signal(both[0], Signal::SIGKILL);
    eventually("it is replaced", Duration::from_secs(5), || bed.nydusds().len() == 2 && bed.nydusds() != both).await;
    for key in ["c", "d"] {
        golden.compare(mounted(&bed.mounts(key).await.expect("mounts")).path());
    }
    for key in ["c", "one/sha256:top"] {
        bed.remove(key).await.expect("removed");
    }
    eventually("its daemon ends", Duration::from_secs(5), || bed.nydusds().len() == 1).await;
    golden.compare(mounted(&bed.mounts("d").await.expect("mounts")).path());
}

#[tokio::test]
async fn a_broken_image_fails_by_itself() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let image = pull(&mut bed, &golden, "one").await;
    let boot = bed.root().join("snapshots/3/fs/image/image.boot");
    fs::write(&boot, "rubbish").expect("written");
    let error = bed.prepare("c", &image, none()).await.expect_err("there is nothing to mount");
    assert!(error.message().contains("image.boot"), "{error}");
    assert_eq!(code(bed.stat("c").await), Code::NotFound, "a failed call leaves no record");
    fs::copy(golden.image().join("bootstrap"), &boot).expect("copied");
    golden.compare(mounted(&bed.prepare("c", &image, none()).await.expect("good again")).path());
}

#[tokio::test]
async fn without_a_daemon_plain_snapshots_work_and_images_are_unavailable() {
    if !bed::may_mount() {
        return;
    }
    let Some(golden) = Golden::unpack() else { return };
    let mut bed = Bed::new(Path::new("/bin/false"), &golden.template(), &[]).await;
    let image = pull(&mut bed, &golden, "one").await;
    assert_eq!(code(bed.prepare("c", &image, none()).await), Code::Unavailable);
    bed.prepare("p", "", none()).await.expect("prepared");
    bed.kill();
    bed.start().await;
    bed.remove("p").await.expect("removed");
}

#[tokio::test]
async fn a_daemon_that_does_not_answer_is_unavailable_in_time_and_replaced_at_the_next_start() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    let one = pull(&mut bed, &golden, "one").await;
    let two = pull(&mut bed, &golden, "two").await;
    bed.prepare("c", &one, none()).await.expect("prepared");
    let stuck = bed.nydusds();
    signal(stuck[0], Signal::SIGSTOP);
    let begun = Instant::now();
    assert_eq!(code(bed.prepare("d", &two, none()).await), Code::Unavailable);
    assert!(begun.elapsed() < Duration::from_secs(21));
    bed.prepare("p", "", none()).await.expect("plain snapshots do not wait for it");
    bed.kill();
    // The kernel wakes what is stopped when its parent is gone, and ends it unless it ignores SIGHUP (as under nohup).
    signal(stuck[0], Signal::SIGSTOP);
    bed.start().await;
    assert_ne!(bed.nydusds(), stuck);
    for (key, image) in [("e", &one), ("f", &two)] {
        golden.compare(mounted(&bed.prepare(key, image, none()).await.expect("prepared")).path());
    }
}

#[tokio::test]
async fn an_image_removed_right_after_a_kill_leaves_no_mount() {
    let Some((mut bed, golden)) = ready(&[]).await else { return };
    for round in 0..3 {
        let image = pull(&mut bed, &golden, &format!("r{round}")).await;
        let mut client = bed.client.clone();
        let parent = image.clone();
        let asked = tokio::spawn(async move {
            let request = containerd_snapshots::api::snapshots::v1::PrepareSnapshotRequest {
                snapshotter: String::new(),
                key: "c".to_owned(),
                parent,
                labels: HashMap::new(),
            };
            client.prepare(request).await.is_ok()
        });
        tokio::time::sleep(Duration::from_millis(30 * (round + 1))).await;
        bed.kill();
        let answered = asked.await.expect("it ends when nobody answers");
        bed.start().await;
        let known = bed.stat("c").await.is_ok();
        assert!(known || !answered, "what was answered is recorded");
        if known {
            bed.remove("c").await.expect("removed");
        }
        bed.remove(&image).await.expect("removed");
        bed.cleanup().await.expect("cleaned up");
        let left = fs::read_dir(bed.root().join("mnt")).expect("there").count();
        assert_eq!(left, 0, "round {round}: an image is still mounted");
    }
}
