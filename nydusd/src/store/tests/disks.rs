//! Cache directories in trouble.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use super::fake::Fake;
use super::*;
use crate::store::ReadError;

/// A small tmpfs, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// `None`, with the reason printed, where mounting is not allowed.
    #[expect(clippy::print_stdout, reason = "a skipped test says why")]
    fn new(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", options, "shoal-test"]).arg(dir.path()).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(dir));
        }
        println!("skipped: cannot mount a tmpfs here (root is needed)");
        None
    }

    fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }

    fn remount(&self, options: &str) {
        let done = Command::new("mount").arg("-o").arg(format!("remount,{options}")).arg(self.0.path()).status();
        assert!(done.unwrap().success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn large() -> Sample {
    Sample::new(11, &[100_000; 20])
}

#[test]
fn a_full_disk_costs_requests_and_no_read() {
    let Some(disk) = Tmpfs::new("size=512k") else { return };
    let (lab, sample) = (Lab::new(&disk.path(), exact(), Fake::default()), large());
    let blob = lab.open(&sample);
    for _ in 0..2 {
        for at in (0..sample.len()).step_by(30_000) {
            sample.check(&blob, at..(at + 30_000).min(sample.len()));
        }
    }
    assert!(blob.counters().unwritten_chunks.get() > 0);
    // What the file did not take is kept at hand: pieces of a chunk do not fetch it again and again.
    assert_eq!(lab.requests(), 20);
    assert!(matches!(blob.ensure(0..sample.len()), Err(ReadError::Uncached { .. })));
    disk.remount("size=64m");
    blob.ensure(0..sample.len()).unwrap();
    assert_eq!(lab.requests(), 20, "what is at hand is written without asking again");
    lab.end(vec![blob]);
    let lab = Lab::new(&disk.path(), exact(), Fake::default());
    let blob = lab.open(&sample);
    sample.check(&blob, 0..sample.len());
    assert_eq!(lab.requests(), 0);
}

#[test]
fn a_disk_that_turns_read_only_costs_requests_and_no_read() {
    let Some(disk) = Tmpfs::new("size=64m") else { return };
    let (lab, sample) = (Lab::new(&disk.path(), exact(), Fake::default()), large());
    // Nothing is open for writing there, so that the kernel agrees to turn it over.
    disk.remount("ro");
    let blob = lab.open(&sample);
    assert!(blob.file().is_none());
    sample.check(&blob, 0..sample.len());
    sample.check(&blob, 0..1000);
    assert_eq!(lab.requests(), 20);
    disk.remount("rw");
    drop(blob);
    let blob = lab.open(&sample);
    blob.ensure(0..sample.len()).unwrap();
}

#[test]
fn a_cache_file_cut_under_us_gives_no_wrong_byte_and_no_error() {
    for cut in [0, 1, 5000, 200_000] {
        let dir = tempfile::tempdir().unwrap();
        let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), large());
        let blob = lab.open(&sample);
        sample.check(&blob, 0..sample.chunks[9].plain.end);
        let path = dir.path().join(&blob.file_names()[0]);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        // Found by a reader of what was there,
        file.set_len(cut).unwrap();
        sample.check(&blob, 0..sample.chunks[9].plain.end);
        // and by a writer of what was not.
        file.set_len(cut).unwrap();
        sample.check(&blob, sample.chunks[15].plain.clone());
        sample.check(&blob, 0..sample.len());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), sample.len());
        lab.end(vec![blob]);
        let lab = Lab::new(dir.path(), exact(), Fake::default());
        sample.check(&lab.open(&sample), 0..sample.len());
        assert_eq!(lab.requests(), 0, "what came after the cut is kept");
    }
}

#[test]
fn whatever_another_program_does_to_the_file_under_us_gives_no_wrong_byte_and_no_error() {
    type Damage = fn(&std::fs::File, &Sample);
    let damages: [(&str, Damage, usize); 4] = [
        (
            "a hole",
            |file, _| {
                let hole =
                    nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
                nix::fcntl::fallocate(file, hole, 0, 4096).unwrap();
            },
            1,
        ),
        ("a flipped bit", |file, sample| file.write_all_at(b"?", sample.chunks[4].plain.start + 7).unwrap(), 1),
        ("another blob", |file, _| file.write_all_at(&Sample::new(12, &[100_000; 20]).plain, 0).unwrap(), 20),
        (
            "cut and grown",
            |file, sample| {
                file.set_len(0).unwrap();
                file.set_len(sample.len()).unwrap();
            },
            20,
        ),
    ];
    for (what, damage, lost) in damages {
        for found_by_a_writer in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), large());
            let blob = lab.open(&sample);
            let known = if found_by_a_writer { 0..sample.chunks[18].plain.end } else { 0..sample.len() };
            sample.check(&blob, known);
            let path = dir.path().join(&blob.file_names()[0]);
            damage(&std::fs::OpenOptions::new().write(true).open(&path).unwrap(), &sample);
            if found_by_a_writer {
                sample.check(&blob, sample.chunks[19].plain.clone());
            }
            for at in (0..sample.len()).step_by(70_000) {
                sample.check(&blob, at..(at + 70_000).min(sample.len()));
            }
            assert!(
                lab.requests() <= 20 + lost,
                "{what}: {} requests: what was right was fetched again",
                lab.requests()
            );
            // An orderly end does not vouch for what others wrote.
            damage(&std::fs::OpenOptions::new().write(true).open(&path).unwrap(), &sample);
            lab.end(vec![blob]);
            let lab = Lab::new(dir.path(), exact(), Fake::default());
            sample.check(&lab.open(&sample), 0..sample.len());
        }
    }
}

#[test]
fn zeros_that_a_disk_gives_instead_of_an_error_are_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), large());
    let blob = lab.open(&sample);
    sample.check(&blob, 0..sample.len());
    let file = std::fs::OpenOptions::new().write(true).open(dir.path().join(&blob.file_names()[0])).unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    // Nothing but the bytes tells of it.
    file.write_all_at(&[0; 8192], sample.chunks[3].plain.start + 4096).unwrap();
    file.set_modified(time).unwrap();
    for at in (0..sample.len()).step_by(4096) {
        sample.check(&blob, at..(at + 4096).min(sample.len()));
    }
    assert_eq!(lab.requests(), 21);
    // Many chunks of one read.
    let time = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&vec![0; sample.plain.len()], 0).unwrap();
    file.set_modified(time).unwrap();
    sample.check(&blob, 0..sample.len());
}

#[test]
fn a_directory_whose_disk_is_in_trouble_is_no_error_and_a_wrong_path_is() {
    let Some(disk) = Tmpfs::new("size=1m") else { return };
    disk.remount("ro");
    let sample = Sample::small();
    let lab = Lab::new(&disk.path().join("missing"), exact(), Fake::default());
    sample.check(&lab.open(&sample), 0..sample.len());
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Store::open(file.path().join("below"), lab.runtime().handle().clone()).unwrap_err().to_string();
    assert!(error.contains("work_dir") && error.contains("below"), "{error}");
}

#[test]
fn things_that_are_not_files_do_not_stop_a_read() {
    let sample = Sample::small();
    for name in [format!("{}.blob.data", sample.info.id), format!("{}.chunk_map", sample.info.id)] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(name)).unwrap();
        let lab = Lab::new(dir.path(), exact(), Fake::default());
        sample.check(&lab.open(&sample), 0..sample.len());
    }
}

#[test]
fn names_too_long_for_a_file_are_cached_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut sample = Sample::small();
    sample.info.id = "x".repeat(255).parse().unwrap();
    let lab = Lab::new(dir.path(), exact(), Fake::default());
    let blob = lab.open(&sample);
    blob.ensure(0..sample.len()).unwrap();
    sample.check(&blob, 0..sample.len());
}

#[test]
fn a_deleted_file_serves_those_who_have_it_open_and_the_next_image_gets_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let blob = lab.open(&sample);
    sample.check(&blob, 0..5000);
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    sample.check(&blob, 0..sample.len());
    lab.end(vec![blob]);
    let lab = Lab::new(dir.path(), exact(), Fake::default());
    sample.check(&lab.open(&sample), 0..sample.len());
    assert!(lab.requests() > 0);
}
