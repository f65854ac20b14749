//! Writes v6 bootstraps, byte for byte as the established builder does.
//!
//! Two passes: [`Places`] decides where every inode lies, then the bytes are put there. Directories name inodes
//! by place, so that nothing can be written before all is placed.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;

use zerocopy::IntoBytes;

use super::format::*;
use super::place::{Place, Places, with_dots};
use crate::blob::format::features;
use crate::bootstrap::{BlobInfo, Kind};
use crate::chunk::Compressor;
use crate::digest::Digest;
use crate::flags::Flags;
use crate::record::ChunkRecord;
use crate::sheet::Sheet;
use crate::tree::{ChunkRef, Node, NodeId, NodeKind, Tree};
use crate::write::{Chunks, Options, WriteError, check_target, xattr_name};

/// EROFS devices are numbered from 1 in one byte, and the last number is left alone.
const MAX_BLOBS: usize = 254;
/// The size of a record in the chunk table.
const RECORD_SIZE: u64 = size_of::<ChunkRecord>() as u64;
/// Blobs are mapped into the linear device at multiples of this.
const MAPPING: u64 = 512 << 10;

/// Writes a tree.
pub(crate) fn write<F: Read + Write + Seek>(
    tree: &Tree,
    blobs: &[BlobInfo],
    chunks: &Chunks<'_>,
    options: &Options,
    out: Sheet<F>,
) -> Result<u64, WriteError> {
    if blobs.len() > MAX_BLOBS {
        return Err(WriteError::TooMany("blobs"));
    }
    let bits = if options.tarfs { TARFS_BITS } else { PAGE_BITS };
    let places = Places::assign(tree, 1 << bits, options.chunk_size)?;
    let layout = Layout::new(blobs.len(), if blobs.is_empty() { 0 } else { options.prefetch.len() }, places.end);
    let met = places.visited.iter().map(|&id| match &tree.node(id).kind {
        NodeKind::Regular { chunks, .. } => chunks.len(),
        _ => 0,
    });
    let met: usize = met.sum();
    let mut writer = Writer {
        tree,
        options,
        bits,
        layout,
        places: &places,
        chunks,
        has_xattrs: options.claim_xattrs,
        met: Vec::with_capacity(met),
        record_bytes: 0,
        out,
    };
    for &id in &places.visited {
        writer.inode(id)?;
    }
    writer.chunk_table()?;
    writer.blobs(blobs)?;
    writer.prefetch_table()?;
    writer.superblocks(blobs)?;
    Ok(writer.out.finish()?)
}

/// Returns the size of an inode with its extended attributes.
pub(super) fn inode_size(node: &Node) -> Result<u64, WriteError> {
    if let NodeKind::Symlink(target) = &node.kind {
        check_target(target)?;
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
        let (_, suffix) = xattr_name(name, value)?;
        words += (4 + suffix.len() + value.len()).div_ceil(4);
        if words > usize::from(u16::MAX) {
            return Err(WriteError::Xattr(name.clone()));
        }
    }
    Ok(words as u16)
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

struct Writer<'a, F> {
    tree: &'a Tree,
    options: &'a Options,
    bits: u8,
    layout: Layout,
    places: &'a Places,
    chunks: &'a Chunks<'a>,
    has_xattrs: bool,
    /// Chunks as they were met, with their number in the file.
    met: Vec<(ChunkRef, u32)>,
    record_bytes: u64,
    out: Sheet<F>,
}

impl<F: Read + Write + Seek> Writer<'_, F> {
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), WriteError> {
        Ok(self.out.put(at, bytes)?)
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
        self.put(at, inode.as_bytes())?;
        let xattrs = xattr_area(node)?;
        self.has_xattrs |= !xattrs.is_empty();
        self.put(at + 64, &xattrs)?;
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
            self.put(self.layout.meta + place.blocks_at, blocks)?;
        }
        self.put(self.layout.meta + place.at + inode_size(node)?, tail)?;
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
            let chunk = self.chunks.get(*chunk_ref)?;
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
            let position = u32::try_from(position).map_err(|_| WriteError::TooMany("chunks of a file"))?;
            self.met.push((*chunk_ref, position));
        }
        let at = (place.at + inode_size(node)?).next_multiple_of(8);
        self.put(self.layout.meta + at, &bytes)?;
        // One extent lets the kernel read such a file in large pieces.
        let extent = if contiguous && size > chunk_size { size.checked_next_power_of_two() } else { None };
        let extent = extent.filter(|extent| extent.trailing_zeros() < 31 + u32::from(self.bits)).unwrap_or(chunk_size);
        Ok(CHUNK_INDEXES | (extent.trailing_zeros() - u32::from(self.bits)))
    }

    /// Writes one record for each digest and blob, that of the chunk that was met last, in the order of digests.
    fn chunk_table(&mut self) -> Result<(), WriteError> {
        let met = std::mem::take(&mut self.met);
        let digest = |(place, _): (ChunkRef, u32)| self.chunks.get(place).ok().and_then(|chunk| chunk.digest);
        let key = |number: u32| {
            let (place, position) = met[number as usize];
            (digest((place, position)).map_or([0; 32], |digest| digest.0), place.blob, number)
        };
        // Whole keys would take four times what they sort; their beginnings decide almost always.
        let beginning = |digest: Option<Digest>| {
            digest.and_then(|digest| digest.0.first_chunk().copied()).map_or(0, u64::from_be_bytes)
        };
        let count = u32::try_from(met.len()).map_err(|_| WriteError::TooMany("chunks"))?;
        let mut order: Vec<(u64, u32)> =
            (0..count).zip(&met).map(|(number, &met)| (beginning(digest(met)), number)).collect();
        order.sort_unstable_by(|one, other| one.0.cmp(&other.0).then_with(|| key(one.1).cmp(&key(other.1))));
        let mut at = self.layout.chunk_table;
        let mut met = order.into_iter().map(|(_, number)| met[number as usize]).peekable();
        while let Some((place, position)) = met.next() {
            let chunk = self.chunks.get(place)?;
            if let Some(&(next, _)) = met.peek()
                && next.blob == place.blob
                && self.chunks.get(next)?.digest == chunk.digest
            {
                continue;
            }
            let file_offset = u64::from(position) * u64::from(self.options.chunk_size);
            self.put(at, ChunkRecord::new(chunk, u32::from(place.blob), file_offset).as_bytes())?;
            at += RECORD_SIZE;
        }
        self.record_bytes = at - self.layout.chunk_table;
        self.put(at, &[0; PAGE as usize][..(at.next_multiple_of(PAGE) - at) as usize])?;
        Ok(())
    }

    fn blobs(&mut self, blobs: &[BlobInfo]) -> Result<(), WriteError> {
        let mut mapped = self.out.len();
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
            self.put(DEVICES_AT + 128 * index as u64, slot.as_bytes())?;
            let entry = BlobEntry::new(blob, id, index as u32, self.options.chunk_size);
            self.put(self.layout.blob_table + 256 * index as u64, entry.as_bytes())?;
        }
        Ok(())
    }

    fn prefetch_table(&mut self) -> Result<(), WriteError> {
        if self.layout.prefetch != 0 {
            for (index, &id) in self.options.prefetch.iter().enumerate() {
                let place = self.places.by_node.get(id.0).copied().flatten().ok_or(WriteError::Prefetch(id))?;
                let nid = u32::try_from(place.nid()).map_err(|_| WriteError::TooMany("inodes"))?;
                self.put(self.layout.prefetch + 4 * index as u64, &nid.to_le_bytes())?;
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
        self.put(SUPER_AT, erofs.as_bytes())?;
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
        self.put(RAFS_SUPER_AT, rafs.as_bytes())?;
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
        let (prefix, suffix) = xattr_name(name, value)?;
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
