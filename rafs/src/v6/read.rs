//! Reads v6 bootstraps.
//!
//! [`Layout`] is what the superblocks say, checked once; [`Image`] answers questions by following offsets
//! in the bytes, each checked when it is followed. Nothing is copied or indexed at opening, so that the
//! memory of an open image is that of its blob list.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::format::*;
use crate::blob::format::features;
use crate::bootstrap::{Attr, BlobInfo, Entry, Extent, FormatError, Ino, Kind, TableLocation};
use crate::chunk::{Chunk, ChunkIndex, ChunkTable, Compressor};
use crate::cipher::Cipher;
use crate::digest::{Algorithm, Digest};
use crate::flags::Flags;
use crate::record::{ChunkRecord, MAX_CHUNK_SIZE};
use crate::view::{View, invalid};
use crate::write::XATTR_PREFIXES;

/// Symbolic links are at most this long, as with `PATH_MAX`.
const MAX_SYMLINK: u64 = 4096;

/// What the superblocks say.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) flags: Flags,
    pub(crate) chunk_size: u32,
    pub(crate) root: Ino,
    pub(crate) inos: u64,
    block_bits: u8,
    /// Where nid 0 would lie.
    meta: u64,
    chunk_table: Range<u64>,
    prefetch: Range<u64>,
}

impl Layout {
    /// Checks the superblocks and tables of a bootstrap.
    pub(crate) fn open(bytes: View<'_>) -> Result<(Self, Vec<BlobInfo>), FormatError> {
        let erofs: &ErofsSuper = bytes.read("EROFS superblock", SUPER_AT)?;
        let rafs: &RafsSuper = bytes.read("RAFS superblock", RAFS_SUPER_AT)?;
        let flags = Flags(rafs.flags.get()).check(RAFS_SUPER_AT)?;
        let bits = erofs.block_bits;
        check_erofs(bytes, erofs, flags)?;
        let layout = Self {
            flags,
            chunk_size: rafs.chunk_size.get(),
            root: Ino(u64::from(erofs.root_nid.get())),
            inos: erofs.inos.get(),
            block_bits: bits,
            meta: u64::from(erofs.meta_block.get()) << bits,
            chunk_table: table(bytes, "chunk table", rafs.chunk_table_at.get(), rafs.chunk_table_size.get(), 80)?,
            // Old builders wrote a size without a table.
            prefetch: match rafs.prefetch_at.get() {
                0 => 0..0,
                at => table(bytes, "prefetch table", at, u64::from(rafs.prefetch_size.get()), 4)?,
            },
        };
        let chunk_size = layout.chunk_size;
        if !chunk_size.is_power_of_two() || !(4096..=MAX_CHUNK_SIZE).contains(&chunk_size) {
            let why = format!("{chunk_size} is not a power of two from 4096 to {MAX_CHUNK_SIZE}");
            return Err(invalid("chunk size", RAFS_SUPER_AT + 20, why));
        }
        if layout.meta > bytes.len() {
            return Err(FormatError::Truncated { what: "inode area", at: layout.meta, len: bytes.len() });
        }
        let blobs = read_blobs(bytes, erofs, rafs, flags)?;
        let image = Image { bytes, layout: &layout };
        if image.attr(layout.root)?.kind != Kind::Directory {
            return Err(invalid("root inode", layout.meta, "is not a directory"));
        }
        Ok((layout, blobs))
    }

    fn block(&self) -> u64 {
        1 << self.block_bits
    }
}

fn check_erofs(bytes: View<'_>, erofs: &ErofsSuper, flags: Flags) -> Result<(), FormatError> {
    let bad = |field: u64, why: String| Err(invalid("EROFS superblock", SUPER_AT + field, why));
    let wanted_bits = if flags.has(Flags::TARFS) { TARFS_BITS } else { PAGE_BITS };
    if erofs.magic.get() != MAGIC {
        return bad(0, format!("magic {:#x} is not that of EROFS", erofs.magic));
    }
    if erofs.checksum.get() != 0 {
        return bad(4, "a checksum is not expected".into());
    }
    if erofs.feature_compat.get() & COMPAT_RAFS == 0 {
        return bad(8, "it is not marked as a RAFS image".into());
    }
    if erofs.block_bits != wanted_bits {
        return bad(12, format!("blocks of 2^{} bytes, wanted 2^{wanted_bits}", erofs.block_bits));
    }
    if erofs.ext_slots != 0 || erofs.xattr_block.get() != 0 || erofs.union.get() != 0 {
        return bad(13, "extension slots and shared attributes are not expected".into());
    }
    if erofs.feature_incompat.get() != INCOMPAT {
        return bad(80, format!("features {:#x}, wanted {INCOMPAT:#x}", erofs.feature_incompat));
    }
    if erofs.device_slot.get() != DEVICES_SLOT {
        return bad(88, format!("devices at slot {}, wanted {DEVICES_SLOT}", erofs.device_slot));
    }
    if erofs.inos.get() == 0 {
        return bad(16, "no inodes".into());
    }
    if !bytes.len().is_multiple_of(1 << wanted_bits) {
        return bad(0, format!("{} bytes are not whole blocks", bytes.len()));
    }
    Ok(())
}

fn table(bytes: View<'_>, what: &'static str, at: u64, size: u64, entry: u64) -> Result<Range<u64>, FormatError> {
    if size == 0 {
        return Ok(0..0);
    }
    if !size.is_multiple_of(entry) {
        return Err(invalid(what, at, format!("{size} bytes are not entries of {entry} bytes")));
    }
    bytes.bytes(what, at, size)?;
    Ok(at..at + size)
}

fn read_blobs(
    bytes: View<'_>,
    erofs: &ErofsSuper,
    rafs: &RafsSuper,
    flags: Flags,
) -> Result<Vec<BlobInfo>, FormatError> {
    let at = rafs.blob_table_at.get();
    let count = u64::from(rafs.blob_table_size.get()) / 256;
    if u64::from(rafs.blob_table_size.get()) % 256 != 0 || count != u64::from(erofs.extra_devices.get()) {
        let why = format!("{} bytes do not describe {} devices", rafs.blob_table_size, erofs.extra_devices);
        return Err(invalid("blob table", at, why));
    }
    let slots: &[DeviceSlot] = bytes.array("device slots", DEVICES_AT, count)?;
    let entries: &[BlobEntry] = bytes.array("blob table", at, count)?;
    let mut blobs = Vec::with_capacity(entries.len());
    for (index, (entry, slot)) in entries.iter().zip(slots).enumerate() {
        let at = at + 256 * index as u64;
        if entry.id != slot.id {
            // Kernel and daemon would read different blobs for one file.
            return Err(invalid(
                "device slot",
                DEVICES_AT + 128 * index as u64,
                "names another blob than the blob table",
            ));
        }
        if entry.index.get() as usize != index || entry.chunk_size != rafs.chunk_size {
            return Err(invalid("blob table entry", at + 64, "index or chunk size differ from what is expected"));
        }
        blobs.push(entry.info(at, flags)?);
    }
    Ok(blobs)
}

impl BlobEntry {
    fn info(&self, at: u64, flags: Flags) -> Result<BlobInfo, FormatError> {
        let bad = |field: u64, why: String| Err(invalid("blob table entry", at + field, why));
        let len = self.id.iter().position(|&byte| byte == 0).unwrap_or(64);
        let Some(id) = std::str::from_utf8(&self.id[..len]).ok().and_then(|id| id.parse().ok()) else {
            return bad(0, "the blob's name is not one".into());
        };
        let Some(compressor) = Compressor::from_code(self.compressor.get()) else {
            return bad(76, format!("compressor {} is unknown", self.compressor));
        };
        let Some(algorithm) = Algorithm::from_code(self.algorithm.get()) else {
            return bad(80, format!("digest {} is unknown", self.algorithm));
        };
        let bits = self.features.get();
        if bits & (features::MUST_KNOW | features::V5_WITHOUT_EXTENDED_TABLE) != 0 {
            return bad(84, format!("features {bits:#x} are unknown"));
        }
        let tarfs = flags.has(Flags::TARFS);
        if (bits & features::ALIGNED == 0) != tarfs {
            return bad(84, "chunks are aligned in all images but tarfs ones".into());
        }
        let needs_v2 = features::BATCH | features::ZRAN | features::ENCRYPTED;
        if bits & needs_v2 != 0 && bits & features::CHUNK_INFO_V2 == 0 {
            return bad(84, format!("features {bits:#x} want chunk infos of 24 bytes"));
        }
        if self.stored_size.get() > 1 << 40 || self.plain_size.get() > 1 << 44 || self.chunk_count.get() > 1 << 24 {
            return bad(88, "the blob is too large".into());
        }
        let table = match self.table_plain_size.get() {
            0 => None,
            plain_size => {
                let Some(compressor) = Compressor::from_code(self.table_compressor.get()) else {
                    return bad(108, format!("compressor {} is unknown", self.table_compressor));
                };
                let start = self.table_at.get();
                let stored_size = self.table_stored_size.get();
                let Some(end) = start.checked_add(stored_size).filter(|&end| end <= 1 << 41) else {
                    return bad(112, "the chunk table lies too far away".into());
                };
                // Every chunk needs 24 bytes at most; contexts and dictionaries of gzip streams come on top.
                if stored_size > plain_size || plain_size > 1 << 32 {
                    return bad(120, format!("a chunk table of {plain_size} bytes in {stored_size}"));
                }
                Some(TableLocation { stored: start..end, plain_size, compressor })
            }
        };
        let cipher = match (self.cipher.get(), bits & features::ENCRYPTED != 0) {
            (1, true) => {
                let mut iv = [0; 16];
                iv[..8].copy_from_slice(&self.meta_size);
                iv[8..].copy_from_slice(&self.iv_second_half);
                Some(Cipher { key: self.meta_digest, iv })
            }
            (_, false) => None,
            (code, true) => return bad(216, format!("cipher {code} is unknown")),
        };
        Ok(BlobInfo {
            id,
            stored_size: self.stored_size.get(),
            plain_size: self.plain_size.get(),
            chunk_count: self.chunk_count.get(),
            compressor,
            algorithm,
            features: bits,
            table,
            toc_size: self.toc_size.get(),
            toc_digest: Digest(self.toc_digest),
            meta_digest: if cipher.is_some() { Digest([0; 32]) } else { Digest(self.meta_digest) },
            meta_size: if cipher.is_some() { 0 } else { u64::from_le_bytes(self.meta_size) },
            cipher,
            prefetch_size: 0,
        })
    }
}

/// A bootstrap and what its superblocks say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Image<'a> {
    pub(crate) bytes: View<'a>,
    pub(crate) layout: &'a Layout,
}

/// An inode of either size.
#[derive(Debug, Clone)]
struct Inode {
    at: u64,
    /// The bytes of its attributes; what follows them belongs to its data.
    xattrs: Range<u64>,
    layout: u16,
    kind: Kind,
    union: u32,
    attr: Attr,
}

impl<'a> Image<'a> {
    fn inode(self, ino: Ino) -> Result<Inode, FormatError> {
        let at = ino.0.checked_mul(SLOT).and_then(|offset| offset.checked_add(self.layout.meta));
        let at = at.ok_or(FormatError::Truncated { what: "inode", at: u64::MAX, len: self.bytes.len() })?;
        let format = self.bytes.read::<zerocopy::little_endian::U16>("inode", at)?.get();
        if format >> 4 != 0 {
            return Err(invalid("inode", at, format!("format {format:#x} is unknown")));
        }
        let ids = self.layout.flags.has(Flags::EXPLICIT_IDS);
        let base = Attr {
            ino,
            kind: Kind::Regular,
            permissions: 0,
            nlink: 0,
            uid: None,
            gid: None,
            rdev: 0,
            size: 0,
            mtime: 0,
            mtime_nsec: 0,
        };
        let (mode, xattr_count, union, len, mut attr);
        if format & EXTENDED != 0 {
            let inode: &ExtendedInode = self.bytes.read("inode", at)?;
            (mode, xattr_count, union, len) = (inode.mode.get(), inode.xattr_count.get(), inode.union.get(), 64);
            attr = Attr {
                nlink: inode.nlink.get(),
                uid: ids.then_some(inode.uid.get()),
                gid: ids.then_some(inode.gid.get()),
                size: inode.size.get(),
                mtime: inode.mtime.get(),
                mtime_nsec: inode.mtime_nsec.get(),
                ..base
            };
        } else {
            let inode: &CompactInode = self.bytes.read("inode", at)?;
            (mode, xattr_count, union, len) = (inode.mode.get(), inode.xattr_count.get(), inode.union.get(), 32);
            attr = Attr {
                nlink: u32::from(inode.nlink.get()),
                uid: ids.then_some(u32::from(inode.uid.get())),
                gid: ids.then_some(u32::from(inode.gid.get())),
                size: u64::from(inode.size.get()),
                ..base
            };
        }
        attr.kind = Kind::from_mode(u32::from(mode))
            .ok_or_else(|| invalid("inode", at + 4, format!("mode {mode:#o} has no file type")))?;
        attr.permissions = mode & 0o7777;
        if matches!(attr.kind, Kind::CharDevice | Kind::BlockDevice) {
            attr.rdev = union;
        }
        if attr.mtime_nsec >= 1_000_000_000 {
            return Err(invalid("inode", at + 40, format!("{} nanoseconds", attr.mtime_nsec)));
        }
        let start = at + len;
        let area = if xattr_count == 0 { 0 } else { 12 + 4 * (u64::from(xattr_count) - 1) };
        self.bytes.bytes("extended attributes", start, area)?;
        Ok(Inode { at, xattrs: start..start + area, layout: format >> 1, kind: attr.kind, union, attr })
    }

    pub(crate) fn attr(self, ino: Ino) -> Result<Attr, FormatError> {
        Ok(self.inode(ino)?.attr)
    }

    /// Returns block `index` of the data of a directory or symbolic link.
    fn flat_block(self, inode: &Inode, index: u64) -> Result<&'a [u8], FormatError> {
        let block = self.layout.block();
        let whole = inode.attr.size / block;
        let at = if inode.layout == FLAT_INLINE && index == whole {
            inode.xattrs.end
        } else {
            (u64::from(inode.union) << self.layout.block_bits).saturating_add(index.saturating_mul(block))
        };
        let rest = inode.attr.size.saturating_sub(index.saturating_mul(block));
        self.bytes.bytes("directory or symbolic link", at, rest.min(block))
    }

    /// Refuses an inode whose data cannot lie in the bootstrap, before anyone counts its blocks.
    fn check_flat(self, inode: &Inode, kind: Kind) -> Result<(), FormatError> {
        if inode.kind != kind {
            return Err(invalid("inode", inode.at, format!("{:?} where {kind:?} is wanted", inode.kind)));
        }
        if inode.layout != FLAT_PLAIN && inode.layout != FLAT_INLINE {
            return Err(invalid("inode", inode.at, format!("data layout {} of a {kind:?}", inode.layout)));
        }
        if inode.attr.size > self.bytes.len() {
            return Err(FormatError::Truncated {
                what: "directory or symbolic link",
                at: inode.at,
                len: self.bytes.len(),
            });
        }
        Ok(())
    }

    fn directory(self, ino: Ino) -> Result<Directory<'a>, FormatError> {
        let inode = self.inode(ino)?;
        self.check_flat(&inode, Kind::Directory)?;
        let blocks = inode.attr.size.div_ceil(self.layout.block());
        Ok(Directory { image: self, inode, blocks })
    }

    pub(crate) fn lookup(self, dir: Ino, name: &OsStr) -> Result<Option<Ino>, FormatError> {
        let directory = self.directory(dir)?;
        let name = name.as_bytes();
        // The last block whose first name is not greater than the name is the only one that may hold it.
        let (mut low, mut high) = (0, directory.blocks);
        let mut candidate = None;
        while low < high {
            let middle = low + (high - low) / 2;
            let block = directory.block(middle)?;
            if block.name(0)? <= name {
                candidate = Some(block);
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(block) = candidate else { return Ok(None) };
        let (mut low, mut high) = (0, block.dirents.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match block.name(middle)?.cmp(name) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => return Ok(Some(Ino(block.dirents[middle].nid.get()))),
            }
        }
        Ok(None)
    }

    pub(crate) fn entries(self, dir: Ino, from: u64) -> Result<Entries<'a>, FormatError> {
        let directory = self.directory(dir)?;
        // Blocks hold different numbers of names, so that those before `from` are counted, not read.
        let (mut index, mut skip) = (0, from);
        while index < directory.blocks {
            let count = directory.block(index)?.dirents.len() as u64;
            if skip < count {
                break;
            }
            skip -= count;
            index += 1;
        }
        // Less than the number of names in one block, or there is no block left.
        Ok(Entries { directory, next_block: index, block: None, next: skip as usize })
    }

    pub(crate) fn readlink(self, ino: Ino) -> Result<OsString, FormatError> {
        let inode = self.inode(ino)?;
        self.check_flat(&inode, Kind::Symlink)?;
        if inode.attr.size > MAX_SYMLINK {
            let why = format!("a target of {} bytes, at most {MAX_SYMLINK} are possible", inode.attr.size);
            return Err(invalid("symbolic link", inode.at, why));
        }
        let mut target = Vec::with_capacity(inode.attr.size as usize);
        for index in 0..inode.attr.size.div_ceil(self.layout.block()) {
            target.extend_from_slice(self.flat_block(&inode, index)?);
        }
        Ok(OsString::from_vec(target))
    }

    pub(crate) fn xattrs(self, ino: Ino) -> Result<Vec<(OsString, Vec<u8>)>, FormatError> {
        let inode = self.inode(ino)?;
        let mut found = Vec::new();
        if inode.xattrs.is_empty() {
            return Ok(found);
        }
        let header: &XattrHeader = self.bytes.read("extended attributes", inode.xattrs.start)?;
        if header.shared_count != 0 {
            return Err(FormatError::Unsupported("an image with shared extended attributes".into()));
        }
        let mut at = inode.xattrs.start + size_of::<XattrHeader>() as u64;
        while at < inode.xattrs.end {
            let entry: &XattrEntry = self.bytes.read("extended attribute", at)?;
            let (name_len, value_len) = (u64::from(entry.name_len), u64::from(entry.value_len.get()));
            let end = at + 4 + name_len + value_len;
            if end > inode.xattrs.end {
                return Err(invalid("extended attribute", at, "reaches beyond its inode's attributes"));
            }
            let Some((_, prefix)) = XATTR_PREFIXES.iter().find(|(code, _)| *code == entry.prefix) else {
                return Err(invalid("extended attribute", at, format!("prefix {} is unknown", entry.prefix)));
            };
            let mut name = prefix.to_vec();
            name.extend_from_slice(self.bytes.bytes("extended attribute", at + 4, name_len)?);
            if name.contains(&0) {
                return Err(invalid("extended attribute", at, "a NUL in its name"));
            }
            let value = self.bytes.bytes("extended attribute", at + 4 + name_len, value_len)?;
            found.push((OsString::from_vec(name), value.to_vec()));
            at = end.next_multiple_of(4);
        }
        Ok(found)
    }

    /// Returns the number of bytes that an inode's attributes and chunk list take: what copying it may cost.
    pub(crate) fn weight(self, ino: Ino) -> Result<u64, FormatError> {
        let inode = self.inode(ino)?;
        let chunks =
            if inode.kind == Kind::Regular { inode.attr.size.div_ceil(u64::from(self.layout.chunk_size)) } else { 0 };
        Ok((inode.xattrs.end - inode.xattrs.start).saturating_add(chunks.saturating_mul(8)))
    }

    pub(crate) fn extents(
        self,
        ino: Ino,
        range: Range<u64>,
        blobs: &'a [BlobInfo],
    ) -> Result<impl Iterator<Item = Result<Extent, FormatError>> + 'a, FormatError> {
        let inode = self.inode(ino)?;
        if inode.kind != Kind::Regular {
            return Err(invalid("inode", inode.at, format!("{:?} has no data", inode.kind)));
        }
        let (size, chunk_size) = (inode.attr.size, u64::from(self.layout.chunk_size));
        if inode.layout != CHUNK_BASED && size > 0 {
            return Err(FormatError::Unsupported(format!("a regular file with data layout {}", inode.layout)));
        }
        let list_at = inode.xattrs.end.next_multiple_of(8);
        let list: &[ChunkEntry] = self.bytes.array("chunk list", list_at, size.div_ceil(chunk_size))?;
        let (start, end) = (range.start.min(size), range.end.min(size));
        // An empty range has no chunks, wherever it lies.
        let first = if start < end { start / chunk_size } else { 0 };
        let last = if start < end { end.div_ceil(chunk_size) } else { 0 };
        let bits = self.layout.block_bits;
        Ok((first..last).map(move |position| {
            // `last` is at most the length of the list, which fits into memory.
            let entry = &list[position as usize];
            let Some(blob) = entry.device.checked_sub(1).filter(|&blob| usize::from(blob) < blobs.len()) else {
                let why = format!("device {} of {}", entry.device, blobs.len());
                return Err(invalid("chunk list", list_at + 8 * position, why));
            };
            let chunk = position * chunk_size;
            let file = start.max(chunk)..end.min(chunk + chunk_size);
            let plain_at = u64::from(entry.block.get()) << bits;
            Ok(Extent {
                blob: u16::from(blob),
                chunk: ChunkIndex(u32::from(entry.index_low.get()) | u32::from(entry.index_high) << 16),
                plain: plain_at + (file.start - chunk)..plain_at + (file.end - chunk),
                file,
            })
        }))
    }

    pub(crate) fn chunks(self, blob: u16, info: &BlobInfo) -> Result<ChunkTable, FormatError> {
        let range = self.layout.chunk_table.clone();
        let records: &[ChunkRecord] = self.bytes.array("chunk table", range.start, (range.end - range.start) / 80)?;
        let mut chunks: Vec<Chunk> = Vec::new();
        for (position, record) in records.iter().enumerate() {
            if record.blob_index.get() == u32::from(blob) {
                chunks.push(record.chunk(info, range.start + 80 * position as u64)?);
            }
        }
        Ok(ChunkTable::new(chunks))
    }

    pub(crate) fn prefetch(self) -> Result<Vec<Ino>, FormatError> {
        let range = self.layout.prefetch.clone();
        let nids: &[zerocopy::little_endian::U32] =
            self.bytes.array("prefetch table", range.start, (range.end - range.start) / 4)?;
        Ok(nids.iter().map(|nid| Ino(u64::from(nid.get()))).take_while(|ino| ino.0 != 0).collect())
    }
}

struct Directory<'a> {
    image: Image<'a>,
    inode: Inode,
    blocks: u64,
}

impl<'a> Directory<'a> {
    fn block(&self, index: u64) -> Result<DirectoryBlock<'a>, FormatError> {
        DirectoryBlock::parse(self.image.flat_block(&self.inode, index)?, self.inode.at)
    }
}

struct DirectoryBlock<'a> {
    bytes: &'a [u8],
    dirents: &'a [Dirent],
    /// The directory's inode, for errors.
    inode_at: u64,
}

impl<'a> DirectoryBlock<'a> {
    fn parse(bytes: &'a [u8], inode_at: u64) -> Result<Self, FormatError> {
        let first: &Dirent = View(bytes).read("directory block", 0)?;
        let names_at = u64::from(first.name_at.get());
        if names_at == 0 || names_at % 12 != 0 {
            return Err(invalid("directory", inode_at, format!("names cannot begin at {names_at}")));
        }
        let dirents = View(bytes).array("directory block", 0, names_at / 12)?;
        Ok(Self { bytes, dirents, inode_at })
    }

    fn name(&self, index: usize) -> Result<&'a [u8], FormatError> {
        let bad = |why: &str| invalid("directory", self.inode_at, why);
        let start = usize::from(self.dirents[index].name_at.get());
        let end = self.dirents.get(index + 1).map_or(self.bytes.len(), |next| usize::from(next.name_at.get()));
        if start < 12 * self.dirents.len() {
            return Err(bad("a name begins among the entries"));
        }
        let mut name = self.bytes.get(start..end).ok_or_else(|| bad("a name reaches beyond its block"))?;
        if index + 1 == self.dirents.len() {
            name = name.split(|&byte| byte == 0).next().unwrap_or(name);
        }
        if name.is_empty() || name.len() > 255 || name.contains(&b'/') || name.contains(&0) {
            return Err(bad("a name is empty, too long, or has a slash or NUL in it"));
        }
        Ok(name)
    }
}

/// The entries of a directory, in the order of their names.
pub(crate) struct Entries<'a> {
    directory: Directory<'a>,
    next_block: u64,
    block: Option<DirectoryBlock<'a>>,
    next: usize,
}

impl<'a> Entries<'a> {
    fn step(&mut self) -> Result<Option<Entry<'a>>, FormatError> {
        loop {
            if let Some(block) = &self.block
                && self.next < block.dirents.len()
            {
                let dirent = &block.dirents[self.next];
                let name = OsStr::from_bytes(block.name(self.next)?);
                self.next += 1;
                let ino = Ino(dirent.nid.get());
                let kind = match dirent.kind {
                    0 => self.directory.image.inode(ino)?.kind,
                    code => Kind::from_code(code).ok_or_else(|| {
                        invalid("directory", self.directory.inode.at, format!("file type {code} is unknown"))
                    })?,
                };
                return Ok(Some(Entry { ino, kind, name }));
            }
            if self.next_block >= self.directory.blocks {
                return Ok(None);
            }
            if self.block.is_some() {
                self.next = 0;
            }
            self.block = Some(self.directory.block(self.next_block)?);
            self.next_block += 1;
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if matches!(step, None | Some(Err(_))) {
            // One error ends the listing.
            (self.next_block, self.block) = (self.directory.blocks, None);
        }
        step
    }
}

impl Kind {
    /// Returns the type that EROFS gives this number in directories.
    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::CharDevice,
            4 => Self::BlockDevice,
            5 => Self::Fifo,
            6 => Self::Socket,
            7 => Self::Symlink,
            _ => return None,
        })
    }
}
