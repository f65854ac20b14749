//! Writes v6 bootstraps, byte for byte as the established builder does.
//!
//! Two passes: [`Places`] decides where every inode lies, then the bytes are put there. Directories name inodes
//! by place, so that nothing can be written before all is placed. The same tree always gives the same bytes:
//! extended attributes, which the established builder writes in the order of a hash map, are sorted.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use zerocopy::IntoBytes;

use super::format::*;
use super::place::{Place, Places, with_dots};
use crate::blob::format::features;
use crate::bootstrap::{BlobInfo, Kind};
use crate::chunk::{Chunk, ChunkTable, Compressor};
use crate::digest::{Algorithm, BlobId};
use crate::flags::Flags;
use crate::record::ChunkRecord;
use crate::tree::{ChunkRef, Node, NodeId, NodeKind, Tree};

/// EROFS devices are numbered from 1 in one byte, and the last number is left alone.
const MAX_BLOBS: usize = 254;
/// Blobs are mapped into the linear device at multiples of this.
const MAPPING: u64 = 512 << 10;

/// Why a tree cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The root is not a directory.
    #[error("the root is not a directory")]
    Root,
    /// A directory has two names.
    #[error("a directory has two names (node {})", .0.0)]
    DirectoryTwice(NodeId),
    /// A name that cannot be one.
    #[error("{0:?} cannot be a file's name")]
    Name(OsString),
    /// The target of a symbolic link has no bytes or more than 4,096.
    #[error("a symbolic link cannot have {0} bytes")]
    Symlink(usize),
    /// An extended attribute that the format cannot hold.
    #[error(
        "the extended attribute {0:?} has a prefix that is none of user, system.posix_acl_*, trusted and security, or is too long"
    )]
    Xattr(OsString),
    /// A file's chunks are not those that its size wants.
    #[error("a file of {size} bytes has {chunks} chunks")]
    Chunks {
        /// The file's size.
        size: u64,
        /// How many chunks it has.
        chunks: usize,
    },
    /// A file refers to a chunk that no table has.
    #[error("blob {} has no chunk {}", .0.blob, .0.chunk.0)]
    UnknownChunk(ChunkRef),
    /// A chunk's plain address is not a multiple of the block size, or too large.
    #[error("chunk {} of blob {} does not begin at a block", .0.chunk.0, .0.blob)]
    Address(ChunkRef),
    /// A blob's name does not fit.
    #[error("the blob name {0} has more than 64 bytes or is there twice")]
    BlobName(BlobId),
    /// The chunk size is not a power of two from 4,096 to 16 MiB.
    #[error("a chunk size of {0} bytes is not a power of two from 4096 to 16777216")]
    ChunkSize(u32),
    /// A node to prefetch has no name in the tree.
    #[error("the node {} to prefetch has no name", .0.0)]
    Prefetch(NodeId),
    /// More than the format can count.
    #[error("the image has too many {0}")]
    TooMany(&'static str),
}

/// How a bootstrap is written.
#[derive(Debug, Clone)]
pub struct Options {
    /// Size into which files were cut, in bytes: a power of two from 4,096 to 16 MiB.
    pub chunk_size: u32,
    /// The builder's compressor; each blob names its own.
    pub compressor: Compressor,
    /// The builder's digest algorithm; each blob names its own.
    pub algorithm: Algorithm,
    /// Whether owners are real; else readers report their own.
    pub explicit_ids: bool,
    /// Whether to say that there are extended attributes even where there are none, as merged images do.
    pub claim_xattrs: bool,
    /// Blobs are raw tars, blocks have 512 bytes.
    pub tarfs: bool,
    /// What to fetch first; [`Tree::prefetch`] finds it. The root alone means everything.
    pub prefetch: Vec<NodeId>,
}

impl Default for Options {
    /// 1 MiB, zstd and BLAKE3, as the established builder has it.
    fn default() -> Self {
        Self {
            chunk_size: 1 << 20,
            compressor: Compressor::Zstd,
            algorithm: Algorithm::Blake3,
            explicit_ids: true,
            claim_xattrs: false,
            tarfs: false,
            prefetch: Vec::new(),
        }
    }
}

/// Writes a tree; `chunks` holds for each of `blobs` the chunks that the tree refers to, or more.
pub fn write(tree: &Tree, blobs: &[BlobInfo], chunks: &[ChunkTable], options: &Options) -> Result<Vec<u8>, WriteError> {
    let chunk_size = options.chunk_size;
    if !chunk_size.is_power_of_two() || !(4096..=16 << 20).contains(&chunk_size) {
        return Err(WriteError::ChunkSize(chunk_size));
    }
    if blobs.len() > MAX_BLOBS {
        return Err(WriteError::TooMany("blobs"));
    }
    let bits = if options.tarfs { TARFS_BITS } else { PAGE_BITS };
    let places = Places::assign(tree, 1 << bits, chunk_size)?;
    let mut chunks_by_index: Vec<Vec<&Chunk>> = chunks.iter().map(|table| table.all().iter().collect()).collect();
    for chunks in &mut chunks_by_index {
        chunks.sort_by_key(|chunk| chunk.index);
    }
    let layout = Layout::new(blobs.len(), if blobs.is_empty() { 0 } else { options.prefetch.len() }, places.end);
    let mut writer = Writer {
        tree,
        options,
        bits,
        layout,
        places: &places,
        chunks: chunks_by_index,
        has_xattrs: options.claim_xattrs,
        records: BTreeMap::new(),
        record_bytes: 0,
        out: Vec::new(),
    };
    for &id in &places.visited {
        writer.inode(id)?;
    }
    writer.chunk_table();
    writer.blobs(blobs)?;
    writer.prefetch_table()?;
    writer.superblocks(blobs)?;
    Ok(writer.out)
}

/// Returns the size of an inode with its extended attributes.
pub(super) fn inode_size(node: &Node) -> Result<u64, WriteError> {
    if let NodeKind::Symlink(target) = &node.kind
        && !(1..=4096).contains(&target.len())
    {
        return Err(WriteError::Symlink(target.len()));
    }
    Ok(64 + 4 * xattr_count(node)?.checked_sub(1).map_or(0, |words| u64::from(words) + 3))
}

/// Returns the field that tells the size of the extended attributes.
fn xattr_count(node: &Node) -> Result<u16, WriteError> {
    if node.xattrs.is_empty() {
        return Ok(0);
    }
    let mut words = 1;
    for (name, value) in &node.xattrs {
        let (_, suffix) = xattr_name(name)?;
        if value.len() > usize::from(u16::MAX) {
            return Err(WriteError::Xattr(name.clone()));
        }
        words += (4 + suffix.len() + value.len()).div_ceil(4);
        if words > usize::from(u16::MAX) {
            return Err(WriteError::Xattr(name.clone()));
        }
    }
    Ok(words as u16)
}

/// Splits the name of an extended attribute into prefix and rest.
fn xattr_name(name: &OsStr) -> Result<(u8, &[u8]), WriteError> {
    let found = XATTR_PREFIXES.iter().find_map(|(code, prefix)| Some((*code, name.as_bytes().strip_prefix(*prefix)?)));
    found
        .filter(|(_, suffix)| suffix.len() <= 255 && name.len() <= 255)
        .ok_or_else(|| WriteError::Xattr(name.to_owned()))
}

/// Where the parts of the file lie.
struct Layout {
    blob_table: u64,
    prefetch: u64,
    meta: u64,
    chunk_table: u64,
}

impl Layout {
    fn new(blobs: usize, prefetch: usize, inodes_end: u64) -> Self {
        let blob_table = (DEVICES_AT + 128 * blobs as u64).next_multiple_of(PAGE);
        let tables_end = blob_table + 256 * blobs as u64;
        let meta = if blobs == 0 { 0 } else { (tables_end + 4 * prefetch as u64).next_multiple_of(PAGE) };
        let prefetch = if prefetch == 0 { 0 } else { tables_end };
        Self { blob_table, prefetch, meta, chunk_table: (meta + inodes_end).next_multiple_of(PAGE) }
    }
}

struct Writer<'a> {
    tree: &'a Tree,
    options: &'a Options,
    bits: u8,
    layout: Layout,
    places: &'a Places,
    chunks: Vec<Vec<&'a Chunk>>,
    has_xattrs: bool,
    /// Digest and device, and the record of the chunk that was met last.
    records: BTreeMap<([u8; 32], u32), ChunkRecord>,
    record_bytes: u64,
    out: Vec<u8>,
}

impl Writer<'_> {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        // What was placed fits into memory, or the tree would not have.
        let (start, end) = (at as usize, at as usize + bytes.len());
        if self.out.len() < end {
            self.out.resize(end, 0);
        }
        self.out[start..end].copy_from_slice(bytes);
    }

    fn inode(&mut self, id: NodeId) -> Result<(), WriteError> {
        let (node, place) = (self.tree.node(id), self.place(id));
        let links = match &node.kind {
            NodeKind::Directory(children) => {
                2 + children.values().filter(|child| self.tree.children(**child).is_some()).count() as u32
            }
            _ => self.places.links[id.0].saturating_add(node.stat.hidden_links),
        };
        let blocks = (self.layout.meta + place.blocks_at) >> self.bits;
        let (size, union) = match &node.kind {
            NodeKind::Directory(_) => {
                let data = self.directory(id, &place);
                let size = data.len() as u64;
                self.flat(node, &place, &data)?;
                (size, blocks)
            }
            NodeKind::Symlink(target) => {
                self.flat(node, &place, target.as_bytes())?;
                (target.len() as u64, blocks)
            }
            NodeKind::Regular { size, chunks } => (*size, u64::from(self.chunk_list(node, &place, *size, chunks)?)),
            NodeKind::CharDevice(number) | NodeKind::BlockDevice(number) => (0, u64::from(*number)),
            NodeKind::Fifo | NodeKind::Socket => (0, 0),
        };
        let inode = ExtendedInode {
            format: (EXTENDED | place.layout << 1).into(),
            xattr_count: xattr_count(node)?.into(),
            mode: (node.kind.kind().mode() as u16 | node.stat.permissions & 0o7777).into(),
            reserved: 0.into(),
            size: size.into(),
            union: u32::try_from(union).map_err(|_| WriteError::TooMany("blocks"))?.into(),
            number: place.number.into(),
            uid: node.stat.uid.into(),
            gid: node.stat.gid.into(),
            mtime: node.stat.mtime.into(),
            mtime_nsec: node.stat.mtime_nsec.into(),
            nlink: links.into(),
            reserved2: [0; 16],
        };
        let at = self.layout.meta + place.at;
        self.put(at, inode.as_bytes());
        let xattrs = xattr_area(node)?;
        self.has_xattrs |= !xattrs.is_empty();
        self.put(at + 64, &xattrs);
        Ok(())
    }

    fn place(&self, id: NodeId) -> Place {
        self.places.by_node[id.0].expect("every node with a name was placed")
    }

    /// Puts the data of a directory or symbolic link where it was placed.
    fn flat(&mut self, node: &Node, place: &Place, data: &[u8]) -> Result<(), WriteError> {
        let tail = if place.layout == FLAT_INLINE { data.len() % (1 << self.bits) } else { 0 };
        let (blocks, tail) = data.split_at(data.len() - tail);
        if !blocks.is_empty() {
            self.put(self.layout.meta + place.blocks_at, blocks);
        }
        self.put(self.layout.meta + place.at + inode_size(node)?, tail);
        Ok(())
    }

    fn directory(&self, id: NodeId, place: &Place) -> Vec<u8> {
        let children = self.tree.children(id).expect("only directories are asked for");
        let names = with_dots(children.keys().map(OsString::as_os_str));
        let block = 1 << self.bits;
        let mut data = Vec::new();
        let mut rest = &names[..];
        while !rest.is_empty() {
            let mut used = 0;
            let fits = |name: &&&OsStr| {
                used += 12 + name.len();
                used <= block
            };
            let (now, later) = rest.split_at(rest.iter().take_while(fits).count());
            // What is left of the block before stays zero.
            data.resize(data.len().next_multiple_of(block), 0);
            let mut name_at = 12 * now.len();
            for name in now {
                let child = match name.as_bytes() {
                    b"." => id,
                    b".." => place.parent,
                    _ => children[*name],
                };
                let dirent = Dirent {
                    nid: self.place(child).nid().into(),
                    name_at: (name_at as u16).into(),
                    kind: kind_code(self.tree.node(child).kind.kind()),
                    reserved: 0,
                };
                data.extend_from_slice(dirent.as_bytes());
                name_at += name.len();
            }
            now.iter().for_each(|name| data.extend_from_slice(name.as_bytes()));
            rest = later;
        }
        data
    }

    /// Writes the chunk list of a file and returns its format.
    fn chunk_list(&mut self, node: &Node, place: &Place, size: u64, list: &[ChunkRef]) -> Result<u32, WriteError> {
        let chunk_size = u64::from(self.options.chunk_size);
        if size.div_ceil(chunk_size) != list.len() as u64 {
            return Err(WriteError::Chunks { size, chunks: list.len() });
        }
        let mut bytes = Vec::with_capacity(8 * list.len());
        let mut contiguous = true;
        let mut expected = None;
        for (position, chunk_ref) in list.iter().enumerate() {
            let chunk = self.chunk(*chunk_ref)?;
            let at = chunk.plain.start;
            let block = u32::try_from(at >> self.bits).ok().filter(|_| at % (1 << self.bits) == 0);
            let block = block.ok_or(WriteError::Address(*chunk_ref))?;
            contiguous &= expected.is_none_or(|expected| expected == (chunk_ref.blob, at));
            expected = Some((chunk_ref.blob, at + chunk_size));
            let entry = ChunkEntry {
                index_low: (chunk_ref.chunk.0 as u16).into(),
                device: chunk_ref.blob as u8 + 1,
                index_high: (chunk_ref.chunk.0 >> 16) as u8,
                block: block.into(),
            };
            bytes.extend_from_slice(entry.as_bytes());
            let record = ChunkRecord::new(chunk, u32::from(chunk_ref.blob), position as u64 * chunk_size);
            self.records.insert((record.digest, u32::from(chunk_ref.blob) + 1), record);
        }
        let at = (place.at + inode_size(node)?).next_multiple_of(8);
        self.put(self.layout.meta + at, &bytes);
        // One extent lets the kernel read such a file in large pieces.
        let extent = if contiguous && size > chunk_size { size.checked_next_power_of_two() } else { None };
        let extent = extent.filter(|extent| extent.trailing_zeros() < 31 + u32::from(self.bits)).unwrap_or(chunk_size);
        Ok(CHUNK_INDEXES | (extent.trailing_zeros() - u32::from(self.bits)))
    }

    fn chunk(&self, wanted: ChunkRef) -> Result<&'_ Chunk, WriteError> {
        let chunks = self.chunks.get(usize::from(wanted.blob)).ok_or(WriteError::UnknownChunk(wanted))?;
        let found = chunks.binary_search_by_key(&wanted.chunk, |chunk| chunk.index);
        found.map(|position| chunks[position]).map_err(|_| WriteError::UnknownChunk(wanted))
    }

    fn chunk_table(&mut self) {
        let records = std::mem::take(&mut self.records);
        let bytes: Vec<u8> = records.values().flat_map(|record| record.as_bytes().to_vec()).collect();
        let at = self.layout.chunk_table;
        self.record_bytes = bytes.len() as u64;
        self.put(at, &bytes);
        self.put(at + bytes.len() as u64, &vec![0; bytes.len().next_multiple_of(PAGE as usize) - bytes.len()]);
    }

    fn blobs(&mut self, blobs: &[BlobInfo]) -> Result<(), WriteError> {
        let mut mapped = self.out.len() as u64;
        for (index, blob) in blobs.iter().enumerate() {
            let name = blob.id.as_str().as_bytes();
            if name.len() > 64 || blobs[..index].iter().any(|earlier| earlier.id == blob.id) {
                return Err(WriteError::BlobName(blob.id.clone()));
            }
            let mut id = [0; 64];
            id[..name.len()].copy_from_slice(name);
            let start = mapped.next_multiple_of(MAPPING) >> self.bits;
            let blocks = blob.plain_size >> self.bits;
            mapped = (start + blocks) << self.bits;
            let block = |count: u64| u32::try_from(count).map_err(|_| WriteError::TooMany("blocks"));
            let slot =
                DeviceSlot { id, blocks: block(blocks)?.into(), mapped_block: block(start)?.into(), reserved: [0; 56] };
            self.put(DEVICES_AT + 128 * index as u64, slot.as_bytes());
            let entry = BlobEntry::new(blob, id, index as u32, self.options.chunk_size);
            self.put(self.layout.blob_table + 256 * index as u64, entry.as_bytes());
        }
        Ok(())
    }

    fn prefetch_table(&mut self) -> Result<(), WriteError> {
        if self.layout.prefetch != 0 {
            for (index, &id) in self.options.prefetch.iter().enumerate() {
                let place = self.places.by_node.get(id.0).copied().flatten().ok_or(WriteError::Prefetch(id))?;
                let nid = u32::try_from(place.nid()).map_err(|_| WriteError::TooMany("inodes"))?;
                self.put(self.layout.prefetch + 4 * index as u64, &nid.to_le_bytes());
            }
        }
        Ok(())
    }

    fn superblocks(&mut self, blobs: &[BlobInfo]) -> Result<(), WriteError> {
        let mut flags = Flags::of(self.options.compressor, self.options.algorithm).0;
        let mut set = |when: bool, bits: u64| flags |= if when { bits } else { 0 };
        let encrypted = blobs.iter().any(|blob| blob.cipher.is_some());
        set(self.options.explicit_ids, Flags::EXPLICIT_IDS);
        set(self.has_xattrs, Flags::HAS_XATTR);
        set(blobs.iter().all(|blob| blob.has(features::INLINED_CHUNK_DIGEST)), Flags::INLINED_CHUNK_DIGEST);
        set(self.options.tarfs, Flags::TARFS);
        set(true, if encrypted { Flags::ENCRYPTION_AES_XTS } else { Flags::ENCRYPTION_NONE });
        let blocks: u64 = blobs.iter().map(|blob| blob.plain_size >> self.bits).sum();
        let erofs = ErofsSuper {
            magic: MAGIC.into(),
            checksum: 0.into(),
            feature_compat: COMPAT_RAFS.into(),
            block_bits: self.bits,
            ext_slots: 0,
            root_nid: (self.place(Tree::ROOT).nid() as u16).into(),
            inos: (self.places.visited.len() as u64).into(),
            build_time: 0.into(),
            build_time_nsec: 0.into(),
            blocks: u32::try_from(blocks).map_err(|_| WriteError::TooMany("blocks"))?.into(),
            meta_block: ((self.layout.meta >> self.bits) as u32).into(),
            xattr_block: 0.into(),
            uuid: [0; 16],
            volume: [0; 16],
            feature_incompat: INCOMPAT.into(),
            union: 0.into(),
            extra_devices: (blobs.len() as u16).into(),
            device_slot: DEVICES_SLOT.into(),
            reserved: [0; 38],
        };
        self.put(SUPER_AT, erofs.as_bytes());
        let prefetch = if self.layout.prefetch == 0 { 0 } else { 4 * self.options.prefetch.len() as u32 };
        let rafs = RafsSuper {
            flags: flags.into(),
            blob_table_at: self.layout.blob_table.into(),
            blob_table_size: (256 * blobs.len() as u32).into(),
            chunk_size: self.options.chunk_size.into(),
            chunk_table_at: self.layout.chunk_table.into(),
            chunk_table_size: self.record_bytes.into(),
            prefetch_at: self.layout.prefetch.into(),
            prefetch_size: prefetch.into(),
            padding: 0.into(),
            reserved: [0; 200],
        };
        self.put(RAFS_SUPER_AT, rafs.as_bytes());
        Ok(())
    }
}

fn xattr_area(node: &Node) -> Result<Vec<u8>, WriteError> {
    let mut area = Vec::new();
    if node.xattrs.is_empty() {
        return Ok(area);
    }
    area.extend_from_slice(XattrHeader { reserved: 0.into(), shared_count: 0, reserved2: [0; 7] }.as_bytes());
    for (name, value) in &node.xattrs {
        let (prefix, suffix) = xattr_name(name)?;
        let entry = XattrEntry { name_len: suffix.len() as u8, prefix, value_len: (value.len() as u16).into() };
        area.extend_from_slice(entry.as_bytes());
        area.extend_from_slice(suffix);
        area.extend_from_slice(value);
        area.resize(area.len().next_multiple_of(4), 0);
    }
    Ok(area)
}

/// Returns the number that EROFS gives a type in directories.
fn kind_code(kind: Kind) -> u8 {
    match kind {
        Kind::Regular => 1,
        Kind::Directory => 2,
        Kind::CharDevice => 3,
        Kind::BlockDevice => 4,
        Kind::Fifo => 5,
        Kind::Socket => 6,
        Kind::Symlink => 7,
    }
}

impl BlobEntry {
    fn new(blob: &BlobInfo, id: [u8; 64], index: u32, chunk_size: u32) -> Self {
        let (at, stored_size, plain_size, compressor) = match &blob.table {
            Some(table) => {
                (table.stored.start, table.stored.end - table.stored.start, table.plain_size, table.compressor)
            }
            // What the established builder leaves there.
            None => (0, 0, 0, Compressor::Lz4Block),
        };
        let mut entry = Self {
            id,
            index: index.into(),
            chunk_size: chunk_size.into(),
            chunk_count: blob.chunk_count.into(),
            compressor: blob.compressor.code().into(),
            algorithm: blob.algorithm.code().into(),
            features: blob.features.into(),
            stored_size: blob.stored_size.into(),
            plain_size: blob.plain_size.into(),
            toc_size: blob.toc_size.into(),
            table_compressor: compressor.code().into(),
            table_at: at.into(),
            table_stored_size: stored_size.into(),
            table_plain_size: plain_size.into(),
            toc_digest: blob.toc_digest.0,
            meta_digest: blob.meta_digest.0,
            meta_size: blob.meta_size.to_le_bytes(),
            iv_second_half: [0; 8],
            cipher: 0.into(),
            reserved: [0; 36],
        };
        if let Some(cipher) = &blob.cipher {
            entry.meta_digest = cipher.key;
            entry.meta_size.copy_from_slice(&cipher.iv[..8]);
            entry.iv_second_half.copy_from_slice(&cipher.iv[8..]);
            entry.cipher = 1.into();
        }
        entry
    }
}
