use std::io::Write as _;

use nydus_rafs::Verified;

use super::*;
use crate::tar::made::{Made, item};

fn layer() -> Vec<u8> {
    let big: Vec<u8> = (0..50_000_u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    Made::of([
        item("d", b'5').mode(0o755),
        item("d/big", b'0').body(&big),
        item("d/again", b'0').body(&big),
        item("small", b'0').body("text"),
        item("empty", b'0'),
        item("link", b'1').link("small"),
    ])
}

fn gzip(tar: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(tar).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn every_chunk_of_a_layer_is_read_from_where_it_lies() {
    let tar = layer();
    for stream in [gzip(&tar), tar.clone()] {
        let referred = read(&stream[..], Rules::Alone, 4096).unwrap();
        let Reference { id, stored_size, chunks, points, .. } = referred.reference;
        assert_eq!(id.digest(), Some(Algorithm::Sha256.digest(&stream)));
        assert_eq!((stored_size, referred.tar), (stream.len() as u64, Algorithm::Sha256.digest(&tar)));
        // 50,000 bytes in 13 chunks, once, and the small file's.
        assert_eq!(chunks.len(), 14);
        for chunk in with_points(&chunks, &points) {
            let stored = &stream[chunk.stored.start as usize..chunk.stored.end as usize];
            let verified = Verified::decode(&chunk, stored).unwrap();
            assert_eq!(verified.bytes().len() as u64, chunk.plain_len());
        }
    }
}

#[test]
fn a_raw_tar_is_its_own_blob() {
    let tar = layer();
    let raw = read_raw(&tar[..], Rules::Alone, 1 << 20).unwrap();
    let info = raw.info.unwrap();
    assert_eq!(info.id.digest(), Some(Algorithm::Sha256.digest(&tar)));
    assert_eq!((info.stored_size, info.plain_size, info.chunk_count), (tar.len() as u64, tar.len() as u64, 3));
    let small = raw.chunks.last().unwrap().stored.clone();
    assert_eq!(&tar[small.start as usize..small.end as usize], b"text");
    assert!(matches!(read_raw(&gzip(&tar)[..], Rules::Alone, 1 << 20), Err(ReferenceError::Compressed)));
}

#[test]
fn what_cannot_be_referred_to_is_named() {
    let sparse = Made::of([item("GNUSparseFile.0/holes", b'0')
        .record("GNU.sparse.major", "1")
        .record("GNU.sparse.minor", "0")
        .record("GNU.sparse.name", "holes")
        .record("GNU.sparse.realsize", "9000")
        .body([&b"1\n0\n4\n"[..], &[0; 506], b"data"].concat())]);
    let error = read(&sparse[..], Rules::Alone, 4096).unwrap_err();
    assert!(matches!(&error, ReferenceError::Sparse(name) if name == "holes"), "{error:?}");
    assert!(read(&zstd::encode_all(&layer()[..], 1).unwrap()[..], Rules::Alone, 4096).is_err());
    assert!(matches!(read(&layer()[..], Rules::Alone, 16 << 20), Err(ReferenceError::ChunkSize(_))));
}
