//! What the next process finds, and what it believes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use super::fake::Fake;
use super::*;

fn files(dir: &Path, sample: &Sample) -> (std::path::PathBuf, std::path::PathBuf) {
    let data = dir.join(format!("{}.blob.data", sample.info.id));
    let map = dir.join(format!("{}.chunk_map", sample.info.id));
    (data, map)
}

fn filled(dir: &Path, sample: &Sample) -> (Lab, Arc<Blob>) {
    let lab = Lab::new(dir, exact(), Fake::default());
    let blob = lab.open(sample);
    sample.check(&blob, 0..sample.len());
    (lab, blob)
}

/// Opens as the next process and reads all; returns (requests, chunks checked, chunks found stale).
fn reopened(dir: &Path, sample: &Sample) -> (usize, u64, u64) {
    let (lab, blob) = filled(dir, sample);
    let counters = blob.counters();
    let result = (lab.requests(), counters.checked_chunks.get(), counters.stale_chunks.get());
    lab.kill(vec![blob]);
    result
}

#[test]
fn after_an_orderly_end_nothing_is_fetched_or_checked() {
    let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::small());
    let (lab, blob) = filled(dir.path(), &sample);
    lab.end(vec![blob]);
    assert_eq!(reopened(dir.path(), &sample), (0, 0, 0));
    // That process was killed, but had nothing to add.
    assert_eq!(reopened(dir.path(), &sample), (0, 0, 0));
}

#[test]
fn an_unmount_is_an_orderly_end() {
    let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::small());
    let (lab, blob) = filled(dir.path(), &sample);
    drop(blob);
    // The files are made fast beside us; who opens meanwhile shares them.
    lab.kill(Vec::new());
    assert_eq!(reopened(dir.path(), &sample), (0, 0, 0));
}

#[test]
fn after_a_kill_nothing_is_fetched_and_all_is_checked_once() {
    let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::small());
    let (lab, blob) = filled(dir.path(), &sample);
    lab.kill(vec![blob]);
    let lab = Lab::new(dir.path(), exact(), Fake::default());
    let blob = lab.open(&sample);
    assert!(!blob.ready(0..1), "unsure is not ready");
    sample.check(&blob, 0..sample.len());
    sample.check(&blob, 0..sample.len());
    assert_eq!((lab.requests(), blob.counters().checked_chunks.get()), (0, 8));
    lab.end(vec![blob]);
    assert_eq!(reopened(dir.path(), &sample), (0, 0, 0), "checked chunks are believed after the next orderly end");
}

#[test]
fn chunks_that_nobody_checked_are_not_believed_after_an_orderly_end() {
    let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::small());
    let (lab, blob) = filled(dir.path(), &sample);
    lab.kill(vec![blob]);
    let (data, _) = files(dir.path(), &sample);
    File::options().write(true).open(&data).unwrap().write_all_at(b"!", sample.chunks[6].plain.start).unwrap();
    let lab = Lab::new(dir.path(), exact(), Fake::default());
    let blob = lab.open(&sample);
    sample.check(&blob, 0..10);
    lab.end(vec![blob]);
    assert_eq!(reopened(dir.path(), &sample), (1, 7, 1));
}

#[test]
fn whatever_is_done_to_a_sealed_file_breaks_the_seal() {
    type Damage = fn(&File, &Sample);
    let damages: [(&str, Damage, usize); 5] = [
        ("a flipped bit", |file, sample| file.write_all_at(b"?", sample.chunks[4].plain.start + 7).unwrap(), 1),
        (
            "a hole",
            |file, _| {
                let hole =
                    nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
                nix::fcntl::fallocate(file, hole, 0, 4096).unwrap();
            },
            1,
        ),
        (
            "cut and grown",
            |file, sample| {
                file.set_len(0).unwrap();
                file.set_len(sample.len()).unwrap();
            },
            8,
        ),
        ("shorter", |file, sample| file.set_len(sample.chunks[7].plain.start).unwrap(), 1),
        ("longer", |file, sample| file.set_len(sample.len() + 4096).unwrap(), 0),
    ];
    for (what, damage, fetched) in damages {
        let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::small());
        let (lab, blob) = filled(dir.path(), &sample);
        lab.end(vec![blob]);
        let (data, _) = files(dir.path(), &sample);
        damage(&File::options().write(true).open(&data).unwrap(), &sample);
        assert_eq!(reopened(dir.path(), &sample), (fetched, 8, fetched as u64), "{what}");
    }
}

#[test]
fn a_map_does_not_grow_with_the_number_of_kills() {
    let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::new(2, &[10; 400]));
    let (_, map) = files(dir.path(), &sample);
    let mut largest = 0;
    for round in 0..8 {
        assert_eq!(reopened(dir.path(), &sample).0, if round == 0 { 400 } else { 0 });
        largest = largest.max(std::fs::metadata(&map).unwrap().len());
    }
    assert!(largest > 3 * 400 * 64 && largest < 5 * 400 * 64, "{largest}");
}

#[test]
fn another_blobs_files_are_not_believed() {
    let (dir, one, two) =
        (tempfile::tempdir().unwrap(), Sample::small(), Sample::new(8, &[4096, 100, 5000, 1, 70_000, 4096]));
    for sample in [&one, &two] {
        let (lab, blob) = filled(dir.path(), sample);
        lab.end(vec![blob]);
    }
    let ((data, map), (other_data, other_map)) = (files(dir.path(), &one), files(dir.path(), &two));
    std::fs::rename(&other_map, &map).unwrap();
    assert_eq!(reopened(dir.path(), &one), (8, 0, 0), "records of another blob are no records");
    std::fs::rename(&other_data, &data).unwrap();
    assert_eq!(reopened(dir.path(), &one), (8, 8, 8));
}

#[test]
fn any_flipped_byte_and_any_cut_of_the_map_costs_a_fetch_at_most() {
    let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::new(5, &[4096, 100, 9000]));
    let (lab, blob) = filled(dir.path(), &sample);
    lab.end(vec![blob]);
    let (data, map) = files(dir.path(), &sample);
    let (bytes, time) = (std::fs::read(&map).unwrap(), std::fs::metadata(&data).unwrap().modified().unwrap());
    for at in (0..bytes.len()).step_by(5) {
        for cut in [false, true] {
            let mut bad = bytes.clone();
            if cut {
                bad.truncate(at);
            } else {
                bad[at] ^= 0x10;
            }
            std::fs::write(&map, bad).unwrap();
            File::options().write(true).open(&data).unwrap().set_modified(time).unwrap();
            let (fetched, ..) = reopened(dir.path(), &sample);
            assert!(fetched <= 3);
        }
    }
}

/// What is on the disk at one moment.
#[derive(Clone)]
struct Moment {
    data: Vec<u8>,
    time: SystemTime,
    map: Vec<u8>,
}

/// Power cuts leave any mixture of what was written; here also mixtures that no power cut leaves.
#[test]
fn mixtures_of_old_and_new_files_never_give_a_wrong_byte() {
    let mut believed = 0;
    for seed in 0..25 {
        let mut dice = Dice::new(seed);
        let (dir, sample) = (tempfile::tempdir().unwrap(), Sample::new(seed, &[3000, 4096, 10, 20_000, 8192, 77]));
        let (data, map) = files(dir.path(), &sample);
        let mut moments: Vec<Moment> = Vec::new();
        for _ in 0..6 {
            let lab = Lab::new(dir.path(), exact(), Fake::default());
            let blob = lab.open(&sample);
            for _ in 0..dice.roll(4) {
                let at = dice.roll(sample.len());
                sample.check(&blob, at..(at + dice.roll(9000)).min(sample.len()));
                moments.push(Moment {
                    data: std::fs::read(&data).unwrap(),
                    time: std::fs::metadata(&data).unwrap().modified().unwrap(),
                    map: std::fs::read(&map).unwrap(),
                });
                if dice.roll(3) == 0 {
                    lab.store.close();
                }
            }
            sample.check(&blob, 0..sample.len());
            if blob.counters().checked_chunks.get() == 0 && lab.requests() == 0 {
                believed += 1;
            }
            if dice.roll(2) == 0 {
                lab.end(vec![blob]);
            } else {
                lab.kill(vec![blob]);
            }
            if !moments.is_empty() && dice.roll(3) > 0 {
                let (one, two) = (dice.roll(moments.len() as u64) as usize, dice.roll(moments.len() as u64) as usize);
                std::fs::write(&map, &moments[two].map).unwrap();
                let file = File::options().write(true).open(&data).unwrap();
                file.set_len(0).unwrap();
                file.write_all_at(&moments[one].data, 0).unwrap();
                file.set_modified(moments[one].time).unwrap();
            }
        }
    }
    assert!(believed > 0, "the test must also see files that are believed");
}
