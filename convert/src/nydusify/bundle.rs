//! The bootstrap layer: a small tar that a snapshotter unpacks before it mounts.
//!
//! It holds `image/image.boot` and for each blob `image/<digest>.blob.meta`, the blob's chunk table as nydusd keeps it
//! in its cache, so that a first read need not fetch it. Same input, same bytes: no times, no owners.

use std::io::{self, Write};

use anyhow::{Context as _, bail};
use nydus_rafs::Digest;
use sha2::{Digest as _, Sha256};

use crate::tar::{Archive, EntryKind};

/// A file of the bundle.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// A packed bundle.
#[derive(Debug)]
pub(super) struct Bundle {
    /// The gzip stream.
    pub(super) bytes: Vec<u8>,
    /// Digest of the gzip stream.
    pub(super) digest: Digest,
    /// Digest of the tar inside.
    pub(super) diff_id: Digest,
}

/// Packs the members.
pub(super) fn pack(members: &[Member]) -> io::Result<Bundle> {
    let mut tar = Vec::new();
    header(&mut tar, "image", 0o755, 0, b'5');
    for Member { name, bytes } in members {
        header(&mut tar, name, 0o444, bytes.len() as u64, b'0');
        tar.extend_from_slice(bytes);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    let diff_id = Digest(Sha256::digest(&tar).into());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&tar)?;
    let bytes = gzip.finish()?;
    let digest = Digest(Sha256::digest(&bytes).into());
    Ok(Bundle { bytes, digest, diff_id })
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
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_bundle_gives_its_bootstrap_back_and_is_the_same_every_time() {
        let members = || {
            vec![
                Member { name: "image/image.boot".into(), bytes: vec![7; 5000] },
                Member { name: "image/aa.blob.meta".into(), bytes: vec![1; 512] },
            ]
        };
        let (one, two) = (pack(&members()).unwrap(), pack(&members()).unwrap());
        assert_eq!((&one.bytes, one.diff_id), (&two.bytes, two.diff_id));
        assert_eq!(bootstrap(&one.bytes, 1 << 20).unwrap(), vec![7; 5000]);
        assert!(bootstrap(&one.bytes, 100).is_err());
        assert_eq!(Digest(Sha256::digest(&one.bytes).into()), one.digest);
        let mut tar = Vec::new();
        flate2::bufread::MultiGzDecoder::new(&one.bytes[..]).read_to_end(&mut tar).unwrap();
        assert_eq!(Digest(Sha256::digest(&tar).into()), one.diff_id);
    }
}
