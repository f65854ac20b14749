//! The disk below the snapshotter's root in trouble: what was answered stays true, errors have names, and nothing needs more
//! than the disk's return.

#![expect(clippy::print_stdout, reason = "a test that is skipped says why")]

#[expect(dead_code, reason = "each test file uses a part of the bed")]
#[path = "bed/bed.rs"]
mod bed;
#[path = "bed/disk.rs"]
mod disk;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bed::{Bed, labels, localfs_template, may_mount, mounted};
use containerd_snapshots::api::snapshots::v1::{Info, Kind};
use disk::Disk;
use tonic::{Code, Status};

/// Where Debian puts the library that tells programs another time.
const FAKETIME: &str = "faketime/libfaketimeMT.so.1";

/// A snapshotter whose root is a disk of its own.
async fn bed_on_a_disk() -> Option<(Bed, Disk)> {
    if !may_mount() || !has("mkfs.ext4") {
        return None;
    }
    let mut bed = Bed::unstarted(Path::new("/bin/true"), &localfs_template(Path::new("/nonexistent")), &[]);
    let disk = Disk::mount(&bed.root(), 16);
    bed.start().await;
    Some((bed, disk))
}

fn has(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&paths).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(program).exists());
    if !found {
        assert!(std::env::var_os("CI").is_none(), "this test needs {program}, and in CI nothing may be skipped");
        println!("skipped: needs {program}");
    }
    found
}

/// A layer with one file, as containerd makes it.
async fn layer(bed: &mut Bed, name: &str) -> Result<(), Status> {
    let key = format!("{name}-key");
    let mounts = bed.prepare(&key, "", labels(&[])).await?;
    fs::write(Path::new(&mounts[0].source).join("file"), name).ok();
    bed.commit(name, &key, labels(&[])).await
}

/// Everything that was answered is there, and every record has its directory.
async fn check(bed: &mut Bed, answered: &BTreeSet<String>) {
    let listed = bed.list(&[]).await.expect("listed");
    let names: BTreeSet<String> = listed.iter().map(|info| info.name.clone()).collect();
    let missing: Vec<_> = answered.difference(&names).collect();
    assert!(missing.is_empty(), "{missing:?} were answered and are gone:\n{}", bed.log());
    for info in listed {
        let key = format!("look-{}", info.name);
        if info.kind() == Kind::Committed {
            // Files of a layer are on the disk when the kernel likes; without them there is an error that says what to do.
            match bed.view(&key, &info.name).await {
                Ok(mounts) => drop(mounted(&mounts)),
                Err(status) => {
                    assert!(status.message().contains("pull it again"), "{status:?}");
                    continue;
                }
            }
            bed.remove(&key).await.expect("removed");
        }
    }
}

fn named(status: &Status, reason: &str) {
    let text = status.message();
    assert!(text.contains(reason), "{status:?}");
    assert!(text.contains("metadata.redb") || text.contains("/snapshots"), "what failed is not named: {status:?}");
}

#[tokio::test]
async fn a_full_disk_is_told_by_name_and_needs_no_restart_once_there_is_room() {
    let Some((mut bed, _disk)) = bed_on_a_disk().await else { return };
    let mut answered = BTreeSet::new();
    layer(&mut bed, "before").await.expect("there is room");
    answered.insert("before".to_owned());
    let filler = bed.root().join("filler");
    let mut file = fs::File::create(&filler).expect("made");
    while std::io::Write::write_all(&mut file, &[7; 4096]).is_ok() {}
    drop(file);
    let refused = loop {
        let name = format!("full-{}", answered.len());
        match layer(&mut bed, &name).await {
            Ok(()) => answered.insert(name),
            Err(status) => break status,
        };
        assert!(answered.len() < 3000, "the disk is never full");
    };
    named(&refused, "No space left");
    assert_eq!(refused.code(), Code::Unknown);
    fs::remove_file(&filler).expect("removed");
    layer(&mut bed, "after").await.expect("there is room again");
    answered.insert("after".to_owned());
    check(&mut bed, &answered).await;
    bed.kill();
    bed.start().await;
    check(&mut bed, &answered).await;
}

#[tokio::test]
async fn a_disk_that_turns_read_only_is_told_by_name_and_comes_back_whole() {
    let Some((mut bed, disk)) = bed_on_a_disk().await else { return };
    let mut answered = BTreeSet::new();
    for number in 0..5 {
        layer(&mut bed, &format!("layer-{number}")).await.expect("made");
        answered.insert(format!("layer-{number}"));
    }
    disk.find_error();
    let begun = Instant::now();
    let refused = layer(&mut bed, "late").await.expect_err("nothing can be written");
    assert!(begun.elapsed() < Duration::from_secs(5));
    named(&refused, "Read-only file system");
    bed.kill();
    disk.start_again();
    bed.start().await;
    check(&mut bed, &answered).await;
    layer(&mut bed, "late").await.expect("made");
}

/// Lets system calls of a program fail until dropped.
struct Injected(Child);

impl Injected {
    fn into(pid: i32, calls: &str, when: &str) -> Self {
        let inject = format!("inject={calls}:error=EIO:when={when}");
        let mut strace = Command::new("strace");
        strace.args([
            "-f",
            "-q",
            "-p",
            &pid.to_string(),
            "-e",
            &format!("trace={calls}"),
            "-e",
            &inject,
            "-o",
            "/dev/null",
        ]);
        let child = strace.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("strace starts");
        let status = format!("/proc/{pid}/status");
        let traced = || fs::read_to_string(&status).is_ok_and(|text| !text.contains("TracerPid:\t0"));
        let begun = Instant::now();
        while !traced() {
            assert!(begun.elapsed() < Duration::from_secs(10), "strace does not attach");
            std::thread::sleep(Duration::from_millis(10));
        }
        // All threads are attached one after another.
        std::thread::sleep(Duration::from_millis(200));
        Self(child)
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        bed::signal(i32::try_from(self.0.id()).expect("small"), nix::sys::signal::Signal::SIGINT);
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn writes_and_syncs_that_fail_lose_nothing_that_was_answered() {
    if !may_mount() || !has("strace") {
        return;
    }
    let mut bed = Bed::plain().await;
    let mut answered = BTreeSet::new();
    // Every second call fails, then all of them, of each kind that the records use.
    for (round, (calls, when)) in
        [("fdatasync,fsync", "2+2"), ("fdatasync,fsync", "1+"), ("pwrite64", "3+3"), ("pwrite64", "1+")]
            .into_iter()
            .enumerate()
    {
        let mut failed = 0;
        {
            let _injected = Injected::into(bed.pid(), calls, when);
            for number in 0..12 {
                let name = format!("{round}-{number}");
                match layer(&mut bed, &name).await {
                    Ok(()) => {
                        answered.insert(name);
                    }
                    Err(status) => {
                        failed += 1;
                        assert!(
                            matches!(status.code(), Code::Unknown | Code::NotFound | Code::AlreadyExists),
                            "{status:?}"
                        );
                    }
                }
            }
        }
        assert!(failed > 0, "no {calls} failed");
        let name = format!("{round}-after");
        layer(&mut bed, &name).await.expect("the disk is well again, without a restart");
        answered.insert(name);
        check(&mut bed, &answered).await;
        assert!(!bed.log().contains("panicked"), "{}", bed.log());
    }
    bed.kill();
    bed.start().await;
    check(&mut bed, &answered).await;
}

#[tokio::test]
async fn a_power_cut_takes_nothing_that_was_answered() {
    let Some((mut bed, disk)) = bed_on_a_disk().await else { return };
    let mut answered = BTreeSet::new();
    for round in 0..4 {
        for number in 0..3 + round {
            let name = format!("{round}-{number}");
            layer(&mut bed, &name).await.expect("made");
            answered.insert(name);
        }
        bed.prepare(&format!("{round}-active"), "", labels(&[])).await.expect("prepared");
        answered.insert(format!("{round}-active"));
        disk.cut_power();
        layer(&mut bed, "lost").await.expect_err("there is no disk");
        bed.kill();
        disk.start_again();
        bed.start().await;
        check(&mut bed, &answered).await;
        let active = bed.mounts(&format!("{round}-active")).await.expect("mounts");
        let at = mounted(&active);
        fs::write(at.path().join("new"), "x").expect("a container may write");
    }
}

#[tokio::test]
async fn a_clock_that_jumps_by_a_day_changes_nothing_but_times() {
    let library = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"].map(|dir| Path::new(dir).join(FAKETIME));
    let Some(library) = library.into_iter().find(|path| path.exists()) else {
        has("faketime");
        return;
    };
    if !may_mount() {
        return;
    }
    let mut bed = Bed::unstarted(Path::new("/bin/true"), &localfs_template(Path::new("/nonexistent")), &[]);
    let clock = bed.dir.path().join("clock");
    fs::write(&clock, "+0").expect("written");
    bed.environment = [
        ("LD_PRELOAD", library.to_str().expect("text")),
        ("FAKETIME_TIMESTAMP_FILE", clock.to_str().expect("text")),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .to_vec();
    bed.start().await;
    let mut answered = BTreeSet::new();
    let mut told = 0;
    for (number, jump) in ["+0", "+1d", "-1d", "+0"].into_iter().enumerate() {
        fs::write(&clock, jump).expect("written");
        let name = format!("layer-{number}");
        layer(&mut bed, &name).await.expect("made");
        answered.insert(name.clone());
        let before = bed.stat(&name).await.expect("known");
        told = told.max(before.created_at.as_ref().map_or(0, |time| time.seconds));
        fs::write(&clock, "-2d").expect("written");
        let after = bed.update(before.clone(), &["labels"]).await.expect("updated");
        let moment = |info: &Info| info.updated_at.as_ref().map(|time| (time.seconds, time.nanos));
        assert!(moment(&after) > moment(&before), "the time of a change went back");
        check(&mut bed, &answered).await;
    }
    let now = std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    assert!(u64::try_from(told).expect("positive") > now + 80_000, "the clock of the program did not jump");
}
