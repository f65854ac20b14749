//! The real program on the real kernel: images mounted, read, blocked, corrupted, and taken away under their readers.
//!
//! These tests need root and `/dev/fuse`, and say so where they are skipped.

mod daemon;
mod disk;
mod disks;
mod fixture;
mod kills;
mod origin;
mod outages;
mod readers;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use daemon::{Place, can_mount, wait_for};
use fixture::{describe, differences, file, fixtures, manifest};
use nix::sys::signal::Signal;
use nydusd::api::MountRequest;
use nydusd::api::types::DaemonState;
use origin::{Mood, Origin};
use readers::reader;

/// What directory builds of `base` show differently from their source (fixtures' README).
const BUILT: &[&str] = &["mtime:/", "mtime_nsec:/", "nlink:/hard/sym", "nlink:/hard/sym-link2"];

/// The same for builds from a tar.
const FROM_TAR: &[&str] = &["mtime_nsec", "mtime:/times/before1970", "mtime:/"];

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Mounts a variant from the command line and returns what differs.
fn mount_and_compare(bootstrap: &Path, blobs: &Path, want: &str, known: &[&str]) -> Vec<String> {
    let place = Place::new();
    let mut daemon = place.start_with(bootstrap, &place.localfs(blobs));
    let found = differences(&describe(&place.mnt()), &manifest(want), known);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", place.log());
    found
}

#[test]
fn images_of_the_established_builder_show_every_attribute_and_byte() {
    if !can_mount() {
        return;
    }
    for variant in [
        "v6-zstd",
        "v6-lz4_block",
        "v6-none",
        "v6-prefetch",
        "v6-toc",
        "v5-lz4_block",
        "v5-zstd",
        "v5-prefetch",
        "v5-aligned",
    ] {
        let found =
            mount_and_compare(&file(variant, "bootstrap"), &file(variant, "blobs"), "manifest-base.jsonl", BUILT);
        assert_eq!(found, Vec::<String>::new(), "{variant}");
    }
    let found =
        mount_and_compare(&file("v6-tar", "bootstrap"), &file("v6-tar", "blobs"), "manifest-base-tar.jsonl", FROM_TAR);
    assert_eq!(found, Vec::<String>::new(), "v6-tar");
}

#[test]
fn images_without_a_cache_are_read_in_full_and_leave_nothing() {
    if !can_mount() {
        return;
    }
    for (variant, kind) in [("v5-lz4_block", ""), ("v6-zstd", "dummycache")] {
        let place = Place::new();
        let mut config = place.localfs(&file(variant, "blobs"));
        config["device"]["cache"]["type"] = kind.into();
        config["fs_prefetch"] = serde_json::json!({"enable": true, "threads_count": 4, "prefetch_all": true});
        let mut daemon = place.start_with(&file(variant, "bootstrap"), &config);
        let found = differences(&describe(&place.mnt()), &manifest("manifest-base.jsonl"), BUILT);
        assert_eq!(found, Vec::<String>::new(), "{variant}");
        daemon.signal(Signal::SIGTERM);
        assert_eq!(daemon.wait().code(), Some(0), "{}", place.log());
        assert_eq!(std::fs::read_dir(place.path("cache")).unwrap().count(), 0, "{variant}");
    }
}

#[test]
fn merged_images_and_images_inside_their_blob_are_mounted() {
    if !can_mount() {
        return;
    }
    // The two layers' blobs in one folder, as a registry would hold them.
    let blobs = tempfile::tempdir().unwrap();
    for layer in ["layer1", "layer2"] {
        for blob in std::fs::read_dir(file("merge6", layer).join("blobs")).unwrap() {
            let blob = blob.unwrap();
            std::fs::copy(blob.path(), blobs.path().join(blob.file_name())).unwrap();
        }
    }
    let known = &["mtime:/", "mtime_nsec:/"];
    let found = mount_and_compare(&file("merge6", "bootstrap"), blobs.path(), "out/merge6/mount.jsonl", known);
    assert_eq!(found, Vec::<String>::new(), "merge6");
    for variant in ["v6-inline", "v5-inline"] {
        let dir = file(variant, "blobs");
        let blob = std::fs::read_dir(&dir).unwrap().next().unwrap().unwrap().path();
        let found = mount_and_compare(&blob, &dir, &format!("out/{variant}/mount.jsonl"), known);
        assert_eq!(found, Vec::<String>::new(), "{variant}");
    }
}

#[test]
fn images_of_every_kind_are_mounted() {
    if !can_mount() {
        return;
    }
    // Some refer to blobs of others: all in one folder.
    let blobs = tempfile::tempdir().unwrap();
    let variants = [
        ("chunk-dict", "out/chunk-dict/mount.jsonl", &["mtime:/", "mtime_nsec:/"][..]),
        ("parent-oci", "out/parent-oci/mount.jsonl", &["mtime:/", "mtime_nsec:/"]),
        ("v6-prefetch-root", "out/v6-prefetch-root/mount.jsonl", &["mtime:/", "mtime_nsec:/"]),
        ("v5-prefetch-blob", "out/v5-prefetch-blob/mount.jsonl", &["mtime:/", "mtime_nsec:/"]),
        ("v6-empty", "out/v6-empty/mount.jsonl", &["mtime:/", "mtime_nsec:/"]),
        ("v6-meta-only", "out/v6-meta-only/mount.jsonl", &["mtime:/", "mtime_nsec:/"]),
        ("v6-batch", "manifest-base.jsonl", BUILT),
        ("v6-zran", "manifest-base-tar.jsonl", FROM_TAR),
    ];
    for variant in variants.iter().map(|(variant, ..)| *variant).chain(["v6-zstd", "v6-lz4_block", "v6-none"]) {
        for blob in std::fs::read_dir(file(variant, "blobs")).into_iter().flatten() {
            let blob = blob.unwrap();
            std::fs::copy(blob.path(), blobs.path().join(blob.file_name())).unwrap();
        }
    }
    for (variant, want, known) in variants {
        let found = mount_and_compare(&file(variant, "bootstrap"), blobs.path(), want, known);
        assert_eq!(found, Vec::<String>::new(), "{variant}");
    }
}

#[test]
fn the_mount_line_is_the_known_one() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let _daemon = place.start_with(&file("v6-zstd", "bootstrap"), &place.localfs(&file("v6-zstd", "blobs")));
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let line = format!(
        "rafs {} fuse ro,nosuid,nodev,noatime,user_id=0,group_id=0,default_permissions,allow_other,max_read=1052672 0 0",
        place.mnt().display()
    );
    assert!(mounts.lines().any(|other| other == line), "{line}\n{mounts}");
    let error = File::create(place.mnt().join("new")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EROFS as i32));
}

#[test]
fn one_daemon_serves_many_images_and_gives_them_back() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let daemon = place.start(&[]);
    let client = daemon.client();
    let info = block_on(client.info()).unwrap();
    assert_eq!((info.state, info.backend_collection.map(|mounts| mounts.len())), (DaemonState::Running, Some(0)));
    let config = place.localfs(&file("v6-zstd", "blobs")).to_string();
    let request = MountRequest::rafs(file("v6-zstd", "bootstrap").to_str().unwrap(), config);
    for mountpoint in ["/1", "/deep/er/2"] {
        block_on(client.mount(mountpoint, &request)).unwrap();
        assert!(block_on(client.mount(mountpoint, &request)).unwrap_err().already_mounted());
    }
    let one = describe(&place.mnt().join("1"));
    assert_eq!(differences(&one, &manifest("manifest-base.jsonl"), BUILT), Vec::<String>::new());
    assert_eq!(one, describe(&place.mnt().join("deep/er/2")));
    let info = block_on(client.info()).unwrap();
    assert_eq!(info.backend_collection.unwrap().into_keys().collect::<Vec<_>>(), ["/1", "/deep/er/2"]);
    assert!(block_on(client.fs_metrics(None)).is_err(), "two are mounted");
    assert!(block_on(client.fs_metrics(Some("/1"))).unwrap().data_read > 10_000_000);
    assert!(block_on(client.cache_metrics(Some("/1"))).unwrap().whole_hits > 0);

    // An open file outlives its image only as an error, never as somebody else's bytes.
    let open = File::open(place.mnt().join("1/hl-in-root")).unwrap();
    block_on(client.umount("/1")).unwrap();
    assert!(block_on(client.umount("/1")).unwrap_err().not_mounted());
    assert!(std::fs::metadata(place.mnt().join("1/hl-in-root")).is_err());
    drop(open);
    assert!(std::fs::read_dir(place.mnt()).unwrap().all(|entry| entry.unwrap().file_name() == "deep"));
    block_on(client.mount("/1", &request)).unwrap();
    assert_eq!(one, describe(&place.mnt().join("1")));
    block_on(client.umount("/deep/er/2")).unwrap();
    assert!(!place.mnt().join("deep").exists(), "directories made for a mount go with it");
}

#[test]
fn what_is_wrong_with_an_image_is_said_at_the_start() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let config = place.localfs(&file("v6-zstd", "blobs"));
    std::fs::write(place.path("config.json"), config.to_string()).unwrap();
    std::fs::write(place.path("empty"), b"").unwrap();
    std::fs::write(place.path("noise"), [0x5a; 9000]).unwrap();
    let whole = std::fs::read(file("v6-zstd", "bootstrap")).unwrap();
    std::fs::write(place.path("cut"), &whole[..whole.len() / 3]).unwrap();
    for name in ["missing", "empty", "noise"] {
        let bootstrap = place.path(name);
        let config = place.path("config.json");
        let arguments = ["--bootstrap", bootstrap.to_str().unwrap(), "--config", config.to_str().unwrap()];
        let mut daemon = place.spawn(&arguments);
        assert_eq!(daemon.wait().code(), Some(1), "{name}");
        let error = daemon.stderr();
        assert!(error.contains(name) && error.starts_with("Error: "), "{error}");
        assert!(!place.path("api.sock").exists());
    }
    // A truncated bootstrap is either refused or gives errors, and never ends the daemon.
    let daemon = place.start(&[]);
    let request = MountRequest::rafs(place.path("cut").to_str().unwrap(), config.to_string());
    if block_on(daemon.client().mount("/cut", &request)).is_ok() {
        let _ = Command::new("find").arg(place.mnt()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
    assert_eq!(block_on(daemon.client().info()).unwrap().state, DaemonState::Running);
}

/// Starts a daemon whose blobs come from `origin`.
fn over<'a>(place: &'a Place, origin: &Origin) -> daemon::Daemon<'a> {
    place.start_with(&file("v6-none", "bootstrap"), &place.config(origin.backend()))
}

/// Returns regular files of some size, largest first.
fn large_files(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for (path, row) in manifest("manifest-base.jsonl") {
        if row["type"] == "reg" && row["size"].as_u64().unwrap() > 4096 {
            let name = hex::decode(path).unwrap();
            files.push((
                row["size"].as_u64().unwrap(),
                root.join(std::ffi::OsStr::new(std::str::from_utf8(&name).unwrap_or(""))),
            ));
        }
    }
    files.retain(|(_, path)| path != root && path.exists());
    files.sort_by_key(|(size, _)| std::cmp::Reverse(*size));
    files.into_iter().map(|(_, path)| path).collect()
}

#[test]
fn readers_in_parallel_get_the_same_bytes_and_ask_once() {
    if !can_mount() {
        return;
    }
    let origin = Origin::serve(file("v6-none", "blobs"), Mood::Serve);
    let place = Place::new();
    let _daemon = over(&place, &origin);
    let wanted = manifest("manifest-base.jsonl");
    let trees: Vec<_> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..8).map(|_| scope.spawn(|| describe(&place.mnt()))).collect();
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    for tree in &trees {
        assert_eq!(differences(tree, &wanted, BUILT), Vec::<String>::new());
    }
    let requests = origin.requests();
    assert!(requests < 100, "{requests} requests for a blob of 10 MB");
}

#[test]
fn a_blocked_source_blocks_neither_warm_reads_nor_metadata_nor_the_api() {
    if !can_mount() {
        return;
    }
    let origin = Origin::serve(file("v6-none", "blobs"), Mood::Serve);
    let place = Place::new();
    let daemon = over(&place, &origin);
    let files = large_files(&place.mnt());
    let (cold, warm) = (&files[0], &files[files.len() - 1]);
    let wanted = std::fs::read(warm).unwrap();
    origin.set(Mood::Hold);
    // More readers than the daemon has threads to begin with.
    let mut blocked: Vec<_> = (0..24).map(|_| reader(cold)).collect();
    wait_for("a request that is held", || origin.held() > 0);
    wait_for("reads under way", || !block_on(daemon.client().inflight()).unwrap().is_empty());
    let began = Instant::now();
    // Directly from the daemon, not from the page cache.
    let direct = File::options().read(true).open(warm).unwrap();
    nix::fcntl::posix_fadvise(&direct, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    let mut got = vec![0; wanted.len()];
    direct.read_exact_at(&mut got, 0).unwrap();
    assert!(got == wanted);
    assert!(std::fs::read_dir(place.mnt()).unwrap().count() > 10);
    assert_eq!(block_on(daemon.client().info()).unwrap().state, DaemonState::Running);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());

    // A killed reader does not wait for the source.
    let victim = &mut blocked[0];
    victim.kill().unwrap();
    let began = Instant::now();
    wait_for("the end of a killed reader", || victim.try_wait().unwrap().is_some());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());

    origin.set(Mood::Serve);
    for mut reader in blocked.drain(1..) {
        assert!(reader.wait().unwrap().success());
    }
}

#[test]
fn the_end_comes_within_five_seconds_with_reads_under_way() {
    if !can_mount() {
        return;
    }
    for how in ["SIGTERM", "exit", "SIGINT"] {
        let origin = Origin::serve(file("v6-none", "blobs"), Mood::Hold);
        let place = Place::new();
        let mut daemon = over(&place, &origin);
        let mut blocked = reader(&large_files(&place.mnt())[0]);
        wait_for("a request that is held", || origin.held() > 0);
        let began = Instant::now();
        match how {
            "exit" => block_on(daemon.client().exit()).unwrap(),
            "SIGINT" => daemon.signal(Signal::SIGINT),
            _ => daemon.signal(Signal::SIGTERM),
        }
        assert_eq!(daemon.wait().code(), Some(0), "{how}");
        assert!(began.elapsed() < Duration::from_secs(5), "{how}: {:?}", began.elapsed());
        assert!(!blocked.wait().unwrap().success(), "{how}: its reader got an error");
        assert!(!place.path("api.sock").exists(), "{how}");
        let mounted = std::fs::read_to_string("/proc/mounts").unwrap().contains(place.mnt().to_str().unwrap());
        assert_eq!(mounted, how == "exit", "{how}: only `exit` leaves the mount for a successor");
    }
}

#[test]
fn an_unmount_by_somebody_else_ends_the_daemon() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let mut daemon = place.start(&[]);
    nix::mount::umount(&place.mnt()).unwrap();
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(!place.path("api.sock").exists());
}

#[test]
fn a_wrong_byte_is_an_error_that_names_blob_and_chunk_and_is_not_remembered() {
    if !can_mount() {
        return;
    }
    let blobs = tempfile::tempdir().unwrap();
    let source = std::fs::read_dir(file("v6-none", "blobs")).unwrap().next().unwrap().unwrap();
    let blob = blobs.path().join(source.file_name());
    let good = std::fs::read(source.path()).unwrap();
    let place = Place::new();
    // Where the largest file lies in the uncompressed blob.
    let mut bad = good.clone();
    let daemon_place = Place::new();
    let (path, at) = {
        let _daemon =
            daemon_place.start_with(&file("v6-none", "bootstrap"), &daemon_place.localfs(&file("v6-none", "blobs")));
        let path = large_files(&daemon_place.mnt())[0].clone();
        let head = &std::fs::read(&path).unwrap()[..64];
        let at = good.windows(64).position(|window| window == head).unwrap();
        (path.strip_prefix(daemon_place.mnt()).unwrap().to_owned(), at)
    };
    bad[at + 7] ^= 1;
    std::fs::write(&blob, &bad).unwrap();
    let daemon = place.start_with(&file("v6-none", "bootstrap"), &place.localfs(blobs.path()));
    let victim = place.mnt().join(&path);
    let error = std::fs::read(&victim).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EIO as i32));
    let log = place.log();
    let line =
        log.lines().find(|line| line.contains("ERROR") && line.contains("damaged")).unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains(source.file_name().to_str().unwrap()) && line.contains("chunk"), "{line}");
    assert!(!block_on(daemon.client().events()).unwrap().errors.is_empty());
    // The rest is readable meanwhile.
    let mut others = 0;
    for other in large_files(&place.mnt()).iter().filter(|other| **other != victim) {
        others += usize::from(std::fs::read(other).is_ok());
    }
    assert!(others > 3, "{others} other files were readable");
    std::fs::write(&blob, &good).unwrap();
    let mended = describe(&place.mnt());
    assert_eq!(differences(&mended, &manifest("manifest-base.jsonl"), BUILT), Vec::<String>::new());
}

#[test]
fn a_source_that_lies_is_met_with_errors_and_believed_again_when_it_does_not() {
    if !can_mount() {
        return;
    }
    let origin = Origin::serve(file("v6-none", "blobs"), Mood::Flip);
    let place = Place::new();
    let _daemon = over(&place, &origin);
    let path = &large_files(&place.mnt())[0];
    let error = std::fs::read(path).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::errno::Errno::EIO as i32));
    origin.set(Mood::Serve);
    let found = differences(&describe(&place.mnt()), &manifest("manifest-base.jsonl"), BUILT);
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn a_killed_daemon_is_succeeded_by_one_with_the_same_arguments() {
    if !can_mount() {
        return;
    }
    let place = Place::new();
    let config = place.localfs(&file("v6-zstd", "blobs"));
    let mut daemon = place.start_with(&file("v6-zstd", "bootstrap"), &config);
    let before = describe(&place.mnt());
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    assert!(nix::sys::statvfs::statvfs(&place.mnt()).is_err(), "nobody serves the old mount");
    assert!(place.path("api.sock").exists(), "a killed daemon leaves its socket");
    let mut daemon = place.spawn(&[
        "--bootstrap",
        file("v6-zstd", "bootstrap").to_str().unwrap(),
        "--config",
        place.path("config.json").to_str().unwrap(),
    ]);
    wait_for("the new daemon", || std::os::unix::net::UnixStream::connect(place.path("api.sock")).is_ok());
    assert_eq!(describe(&place.mnt()), before);
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(place.mnt().to_str().unwrap()), "nothing is left mounted");
}

#[test]
fn prefetch_fetches_everything_without_a_reader() {
    if !can_mount() {
        return;
    }
    let origin = Origin::serve(file("v6-none", "blobs"), Mood::Serve);
    let place = Place::new();
    let mut config = place.config(origin.backend());
    config["fs_prefetch"] = serde_json::json!({"enable": true, "threads_count": 4});
    let daemon = place.start_with(&file("v6-none", "bootstrap"), &config);
    wait_for("the prefetch to end", || {
        let cache = block_on(daemon.client().cache_metrics(None)).unwrap();
        cache.prefetch_end_time_secs > 0 && cache.prefetch_data_amount > 0
    });
    origin.set(Mood::Hold);
    let found = differences(&describe(&place.mnt()), &manifest("manifest-base.jsonl"), BUILT);
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn help_and_version_of_the_programs_are_there() {
    let output = Command::new(env!("CARGO_BIN_EXE_nydusd")).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("nydusd Version: \tv"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("Git Commit:")), "{text}");
    let output = Command::new(env!("CARGO_BIN_EXE_nydusd")).args(["singleton", "--fscache", "/x"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr).unwrap().contains("not supported"));
    let mut text = String::new();
    let mut ctl = Command::new(env!("CARGO_BIN_EXE_nydusctl"))
        .args(["-S", "/nonexistent/sock", "info"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    ctl.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(ctl.wait().unwrap().code(), Some(1));
    assert!(text.contains("/nonexistent/sock"), "{text}");
    let _ = fixtures;
}
