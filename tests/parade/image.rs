//! The image under test: layers of one file each, together more bytes than a mirror keeps.

use anyhow::Result;
use nydus_rafs::Algorithm;
use nydus_tests::image::Layer;
use nydus_tests::smoke;

/// How many layers, each of which becomes a blob. A mirror keeps half of them.
pub(crate) const FILES: usize = 14;
/// Bytes of a file: some chunks.
const BYTES: usize = 2_400_000;

/// Makes the layers, a shell below them.
pub(crate) fn layers() -> Result<Vec<Layer>> {
    let mut layers = smoke::layers()?;
    for number in 0..FILES {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(BYTES as u64);
        header.set_mtime(1_700_000_000);
        tar.append_data(&mut header, name(number), &*bytes(number))?;
        layers.push(Layer::new(&tar.into_inner()?)?);
    }
    Ok(layers)
}

/// Returns a file's path, relative to the root.
pub(crate) fn name(number: usize) -> String {
    format!("cold/{number}")
}

/// Returns what is in it, which nothing compresses.
fn bytes(number: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(number as u64 + 1);
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(BYTES / 8).flatten().collect()
}

/// Returns whether these are a file's bytes.
pub(crate) fn is_right(number: usize, found: &[u8]) -> bool {
    Algorithm::Sha256.digest(found) == Algorithm::Sha256.digest(&bytes(number))
}
