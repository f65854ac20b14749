//! Random readers and random faults against what the blob should read as.

use super::fake::{Fake, Fault};
use super::*;
use crate::store::ReadError;

fn campaign(seed: u64, options: Options, dir: &Path) {
    let mut dice = Dice::new(seed);
    let sizes: Vec<usize> = (0..40).map(|_| 1 + dice.roll(30_000) as usize).collect();
    let sample = Sample::new(seed, &sizes);
    let lab = Lab::new(dir, options, Fake::default());
    let mut faults: Vec<Fault> = Vec::new();
    for _ in 0..120 {
        faults.push(match dice.roll(8) {
            0 => Fault::Fail,
            1 => Fault::Wrong,
            2 => Fault::Short,
            3 | 4 => Fault::Slow,
            _ => Fault::None,
        });
    }
    *lab.fake.faults.lock().unwrap() = faults;
    // Two images that overlap, as strangers to each other.
    let blobs = [lab.open(&sample), lab.try_open(&sample, ChunkTable::new(sample.chunks[10..].to_vec())).unwrap()];
    let begin = [0, sample.chunks[10].plain.start];
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (mut dice, blobs, sample) = (Dice::new(seed * 31 + thread), &blobs, &sample);
            scope.spawn(move || {
                for _ in 0..60 {
                    let which = dice.roll(2) as usize;
                    let start = begin[which] + dice.roll(sample.len() - begin[which]);
                    let end = (start + dice.roll(60_000)).min(sample.len());
                    let mut buf = vec![0xee; (end - start) as usize];
                    match blobs[which].read_at(&mut buf, start) {
                        Ok(n) => assert!(n == buf.len() && buf == sample.plain(start..end), "wrong bytes"),
                        Err(ReadError::Unavailable { .. } | ReadError::Corrupt { .. }) => {}
                        Err(other) => panic!("{other}"),
                    }
                }
            });
        }
    });
    lab.fake.faults.lock().unwrap().clear();
    sample.check(&blobs[0], 0..sample.len());
    sample.check(&blobs[1], begin[1]..sample.len());
    if seed.is_multiple_of(2) {
        lab.end(blobs.into());
    } else {
        lab.kill(blobs.into());
    }
    let lab = Lab::new(dir, exact(), Fake::default());
    sample.check(&lab.open(&sample), 0..sample.len());
    assert_eq!(lab.requests(), 0, "all was in the cache");
}

#[test]
fn readers_never_see_a_wrong_byte_whatever_the_sources_do() {
    for seed in 0..12 {
        let dir = tempfile::tempdir().unwrap();
        campaign(seed, exact(), dir.path());
    }
}

#[test]
fn nor_with_requests_joined_and_made_ahead() {
    for seed in 100..112 {
        let dir = tempfile::tempdir().unwrap();
        campaign(seed, Options { readahead: 4, amplify: 64 << 10, ..exact() }, dir.path());
    }
}
