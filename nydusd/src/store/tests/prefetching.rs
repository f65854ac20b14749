//! What is fetched before it is asked for.

use std::time::{Duration, Instant};

use nydus_backend::Urgency;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::fake::{Fake, Fault};
use super::*;
use crate::store::{Hint, PrefetchOptions, prefetch};

fn large() -> Sample {
    Sample::new(11, &[100_000; 30])
}

fn of(lab: &Lab, urgency: Urgency) -> Vec<Range<u64>> {
    let requests = lab.fake.requests.lock().unwrap();
    requests.iter().filter(|request| request.urgency == urgency).map(|request| request.stored.clone()).collect()
}

#[test]
fn a_sequential_reader_finds_the_next_chunks_there_and_a_random_one_pays_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), Options { readahead: 8, ..exact() }, Fake::default()), large());
    let blob = lab.open(&sample);
    for at in [3, 20, 11] {
        sample.check(&blob, sample.chunks[at].plain.clone());
    }
    assert_eq!(of(&lab, Urgency::Prefetch), []);
    sample.check(&blob, sample.chunks[4].plain.clone());
    let window = sample.chunks[5].plain.start..sample.chunks[12].plain.end;
    eventually("the window is there", || blob.ready(window.clone()));
    // A reader who comes by the mark has the next window fetched, and waits for nothing.
    sample.check(&blob, sample.chunks[5].plain.clone());
    eventually("the next one too", || blob.ready(sample.chunks[13].plain.start..sample.chunks[20].plain.end));
    assert_eq!(of(&lab, Urgency::Demand).len(), 4);
}

#[test]
fn a_demanded_chunk_is_answered_before_its_neighbours_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake { gate: Some(Semaphore::new(1)), ..Fake::default() };
    let (lab, sample) = (Lab::new(dir.path(), Options { amplify: 300_000, ..exact() }, fake), large());
    let blob = lab.open(&sample);
    // One request passes; the answer does not need a second.
    sample.check(&blob, sample.chunks[2].plain.start + 5..sample.chunks[2].plain.start + 10);
    eventually("neighbours are asked for", || lab.requests() > 1);
    assert!(!blob.ready(sample.chunks[3].plain.clone()));
    lab.fake.gate.as_ref().unwrap().add_permits(100);
    eventually("and come", || blob.ready(sample.chunks[3].plain.clone()));
    assert_eq!(of(&lab, Urgency::Demand), [sample.chunks[2].stored.clone()]);
    let ahead: u64 = of(&lab, Urgency::Prefetch).iter().map(|range| range.end - range.start).sum();
    assert!(ahead <= 300_000);
}

#[test]
fn a_reader_joins_a_prefetch_and_is_not_kept_by_one_that_hangs() {
    for hang in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), large());
        let blob = lab.open(&sample);
        *lab.fake.faults.lock().unwrap() = vec![if hang { Fault::Hang } else { Fault::Slow }];
        let ahead = lab.runtime().spawn({
            let (blob, plain) = (blob.clone(), sample.chunks[0].plain.clone());
            async move { blob.fill(plain, Urgency::Prefetch).await }
        });
        eventually("it is asked for", || lab.requests() == 1);
        let began = Instant::now();
        sample.check(&blob, 0..100);
        assert!(began.elapsed() < Duration::from_secs(15));
        assert_eq!(lab.requests(), if hang { 2 } else { 1 });
        lab.runtime().block_on(ahead).unwrap().unwrap();
    }
}

#[test]
fn hints_are_followed_in_order_in_bounded_requests_and_counted_apart() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), large());
    let blob = lab.open(&sample);
    let hint = |chunks: Range<usize>| Hint {
        blob: blob.clone(),
        plain: sample.chunks[chunks.start].plain.start..sample.chunks[chunks.end - 1].plain.end,
    };
    let options = PrefetchOptions { threads: 1, merging_size: 1, bandwidth_rate: 1 << 30 };
    let hints = vec![hint(20..30), hint(0..5), hint(18..22)];
    lab.runtime().block_on(prefetch(hints, options, CancellationToken::new()));
    let asked = of(&lab, Urgency::Prefetch);
    assert!(asked.iter().all(|range| range.end - range.start <= 128 << 10));
    let all: Vec<u64> = asked.iter().map(|range| range.start).collect();
    let place = |chunk: usize| all.iter().position(|&start| start == sample.chunks[chunk].stored.start);
    assert!(place(20) < place(0) && place(0) < place(18));
    assert!(blob.ready(sample.chunks[18].plain.start..sample.len()));
    assert!(!blob.ready(sample.chunks[10].plain.clone()));
    assert_eq!(blob.counters().prefetch_chunks.get(), 17);
    assert_eq!((blob.counters().reads.get(), blob.counters().demand_requests.get()), (0, 0));
    assert!(blob.counters().prefetch_ended.get() >= blob.counters().prefetch_began.get());
}

#[test]
fn prefetch_stops_when_told_and_gives_up_on_a_source_that_fails() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), large());
    let blob = lab.open(&sample);
    let hints = vec![Hint { blob: blob.clone(), plain: 0..sample.len() }];
    let options = PrefetchOptions { threads: 2, merging_size: 0, bandwidth_rate: 0 };
    *lab.fake.faults.lock().unwrap() = vec![Fault::Fail; 1000];
    lab.runtime().block_on(prefetch(hints.clone(), options.clone(), CancellationToken::new()));
    assert!(lab.requests() < 12, "{}", lab.requests());
    *lab.fake.faults.lock().unwrap() = vec![Fault::Hang; 1000];
    let stop = CancellationToken::new();
    let requests = lab.requests();
    let task = lab.runtime().spawn(prefetch(hints, options, stop.clone()));
    eventually("it asks", || lab.requests() == requests + 2);
    stop.cancel();
    lab.runtime().block_on(task).unwrap();
    lab.fake.faults.lock().unwrap().clear();
    sample.check(&blob, 0..sample.len());
}

#[test]
fn a_source_that_ignores_ranges_is_asked_for_the_whole_blob_once() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake { ignores_ranges: true, ..Fake::default() };
    let (lab, sample) = (Lab::new(dir.path(), exact(), fake), large());
    let blob = lab.open(&sample);
    sample.check(&blob, sample.chunks[9].plain.clone());
    eventually("all is there", || blob.ready(0..sample.len()));
    assert!(of(&lab, Urgency::Prefetch).len() <= 2, "before and after the chunk that was there already");
}
