//! Reads v5 bootstraps.
//!
//! Inodes are known by index, one per name; the names of a hard link share an inode number, which is the index
//! of the first of them. [`Ino`] is that number, so that links are one inode to whoever asks.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use zerocopy::little_endian::{U32, U64};

use super::format::*;
use crate::blob::format::features;
use crate::bootstrap::{Attr, BlobInfo, Entry, Extent, FormatError, Ino, Kind};
use crate::chunk::{Chunk, ChunkIndex, ChunkTable};
use crate::flags::Flags;
use crate::record::{ChunkRecord, MAX_CHUNK_SIZE};
use crate::tree::ENTRY_WEIGHT;
use crate::view::{View, invalid};

/// What the superblock says.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) flags: Flags,
    pub(crate) chunk_size: u32,
    pub(crate) inode_count: u64,
    inode_table: (u64, u64),
    prefetch: (u64, u64),
}

impl Layout {
    /// The root's index.
    pub(crate) const ROOT: Ino = Ino(1);

    /// Checks superblock and tables of a bootstrap.
    pub(crate) fn open(bytes: View<'_>) -> Result<(Self, Vec<BlobInfo>), FormatError> {
        let superblock: &Super = bytes.read("superblock", 0)?;
        let bad = |at: u64, why: String| Err(invalid("superblock", at, why));
        if superblock.magic.get() != MAGIC || superblock.size.get() != SUPER_SIZE {
            return bad(0, "it is not that of RAFS v5".into());
        }
        if superblock.version.get() != VERSION {
            return Err(FormatError::Unsupported(format!("RAFS version {:#x}", superblock.version)));
        }
        let chunk_size = superblock.chunk_size.get();
        if !chunk_size.is_power_of_two() || !(4096..=MAX_CHUNK_SIZE).contains(&chunk_size) {
            return bad(12, format!("a chunk size of {chunk_size} bytes"));
        }
        let layout = Self {
            flags: Flags(superblock.flags.get()).check_v5(16)?,
            chunk_size,
            inode_count: superblock.inode_count.get(),
            inode_table: (superblock.inode_table_at.get(), u64::from(superblock.inode_table_len.get())),
            prefetch: (superblock.prefetch_at.get(), u64::from(superblock.prefetch_len.get())),
        };
        if layout.inode_count > layout.inode_table.1 {
            return bad(24, format!("{} inodes in a table of {}", layout.inode_count, layout.inode_table.1));
        }
        bytes.array::<U32>("inode table", layout.inode_table.0, layout.inode_table.1)?;
        bytes.array::<U32>("prefetch table", layout.prefetch.0, layout.prefetch.1)?;
        let blobs = read_blobs(bytes, superblock, layout.flags)?;
        let image = Image { bytes, layout: &layout };
        if image.inode(Self::ROOT.0)?.kind != Kind::Directory {
            return bad(32, "the root is not a directory".into());
        }
        Ok((layout, blobs))
    }
}

fn read_blobs(bytes: View<'_>, superblock: &Super, flags: Flags) -> Result<Vec<BlobInfo>, FormatError> {
    let at = superblock.blob_table_at.get();
    let mut rest = bytes.bytes("blob table", at, u64::from(superblock.blob_table_size.get()))?;
    let count = u64::from(superblock.extended_len.get());
    let extended: &[ExtendedBlob] = bytes.array("extended blob table", superblock.extended_at.get(), count)?;
    let mut blobs = Vec::new();
    // Two words and a name, which ends with NUL unless it is the last; less than that is padding.
    while rest.len() > 8 {
        let (words, names) = rest.split_at(8);
        let len = names.iter().position(|&byte| byte == 0).unwrap_or(names.len());
        let name = std::str::from_utf8(&names[..len]).ok().and_then(|name| name.parse().ok());
        let Some(id) = name else {
            return Err(invalid("blob table", at, format!("blob {} has no name that could be one", blobs.len())));
        };
        let mut info = BlobInfo::new(id, flags.compressor(), flags.algorithm());
        info.prefetch_size = u32::from_le_bytes([words[4], words[5], words[6], words[7]]);
        match extended.get(blobs.len()) {
            Some(extended) => {
                info.chunk_count = extended.chunk_count.get();
                info.features = extended.features.get();
                info.plain_size = extended.plain_size.get();
                info.stored_size = extended.stored_size.get();
            }
            None => info.features = features::V5_WITHOUT_EXTENDED_TABLE,
        }
        if info.stored_size > 1 << 40 || info.plain_size > 1 << 44 || info.chunk_count > 1 << 24 {
            return Err(invalid("extended blob table", superblock.extended_at.get(), "the blob is too large"));
        }
        if blobs.len() >= usize::from(u16::MAX) {
            return Err(invalid("blob table", at, "it has too many blobs"));
        }
        blobs.push(info);
        rest = names.get(len + 1..).unwrap_or_default();
    }
    Ok(blobs)
}

/// A bootstrap and what its superblock says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Image<'a> {
    pub(crate) bytes: View<'a>,
    pub(crate) layout: &'a Layout,
}

/// An inode and the places of what follows it.
#[derive(Debug, Clone)]
struct Found<'a> {
    at: u64,
    inode: &'a Inode,
    kind: Kind,
    name: &'a [u8],
    symlink: &'a [u8],
    /// Pairs of names and values, without the word that tells their size.
    xattrs: Range<u64>,
    chunks_at: u64,
}

impl<'a> Image<'a> {
    /// Returns the inode of index `index`, from 1 on.
    fn inode(self, index: u64) -> Result<Found<'a>, FormatError> {
        let (table, len) = self.layout.inode_table;
        let Some(position) = index.checked_sub(1).filter(|&position| position < len) else {
            return Err(invalid("inode table", table, format!("there is no inode {index}")));
        };
        let slot = self.bytes.read::<U32>("inode table", table + 4 * position)?;
        let at = u64::from(slot.get()) * ALIGNMENT;
        let inode: &Inode = self.bytes.read("inode", at)?;
        let kind = Kind::from_mode(inode.mode.get())
            .ok_or_else(|| invalid("inode", at + 60, format!("mode {:#o} has no file type", inode.mode)))?;
        if inode.mtime_nsec.get() >= 1_000_000_000 {
            return Err(invalid("inode", at + 108, format!("{} nanoseconds", inode.mtime_nsec)));
        }
        let mut cursor = at + 128;
        let name = self.bytes.bytes("name", cursor, u64::from(inode.name_size.get()))?;
        cursor += (name.len() as u64).next_multiple_of(ALIGNMENT);
        let mut symlink = &[][..];
        if kind == Kind::Symlink {
            symlink = self.bytes.bytes("symbolic link", cursor, u64::from(inode.symlink_size.get()))?;
            cursor += (symlink.len() as u64).next_multiple_of(ALIGNMENT);
        }
        let mut xattrs = cursor..cursor;
        if inode.flags.get() & HAS_XATTR != 0 {
            let size = self.bytes.read::<U64>("extended attributes", cursor)?.get();
            self.bytes.bytes("extended attributes", cursor + 8, size)?;
            xattrs = cursor + 8..cursor + 8 + size;
            cursor = xattrs.end.next_multiple_of(ALIGNMENT);
        }
        Ok(Found { at, inode, kind, name, symlink, xattrs, chunks_at: cursor })
    }

    pub(crate) fn attr(self, ino: Ino) -> Result<Attr, FormatError> {
        let Found { inode, kind, symlink, .. } = self.inode(ino.0)?;
        let ids = self.layout.flags.has(Flags::EXPLICIT_IDS);
        let device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        Ok(Attr {
            ino,
            kind,
            permissions: (inode.mode.get() & 0o7777) as u16,
            nlink: inode.nlink.get(),
            uid: ids.then_some(inode.uid.get()),
            gid: ids.then_some(inode.gid.get()),
            rdev: if device { inode.rdev.get() } else { 0 },
            size: if kind == Kind::Symlink { symlink.len() as u64 } else { inode.size.get() },
            mtime: inode.mtime.get(),
            mtime_nsec: inode.mtime_nsec.get(),
        })
    }

    /// Returns a directory's parent and the indexes of its children.
    fn directory(self, ino: Ino) -> Result<(Ino, Range<u64>), FormatError> {
        let found = self.inode(ino.0)?;
        if found.kind != Kind::Directory {
            return Err(invalid("inode", found.at, format!("{:?} where a directory is wanted", found.kind)));
        }
        let first = u64::from(found.inode.child_index.get());
        let count = u64::from(found.inode.child_count.get());
        if count > 0 && (first == 0 || first + count - 1 > self.layout.inode_table.1) {
            return Err(invalid(
                "inode",
                found.at + 92,
                format!("children {first} to {} are not there", first + count),
            ));
        }
        let parent = if ino == Layout::ROOT { ino } else { Ino(found.inode.parent.get()) };
        Ok((parent, first..first + count))
    }

    fn child(self, index: u64) -> Result<Entry<'a>, FormatError> {
        let found = self.inode(index)?;
        let name = found.name;
        if name.is_empty()
            || name.len() > 255
            || name.contains(&b'/')
            || name.contains(&0)
            || name == b"."
            || name == b".."
        {
            return Err(invalid("inode", found.at, "its name is none"));
        }
        Ok(Entry { ino: Ino(found.inode.ino.get()), kind: found.kind, name: OsStr::from_bytes(name) })
    }

    pub(crate) fn lookup(self, dir: Ino, name: &OsStr) -> Result<Option<Ino>, FormatError> {
        let (parent, children) = self.directory(dir)?;
        if name == "." || name == ".." {
            return Ok(Some(if name == "." { dir } else { parent }));
        }
        let (mut low, mut high) = (children.start, children.end);
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = self.child(middle)?;
            match entry.name.as_bytes().cmp(name.as_bytes()) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Ok(Some(entry.ino)),
            }
        }
        Ok(None)
    }

    /// Returns the entries of a directory; `.` and `..`, which are not stored, come first.
    pub(crate) fn entries(
        self,
        dir: Ino,
        from: u64,
    ) -> Result<impl Iterator<Item = Result<Entry<'a>, FormatError>>, FormatError> {
        let (parent, children) = self.directory(dir)?;
        let dot = |ino, name| Ok(Entry { ino, kind: Kind::Directory, name: OsStr::new(name) });
        let dots = [dot(dir, "."), dot(parent, "..")].into_iter().skip(from.min(2) as usize);
        let first = children.start.saturating_add(from.saturating_sub(2)).min(children.end);
        Ok(dots.chain((first..children.end).map(move |index| self.child(index))))
    }

    pub(crate) fn readlink(self, ino: Ino) -> Result<OsString, FormatError> {
        let found = self.inode(ino.0)?;
        if found.kind != Kind::Symlink {
            return Err(invalid("inode", found.at, format!("{:?} where a symbolic link is wanted", found.kind)));
        }
        Ok(OsString::from_vec(found.symlink.to_vec()))
    }

    pub(crate) fn xattrs(self, ino: Ino) -> Result<Vec<(OsString, Vec<u8>)>, FormatError> {
        let Range { start: mut at, end } = self.inode(ino.0)?.xattrs;
        let mut pairs = Vec::new();
        while at < end {
            let size = u64::from(self.bytes.read::<U32>("extended attribute", at)?.get());
            let pair = self.bytes.bytes("extended attribute", at + 4, size)?;
            let split = pair.iter().position(|&byte| byte == 0).filter(|&split| split > 0 && at + 4 + size <= end);
            let Some(split) = split else {
                return Err(invalid("extended attribute", at, "it has no name, or reaches beyond its inode's"));
            };
            pairs.push((OsString::from_vec(pair[..split].to_vec()), pair[split + 1..].to_vec()));
            at += 4 + size;
        }
        Ok(pairs)
    }

    /// Returns the number of bytes that an inode takes with all that follows it, less those by which its directory
    /// counts the name: what copying it may cost.
    pub(crate) fn weight(self, ino: Ino) -> Result<u64, FormatError> {
        let found = self.inode(ino.0)?;
        let chunks = if found.kind == Kind::Regular { u64::from(found.inode.child_count.get()) } else { 0 };
        Ok(found.chunks_at - found.at + 80 * chunks - ENTRY_WEIGHT)
    }

    fn records(self, found: &Found<'a>) -> Result<&'a [ChunkRecord], FormatError> {
        if found.kind != Kind::Regular {
            return Err(invalid("inode", found.at, format!("{:?} has no data", found.kind)));
        }
        if found.inode.flags.get() & HAS_HOLE != 0 {
            return Err(FormatError::Unsupported("a file with holes".into()));
        }
        let count = u64::from(found.inode.child_count.get());
        if count != found.inode.size.get().div_ceil(u64::from(self.layout.chunk_size)) {
            let why = format!("{count} chunks for {} bytes", found.inode.size);
            return Err(invalid("inode", found.at + 96, why));
        }
        self.bytes.array("chunks", found.chunks_at, count)
    }

    pub(crate) fn extents(
        self,
        ino: Ino,
        range: Range<u64>,
        blobs: &'a [BlobInfo],
    ) -> Result<impl Iterator<Item = Result<Extent, FormatError>> + 'a, FormatError> {
        let found = self.inode(ino.0)?;
        let records = self.records(&found)?;
        let (size, chunk_size) = (found.inode.size.get(), u64::from(self.layout.chunk_size));
        let (start, end) = (range.start.min(size), range.end.min(size));
        let first = if start < end { start / chunk_size } else { 0 };
        let last = if start < end { end.div_ceil(chunk_size) } else { 0 };
        Ok((first..last).map(move |position| {
            let at = found.chunks_at + 80 * position;
            let record = &records[position as usize];
            let chunk_at = position * chunk_size;
            let wanted = chunk_size.min(size - chunk_at);
            let blob = u16::try_from(record.blob_index.get()).ok().filter(|&blob| usize::from(blob) < blobs.len());
            let Some(blob) = blob else {
                return Err(invalid("chunk record", at, format!("there is no blob {}", record.blob_index)));
            };
            let plain_at = record.plain_offset.get();
            if record.file_offset.get() != chunk_at
                || u64::from(record.plain_size.get()) != wanted
                || plain_at > 1 << 48
            {
                return Err(invalid("chunk record", at, "it is not the chunk of its place in the file"));
            }
            let file = start.max(chunk_at)..end.min(chunk_at + chunk_size);
            let plain = plain_at + (file.start - chunk_at)..plain_at + (file.end - chunk_at);
            Ok(Extent { blob, chunk: ChunkIndex(record.index.get()), file, plain })
        }))
    }

    pub(crate) fn chunks(self, blob: u16, info: &BlobInfo) -> Result<ChunkTable, FormatError> {
        // Every name has its own inode and records, so that honest ones fit into the file side by side.
        let mut budget = self.bytes.len();
        let mut chunks = BTreeMap::<(u64, u32), Chunk>::new();
        for index in 1..=self.layout.inode_table.1 {
            // The table may end with an empty slot of padding.
            let slot = self.bytes.read::<U32>("inode table", self.layout.inode_table.0 + 4 * (index - 1))?;
            if slot.get() == 0 {
                continue;
            }
            let found = self.inode(index)?;
            if found.kind != Kind::Regular {
                continue;
            }
            let records = self.records(&found)?;
            budget = budget
                .checked_sub(80 * records.len() as u64)
                .ok_or_else(|| invalid("inode table", self.layout.inode_table.0, "inodes share their chunks"))?;
            for (position, record) in
                records.iter().enumerate().filter(|(_, record)| record.blob_index.get() == u32::from(blob))
            {
                let chunk = record.chunk(info, found.chunks_at + 80 * position as u64)?;
                chunks.insert((chunk.plain.start, chunk.index.0), chunk);
            }
        }
        Ok(ChunkTable::new(chunks.into_values().collect()))
    }

    pub(crate) fn prefetch(self) -> Result<Vec<Ino>, FormatError> {
        let inos: &[U32] = self.bytes.array("prefetch table", self.layout.prefetch.0, self.layout.prefetch.1)?;
        Ok(inos.iter().map(|ino| Ino(u64::from(ino.get()))).take_while(|ino| ino.0 != 0).collect())
    }
}
