use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nydus_backend::{Avoid, SourceError, Urgency};
use tokio::sync::Semaphore;

use super::fake::{Fake, Fault};
use super::*;
use crate::store::ReadError;

#[test]
fn what_is_read_is_what_the_image_was_made_of_and_is_fetched_once() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let blob = lab.open(&sample);
    assert_eq!(lab.requests(), 0, "opening asks nobody");
    assert!(!blob.ready(0..1));
    sample.check(&blob, 0..sample.len());
    let requests = lab.requests();
    for at in (0..sample.len()).step_by(1000) {
        sample.check(&blob, at..(at + 3333).min(sample.len()));
    }
    assert_eq!(lab.requests(), requests);
    assert!(blob.ready(0..sample.len()));
    assert_eq!(blob.progress(), Some((8, 8)));
    assert_eq!(blob.read_at(&mut [], 17).unwrap(), 0);
}

#[test]
fn a_route_serves_what_a_blob_misses() {
    use nydus_backend::memory::{Fault, Memory};
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample, memory) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small(), Memory::new());
    memory.insert(sample.info.id.clone(), sample.stored.clone());
    memory.inject([Fault::WrongByte(3), Fault::None, Fault::Fail]);
    let blob = lab.store.blob(&sample.info, sample.table(), memory.clone().into()).unwrap();
    sample.check(&blob, 0..10);
    let counters = Arc::new(crate::store::Counters::default());
    let again =
        lab.store.image(exact(), counters.clone()).blob(&sample.info, sample.table(), memory.clone().into()).unwrap();
    assert!(again.ensure(8192..8193).is_err());
    sample.check(&again, 0..sample.len());
    sample.check(&blob, 0..sample.len());
    // Each image has its own numbers.
    assert_eq!((blob.counters().demand_requests.get(), blob.counters().corrupt_chunks.get()), (2, 1));
    assert_eq!((counters.failed_reads.get(), counters.corrupt_chunks.get()), (1, 0));
}

#[test]
fn ensured_bytes_are_in_the_file() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let blob = lab.open(&sample);
    blob.ensure(0..sample.len()).unwrap();
    let file = std::fs::File::from(blob.file().unwrap().try_clone_to_owned().unwrap());
    let mut bytes = vec![0; sample.plain.len()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == sample.plain);
    assert!(dir.path().join(format!("{}.blob.data", sample.info.id)).exists());
}

#[test]
fn bytes_of_no_chunk_are_zeros_up_to_the_block_and_an_error_beyond() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    // Chunk 1 has 100 bytes at 4096; the image does not know chunk 2 at 8192.
    let mut chunks = sample.chunks.clone();
    chunks.remove(2);
    let blob = lab.try_open(&sample, ChunkTable::new(chunks)).unwrap();
    sample.check(&blob, 4000..8192);
    sample.check(&blob, 4300..4400);
    assert!(matches!(blob.ensure(4096..8193), Err(ReadError::Outside { plain, .. }) if plain == (8192..8193)));
    assert!(matches!(blob.ensure(9000..9001), Err(ReadError::Outside { .. })));
    assert!(!blob.ready(9000..9001));
    let end = sample.len();
    assert!(matches!(blob.ensure(end - 1..end + 1), Err(ReadError::Outside { .. })));
    assert!(matches!(blob.read_at(&mut [0; 2], u64::MAX), Err(ReadError::Outside { .. })));
}

#[test]
fn however_many_readers_there_are_a_chunk_is_fetched_once() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake { gate: Some(Semaphore::new(0)), ..Fake::default() };
    let (lab, sample) = (Lab::new(dir.path(), exact(), fake), Sample::small());
    let blob = lab.open(&sample);
    std::thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| sample.check(&blob, 0..50));
        }
        eventually("all wait", || blob.counters().joined.get() == 11);
        lab.fake.gate.as_ref().unwrap().add_permits(100);
    });
    assert_eq!(lab.requests(), 1);
}

#[test]
fn a_failure_is_an_error_once_and_never_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let blob = lab.open(&sample);
    *lab.fake.faults.lock().unwrap() = vec![Fault::Fail];
    assert!(
        matches!(blob.ensure(0..1), Err(ReadError::Unavailable { last, .. }) if matches!(*last, SourceError::Config(_)))
    );
    sample.check(&blob, 0..1);
}

#[test]
fn wrong_bytes_are_asked_for_again_without_mirrors_and_never_read() {
    for fault in [Fault::Wrong, Fault::Short] {
        let dir = tempfile::tempdir().unwrap();
        let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
        let blob = lab.open(&sample);
        *lab.fake.faults.lock().unwrap() = vec![fault];
        sample.check(&blob, 8192..8200);
        let asked: Vec<_> = lab.fake.requests.lock().unwrap().iter().map(|request| request.avoid).collect();
        assert_eq!(asked, [Avoid::Nothing, Avoid::Mirrors]);
        assert_eq!(blob.counters().corrupt_chunks.get(), 1);
    }
}

#[test]
fn a_damaged_chunk_is_an_error_of_its_own_and_good_again_when_the_source_is() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) =
        (Lab::new(dir.path(), Options { amplify: 1 << 20, ..exact() }, Fake::default()), Sample::small());
    let blob = lab.open(&sample);
    let mut bad = sample.stored.to_vec();
    bad[sample.chunks[4].stored.start as usize + 3] ^= 1;
    lab.fake.blobs.lock().unwrap().insert(sample.info.id.clone(), bad.into());
    let error = blob.ensure(0..sample.len()).unwrap_err();
    assert!(matches!(&error, ReadError::Corrupt { chunk, .. } if chunk.0 == 4), "{error}");
    assert!(error.to_string().contains(sample.info.id.as_str()), "{error}");
    sample.check(&blob, 0..sample.chunks[4].plain.start);
    sample.check(&blob, sample.chunks[5].plain.start..sample.len());
    lab.serve(&sample);
    sample.check(&blob, 0..sample.len());
}

#[test]
fn images_that_share_a_directory_keep_their_own_deadlines() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    lab.serve(&sample);
    let hasty = Options { deadline: Duration::from_millis(50), ..exact() };
    let hasty = lab.store.image(hasty, Arc::default());
    let hasty = hasty.blob_from(&sample.info, sample.table().into(), Source::Fake(lab.fake.clone())).unwrap();
    *lab.fake.faults.lock().unwrap() = vec![Fault::Hang];
    let error = hasty.ensure(0..1).unwrap_err();
    assert!(matches!(error, ReadError::Deadline { after, .. } if after == Duration::from_millis(50)), "{error}");
}

#[test]
fn a_reader_waits_until_the_deadline_and_the_next_one_starts_afresh() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { deadline: Duration::from_millis(50), ..exact() };
    let (lab, sample) = (Lab::new(dir.path(), options, Fake::default()), Sample::small());
    let blob = lab.open(&sample);
    *lab.fake.faults.lock().unwrap() = vec![Fault::Hang];
    assert!(matches!(blob.ensure(0..1), Err(ReadError::Deadline { .. })));
    assert!(blob.ensure(0..1).is_ok());
}

#[test]
fn a_reader_that_is_given_up_leaves_its_chunk_to_those_who_wait() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let blob = lab.open(&sample);
    *lab.fake.faults.lock().unwrap() = vec![Fault::Hang];
    let first = lab.runtime().spawn({
        let blob = blob.clone();
        async move { blob.fill(0..1, Urgency::Demand).await }
    });
    eventually("the first asks", || lab.fake.under_way.load(Ordering::SeqCst) == 1);
    std::thread::scope(|scope| {
        scope.spawn(|| sample.check(&blob, 0..10));
        eventually("the second waits", || blob.counters().joined.get() == 1);
        first.abort();
    });
    assert_eq!(lab.requests(), 2);
}

#[test]
fn a_table_that_comes_from_the_blob_is_fetched_by_the_first_read_and_again_after_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (count, table, id) = (asked.clone(), sample.table(), sample.info.id.clone());
    let lazy = Table::Lazy(Box::new(move || {
        let n = count.fetch_add(1, Ordering::SeqCst);
        let (table, blob) = (table.clone(), id.clone());
        Box::pin(async move {
            match n {
                0 => Err(ReadError::TableSource { blob, source: Box::new(SourceError::Config("down".into())) }),
                _ => Ok(table),
            }
        })
    }));
    let blob = lab.try_open(&sample, lazy).unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    assert!(blob.file().is_none());
    assert!(matches!(blob.ensure(0..1), Err(ReadError::TableSource { .. })));
    sample.check(&blob, 0..sample.len());
    assert_eq!(asked.load(Ordering::SeqCst), 2);
    assert!(blob.file().is_some());
}

#[test]
fn tables_that_contradict_themselves_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let refused = |change: &dyn Fn(&mut Vec<Chunk>)| {
        let mut chunks = sample.chunks.clone();
        change(&mut chunks);
        matches!(lab.try_open(&sample, ChunkTable::new(chunks)), Err(StoreError::Table { .. }))
    };
    assert!(refused(&|chunks| chunks[1].plain = 4095..4100));
    assert!(refused(&|chunks| chunks[1].plain = 4096..4096 + (1 << 40)));
    assert!(refused(&|chunks| chunks[1].stored = 0..u64::MAX));
    assert!(refused(&|chunks| chunks[7].plain.end = u64::MAX));
    assert!(refused(&|chunks| {
        let mut twin = chunks[0].clone();
        twin.digest = chunks[1].digest;
        chunks.push(twin);
    }));
    assert!(!refused(&|chunks| chunks.push(chunks[0].clone())), "one chunk listed twice is one chunk");
}

#[test]
fn without_verification_bytes_pass_and_a_verifying_store_checks_them_later() {
    let dir = tempfile::tempdir().unwrap();
    let sample = Sample::new(3, &[4096, 4096]);
    let mut other = sample.clone();
    other.chunks[1].digest = Some(Digest([9; 32]));
    let lab = Lab::over(Store::unverified, dir.path(), exact(), Fake::default());
    let blob = lab.open(&other);
    other.check(&blob, 0..other.len());
    lab.end(vec![blob]);
    let lab = Lab::new(dir.path(), exact(), Fake::default());
    let blob = lab.open(&other);
    other.check(&blob, 0..4096);
    assert!(matches!(blob.ensure(4096..4097), Err(ReadError::Corrupt { .. })));
    assert_eq!(blob.counters().checked_chunks.get(), 2);
}

#[test]
fn what_is_open_is_not_removed_and_what_is_not_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let blob = lab.open(&sample);
    sample.check(&blob, 0..sample.len());
    assert!(matches!(lab.store.remove(&sample.info.id), Err(StoreError::InUse(_))));
    let usage = lab.store.usage().unwrap();
    assert_eq!((usage.len(), usage[0].blob.as_str()), (1, sample.info.id.as_str()));
    assert!(usage[0].bytes > 0);
    assert_eq!(usage[0].files.len(), blob.file_names().len());
    drop(blob);
    eventually("it is let go", || lab.store.remove(&sample.info.id).is_ok());
    assert_eq!(lab.store.usage().unwrap(), []);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    sample.check(&lab.open(&sample), 0..sample.len());
}
