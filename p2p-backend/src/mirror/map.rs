//! The file beside a blob's data that says which pieces are there.
//!
//! ```text
//!     0   magic "SHOALPM1"
//!     8   size of the blob, little endian
//!    16   size of a piece
//!    24   first 8 bytes of blake3(digest, bytes 0..24): a header of another blob, or a torn one, is no header
//!    32   seal: blake3("seal", all sums) once the whole blob matched its sha256, else zeros
//!    64   one sum per piece: blake3 of its bytes, zeros while it is absent
//! ```
//!
//! Nothing is synced. A sum is written after its data, but the disk may keep either without the other, or half of
//! it: so a sum is never an answer, only what the data is compared with the first time it is read in a process's life.
//! The worst that a lost or torn entry costs is a piece that is fetched again. The seal is believed for the same
//! reason: it covers the sums, and the sums cover the data.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nydus_rafs::Digest;

use super::pieces::{PIECE, Sum};

const MAGIC: &[u8; 8] = b"SHOALPM1";
const HEADER: u64 = 64;
const SUM: u64 = 32;

/// What a map file says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) size: u64,
    /// Per piece; none where it is absent.
    pub(super) sums: Vec<Option<Sum>>,
    /// Whether these sums were once proved by the sha256 of the whole.
    pub(super) sealed: bool,
}

fn header(digest: &Digest, size: u64) -> [u8; 32] {
    let mut header = [0; 32];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&size.to_le_bytes());
    header[16..24].copy_from_slice(&PIECE.to_le_bytes());
    let mut check = blake3::Hasher::new();
    check.update(&digest.0).update(&header[..24]);
    header[24..].copy_from_slice(&check.finalize().as_bytes()[..8]);
    header
}

fn seal(sums: &[Option<Sum>]) -> Option<Sum> {
    let mut hash = blake3::Hasher::new();
    hash.update(b"seal");
    for sum in sums {
        hash.update(sum.as_ref()?);
    }
    Some(*hash.finalize().as_bytes())
}

impl Map {
    /// Reads the bytes of a map file of blob `digest`; none if they are not a map of it.
    pub(super) fn parse(digest: &Digest, bytes: &[u8]) -> Option<Self> {
        let (head, rest) = bytes.split_at_checked(32)?;
        let size = u64::from_le_bytes(head[8..16].try_into().ok()?);
        if head != header(digest, size) {
            return None;
        }
        let (sealed, sums) = rest.split_at_checked(32)?;
        if sums.len() as u64 != size.div_ceil(PIECE).checked_mul(SUM)? {
            return None;
        }
        let sums: Vec<Option<Sum>> =
            sums.chunks_exact(32).map(|sum| Sum::try_from(sum).ok().filter(|sum| *sum != [0; 32])).collect();
        let sealed = seal(&sums).is_some_and(|seal| seal == sealed);
        Some(Self { size, sums, sealed })
    }

    /// Writes an empty map.
    pub(super) fn create(file: &File, digest: &Digest, size: u64) -> io::Result<()> {
        file.set_len(HEADER + size.div_ceil(PIECE) * SUM)?;
        file.write_all_at(&header(digest, size), 0)
    }

    /// Records the sum of a piece, or that it is absent.
    pub(super) fn record(file: &File, piece: u64, sum: Option<&Sum>) -> io::Result<()> {
        file.write_all_at(sum.unwrap_or(&[0; 32]), HEADER + piece * SUM)
    }

    /// Records that the whole was proved with these sums.
    pub(super) fn seal(file: &File, sums: &[Option<Sum>]) -> io::Result<()> {
        file.write_all_at(&seal(sums).unwrap_or([0; 32]), 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest() -> Digest {
        Digest([7; 32])
    }

    fn written(size: u64, sums: &[Option<Sum>], sealed: bool) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        Map::create(file.as_file(), &digest(), size).unwrap();
        for (piece, sum) in sums.iter().enumerate() {
            Map::record(file.as_file(), piece as u64, sum.as_ref()).unwrap();
        }
        if sealed {
            Map::seal(file.as_file(), sums).unwrap();
        }
        std::fs::read(file.path()).unwrap()
    }

    #[test]
    fn a_map_says_what_was_recorded() {
        let sums = vec![Some([1; 32]), None, Some([3; 32])];
        let bytes = written(2 * PIECE + 5, &sums, true);
        let map = Map::parse(&digest(), &bytes).unwrap();
        assert_eq!(map, Map { size: 2 * PIECE + 5, sums, sealed: false }, "a map with gaps is never sealed");
        let sums = vec![Some([1; 32]), Some([2; 32])];
        assert!(Map::parse(&digest(), &written(2 * PIECE, &sums, true)).unwrap().sealed);
        assert!(!Map::parse(&digest(), &written(2 * PIECE, &sums, false)).unwrap().sealed);
    }

    #[test]
    fn no_flipped_bit_and_no_cut_makes_a_map_say_more_than_it_knew() {
        let sums = vec![Some([1; 32]), Some([2; 32])];
        let good = written(2 * PIECE, &sums, true);
        for cut in 0..good.len() {
            assert_eq!(Map::parse(&digest(), &good[..cut]), None, "cut at {cut}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            if let Some(map) = Map::parse(&digest(), &bad) {
                assert_eq!(map.size, 2 * PIECE, "bit {bit}");
                assert!(!map.sealed, "bit {bit}");
            }
        }
        assert_eq!(Map::parse(&Digest([8; 32]), &good), None, "the map of another blob");
    }
}
