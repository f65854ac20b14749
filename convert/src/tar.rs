//! Reading a tar stream, as layers come: forwards, once, and from strangers.
//!
//! A tar is a row of 512-byte blocks. Each entry is a header block, blocks of data, and whatever extension
//! headers went before it: a pax header (`x`) with records such as `path=` or `SCHILY.xattr.user.a=`, or GNU's
//! long name and long link (`L`, `K`). [`Archive::next_entry`] folds these into one [`Entry`]; the bytes of the
//! entry are then read from the archive itself, with the holes of sparse files filled in.
//!
//! What is accepted is what Go's `archive/tar` accepts, since containerd unpacks with it: links and directories
//! carry no data whatever their size field says, a V7 entry whose name ends in `/` is a directory, global pax
//! headers change nothing, and the end may be two zero blocks, one, or none. pax records are cut by
//! their own length, because a value may hold newlines (a file capability often does).
//! Contiguous files and old GNU sparse files are read as the files they are; [`crate::layer`] refuses them where
//! containerd does.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt as _;

mod header;
mod pax;
mod sparse;
pub(crate) mod write;

pub(crate) use header::Block;
use pax::Records;
use sparse::Expander;

/// The size of a block, and so of a header.
pub const BLOCK: usize = 512;

/// The largest extension header that is read: 1 MiB, the limit of the program that unpacks layers elsewhere.
const EXTENSION_LIMIT: u64 = 1 << 20;

/// Why a tar cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The bytes could not be had.
    #[error("could not read the archive at byte {at}")]
    Read {
        /// Position in the uncompressed archive.
        at: u64,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The archive stops inside an entry.
    #[error("the archive ends at byte {at}, inside {what}; it was cut short")]
    Truncated {
        /// Position in the uncompressed archive.
        at: u64,
        /// What the end fell into.
        what: &'static str,
    },
    /// A header makes no sense.
    #[error("the header at byte {at} is not a tar header: {why}")]
    Header {
        /// Position of the header in the uncompressed archive.
        at: u64,
        /// What is wrong.
        why: String,
    },
    /// An entry of a type that has no place in a file system.
    #[error("entry `{name}` at byte {at} has type `{kind}`, which cannot be unpacked")]
    Kind {
        /// The entry's name.
        name: String,
        /// Position of its header in the uncompressed archive.
        at: u64,
        /// The type flag, as a character.
        kind: char,
    },
}

/// What an entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file; its bytes follow.
    Regular,
    /// Another name for an earlier entry.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One entry, extension headers applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name, as written.
    pub path: Vec<u8>,
    /// What it makes.
    pub kind: EntryKind,
    /// Target of a link, as written.
    pub link: Vec<u8>,
    /// Permission bits with set-uid, set-gid and sticky.
    pub permissions: u16,
    /// Owner, as written.
    pub uid: i64,
    /// Group, as written.
    pub gid: i64,
    /// Seconds of the modification time.
    pub mtime: i64,
    /// Nanoseconds of the modification time, counted upwards.
    pub mtime_nsec: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Bytes that the file holds, holes included; 0 unless it is regular.
    pub size: u64,
    /// Extended attributes, full names.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The type as the header tells it; several mean the same kind.
    pub flag: u8,
    /// Position of its header in the uncompressed archive.
    pub at: u64,
}

impl Entry {
    /// Returns the name for messages.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }
}

/// A tar stream.
#[derive(Debug)]
pub struct Archive<R> {
    input: Counted<R>,
    body: Option<Expander>,
    /// Stored bytes of the current entry not yet read, without padding.
    stored_left: u64,
    padding: u64,
    finished: bool,
}

impl<R: Read> Archive<R> {
    /// Begins to read; nothing is read yet.
    pub fn new(input: R) -> Self {
        let input = Counted { inner: input, at: 0 };
        Self { input, body: None, stored_left: 0, padding: 0, finished: false }
    }

    /// Returns the position in the uncompressed archive.
    pub fn position(&self) -> u64 {
        self.input.at
    }

    /// Skips what is left of the current entry and returns the next; `None` at the end of the archive.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        if self.finished {
            return Ok(None);
        }
        self.skip_body()?;
        let mut records = Records::default();
        let mut long_name = None;
        let mut long_link = None;
        loop {
            let at = self.input.at;
            let Some(block) = self.header_block()? else {
                self.finished = true;
                return Ok(None);
            };
            let bad = |why: String| TarError::Header { at, why };
            block.check().map_err(bad)?;
            match block.type_flag() {
                b'x' => {
                    let body = self.extension(&block, at)?;
                    records = Records::parse(&body).map_err(bad)?;
                }
                b'g' => {
                    let body = self.extension(&block, at)?;
                    Records::parse(&body).map_err(bad)?;
                }
                b'L' => long_name = Some(until_nul(self.extension(&block, at)?)),
                b'K' => long_link = Some(until_nul(self.extension(&block, at)?)),
                _ => return self.entry(&block, at, records, long_name, long_link).map(Some),
            }
        }
    }

    /// Reads whatever follows the end of the archive, so that digests of the whole stream can be taken.
    pub fn drain(&mut self) -> Result<(), TarError> {
        self.skip_body()?;
        let mut sink = [0; 16 * 1024];
        while self.input.read(&mut sink)? > 0 {}
        Ok(())
    }

    /// Returns the underlying reader; what is read from it by others is missing here.
    pub(crate) fn input_mut(&mut self) -> &mut R {
        &mut self.input.inner
    }

    /// Returns whether the bytes of the current entry lie in the archive as they are, without holes.
    pub(crate) fn is_whole(&self) -> bool {
        self.body.as_ref().is_none_or(Expander::is_whole)
    }

    /// Fills `into` with bytes of the current entry.
    pub(crate) fn read_body_exact(&mut self, into: &mut [u8]) -> Result<(), TarError> {
        let mut filled = 0;
        while filled < into.len() {
            match self.read_body(&mut into[filled..])? {
                0 => return Err(TarError::Truncated { at: self.position(), what: "a sparse file" }),
                read => filled += read,
            }
        }
        Ok(())
    }

    /// Passes over `len` bytes of the current entry, which must be whole.
    pub(crate) fn skip_part(&mut self, mut len: u64) -> Result<(), TarError> {
        let mut sink = [0; 16 * 1024];
        while len > 0 {
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(sink.len());
            self.read_body_exact(&mut sink[..part])?;
            len -= part as u64;
        }
        Ok(())
    }

    /// Gives the underlying reader back.
    pub fn into_inner(self) -> R {
        self.input.inner
    }

    /// Reads bytes of the current entry into `into`; 0 at its end.
    pub fn read_body(&mut self, into: &mut [u8]) -> Result<usize, TarError> {
        let Some(body) = &mut self.body else { return Ok(0) };
        let Some(step) = body.step(into.len()) else { return Ok(0) };
        match step {
            sparse::Step::Hole(len) => {
                into[..len].fill(0);
                Ok(len)
            }
            sparse::Step::Data(len) => {
                let read = self.input.read(&mut into[..len])?;
                if read == 0 {
                    return Err(TarError::Truncated { at: self.input.at, what: "the data of an entry" });
                }
                body.took(read);
                self.stored_left -= read as u64;
                Ok(read)
            }
        }
    }

    fn entry(
        &mut self,
        block: &Block,
        at: u64,
        mut records: Records,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let bad = |why: String| TarError::Header { at, why };
        let mut path = records.path.take().unwrap_or_else(|| block.path());
        if let Some(name) = long_name {
            path = name;
        }
        let mut link = records.link.take().unwrap_or_else(|| block.link());
        if let Some(name) = long_link {
            link = name;
        }
        let kind = match block.type_flag() {
            0 if path.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' | b'S' => EntryKind::Regular,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                return Err(TarError::Kind {
                    name: String::from_utf8_lossy(&path).into_owned(),
                    at,
                    kind: char::from(other),
                });
            }
        };
        let (mtime, mtime_nsec) = match records.mtime {
            Some(time) => time,
            None => (block.mtime().map_err(bad)?, 0),
        };
        let device = if matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice) {
            block.device().map_err(bad)?
        } else {
            (0, 0)
        };
        let mut size = 0;
        self.body = None;
        if kind == EntryKind::Regular {
            let stored = match records.size {
                Some(size) => size,
                None => block.size().map_err(bad)?,
            };
            self.stored_left = stored;
            self.padding = stored.wrapping_neg() % BLOCK as u64;
            let body = if block.type_flag() == b'S' {
                let map = self.old_sparse_map(block, at)?;
                Expander::sparse(map, stored)
            } else if records.is_sparse_1_0() {
                let before = self.input.at;
                let map = self.sparse_1_0_map(&records, at)?;
                self.stored_left = stored
                    .checked_sub(self.input.at - before)
                    .ok_or_else(|| bad("its sparse map is longer than the entry".to_owned()))?;
                Expander::sparse(map, self.stored_left)
            } else if let Some(map) = records.sparse_map().map_err(bad)? {
                Expander::sparse(map, stored)
            } else {
                Ok(Expander::whole(stored))
            }
            .map_err(bad)?;
            size = body.size();
            if let Some(name) = records.sparse_name.take() {
                path = name;
            }
            self.body = Some(body);
        }
        Ok(Entry {
            path,
            kind,
            link,
            permissions: block.mode().map_err(bad)?,
            uid: records.uid.map_or_else(|| block.uid(), Ok).map_err(bad)?,
            gid: records.gid.map_or_else(|| block.gid(), Ok).map_err(bad)?,
            mtime,
            mtime_nsec,
            device,
            size,
            xattrs: records.xattrs.into_iter().map(|(name, value)| (OsString::from_vec(name), value)).collect(),
            flag: block.type_flag(),
            at,
        })
    }

    /// Reads the header's own map of an old GNU sparse file and the blocks that continue it.
    fn old_sparse_map(&mut self, block: &Block, at: u64) -> Result<sparse::Map, TarError> {
        let bad = |why: String| TarError::Header { at, why };
        let mut map = sparse::Map::new(block.sparse_real_size().map_err(bad)?);
        let mut more = map.extend_old(block.sparse_pieces()).map_err(bad)? && block.sparse_continues();
        while more {
            let mut next = Block::zeroed();
            self.input.read_exact(next.bytes_mut(), "a sparse map")?;
            more = map.extend_old(next.continued_pieces()).map_err(bad)? && next.continued_continues();
        }
        Ok(map)
    }

    /// Reads the map that a pax 1.0 sparse file carries before its data: decimal numbers, one a line, padded to a block.
    fn sparse_1_0_map(&mut self, records: &Records, at: u64) -> Result<sparse::Map, TarError> {
        let bad = |why: &str| TarError::Header { at, why: why.to_owned() };
        let size = records.sparse_size.ok_or_else(|| bad("a sparse file without its real size"))?;
        let mut map = sparse::Map::new(size);
        let mut block = [0; BLOCK];
        let mut used = BLOCK;
        let mut total = 0_u64;
        let mut number = |archive: &mut Self| -> Result<u64, TarError> {
            let mut text = Vec::new();
            loop {
                if used == BLOCK {
                    archive.input.read_exact(&mut block, "a sparse map")?;
                    used = 0;
                    total += BLOCK as u64;
                    if total > EXTENSION_LIMIT {
                        return Err(bad("its sparse map is longer than 1 MiB"));
                    }
                }
                let byte = block[used];
                used += 1;
                if byte == b'\n' {
                    return pax::decimal(&text).ok_or_else(|| bad("its sparse map holds something other than numbers"));
                }
                text.push(byte);
                if text.len() > 20 {
                    return Err(bad("its sparse map holds something other than numbers"));
                }
            }
        };
        let pieces = number(self)?;
        for _ in 0..pieces {
            let offset = number(self)?;
            let len = number(self)?;
            map.push(offset, len).map_err(|why| TarError::Header { at, why })?;
        }
        Ok(map)
    }

    fn header_block(&mut self) -> Result<Option<Block>, TarError> {
        let mut block = Block::zeroed();
        if !self.input.read_block(block.bytes_mut(), "a header")? {
            return Ok(None);
        }
        if !block.is_zero() {
            return Ok(Some(block));
        }
        // One zero block ends the archive if a second or nothing follows.
        let at = self.input.at;
        if self.input.read_block(block.bytes_mut(), "the end of the archive")? && !block.is_zero() {
            return Err(TarError::Header { at, why: "a single zero block lies before it".to_owned() });
        }
        Ok(None)
    }

    fn extension(&mut self, block: &Block, at: u64) -> Result<Vec<u8>, TarError> {
        let size = block.size().map_err(|why| TarError::Header { at, why })?;
        if size > EXTENSION_LIMIT {
            return Err(TarError::Header {
                at,
                why: format!("an extension header of {size} bytes; 1 MiB is the limit"),
            });
        }
        let mut body = vec![0; usize::try_from(size).expect("at most 1 MiB")];
        self.input.read_exact(&mut body, "an extension header")?;
        self.input.skip(size.wrapping_neg() % BLOCK as u64, "the padding of an extension header")?;
        Ok(body)
    }

    fn skip_body(&mut self) -> Result<(), TarError> {
        self.body = None;
        self.input.skip(std::mem::take(&mut self.stored_left), "the data of an entry")?;
        self.input.skip_padding(std::mem::take(&mut self.padding))
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// A reader that knows where it is.
#[derive(Debug)]
struct Counted<R> {
    inner: R,
    at: u64,
}

impl<R: Read> Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize, TarError> {
        loop {
            match self.inner.read(into) {
                Ok(len) => {
                    self.at += len as u64;
                    return Ok(len);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Read { at: self.at, source }),
            }
        }
    }

    /// Fills `into`; `false` if there was nothing at all.
    fn read_block(&mut self, into: &mut [u8], what: &'static str) -> Result<bool, TarError> {
        let mut filled = 0;
        while filled < into.len() {
            match self.read(&mut into[filled..])? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(TarError::Truncated { at: self.at, what }),
                len => filled += len,
            }
        }
        Ok(true)
    }

    fn read_exact(&mut self, into: &mut [u8], what: &'static str) -> Result<(), TarError> {
        if into.is_empty() || self.read_block(into, what)? {
            Ok(())
        } else {
            Err(TarError::Truncated { at: self.at, what })
        }
    }

    fn skip(&mut self, mut len: u64, what: &'static str) -> Result<(), TarError> {
        let mut sink = [0; 16 * 1024];
        while len > 0 {
            let want = usize::try_from(len).unwrap_or(usize::MAX).min(sink.len());
            match self.read(&mut sink[..want])? {
                0 => return Err(TarError::Truncated { at: self.at, what }),
                read => len -= read as u64,
            }
        }
        Ok(())
    }

    /// Skips padding; an archive may end before the padding of its last entry is complete.
    fn skip_padding(&mut self, len: u64) -> Result<(), TarError> {
        match self.skip(len, "padding") {
            Err(TarError::Truncated { .. }) => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
pub(crate) mod made;
#[cfg(test)]
mod tests;
