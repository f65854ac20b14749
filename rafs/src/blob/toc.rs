//! The table of contents at the end of a blob.

use std::ops::Range;

use zerocopy::IntoBytes;

use super::format;
use super::section::Section;
use crate::bootstrap::FormatError;
use crate::chunk::Codec;
use crate::digest::Digest;
use crate::view::{View, invalid};

/// A table is at most this large: readers fetch no more than the last 4,096 bytes of a blob.
pub(crate) const MAX_SIZE: u64 = 4096;

/// Compression as the table of contents, and nothing else, numbers it.
const PLAIN: u32 = 1;
const ZSTD: u32 = 2;
const LZ4_BLOCK: u32 = 4;

/// One section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocEntry {
    /// Which one.
    pub section: Section,
    /// How it is compressed; the chunks count as not compressed.
    pub codec: Codec,
    /// SHA-256 of the plain section; of the chunks as stored, with the tar header behind them.
    pub digest: Digest,
    /// Where it lies.
    pub stored: Range<u64>,
    /// Its size once decompressed; for the chunks the size of the plain address space.
    pub plain_size: u64,
}

/// A table of contents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Toc {
    /// Its entries, in the order of the sections.
    pub entries: Vec<TocEntry>,
}

impl Toc {
    /// Reads a table; sections of unknown names are passed over.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let view = View(bytes);
        if !view.len().is_multiple_of(128) {
            return Err(invalid("table of contents", 0, format!("{} bytes are not entries of 128", view.len())));
        }
        let mut entries = Vec::new();
        for (index, entry) in
            view.array::<format::TocEntry>("table of contents", 0, view.len() / 128)?.iter().enumerate()
        {
            let at = 128 * index as u64;
            let len = entry.name.iter().position(|&byte| byte == 0).unwrap_or(16);
            let Some(section) = std::str::from_utf8(&entry.name[..len]).ok().and_then(Section::from_name) else {
                continue;
            };
            let codec = match entry.flags.get() & 0xf {
                PLAIN => Codec::Plain,
                ZSTD => Codec::Zstd,
                LZ4_BLOCK => Codec::Lz4Block,
                flags => return Err(invalid("table of contents", at, format!("compression {flags:#x} is unknown"))),
            };
            let start = entry.stored_at.get();
            let end = start.checked_add(entry.stored_size.get());
            let end = end.ok_or_else(|| invalid("table of contents", at + 56, "the section lies too far away"))?;
            let plain_size = entry.plain_size.get();
            entries.push(TocEntry { section, codec, digest: Digest(entry.digest), stored: start..end, plain_size });
        }
        Ok(Self { entries })
    }

    /// Returns the entry of a section.
    pub fn get(&self, section: Section) -> Option<&TocEntry> {
        self.entries.iter().find(|entry| entry.section == section)
    }

    /// Writes the table, without the tar header that follows it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(128 * self.entries.len());
        for entry in &self.entries {
            let mut name = [0; 16];
            name[..entry.section.name().len()].copy_from_slice(entry.section.name().as_bytes());
            let flags = match entry.codec {
                Codec::Zstd => ZSTD,
                Codec::Lz4Block => LZ4_BLOCK,
                // Nothing else is written.
                Codec::Plain | Codec::Gzip | Codec::Zran { .. } | Codec::Batch { .. } => PLAIN,
            };
            let entry = format::TocEntry {
                flags: flags.into(),
                reserved: 0.into(),
                name,
                digest: entry.digest.0,
                stored_at: entry.stored.start.into(),
                stored_size: (entry.stored.end - entry.stored.start).into(),
                plain_size: entry.plain_size.into(),
                reserved2: [0; 48],
            };
            bytes.extend_from_slice(entry.as_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_written_is_read(
            digest in any::<[u8; 32]>(),
            start in 0u64..1 << 50,
            len in 0u64..1 << 40,
            codec in prop_oneof![Just(Codec::Plain), Just(Codec::Zstd), Just(Codec::Lz4Block)],
        ) {
            let sections = [Section::Data, Section::Table, Section::TableHeader, Section::Digests, Section::Bootstrap];
            let entry = |section| TocEntry { section, codec, digest: Digest(digest), stored: start..start + len, plain_size: len };
            let toc = Toc { entries: sections.map(entry).to_vec() };
            prop_assert_eq!(Toc::parse(&toc.to_bytes()).expect("own bytes"), toc);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = Toc::parse(&bytes);
        }
    }
}
