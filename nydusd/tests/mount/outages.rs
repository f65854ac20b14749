//! The source goes away and comes back; nobody restarts the daemon.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use nydusd::api::types::DaemonState;

use super::daemon::{Place, can_mount, wait_for};
use super::fixture::{describe, differences, file, manifest};
use super::origin::{Mood, Origin};
use super::readers::{How, reader};
use super::{BUILT, block_on, over};

#[test]
fn a_mount_opens_no_connection_and_metadata_needs_none() {
    if !can_mount() {
        return;
    }
    // With a chunk table in the bootstrap, and with one in the blob, which the first read fetches.
    for (variant, path) in [("v6-none", "sizes/m1"), ("v6-zran", "sizes/m1"), ("v6-batch", "sizes/m1")] {
        let origin = Origin::serve(file(variant, "blobs"), Mood::Serve);
        let place = Place::new();
        let _daemon = place.start_with(&file(variant, "bootstrap"), &place.config(origin.backend()));
        let mut seen = 0;
        let mut todo = vec![place.mnt()];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                seen += 1;
                if entry.metadata().unwrap().is_dir() {
                    todo.push(entry.path());
                }
            }
        }
        assert!(seen > 100, "{variant}: {seen}");
        assert_eq!(origin.requests(), 0, "{variant}");
        std::fs::read(place.mnt().join(path)).unwrap();
        assert!(origin.requests() > 0, "{variant}");
    }
}

#[test]
fn a_source_that_is_down_at_the_start_serves_those_who_wait_when_it_comes_up() {
    if !can_mount() {
        return;
    }
    for variant in ["v6-none", "v6-zran"] {
        let mut origin = Origin::serve(file(variant, "blobs"), Mood::Serve);
        origin.fall();
        let place = Place::new();
        let _daemon = place.start_with(&file(variant, "bootstrap"), &place.config(origin.backend()));
        assert!(std::fs::metadata(place.mnt().join("sizes/m1")).is_ok());
        let mut waiting = reader(&place.mnt().join("sizes/m1"));
        std::thread::sleep(Duration::from_millis(1500));
        assert!(waiting.try_wait().unwrap().is_none(), "{variant}: a cold read did not wait");
        origin.rise();
        assert!(waiting.wait().unwrap().success(), "{variant}\n{}", place.log());
    }
}

#[test]
fn an_outage_longer_than_the_deadline_is_an_error_then_and_forgotten_afterwards() {
    if !can_mount() {
        return;
    }
    let mut origin = Origin::serve(file("v6-none", "blobs"), Mood::Serve);
    let place = Place::new();
    let mut config = place.config(origin.backend());
    config["read_deadline"] = 5.into();
    let daemon = place.start_with(&file("v6-none", "bootstrap"), &config);
    let warm = place.mnt().join("sizes/random300k");
    let bytes = std::fs::read(&warm).unwrap();
    origin.fall();
    let cold = place.mnt().join("sizes/m3_5");
    let began = Instant::now();
    let failed = std::thread::spawn(move || (std::fs::read(cold), Instant::now()));
    while !failed.is_finished() {
        super::disk::drop_pages(&warm);
        let asked = Instant::now();
        assert!(std::fs::read(&warm).unwrap() == bytes);
        assert!(asked.elapsed() < Duration::from_secs(1), "a warm read noticed: {:?}", asked.elapsed());
        std::thread::sleep(Duration::from_millis(100));
    }
    let (read, ended) = failed.join().unwrap();
    assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO));
    let took = ended - began;
    assert!(took > Duration::from_secs(2) && took < Duration::from_secs(7), "the deadline is 5 s: {took:?}");
    let log = place.log();
    assert!(log.lines().any(|line| line.contains("WARN") && line.contains("library/test")), "{log}");
    origin.rise();
    wait_for("the source to be believed again", || std::fs::read(place.mnt().join("sizes/m3_5")).is_ok());
    let found = differences(&describe(&place.mnt()), &manifest("manifest-base.jsonl"), BUILT);
    assert_eq!(found, Vec::<String>::new());
    assert_eq!(block_on(daemon.client().info()).unwrap().state, DaemonState::Running);
}

#[test]
fn a_cold_read_waits_for_its_deadline_to_the_end_and_no_longer_and_then_it_is_eio() {
    if !can_mount() {
        return;
    }
    let deadline = Duration::from_secs(6);
    let check = |how: How, requests: u32, down: bool| {
        let mut origin = Origin::serve(file("v6-none", "blobs"), Mood::Hold);
        if down {
            origin.fall();
        }
        let place = Place::new();
        let mut config = place.config(origin.backend());
        config["read_deadline"] = deadline.as_secs().into();
        let _daemon = place.start_with(&file("v6-none", "bootstrap"), &config);
        let began = Instant::now();
        let status = how.read(&place.mnt().join("sizes/m3_5")).wait().unwrap();
        let took = began.elapsed();
        assert!(!status.success(), "{how:?}: nobody could give the bytes");
        let whole = deadline / 2 * requests;
        // Nobody is asked in the last tenth of a second; and a machine may be busy.
        let within = whole - Duration::from_millis(100) * requests..deadline + Duration::from_secs(2);
        assert!(within.contains(&took), "{how:?}, down: {down}: {took:?} instead of {whole:?}\n{}", place.log());
    };
    std::thread::scope(|scope| {
        for down in [false, true] {
            // One request of the kernel has half of it. A direct read is one; where its read-ahead failed, the kernel asks again.
            for (how, requests) in [(How::Direct, 1), (How::Read, 2)] {
                scope.spawn(move || check(how, requests, down));
            }
        }
    });
}

#[test]
fn a_source_that_goes_and_comes_in_the_middle_of_reads_fails_none_of_them() {
    if !can_mount() {
        return;
    }
    let mut origin = Origin::serve(file("v6-none", "blobs"), Mood::Serve);
    let place = Place::new();
    let _daemon = over(&place, &origin);
    let mnt = place.mnt();
    let reading = std::thread::spawn(move || differences(&describe(&mnt), &manifest("manifest-base.jsonl"), BUILT));
    for _ in 0..6 {
        origin.fall();
        std::thread::sleep(Duration::from_millis(150));
        origin.rise();
        std::thread::sleep(Duration::from_millis(150));
    }
    assert_eq!(reading.join().unwrap(), Vec::<String>::new(), "{}", place.log());
    // What was asked for while it was down is asked for again, not remembered as missing.
    let error = std::fs::read(place.mnt().join("no such file")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
