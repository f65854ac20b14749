//! The cache's disk in trouble, under the real program: what a source can serve is read all the same, and no byte is wrong.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;

use super::BUILT;
use super::daemon::{Daemon, Place, can_mount, has};
use super::disk::{Disk, drop_pages, drop_pages_below};
use super::fixture::{describe, differences, file, manifest};
use super::origin::{Mood, Origin};

/// Tells a program another time than it is.
const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

/// A daemon's place and where its blobs come from.
struct Bed {
    place: Place,
    origin: Origin,
}

impl Bed {
    fn new() -> Self {
        Self { place: Place::new(), origin: Origin::serve(file("v6-none", "blobs"), Mood::Serve) }
    }

    fn cache(&self) -> PathBuf {
        self.place.path("cache")
    }

    fn start(&self) -> Daemon<'_> {
        self.start_as(Command::new(env!("CARGO_BIN_EXE_nydusd")))
    }

    fn start_as(&self, command: Command) -> Daemon<'_> {
        self.place.start_as(command, &file("v6-none", "bootstrap"), &self.place.config(self.origin.backend()))
    }

    /// Reads everything through the daemon, not from the kernel's memory, and compares.
    fn check(&self, when: &str) {
        drop_pages_below(&self.place.mnt());
        let found = differences(&describe(&self.place.mnt()), &manifest("manifest-base.jsonl"), BUILT);
        assert_eq!(found, Vec::<String>::new(), "{when}\n{}", self.place.log());
    }

    /// Returns the cache file whose name ends so.
    fn cache_file(&self, end: &str) -> PathBuf {
        let mut all = std::fs::read_dir(self.cache()).unwrap().map(|entry| entry.unwrap().path());
        all.find(|path| path.to_str().unwrap().ends_with(end)).unwrap()
    }

    fn data(&self) -> PathBuf {
        self.cache_file(".blob.data")
    }

    /// Takes the cache file out of memory, so that the disk itself is read.
    fn drop_cache_pages(&self) {
        File::open(self.data()).unwrap().sync_all().unwrap();
        drop_pages(&self.data());
    }

    fn assert_warned(&self, what: &str) {
        let log = self.place.log();
        assert!(log.lines().any(|line| line.contains("WARN") && line.contains(what)), "no warning of {what:?}:\n{log}");
    }

    /// All is served without the source.
    fn check_warm(&self, when: &str) {
        self.origin.set(Mood::Hold);
        self.check(when);
        self.origin.set(Mood::Serve);
    }
}

fn stop(mut daemon: Daemon<'_>) {
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0));
}

/// strace, which makes a system call fail in the daemon that it starts; the daemon is our own child.
fn failing(calls: &str, errno: &str) -> Command {
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qqq", "--seccomp-bpf", "-o", "/dev/null", "-e"]).arg(format!("trace={calls}"));
    command.arg("-e").arg(format!("inject={calls}:error={errno}")).arg(env!("CARGO_BIN_EXE_nydusd"));
    command
}

#[test]
fn a_full_disk_fails_no_read_and_is_used_again_when_it_has_room() {
    if !can_mount() {
        return;
    }
    let bed = Bed::new();
    let disk = Disk::tmpfs(&bed.cache(), "size=2m");
    let daemon = bed.start();
    bed.check("full");
    bed.assert_warned("No space left on device");
    disk.remount("size=64m");
    bed.check("with room");
    bed.check_warm("warm");
    stop(daemon);
}

#[test]
fn a_disk_that_cannot_be_read_any_more_fails_no_read() {
    if !can_mount() || !has(&["mkfs.ext4"]) {
        return;
    }
    let bed = Bed::new();
    let disk = Disk::ext4(&bed.cache(), 64, "errors=continue");
    let _daemon = bed.start();
    bed.check("well");
    let before = bed.origin.requests();
    bed.drop_cache_pages();
    disk.lose_all_behind(2);
    let error = std::fs::read(bed.data()).expect_err("the disk is broken");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    bed.check("broken");
    assert!(bed.origin.requests() > before, "nothing was fetched again: the disk was not broken");
    bed.assert_warned("Input/output error");
}

#[test]
fn writes_that_fail_fail_no_read() {
    if !can_mount() || !has(&["strace"]) {
        return;
    }
    let bed = Bed::new();
    let daemon = bed.start_as(failing("pwrite64", "EIO"));
    bed.check("without writes");
    bed.assert_warned("Input/output error");
    stop(daemon);
    let _daemon = bed.start();
    bed.check("with writes again");
    bed.check_warm("warm");
}

#[test]
fn what_could_not_be_synced_is_not_believed() {
    if !can_mount() || !has(&["strace"]) {
        return;
    }
    let bed = Bed::new();
    let daemon = bed.start_as(failing("fdatasync", "EIO"));
    bed.check("without syncs");
    stop(daemon);
    bed.assert_warned("not synced");
    // As after a crash of the machine: one block never reached the disk, and the time stayed.
    let time = std::fs::metadata(bed.data()).unwrap().modified().unwrap();
    let data = File::options().write(true).open(bed.data()).unwrap();
    data.write_all_at(&[0; 4096], 0).unwrap();
    data.set_modified(time).unwrap();
    let _daemon = bed.start();
    bed.check("with syncs again");
}

#[test]
fn a_disk_that_turns_read_only_in_the_middle_fails_no_read() {
    if !can_mount() || !has(&["mkfs.ext4", "findmnt"]) {
        return;
    }
    let bed = Bed::new();
    let disk = Disk::ext4(&bed.cache(), 64, "errors=remount-ro");
    let daemon = bed.start();
    assert!(std::fs::read(bed.place.mnt().join("hl-in-root")).is_ok());
    disk.find_error();
    std::fs::write(bed.cache().join("probe"), "x").expect_err("the disk is read-only");
    bed.check("read-only");
    bed.check("read-only, again");
    stop(daemon);
    // Not even the files can be made anew.
    let _daemon = bed.start();
    bed.check("read-only from the start");
}

#[test]
fn a_power_cut_leaves_nothing_that_is_believed_wrongly() {
    if !can_mount() || !has(&["mkfs.ext4", "python3"]) {
        return;
    }
    let bed = Bed::new();
    let disk = Disk::ext4(&bed.cache(), 64, "data=ordered");
    let mut daemon = bed.start();
    let files = super::large_files(&bed.place.mnt());
    for path in &files[..files.len() / 2] {
        std::fs::read(path).unwrap();
    }
    disk.cut_power();
    bed.check("without power for the disk");
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    drop(daemon);
    disk.start_again("data=ordered");
    let _daemon = bed.start();
    bed.check("after the cut");
    bed.check_warm("warm");
}

#[test]
fn nothing_on_the_disk_is_mapped_into_memory() {
    if !can_mount() {
        return;
    }
    let bed = Bed::new();
    let daemon = bed.start();
    bed.check("cold");
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.pid())).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_nydusd")).canonicalize().unwrap();
    let strange: Vec<&str> = maps
        .lines()
        .filter(|line| line.split_whitespace().nth(5).is_some_and(|path| path.starts_with('/')))
        .filter(|line| !line.ends_with(program.to_str().unwrap()) && !line.contains(".so"))
        .collect();
    assert_eq!(strange, Vec::<&str>::new(), "a file that shrinks would kill the daemon with SIGBUS");
}

/// What may be done to the files of a cache; `data` and `map` are their paths.
type Damage = fn(data: &Path, map: &Path);

const DAMAGES: [(&str, Damage); 9] = [
    ("a shorter data file", |data, _| open(data).set_len(100_000).unwrap()),
    ("an empty data file", |data, _| open(data).set_len(0).unwrap()),
    ("a longer data file", |data, _| open(data).set_len(std::fs::metadata(data).unwrap().len() + 12_345).unwrap()),
    ("holes", |data, _| {
        for at in 0..8 {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(open(data), hole, at << 20, 8192).unwrap();
        }
    }),
    ("another blob's data", |data, _| {
        let len = usize::try_from(std::fs::metadata(data).unwrap().len()).unwrap();
        std::fs::write(data, vec![0x5a; len]).unwrap();
    }),
    ("flipped bits in the data", |data, _| {
        let file = open(data);
        for at in 0..8 {
            file.write_all_at(b"?", at * 1_000_003).unwrap();
        }
    }),
    ("half a map", |_, map| open(map).set_len(std::fs::metadata(map).unwrap().len() / 2 + 7).unwrap()),
    ("an empty map", |_, map| open(map).set_len(0).unwrap()),
    ("flipped bits in the map", |_, map| {
        let mut bytes = std::fs::read(map).unwrap();
        bytes.iter_mut().step_by(37).for_each(|byte| *byte ^= 4);
        std::fs::write(map, bytes).unwrap();
    }),
];

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn whatever_is_done_to_the_files_of_a_running_daemon_or_between_two_gives_no_wrong_byte() {
    if !can_mount() {
        return;
    }
    for (what, damage) in DAMAGES {
        let bed = Bed::new();
        let daemon = bed.start();
        bed.check("cold");
        damage(&bed.data(), &bed.cache_file(".chunk_map"));
        bed.check(what);
        damage(&bed.data(), &bed.cache_file(".chunk_map"));
        stop(daemon);
        let mut daemon = bed.start();
        bed.check(&format!("{what}, then an orderly end"));
        daemon.signal(Signal::SIGKILL);
        daemon.wait();
        drop(daemon);
        damage(&bed.data(), &bed.cache_file(".chunk_map"));
        let _daemon = bed.start();
        bed.check(&format!("{what}, after a kill"));
    }
}

#[test]
fn a_clock_that_jumps_by_a_day_stops_nothing() {
    if !can_mount() || !has(&[LIBRARY]) {
        return;
    }
    let bed = Bed::new();
    let clock = bed.place.path("clock");
    std::fs::write(&clock, "+0").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nydusd"));
    command.env("LD_PRELOAD", LIBRARY).env("FAKETIME_TIMESTAMP_FILE", &clock).env("FAKETIME_NO_CACHE", "1");
    // A clock that is set moves neither the monotonic one nor the times of files.
    command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1");
    let daemon = bed.start_as(command);
    let files = super::large_files(&bed.place.mnt());
    for (jump, path) in ["+1d", "-1d", "+0"].into_iter().zip(&files) {
        std::fs::write(&clock, jump).unwrap();
        std::fs::read(path).unwrap();
        bed.origin.set(Mood::Hold);
        std::thread::sleep(Duration::from_millis(300));
        bed.origin.set(Mood::Serve);
        std::fs::read(path).unwrap();
    }
    std::fs::write(&clock, "-1d").unwrap();
    bed.check("a day ago");
    stop(daemon);
    let (log, day) = (bed.place.log(), "[2026-07-20".len());
    let days = (log.lines().next().map(|line| &line[..day]), log.lines().last().map(|line| &line[..day]));
    assert_ne!(days.0, days.1, "the clock did not jump");
    let _daemon = bed.start();
    bed.check_warm("today");
}
