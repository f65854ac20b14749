//! Sections of a blob and the tar headers behind them.
//!
//! A section is followed, without padding, by a 512-byte header in the form of GNU tar. Since the header
//! comes after its data no tar program can read a blob; but a builder need not know a section's size before
//! it writes it, and a reader walks from the end.

use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use super::toc::{self, Toc};
use crate::bootstrap::FormatError;
use crate::codec::{self, DecodeError};
use crate::view::invalid;

/// Size of a tar header.
pub const HEADER_SIZE: u64 = 512;

/// Bootstraps are at most this large once decompressed: room for some ten million files.
const MAX_BOOTSTRAP: u64 = 4 << 30;

/// A section of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Section {
    /// The chunks.
    Data,
    /// The chunk table; in tar headers with the header after it.
    Table,
    /// The header of the chunk table; in tables of contents only.
    TableHeader,
    /// Digests of the chunks.
    Digests,
    /// The bootstrap.
    Bootstrap,
    /// The table of contents.
    Toc,
}

impl Section {
    const ALL: [Self; 6] = [Self::Data, Self::Table, Self::TableHeader, Self::Digests, Self::Bootstrap, Self::Toc];

    /// Returns the section's name in tar headers and tables of contents.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "image.blob",
            Self::Table => "blob.meta",
            Self::TableHeader => "blob.meta.header",
            Self::Digests => "blob.digest",
            Self::Bootstrap => "image.boot",
            Self::Toc => "rafs.blob.toc",
        }
    }

    /// Returns the section of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|section| section.name() == name)
    }
}

/// Makes the tar header that follows `size` bytes of `section`.
pub fn tar_header(section: Section, size: u64) -> [u8; 512] {
    let mut header = [0; 512];
    let name = section.name().as_bytes();
    header[..name.len()].copy_from_slice(name);
    if size < 1 << 33 {
        header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    } else {
        // Eleven octal digits end at 8 GiB; GNU tar goes on in base 256, marked by the first bit.
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar  \0");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum::<u32>() + 8 * u32::from(b' ');
    header[148..155].copy_from_slice(format!("{sum:07o}").as_bytes());
    header
}

/// Reads a tar header: the section's name and size.
fn parse_header(header: &[u8; 512]) -> Option<(String, u64)> {
    let magic = &header[257..263];
    if magic != b"ustar " && magic != b"ustar\0" {
        return None;
    }
    let name = header[..100].split(|&byte| byte == 0).next()?;
    let size = if header[124] & 0x80 != 0 {
        u64::from_be_bytes(header[128..136].try_into().ok()?)
    } else {
        let digits = std::str::from_utf8(&header[124..136]).ok()?.trim_matches(['\0', ' ']);
        u64::from_str_radix(digits, 8).ok()?
    };
    Some((std::str::from_utf8(name).ok()?.to_owned(), size))
}

/// Why a section of a blob could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SectionError {
    /// The blob cannot be read.
    #[error("the blob cannot be read")]
    Io(#[from] io::Error),
    /// It is not built as it should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The section does not decompress.
    #[error("section {} cannot be decoded", section.name())]
    Decode {
        /// The section.
        section: Section,
        /// Why.
        #[source]
        source: DecodeError,
    },
    /// The section does not match the digest in the table of contents.
    #[error("section {} does not match its digest", .0.name())]
    Mismatch(Section),
    /// There is no such section.
    #[error("the blob has no section {}", .0.name())]
    Missing(Section),
}

/// Finds the sections of a blob, the last one first, by the tar headers behind them.
///
/// A blob without tar headers has none.
pub fn locate(blob: &mut (impl Read + Seek)) -> Result<Vec<(Section, Range<u64>)>, SectionError> {
    let mut end = blob.seek(SeekFrom::End(0))?;
    let mut sections = Vec::new();
    while end >= HEADER_SIZE && sections.len() < Section::ALL.len() {
        let mut header = [0; 512];
        blob.seek(SeekFrom::Start(end - HEADER_SIZE))?;
        blob.read_exact(&mut header)?;
        let Some((name, size)) = parse_header(&header) else { break };
        let at = end - HEADER_SIZE;
        let Some(section) = Section::from_name(&name) else { break };
        let Some(start) = at.checked_sub(size) else {
            return Err(invalid("tar header", at, format!("section {name} of {size} bytes does not fit")).into());
        };
        sections.push((section, start..at));
        end = start;
    }
    Ok(sections)
}

/// Reads the table of contents at the end of a blob, if there is one.
pub fn read_toc(blob: &mut (impl Read + Seek)) -> Result<Option<Toc>, SectionError> {
    match locate(blob)?.first() {
        Some((Section::Toc, range)) => {
            if range.end - range.start > toc::MAX_SIZE {
                return Err(invalid("table of contents", range.start, "is too large").into());
            }
            Ok(Some(Toc::parse(&read_range(blob, range)?)?))
        }
        _ => Ok(None),
    }
}

/// Reads the bootstrap that lies in a blob: through the table of contents where there is one, else by its
/// tar header.
pub fn read_bootstrap(blob: &mut (impl Read + Seek)) -> Result<Vec<u8>, SectionError> {
    if let Some(toc) = read_toc(blob)? {
        let entry = toc.get(Section::Bootstrap).ok_or(SectionError::Missing(Section::Bootstrap))?;
        let size = blob.seek(SeekFrom::End(0))?;
        if entry.stored.end > size || entry.plain_size > MAX_BOOTSTRAP {
            return Err(invalid("table of contents", entry.stored.start, "the bootstrap does not fit").into());
        }
        let stored = read_range(blob, &entry.stored)?;
        // zstd frames promise their size; a false promise must not reserve memory.
        if entry.plain_size > stored.len() as u64 * 4096 {
            return Err(invalid("table of contents", entry.stored.start, "the bootstrap shrank beyond belief").into());
        }
        let plain = codec::decode(entry.codec, &stored, entry.plain_size as usize)
            .map_err(|source| SectionError::Decode { section: Section::Bootstrap, source })?;
        if crate::Algorithm::Sha256.digest(&plain) != entry.digest {
            return Err(SectionError::Mismatch(Section::Bootstrap));
        }
        return Ok(plain);
    }
    match locate(blob)?.first() {
        Some((Section::Bootstrap, range)) => Ok(read_range(blob, range)?),
        _ => Err(SectionError::Missing(Section::Bootstrap)),
    }
}

/// Reads a range that is known to lie inside the blob.
fn read_range(blob: &mut (impl Read + Seek), range: &Range<u64>) -> io::Result<Vec<u8>> {
    blob.seek(SeekFrom::Start(range.start))?;
    let len = range.end - range.start;
    let mut bytes = Vec::new();
    blob.by_ref().take(len).read_to_end(&mut bytes)?;
    if bytes.len() as u64 != len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn headers_tell_names_and_sizes_beyond_eight_gibibytes() {
        for size in [0, 1, 511, (1 << 33) - 1, 1 << 33, u64::MAX] {
            let header = tar_header(Section::Table, size);
            assert_eq!(parse_header(&header), Some(("blob.meta".to_owned(), size)));
            let sum: u32 = header
                .iter()
                .enumerate()
                .map(|(at, &byte)| if (148..156).contains(&at) { 32 } else { u32::from(byte) })
                .sum();
            assert_eq!(format!("{sum:07o}\0").as_bytes(), &header[148..156]);
        }
        assert_eq!(parse_header(&[0; 512]), None);
    }

    #[test]
    fn a_size_beyond_the_blob_is_an_error() {
        let mut blob = b"short".to_vec();
        blob.extend_from_slice(&tar_header(Section::Bootstrap, 6));
        assert!(matches!(read_bootstrap(&mut Cursor::new(blob)), Err(SectionError::Format(_))));
    }

    #[test]
    fn bytes_without_a_header_have_no_sections() {
        assert!(locate(&mut Cursor::new(vec![7; 5000])).expect("readable").is_empty());
        assert!(matches!(read_bootstrap(&mut Cursor::new(vec![7; 100])), Err(SectionError::Missing(_))));
    }
}
