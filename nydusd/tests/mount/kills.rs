//! Readers and daemons that are killed: nobody waits for the dead, and nothing wrong is left.

use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use nydusd::api::MountRequest;

use super::daemon::{Place, can_mount, has, wait_for};
use super::fixture::{describe, differences, file, manifest};
use super::origin::{Mood, Origin};
use super::readers::{How, reader};
use super::{BUILT, block_on, over};

/// How long the end of a reader may take that was killed, or whose daemon was.
const AT_ONCE: Duration = Duration::from_secs(1);

/// Starts a reader of each kind, each on a file of its own that nobody has read, and waits until all of them wait.
fn blocked(place: &Place, origin: &Origin) -> Vec<(How, Child)> {
    origin.set(Mood::Hold);
    let files = ["sizes/m3_5", "sizes/m1plus1", "modes/suid", "sizes/random300k", "hard/big1"];
    let readers: Vec<(How, Child)> =
        How::ALL.into_iter().zip(files).map(|(how, path)| (how, how.read(&place.mnt().join(path)))).collect();
    for (how, reader) in &readers {
        // `cat` and the others are in the kernel, in a page that does not come.
        let stack = format!("/proc/{}/stack", reader.id());
        wait_for(&format!("{how:?} to wait"), || {
            let stack = std::fs::read_to_string(&stack).unwrap_or_default();
            stack.contains("folio") || stack.contains("fuse")
        });
    }
    readers
}

#[test]
fn a_killed_reader_dies_within_a_second_however_it_waits() {
    if !can_mount() || !has(&["python3"]) {
        return;
    }
    let origin = Origin::serve(file("v6-none", "blobs"), Mood::Serve);
    let place = Place::new();
    let _daemon = over(&place, &origin);
    for (how, mut reader) in blocked(&place, &origin) {
        let began = Instant::now();
        reader.kill().unwrap();
        let status = reader.wait().unwrap();
        assert!(began.elapsed() < AT_ONCE, "{how:?}: {:?}", began.elapsed());
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{how:?} did not wait");
    }
    // Nobody waits for what the dead had claimed.
    origin.set(Mood::Serve);
    let found = differences(&describe(&place.mnt()), &manifest("manifest-base.jsonl"), BUILT);
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn readers_of_a_killed_daemon_get_an_error_within_a_second_and_the_mount_can_go() {
    if !can_mount() || !has(&["python3"]) {
        return;
    }
    let origin = Origin::serve(file("v6-none", "blobs"), Mood::Serve);
    let place = Place::new();
    let mut daemon = over(&place, &origin);
    let readers = blocked(&place, &origin);
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    let began = Instant::now();
    for (how, mut reader) in readers {
        let status = reader.wait().unwrap();
        assert!(began.elapsed() < AT_ONCE, "{how:?}: {:?}", began.elapsed());
        match how {
            How::Map => assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}"),
            _ => assert!(!status.success(), "{how:?} had nothing to read from"),
        }
    }
    for how in How::ALL {
        let began = Instant::now();
        assert!(!how.read(&place.mnt().join("sizes/m1")).wait().unwrap().success(), "{how:?}");
        assert!(began.elapsed() < AT_ONCE, "{how:?}: {:?}", began.elapsed());
    }
    umount2(&place.mnt(), MntFlags::empty()).unwrap();
}

#[test]
fn a_daemon_killed_at_any_moment_leaves_nothing_wrong_or_stuck() {
    if !can_mount() {
        return;
    }
    let origin = Origin::serve(file("v6-none", "blobs"), Mood::Serve);
    let place = Place::new();
    let mut config = place.config(origin.backend());
    config["fs_prefetch"] = serde_json::json!({"enable": true});
    std::fs::write(place.path("config.json"), config.to_string()).unwrap();
    let (bootstrap, config) = (file("v6-none", "bootstrap"), place.path("config.json"));
    let arguments = ["--bootstrap", bootstrap.to_str().unwrap(), "--config", config.to_str().unwrap()];
    // From before the mount to behind the prefetch; every third daemon is ending by itself when it dies.
    for round in 0..18u64 {
        let mut daemon = place.spawn(&arguments);
        let mut readers = Vec::new();
        let dies_after = Duration::from_millis(7 + 23 * round);
        let began = Instant::now();
        let mut mounted = false;
        while began.elapsed() < dies_after {
            if !mounted && place.path("api.sock").exists() && place.mnt().join("sizes").exists() {
                mounted = true;
                let files = ["sizes/m3_5", "sparse/mixed", "sizes/m1", "hard/big1"];
                readers = files.iter().map(|path| reader(&place.mnt().join(path))).collect();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if round % 3 == 2 {
            daemon.signal(Signal::SIGTERM);
            std::thread::sleep(Duration::from_millis(round));
        }
        daemon.signal(Signal::SIGKILL);
        daemon.wait();
        let began = Instant::now();
        for mut reader in readers {
            reader.wait().unwrap();
        }
        assert!(began.elapsed() < AT_ONCE, "round {round}: {:?}", began.elapsed());
        // The next daemon takes the dead mount away by itself; the last one is found empty.
    }
    let mut daemon = place.start(&arguments);
    let found = differences(&describe(&place.mnt()), &manifest("manifest-base.jsonl"), BUILT);
    assert_eq!(found, Vec::<String>::new());
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(place.mnt().to_str().unwrap()), "a dead mount is left:\n{mounts}");
}

#[test]
fn an_image_is_unmounted_within_five_seconds_with_reads_under_way() {
    if !can_mount() {
        return;
    }
    let origin = Origin::serve(file("v6-none", "blobs"), Mood::Hold);
    let place = Place::new();
    let daemon = place.start(&[]);
    let config = place.config(origin.backend()).to_string();
    let request = MountRequest::rafs(file("v6-none", "bootstrap").to_str().unwrap(), config);
    let began = Instant::now();
    block_on(daemon.client().mount("/1", &request)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "mount: {:?}", began.elapsed());
    let mut waiting = reader(&place.mnt().join("1/sizes/m3_5"));
    wait_for("a request that is held", || origin.held() > 0);
    let began = Instant::now();
    block_on(daemon.client().umount("/1")).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "unmount: {:?}", began.elapsed());
    assert!(!place.mnt().join("1").exists());
    // Mounted anew while the old reader still waits, and killed without a trace.
    block_on(daemon.client().mount("/1", &request)).unwrap();
    waiting.kill().unwrap();
    waiting.wait().unwrap();
    origin.set(Mood::Serve);
    assert_eq!(std::fs::read(place.mnt().join("1/sizes/m1")).unwrap().len(), 1 << 20);
}
