//! Images and processes that share a directory, whether they agree or not.

use super::fake::Fake;
use super::*;

/// An image that finds other bytes at chunk 2's place: the same length, out of chunk 4.
fn contradicting(sample: &Sample) -> Sample {
    let mut other = sample.clone();
    let bytes: Vec<u8> = (0..5000).map(|at| (at % 251) as u8 | 1).collect();
    let mut stored = sample.stored.to_vec();
    let start = stored.len() as u64;
    stored.extend_from_slice(&bytes);
    other.stored = stored.into();
    let chunk = &mut other.chunks[2];
    chunk.codec = nydus_rafs::Codec::Plain;
    chunk.stored = start..start + 5000;
    chunk.digest = Some(Algorithm::Blake3.digest(&bytes));
    let place = chunk.plain.start as usize;
    other.plain[place..place + 5000].copy_from_slice(&bytes);
    other
}

#[test]
fn images_share_the_chunks_that_they_agree_on() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let first = lab.try_open(&sample, ChunkTable::new(sample.chunks[..5].to_vec())).unwrap();
    let second = lab.try_open(&sample, ChunkTable::new(sample.chunks[3..].to_vec())).unwrap();
    sample.check(&first, 0..sample.chunks[4].plain.end);
    assert!(second.ready(sample.chunks[3].plain.start..sample.chunks[4].plain.end));
    assert!(!second.ready(sample.chunks[5].plain.clone()));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    // Through the map, after the first image has gone.
    drop(first);
    sample.check(&second, sample.chunks[3].plain.start..sample.len());
    let requests = lab.requests();
    sample.check(&lab.open(&sample), 0..sample.len());
    assert_eq!(lab.requests(), requests);
}

#[test]
fn an_image_that_contradicts_another_neither_poisons_nor_is_poisoned() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let other = contradicting(&sample);
    let (one, two) = (lab.open(&sample), lab.open(&other));
    for _ in 0..2 {
        sample.check(&one, 0..sample.len());
        other.check(&two, 0..sample.len());
    }
    assert_ne!(one.file_names(), two.file_names());
}

#[test]
fn an_image_that_contradicts_one_that_has_gone_takes_its_place() {
    for killed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let sample = Sample::small();
        let other = contradicting(&sample);
        for image in [&sample, &other, &sample, &other] {
            let lab = Lab::new(dir.path(), exact(), Fake::default());
            let blob = lab.open(image);
            assert!(!blob.ready(image.chunks[2].plain.clone()), "the other image's chunk is not this one's");
            image.check(&blob, 0..image.len());
            if killed { lab.kill(vec![blob]) } else { lab.end(vec![blob]) }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

#[test]
fn in_one_process_too_the_map_does_not_speak_for_an_image_that_has_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (lab, sample) = (Lab::new(dir.path(), exact(), Fake::default()), Sample::small());
    let other = contradicting(&sample);
    // Keeps the cache alive and says nothing about the chunk in question.
    let bystander = lab.try_open(&sample, ChunkTable::new(sample.chunks[..1].to_vec())).unwrap();
    for image in [&sample, &other, &sample, &other] {
        let blob = lab.open(image);
        image.check(&blob, 0..image.len());
    }
    sample.check(&bystander, 0..4096);
}

#[test]
fn a_second_process_gets_a_copy_of_its_own_and_a_later_one_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let sample = Sample::small();
    let (a, b) = (Lab::new(dir.path(), exact(), Fake::default()), Lab::new(dir.path(), exact(), Fake::default()));
    let (one, two) = (a.open(&sample), b.open(&sample));
    sample.check(&one, 0..sample.len());
    sample.check(&two, 0..sample.len());
    assert!(two.file_names()[0].ends_with(".blob.data.1"), "{:?}", two.file_names());
    assert!(matches!(b.store.remove(&sample.info.id), Err(StoreError::InUse(_))));
    a.end(vec![one]);
    let c = Lab::new(dir.path(), exact(), Fake::default());
    let three = c.open(&sample);
    assert!(three.file_names()[0].ends_with(".blob.data"));
    sample.check(&three, 0..sample.len());
    assert_eq!(c.requests(), 0);
    b.end(vec![two]);
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().ends_with(".1")), "{left:?}");
}

#[test]
fn a_process_that_takes_a_moment_to_die_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let sample = Sample::small();
    let a = Lab::new(dir.path(), exact(), Fake::default());
    let blob = a.open(&sample);
    sample.check(&blob, 0..sample.len());
    let dying = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        a.kill(vec![blob]);
    });
    let b = Lab::new(dir.path(), exact(), Fake::default());
    sample.check(&b.open(&sample), 0..sample.len());
    assert_eq!(b.requests(), 0);
    dying.join().unwrap();
}

#[test]
fn a_file_of_another_program_is_neither_believed_nor_shortened() {
    let dir = tempfile::tempdir().unwrap();
    let sample = Sample::small();
    let path = dir.path().join(format!("{}.blob.data", sample.info.id));
    std::fs::write(&path, vec![0xaa; sample.plain.len() + 5000]).unwrap();
    let lab = Lab::new(dir.path(), exact(), Fake::default());
    let blob = lab.open(&sample);
    sample.check(&blob, 0..sample.len());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), sample.len() + 5000);
}
