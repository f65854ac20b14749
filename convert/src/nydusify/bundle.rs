//! The bootstrap layer: a small tar that a snapshotter unpacks before it mounts.
//!
//! It holds `image/image.boot` and for each blob `image/<digest>.blob.meta`, the blob's chunk table as nydusd keeps it
//! in its cache, so that a first read need not fetch it. Same input, same bytes: no times, no owners.

use std::io::{self, Read, Write};

use anyhow::{Context as _, bail};
use nydus_rafs::Digest;

use crate::layer::stream::Hashing;
use crate::tar::{Archive, EntryKind};

/// A file of the bundle.
pub(super) struct Member<'m> {
    pub(super) name: String,
    pub(super) len: u64,
    /// Gives that many bytes.
    pub(super) bytes: Box<dyn Read + 'm>,
}

/// A packed bundle.
#[derive(Debug)]
pub(super) struct Bundle<W> {
    /// What the gzip stream was written to.
    pub(super) out: W,
    /// Digest of the gzip stream.
    pub(super) digest: Digest,
    /// Digest of the tar inside.
    pub(super) diff_id: Digest,
}

/// Packs the members.
pub(super) fn pack<W: Write>(members: Vec<Member<'_>>, out: W) -> io::Result<Bundle<W>> {
    let gzip = flate2::write::GzEncoder::new(Hashing::new(out), flate2::Compression::default());
    let mut tar = Hashing::new(gzip);
    let block = |name: &str, mode, size, kind| {
        let mut block = Vec::new();
        header(&mut block, name, mode, size, kind);
        block
    };
    tar.write_all(&block("image", 0o755, 0, b'5'))?;
    for Member { name, len, bytes } in members {
        tar.write_all(&block(&name, 0o444, len, b'0'))?;
        if io::copy(&mut bytes.take(len), &mut tar)? != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        tar.write_all(&[0; 512][..(len.next_multiple_of(512) - len) as usize])?;
    }
    tar.write_all(&[0; 1024])?;
    let (gzip, diff_id) = tar.finish();
    let (out, digest) = gzip.finish()?.finish();
    Ok(Bundle { out, digest, diff_id })
}

/// The largest size that eleven octal digits tell.
const MAX_OCTAL: u64 = 0o777_7777_7777;

/// Appends the header of an entry; its name has at most 100 bytes.
pub(super) fn header(tar: &mut Vec<u8>, name: &str, mode: u32, size: u64, kind: u8) {
    let mut block = [0_u8; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[100..108].copy_from_slice(format!("{mode:07o}\0").as_bytes());
    block[108..116].copy_from_slice(b"0000000\0");
    block[116..124].copy_from_slice(b"0000000\0");
    if size <= MAX_OCTAL {
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        block[124] = 0x80;
        block[128..136].copy_from_slice(&size.to_be_bytes());
    }
    block[136..148].copy_from_slice(b"00000000000\0");
    block[148..156].fill(b' ');
    block[156] = kind;
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[329..337].copy_from_slice(b"0000000\0");
    block[337..345].copy_from_slice(b"0000000\0");
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend_from_slice(&block);
}

/// Takes `image/image.boot` out of a bundle.
pub(super) fn bootstrap(gzip: &[u8], limit: u64) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::new(flate2::bufread::MultiGzDecoder::new(gzip));
    while let Some(entry) = archive.next_entry()? {
        if entry.kind != EntryKind::Regular
            || crate::path::clean(&entry.path) != crate::path::clean(b"image/image.boot")
        {
            continue;
        }
        if entry.size > limit {
            bail!("the bootstrap has {} bytes; {limit} is the limit", entry.size);
        }
        let mut bytes = vec![0; usize::try_from(entry.size).context("the bootstrap does not fit into memory")?];
        let mut filled = 0;
        while filled < bytes.len() {
            match archive.read_body(&mut bytes[filled..])? {
                0 => bail!("the bootstrap is cut short"),
                len => filled += len,
            }
        }
        return Ok(bytes);
    }
    bail!("the bootstrap layer holds no image/image.boot")
}

#[cfg(test)]
mod tests {
    use nydus_rafs::Algorithm;

    use super::*;

    #[test]
    fn a_bundle_gives_its_bootstrap_back_and_is_the_same_every_time() {
        let pack = || {
            let member = |name: &str, bytes: Vec<u8>| Member {
                name: name.into(),
                len: bytes.len() as u64,
                bytes: Box::new(io::Cursor::new(bytes)),
            };
            let members = vec![member("image/image.boot", vec![7; 5000]), member("image/aa.blob.meta", vec![1; 512])];
            pack(members, Vec::new()).unwrap()
        };
        let (one, two) = (pack(), pack());
        assert_eq!((&one.out, one.diff_id), (&two.out, two.diff_id));
        assert_eq!(bootstrap(&one.out, 1 << 20).unwrap(), vec![7; 5000]);
        assert!(bootstrap(&one.out, 100).is_err());
        assert_eq!(Algorithm::Sha256.digest(&one.out), one.digest);
        let mut tar = Vec::new();
        flate2::bufread::MultiGzDecoder::new(&one.out[..]).read_to_end(&mut tar).unwrap();
        assert_eq!(Algorithm::Sha256.digest(&tar), one.diff_id);
    }

    #[test]
    fn a_member_that_is_shorter_than_it_says_is_an_error() {
        let member = Member { name: "image/image.boot".into(), len: 3, bytes: Box::new(&b"ab"[..]) };
        assert!(pack(vec![member], Vec::new()).is_err());
    }
}
