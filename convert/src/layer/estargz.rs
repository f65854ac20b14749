//! A layer whose files stay where they are, known from its own table of contents: an eStargz layer.
//!
//! Nothing but the table is read. It names for each chunk the gzip member in which it begins and its digest; what
//! is made is the layer's tree and the place of every chunk. Only layers in which each chunk has a member and a digest of its
//! own, and all chunks of a file but the last have the same size, can be described so. The members of which a table does not
//! speak hold tar headers.
//!
//! The table's times are whole seconds, and it does not list the file that it is itself.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nydus_rafs::tree::ChunkRef;
use nydus_rafs::{Algorithm, BlobId, BlobInfo, Chunk, ChunkIndex, Codec, Compressor, Digest};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::reference::{PAGE, Raw};
use super::stream::attach;
use super::{BodyId, LayerBuilder, LayerError, Rules};
use crate::pack::Body;
use crate::tar::{Entry, EntryKind};

/// The sizes that chunks of an image may have.
const CHUNK_SIZES: std::ops::RangeInclusive<u64> = 4096..=16 << 20;
/// What builders of such layers cut files into when they are not told otherwise.
const USUAL_CHUNK_SIZE: u64 = 4 << 20;
/// More entries than any layer has.
const MAX_ENTRIES: usize = 1 << 20;
/// Chunks of one blob are numbered with 24 bits.
const MAX_CHUNKS: usize = 0xff_ffff;

/// Why a layer cannot be described by its table of contents.
#[derive(Debug, thiserror::Error)]
pub enum EstargzError {
    /// It is no table of contents.
    #[error("the table of contents is not valid")]
    Json(#[from] serde_json::Error),
    /// It is one of another kind.
    #[error("the table of contents has version {0}, and only version 1 is known")]
    Version(i64),
    /// An entry makes no sense.
    #[error("`{name}`, entry {number} of the table of contents, {why}")]
    Entry {
        /// Its name.
        name: String,
        /// Its number, from 0.
        number: usize,
        /// What is wrong.
        why: String,
    },
    /// An entry cannot be unpacked.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Its chunks cannot be those of the image.
    #[error("its files are cut into chunks of {found} bytes, the image has {wanted}")]
    ChunkSize {
        /// The layer's.
        found: u64,
        /// The image's.
        wanted: u64,
    },
    /// A chunk size that no image has.
    #[error("its files are cut into chunks of {0} bytes, not a power of two from 4,096 to 16,777,216")]
    Uneven(u64),
    /// There are too many.
    #[error("it has more than 16,777,215 chunks")]
    TooMany,
}

#[derive(Debug, Deserialize)]
struct Document {
    version: i64,
    #[serde(deserialize_with = "bounded")]
    entries: Vec<TocEntry>,
}

/// Reads entries until there are too many: a few bytes would promise more memory than there is.
fn bounded<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<TocEntry>, D::Error> {
    struct Entries;
    impl<'de> Visitor<'de> for Entries {
        type Value = Vec<TocEntry>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {MAX_ENTRIES} entries")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = from.next_element()? {
                if entries.len() == MAX_ENTRIES {
                    return Err(A::Error::invalid_length(MAX_ENTRIES + 1, &self));
                }
                entries.push(entry);
            }
            Ok(entries)
        }
    }
    from.deserialize_seq(Entries)
}

/// An entry as it is in the table.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct TocEntry {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    size: u64,
    modtime: String,
    link_name: String,
    mode: i64,
    uid: i64,
    gid: i64,
    offset: u64,
    inner_offset: u64,
    dev_major: u32,
    dev_minor: u32,
    xattrs: HashMap<String, Option<String>>,
    chunk_offset: u64,
    chunk_size: u64,
    chunk_digest: String,
}

/// A chunk of a file, as the table tells it.
#[derive(Debug)]
struct Part {
    at: u64,
    len: u64,
    digest: Digest,
}

/// A file and its parts.
#[derive(Debug)]
struct Item {
    entry: Entry,
    parts: Vec<Part>,
}

/// A table of contents that was understood.
#[derive(Debug)]
pub struct Toc {
    items: Vec<Item>,
    /// What the files with several chunks are cut into, if there are any.
    cut: Option<u64>,
    /// The largest file of one chunk.
    largest: u64,
}

impl Toc {
    /// Understands a table of contents, JSON.
    ///
    /// # Errors
    ///
    /// If it is not valid, or the layer's chunks cannot be read by themselves.
    pub fn parse(json: &[u8]) -> Result<Self, EstargzError> {
        let document: Document = serde_json::from_slice(json)?;
        if document.version != 1 {
            return Err(EstargzError::Version(document.version));
        }
        let mut toc = Self { items: Vec::new(), cut: None, largest: 0 };
        let mut entries = document.entries.into_iter().enumerate().peekable();
        while let Some((number, first)) = entries.next() {
            let name = first.name.clone();
            let refused = |why: String| EstargzError::Entry { name: name.clone(), number, why };
            if format!("{name}{}", first.link_name).contains(char::REPLACEMENT_CHARACTER) {
                return Err(refused("had a name that is not UTF-8, which the table does not tell".to_owned()));
            }
            let size = first.size;
            let mut parts = Vec::new();
            let entry = first.entry(number).map_err(refused)?;
            if entry.kind == EntryKind::Regular && size > 0 {
                parts.push(first.part(0, size).map_err(refused)?);
                let mut end = parts[0].len;
                while let Some((number, next)) = entries.next_if(|(_, next)| next.kind == "chunk") {
                    let refused = |why| EstargzError::Entry { name: next.name.clone(), number, why };
                    if next.name != name {
                        return Err(refused(format!("is a chunk of another file than `{name}` before it")));
                    }
                    let part = next.part(end, size).map_err(refused)?;
                    end += part.len;
                    parts.push(part);
                }
                if end != size {
                    return Err(refused(format!("has {size} bytes and chunks of {end}")));
                }
            }
            toc.measure(&parts).map_err(refused)?;
            toc.items.push(Item { entry, parts });
        }
        Ok(toc)
    }

    /// Notes into what a file is cut.
    fn measure(&mut self, parts: &[Part]) -> Result<(), String> {
        if let [part] = parts {
            self.largest = self.largest.max(part.len);
            return Ok(());
        }
        let Some((last, before)) = parts.split_last() else { return Ok(()) };
        for part in before {
            let cut = *self.cut.get_or_insert(part.len);
            if part.len != cut {
                return Err(format!("has a chunk of {} bytes where others have {cut}", part.len));
            }
        }
        match self.cut {
            Some(cut) if last.len > cut => {
                Err(format!("ends in a chunk of {} bytes where others have {cut}", last.len))
            }
            _ => Ok(()),
        }
    }

    /// Returns the size of the chunks of an image with this layer, in bytes; `wanted` is that of the layers below.
    ///
    /// # Errors
    ///
    /// If the layer cannot be in such an image, or in none.
    pub fn chunk_size(&self, wanted: Option<u32>) -> Result<u32, EstargzError> {
        if let Some(cut) = self.cut.filter(|cut| !cut.is_power_of_two() || !CHUNK_SIZES.contains(cut)) {
            return Err(EstargzError::Uneven(cut));
        }
        let least =
            self.cut.unwrap_or(USUAL_CHUNK_SIZE).max(self.largest.checked_next_power_of_two().unwrap_or(u64::MAX));
        let size = match (wanted, self.cut) {
            (Some(wanted), Some(cut)) if u64::from(wanted) != cut => {
                return Err(EstargzError::ChunkSize { found: cut, wanted: wanted.into() });
            }
            (Some(wanted), _) => u64::from(wanted),
            (None, Some(cut)) => cut,
            (None, None) => least,
        };
        if self.largest > size {
            return Err(EstargzError::ChunkSize { found: self.largest, wanted: size });
        }
        u32::try_from(size).ok().filter(|_| CHUNK_SIZES.contains(&size)).ok_or(EstargzError::Uneven(size))
    }

    /// Makes the layer: blob `id`, whose chunks end before byte `data_size`.
    ///
    /// # Errors
    ///
    /// If an entry cannot be unpacked or a chunk lies where it cannot.
    pub fn layer(self, rules: Rules, id: BlobId, data_size: u64) -> Result<Raw, EstargzError> {
        // A member ends where the next begins of which the table speaks.
        let mut begins: Vec<u64> = self.items.iter().flat_map(|item| &item.parts).map(|part| part.at).collect();
        begins.sort_unstable();
        let end = |at: u64| begins.get(begins.partition_point(|&begin| begin <= at)).copied().unwrap_or(data_size);
        let mut builder = LayerBuilder::new(rules);
        let (mut chunks, mut bodies, mut plain_size) = (Vec::new(), Vec::new(), 0_u64);
        let mut known: HashMap<Digest, ChunkIndex> = HashMap::new();
        for (number, Item { entry, parts }) in self.items.into_iter().enumerate() {
            let name = entry.name();
            let body = LayerBuilder::wants_body(&entry).then_some(BodyId(bodies.len()));
            builder.add(entry, body)?;
            if body.is_none() {
                continue;
            }
            let mut body = Body::default();
            for part in parts {
                let stored = part.at..end(part.at);
                if stored.end > data_size || stored.is_empty() || stored.end - stored.start > 2 * CHUNK_SIZES.end() {
                    let why = format!("has a chunk at bytes {stored:?} of a layer with {data_size}");
                    return Err(EstargzError::Entry { name, number, why });
                }
                let index = match known.get(&part.digest) {
                    Some(&index) => index,
                    None if chunks.len() >= MAX_CHUNKS => return Err(EstargzError::TooMany),
                    None => {
                        let index = ChunkIndex(u32::try_from(chunks.len()).expect("less than 24 bits"));
                        chunks.push(Chunk {
                            index,
                            plain: plain_size..plain_size + part.len,
                            stored,
                            codec: Codec::Gzip,
                            encrypted: false,
                            algorithm: Algorithm::Sha256,
                            digest: Some(part.digest),
                            container: None,
                            crc32: None,
                        });
                        plain_size = (plain_size + part.len).next_multiple_of(PAGE);
                        known.insert(part.digest, index);
                        index
                    }
                };
                let found = &chunks[usize::try_from(index.0).expect("an index")];
                if found.plain_len() != part.len {
                    let why = "has a chunk with the digest of a longer or shorter one".to_owned();
                    return Err(EstargzError::Entry { name, number, why });
                }
                body.chunks.push(ChunkRef { blob: 0, chunk: index });
            }
            bodies.push(body);
        }
        let mut layer = builder.finish()?;
        attach(&mut layer, bodies);
        let info = (!chunks.is_empty()).then(|| BlobInfo {
            stored_size: data_size,
            plain_size,
            chunk_count: u32::try_from(chunks.len()).unwrap_or(u32::MAX),
            ..BlobInfo::new(id, Compressor::Gzip, Algorithm::Sha256)
        });
        Ok(Raw { layer, info, chunks })
    }
}

impl TocEntry {
    /// Reads it as the header of a tar entry.
    fn entry(&self, number: usize) -> Result<Entry, String> {
        let kind = match &*self.kind {
            "dir" => EntryKind::Directory,
            "reg" => EntryKind::Regular,
            "symlink" => EntryKind::Symlink,
            "hardlink" => EntryKind::HardLink,
            "char" => EntryKind::CharDevice,
            "block" => EntryKind::BlockDevice,
            "fifo" => EntryKind::Fifo,
            "chunk" => return Err("is a chunk of no file".to_owned()),
            other => return Err(format!("has the unknown type {other:?}")),
        };
        let mut xattrs = BTreeMap::new();
        for (name, value) in &self.xattrs {
            let value = value.as_deref().unwrap_or_default();
            let value = STANDARD.decode(value).map_err(|_| format!("has the attribute {name:?} not in base64"))?;
            xattrs.insert(OsString::from_vec(name.clone().into_bytes()), value);
        }
        let (mtime, mtime_nsec) = match &*self.modtime {
            "" => (0, 0),
            text => instant(text).ok_or_else(|| format!("has the time {text:?}, which is none of RFC 3339"))?,
        };
        Ok(Entry {
            path: self.name.clone().into_bytes(),
            kind,
            link: self.link_name.clone().into_bytes(),
            permissions: u16::try_from(self.mode & 0o7777).expect("12 bits"),
            uid: self.uid,
            gid: self.gid,
            mtime,
            mtime_nsec,
            device: (self.dev_major, self.dev_minor),
            size: if kind == EntryKind::Regular { self.size } else { 0 },
            xattrs,
            flag: b'0',
            at: number as u64,
        })
    }

    /// Reads it as a chunk that begins `begin` bytes into a file of `size` bytes.
    fn part(&self, begin: u64, size: u64) -> Result<Part, String> {
        let left = size.checked_sub(begin).filter(|&left| left > 0).ok_or("has a chunk after its end")?;
        if self.chunk_offset != begin {
            return Err(format!("has a chunk at byte {} where one at {begin} is wanted", self.chunk_offset));
        }
        let len = if self.chunk_size == 0 { left } else { self.chunk_size };
        if len > left || len > *CHUNK_SIZES.end() {
            return Err(format!("has a chunk of {len} bytes, and {left} are left of the file and 16 MiB the most"));
        }
        if self.inner_offset != 0 {
            return Err("has a chunk in the middle of a gzip member: it can only be read with what is before it".into());
        }
        let digest = self.chunk_digest.strip_prefix("sha256:").and_then(|hex| hex.parse().ok());
        let digest = digest.ok_or("has a chunk without a sha256 digest of its own")?;
        Ok(Part { at: self.offset, len, digest })
    }
}

/// Reads a time of RFC 3339: seconds since 1970 and nanoseconds.
fn instant(text: &str) -> Option<(i64, u32)> {
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))?;
        digits.parse().ok()
    };
    let marks = [(4, "-"), (7, "-"), (10, "T"), (13, ":"), (16, ":")];
    if marks.iter().any(|&(at, mark)| text.get(at..at + 1) != Some(mark)) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut rest = text.get(19..)?;
    let mut nanoseconds = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        nanoseconds = format!("{:0<9}", &fraction[..digits.min(9)]).parse().ok()?;
        rest = &fraction[digits..];
    }
    let zone = match rest.as_bytes() {
        b"Z" => 0,
        [sign @ (b'+' | b'-'), hours @ ..] if hours.len() == 5 && hours[2] == b':' => {
            let from = text.len() - 5;
            let minutes = number(from, from + 2)? * 60 + number(from + 3, from + 5)?;
            if *sign == b'+' { minutes } else { -minutes }
        }
        _ => return None,
    };
    // Days since 1970, counted in years that begin in March, so that the leap day is the last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + (153 * month + 2) / 5 + day
            - 1
            - 719_468;
    Some((((days * 24 + hour) * 60 + minute - zone) * 60 + second, nanoseconds))
}

#[cfg(test)]
mod tests;
