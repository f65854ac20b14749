//! Where an eStargz layer keeps its table of contents.
//!
//! Such a layer is a `.tar.gz` of many gzip members, so that each chunk of a file can be read by itself, and ends like this:
//!
//! ```text
//! ... chunks ... | gzip member: tar entry `stargz.index.json` | footer, 51 bytes
//! ```
//!
//! The footer is an empty gzip member whose extra field names the position of the table's member. The table is a
//! stranger's like any other: it is believed once it matches the digest that the image's manifest names.

use std::io::Read;

use crate::digest::{Algorithm, Digest};

/// The size of the footer, in bytes.
pub const FOOTER_SIZE: u64 = 51;
/// Name of the table in its tar entry.
pub const TOC_NAME: &str = "stargz.index.json";
/// The largest table that is believed, as stored: some 100,000 files have 10 MB.
pub const MAX_STORED: u64 = 64 << 20;
/// The largest table that is believed, plain.
const MAX_PLAIN: u64 = 256 << 20;

/// Everything of the footer but the 16 hexadecimal digits of the position, which stand between them.
const FOOTER: (&[u8], &[u8]) =
    (&[0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, 26, 0, b'S', b'G', 22, 0], b"STARGZ\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");

/// Why a layer's table of contents cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EstargzError {
    /// The layer does not end in a footer.
    #[error("the layer has no eStargz footer")]
    Footer,
    /// The table lies where it cannot.
    #[error("the footer says that the table of contents is at byte {toc} of a layer of {size} bytes")]
    Place {
        /// Where it is said to be.
        toc: u64,
        /// The layer's size.
        size: u64,
    },
    /// The table's gzip member is not one, or not a tar entry of that name.
    #[error("the table of contents is not a gzip member with {TOC_NAME}: {0}")]
    Member(&'static str),
    /// It is another one than the manifest names.
    #[error("the table of contents does not match the digest in the manifest")]
    Digest,
}

/// Returns where the table of contents begins in a layer of `size` bytes with this footer, its last [`FOOTER_SIZE`] bytes.
///
/// # Errors
///
/// If these bytes are no footer, or the table cannot be there.
pub fn toc_position(footer: &[u8], size: u64) -> Result<u64, EstargzError> {
    let (head, tail) = FOOTER;
    let digits = footer.strip_prefix(head).and_then(|rest| rest.strip_suffix(tail)).filter(|digits| digits.len() == 16);
    let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok()).ok_or(EstargzError::Footer)?;
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(EstargzError::Footer);
    }
    let toc = u64::from_str_radix(digits, 16).map_err(|_| EstargzError::Footer)?;
    let end = size.saturating_sub(FOOTER_SIZE);
    if toc < end && end - toc <= MAX_STORED { Ok(toc) } else { Err(EstargzError::Place { toc, size }) }
}

/// Returns the table of contents, JSON, out of its gzip `member`; it matches `digest`.
///
/// # Errors
///
/// If the member is something else, or the table another one.
pub fn toc(member: &[u8], digest: Digest) -> Result<Vec<u8>, EstargzError> {
    let mut plain = flate2::read::GzDecoder::new(member);
    let mut header = [0; 512];
    plain.read_exact(&mut header).map_err(|_| EstargzError::Member("it does not begin with a tar header"))?;
    let name = header[..100].split(|&byte| byte == 0).next().unwrap_or_default();
    if name != TOC_NAME.as_bytes() {
        return Err(EstargzError::Member("its tar entry has another name"));
    }
    let size = octal(&header[124..136]).filter(|&size| size <= MAX_PLAIN);
    let size = size.ok_or(EstargzError::Member("its size is not one, or more than 256 MiB"))?;
    let mut json = Vec::new();
    let read = plain.take(size).read_to_end(&mut json);
    if read.is_err() || json.len() as u64 != size {
        return Err(EstargzError::Member("it is cut or damaged"));
    }
    if Algorithm::Sha256.digest(&json) == digest { Ok(json) } else { Err(EstargzError::Digest) }
}

/// The number in a field of a tar header: octal digits, then blanks or NULs.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    if text.bytes().all(|digit| digit.is_ascii_digit()) { u64::from_str_radix(text, 8).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn footer(toc: u64) -> Vec<u8> {
        [FOOTER.0, format!("{toc:016x}").as_bytes(), FOOTER.1].concat()
    }

    fn member(name: &str, json: &[u8]) -> Vec<u8> {
        let mut header = [0; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..135].copy_from_slice(format!("{:011o}", json.len()).as_bytes());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&[&header, json].concat()).expect("memory");
        gzip.finish().expect("memory")
    }

    #[test]
    fn a_footer_is_a_gzip_member_that_names_a_place_before_itself() {
        let bytes = footer(1000);
        assert_eq!(bytes.len() as u64, FOOTER_SIZE);
        let mut nothing = Vec::new();
        flate2::read::GzDecoder::new(&bytes[..]).read_to_end(&mut nothing).expect("gzip");
        assert!(nothing.is_empty());
        assert_eq!(toc_position(&bytes, 2000).expect("a footer"), 1000);
        for size in [0, 51, 1000, 1051] {
            assert!(matches!(toc_position(&bytes, size), Err(EstargzError::Place { .. })), "{size}");
        }
        assert!(matches!(toc_position(&footer(0), 1 << 40), Err(EstargzError::Place { .. })), "too large");
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 0x80;
            assert!(matches!(toc_position(&other, 2000), Err(EstargzError::Footer)), "byte {at}");
        }
        assert!(matches!(toc_position(&bytes[1..], 2000), Err(EstargzError::Footer)));
    }

    #[test]
    fn a_table_is_believed_only_if_it_is_the_one_that_the_manifest_names() {
        let json = br#"{"version":1,"entries":[]}"#;
        let digest = Algorithm::Sha256.digest(json);
        assert_eq!(toc(&member(TOC_NAME, json), digest).expect("the table"), json);
        assert!(matches!(toc(&member(TOC_NAME, b"{}"), digest), Err(EstargzError::Digest)));
        assert!(matches!(toc(&member("other", json), digest), Err(EstargzError::Member(_))));
        let whole = member(TOC_NAME, json);
        for cut in [0, 9, 20, whole.len() / 2] {
            assert!(matches!(toc(&whole[..cut], digest), Err(EstargzError::Member(_))), "{cut}");
        }
    }
}
