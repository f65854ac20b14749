//! Writes v5 bootstraps, byte for byte as the established builder does.
//!
//! Every name has an inode of its own; names of one file share an inode number, which is the index of the first of
//! them. Indexes and places follow two different walks: a directory's children have consecutive indexes, given before
//! any of theirs, but an inode is followed by everything below it. So all is numbered first, then placed, then put there.

use std::ffi::OsStr;
use std::io::{Read, Seek, Write};
use std::os::unix::ffi::OsStrExt;

use zerocopy::IntoBytes;

use super::format::*;
use crate::blob::format::features;
use crate::bootstrap::BlobInfo;
use crate::digest::Digest;
use crate::flags::Flags;
use crate::record::ChunkRecord;
use crate::sheet::Sheet;
use crate::tree::{Node, NodeId, NodeKind, Tree};
use crate::write::{Chunks, Options, WriteError, check_name, check_target, xattr_name};

/// What a directory entry adds to the size of its directory, besides its name: the format has none.
const ENTRY_SIZE: u64 = 8;

/// Writes a tree.
pub(crate) fn write<F: Read + Write + Seek>(
    tree: &Tree,
    blobs: &[BlobInfo],
    chunks: &Chunks<'_>,
    options: &Options,
    out: Sheet<F>,
) -> Result<u64, WriteError> {
    check_blobs(blobs, options)?;
    let numbers = Numbers::assign(tree)?;
    let mut writer = Writer { tree, options, chunks, numbers: &numbers, digests: Vec::new(), out };
    writer.digests = writer.digests()?;
    let count = numbers.entries.len() as u64;
    let prefetch = options.prefetch.len() as u64;
    let table = |entries: u64| (4 * entries).next_multiple_of(ALIGNMENT);
    let inode_table_at = u64::from(SUPER_SIZE);
    let prefetch_at = inode_table_at + table(count);
    let blob_table_at = prefetch_at + table(prefetch);
    let blob_table = blob_table(blobs);
    let extended_at = blob_table_at + blob_table.len() as u64;
    let inodes_at = extended_at + 64 * blobs.len() as u64;

    let (places, end) = writer.places(inodes_at)?;
    writer.out.reach(end);
    let has_xattrs = numbers.entries.iter().any(|entry| !tree.node(entry.node).xattrs.is_empty());
    let mut flags = Flags::of(options.compressor, options.algorithm).0;
    flags |= if options.explicit_ids { Flags::EXPLICIT_IDS } else { 0 };
    flags |= if has_xattrs || options.claim_xattrs { Flags::HAS_XATTR } else { 0 };
    let superblock = Super {
        magic: MAGIC.into(),
        version: VERSION.into(),
        size: SUPER_SIZE.into(),
        chunk_size: options.chunk_size.into(),
        flags: flags.into(),
        inode_count: numbers.inodes.into(),
        inode_table_at: inode_table_at.into(),
        prefetch_at: prefetch_at.into(),
        blob_table_at: blob_table_at.into(),
        inode_table_len: (count as u32).into(),
        prefetch_len: (prefetch as u32).into(),
        blob_table_size: (blob_table.len() as u32).into(),
        extended_len: (blobs.len() as u32).into(),
        extended_at: extended_at.into(),
    };
    writer.put(0, superblock.as_bytes())?;
    writer.put(blob_table_at, &blob_table)?;
    for (index, blob) in blobs.iter().enumerate() {
        writer.put(extended_at + 64 * index as u64, ExtendedBlob::new(blob).as_bytes())?;
    }
    for (index, &id) in options.prefetch.iter().enumerate() {
        let number = numbers.number.get(id.0).copied().filter(|&number| number != 0).ok_or(WriteError::Prefetch(id))?;
        writer.put(prefetch_at + 4 * index as u64, &number.to_le_bytes())?;
    }
    for (position, &at) in places.iter().enumerate() {
        let slot = u32::try_from(at / ALIGNMENT).map_err(|_| WriteError::TooMany("inodes"))?;
        writer.put(inode_table_at + 4 * position as u64, &slot.to_le_bytes())?;
        writer.inode(position, at)?;
    }
    Ok(writer.out.finish()?)
}

fn check_blobs(blobs: &[BlobInfo], options: &Options) -> Result<(), WriteError> {
    if blobs.len() > usize::from(u16::MAX) {
        return Err(WriteError::TooMany("blobs"));
    }
    let only_v6 = features::BATCH
        | features::ENCRYPTED
        | features::TARFS
        | features::ZRAN
        | features::SEPARATE
        | features::EXTERNAL;
    for (index, blob) in blobs.iter().enumerate() {
        if blob.features & only_v6 != 0 || options.tarfs {
            return Err(WriteError::NeedsV6(blob.id.clone()));
        }
        if blob.compressor != options.compressor || blob.algorithm != options.algorithm {
            return Err(WriteError::Mixed(blob.id.clone()));
        }
        if blobs[..index].iter().any(|earlier| earlier.id == blob.id) {
            return Err(WriteError::BlobName(blob.id.clone()));
        }
    }
    Ok(())
}

fn blob_table(blobs: &[BlobInfo]) -> Vec<u8> {
    let mut table = Vec::new();
    for (index, blob) in blobs.iter().enumerate() {
        if index > 0 {
            table.push(0);
        }
        table.extend_from_slice(&0u32.to_le_bytes());
        table.extend_from_slice(&blob.prefetch_size.to_le_bytes());
        table.extend_from_slice(blob.id.as_str().as_bytes());
    }
    table.resize(table.len().next_multiple_of(ALIGNMENT as usize), 0);
    table
}

impl ExtendedBlob {
    fn new(blob: &BlobInfo) -> Self {
        Self {
            chunk_count: blob.chunk_count.into(),
            features: blob.features.into(),
            plain_size: blob.plain_size.into(),
            stored_size: blob.stored_size.into(),
            reserved: [0; 40],
        }
    }
}

/// A name.
#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    node: NodeId,
    name: &'a OsStr,
    /// Inode number of the directory that has it; 0 for the root.
    parent: u32,
    /// Index of the first child of a directory.
    first_child: u32,
}

/// The names of a tree in the order of their indexes, which count from 1.
struct Numbers<'a> {
    entries: Vec<Entry<'a>>,
    /// Inode number by node; 0 for nodes without a name.
    number: Vec<u32>,
    /// Number of names by node.
    links: Vec<u32>,
    /// How many nodes have a name.
    inodes: u64,
}

impl<'a> Numbers<'a> {
    fn assign(tree: &'a Tree) -> Result<Self, WriteError> {
        let root = Entry { node: Tree::ROOT, name: OsStr::new("/"), parent: 0, first_child: 0 };
        let mut numbers =
            Self { entries: vec![root], number: vec![0; tree.len()], links: vec![0; tree.len()], inodes: 1 };
        (numbers.number[Tree::ROOT.0], numbers.links[Tree::ROOT.0]) = (1, 1);
        let mut directories = vec![0usize];
        while let Some(position) = directories.pop() {
            let dir = numbers.entries[position].node;
            let children = tree.children(dir).ok_or(WriteError::Root)?;
            let parent = numbers.number[dir.0];
            numbers.entries[position].first_child =
                u32::try_from(numbers.entries.len() + 1).map_err(|_| WriteError::TooMany("inodes"))?;
            let first_below = directories.len();
            for (name, &node) in children {
                check_name(name)?;
                let index = u32::try_from(numbers.entries.len() + 1).map_err(|_| WriteError::TooMany("inodes"))?;
                let is_directory = tree.children(node).is_some();
                if numbers.number[node.0] == 0 {
                    numbers.number[node.0] = index;
                    numbers.inodes += 1;
                } else if is_directory {
                    return Err(WriteError::DirectoryTwice(node));
                }
                numbers.links[node.0] += 1;
                if is_directory {
                    directories.push(numbers.entries.len());
                }
                numbers.entries.push(Entry { node, name, parent, first_child: 0 });
            }
            directories[first_below..].reverse();
        }
        Ok(numbers)
    }

    /// Returns the positions of a directory's children.
    fn children(&self, tree: &Tree, position: usize) -> std::ops::Range<usize> {
        let Entry { node, first_child, .. } = self.entries[position];
        let count = tree.children(node).map_or(0, |children| children.len());
        let first = (first_child as usize).saturating_sub(1);
        first..first + count
    }
}

struct Writer<'a, F> {
    tree: &'a Tree,
    options: &'a Options,
    chunks: &'a Chunks<'a>,
    numbers: &'a Numbers<'a>,
    /// Digests of inodes, by position.
    digests: Vec<Digest>,
    out: Sheet<F>,
}

impl<F: Read + Write + Seek> Writer<'_, F> {
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), WriteError> {
        Ok(self.out.put(at, bytes)?)
    }

    /// Names what each inode holds: a directory's digest is that of its children's, and so covers all contents.
    fn digests(&self) -> Result<Vec<Digest>, WriteError> {
        let algorithm = self.options.algorithm;
        let mut digests = vec![Digest([0; 32]); self.numbers.entries.len()];
        // Children come after their directory.
        for (position, entry) in self.numbers.entries.iter().enumerate().rev() {
            digests[position] = match &self.tree.node(entry.node).kind {
                NodeKind::Directory(_) => {
                    let children = digests[self.numbers.children(self.tree, position)].iter();
                    algorithm.digest(&children.flat_map(|digest| digest.0).collect::<Vec<u8>>())
                }
                NodeKind::Regular { chunks, .. } => {
                    let mut ids = Vec::with_capacity(32 * chunks.len());
                    for &chunk in chunks {
                        ids.extend_from_slice(&self.chunks.get(chunk)?.digest.map_or([0; 32], |digest| digest.0));
                    }
                    algorithm.digest(&ids)
                }
                NodeKind::Symlink(target) => algorithm.digest(target.as_bytes()),
                NodeKind::CharDevice(_) | NodeKind::BlockDevice(_) | NodeKind::Fifo | NodeKind::Socket => {
                    algorithm.digest(b"")
                }
            };
        }
        Ok(digests)
    }

    /// Returns where each inode goes, by position, and where the last ends.
    fn places(&self, first: u64) -> Result<(Vec<u64>, u64), WriteError> {
        let mut places = vec![0; self.numbers.entries.len()];
        let mut at = first;
        let mut open = vec![0usize];
        while let Some(position) = open.pop() {
            let entry = &self.numbers.entries[position];
            places[position] = at;
            at = at.saturating_add(record_size(entry.name, self.tree.node(entry.node))?);
            if self.tree.children(entry.node).is_some() {
                open.extend(self.numbers.children(self.tree, position).rev());
            }
        }
        // Established readers count bytes in 32 bits.
        if at > u64::from(u32::MAX) { Err(WriteError::TooMany("inodes")) } else { Ok((places, at)) }
    }

    fn inode(&mut self, position: usize, at: u64) -> Result<(), WriteError> {
        let entry = self.numbers.entries[position];
        let node = self.tree.node(entry.node);
        let xattrs = xattr_pairs(node)?;
        let mut flags = if xattrs.is_empty() { 0 } else { HAS_XATTR };
        let mut links = self.numbers.links[entry.node.0].saturating_add(node.stat.hidden_links);
        let (mut size, mut children, mut target, mut rdev) = (0, 0, &[][..], 0);
        match &node.kind {
            NodeKind::Directory(names) => {
                let directories = names.values().filter(|child| self.tree.children(**child).is_some()).count();
                links = 2 + directories as u32;
                let bytes: u64 = names.keys().map(|name| name.len() as u64 + ENTRY_SIZE).sum();
                size = bytes.next_multiple_of(4096).max(4096);
                children = names.len() as u32;
            }
            NodeKind::Regular { size: bytes, chunks } => (size, children) = (*bytes, chunks.len() as u32),
            NodeKind::Symlink(text) => {
                check_target(text)?;
                (size, target, flags) = (text.len() as u64, text.as_bytes(), flags | IS_SYMLINK);
            }
            NodeKind::CharDevice(number) | NodeKind::BlockDevice(number) => rdev = *number,
            NodeKind::Fifo | NodeKind::Socket => {}
        }
        let inode = Inode {
            digest: self.digests[position].0,
            parent: u64::from(entry.parent).into(),
            ino: u64::from(self.numbers.number[entry.node.0]).into(),
            uid: node.stat.uid.into(),
            gid: node.stat.gid.into(),
            projid: 0.into(),
            mode: (node.kind.kind().mode() | u32::from(node.stat.permissions & 0o7777)).into(),
            size: size.into(),
            blocks: (size + (xattrs.len() as u64).next_multiple_of(ALIGNMENT)).div_ceil(512).into(),
            flags: flags.into(),
            nlink: links.into(),
            child_index: entry.first_child.into(),
            child_count: children.into(),
            // Checked when names were numbered and targets looked at.
            name_size: (entry.name.len() as u16).into(),
            symlink_size: (target.len() as u16).into(),
            rdev: rdev.into(),
            mtime_nsec: node.stat.mtime_nsec.into(),
            mtime: node.stat.mtime.into(),
            reserved: [0; 8],
        };
        self.put(at, inode.as_bytes())?;
        let mut cursor = at + 128;
        for text in [entry.name.as_bytes(), target] {
            self.put(cursor, text)?;
            cursor += (text.len() as u64).next_multiple_of(ALIGNMENT);
        }
        if !xattrs.is_empty() {
            self.put(cursor, &(xattrs.len() as u64).to_le_bytes())?;
            self.put(cursor + 8, &xattrs)?;
            cursor += 8 + (xattrs.len() as u64).next_multiple_of(ALIGNMENT);
        }
        if let NodeKind::Regular { size, chunks } = &node.kind {
            let chunk_size = u64::from(self.options.chunk_size);
            if size.div_ceil(chunk_size) != chunks.len() as u64 {
                return Err(WriteError::Chunks { size: *size, chunks: chunks.len() });
            }
            for (number, &chunk) in chunks.iter().enumerate() {
                let file_offset = number as u64 * chunk_size;
                let record = ChunkRecord::new(self.chunks.get(chunk)?, u32::from(chunk.blob), file_offset);
                self.put(cursor + 80 * number as u64, record.as_bytes())?;
            }
        }
        Ok(())
    }
}

/// Returns the number of bytes of an inode with all that follows it.
fn record_size(name: &OsStr, node: &Node) -> Result<u64, WriteError> {
    let padded = |len: usize| (len as u64).next_multiple_of(ALIGNMENT);
    let xattrs = xattr_pairs(node)?.len();
    let more = match &node.kind {
        NodeKind::Symlink(target) => padded(target.len()),
        NodeKind::Regular { chunks, .. } => 80 * chunks.len() as u64,
        _ => 0,
    };
    Ok(128 + padded(name.len()) + if xattrs == 0 { 0 } else { 8 + padded(xattrs) } + more)
}

/// Returns the extended attributes as they are stored: length, name, NUL, value, one after the other.
fn xattr_pairs(node: &Node) -> Result<Vec<u8>, WriteError> {
    let mut pairs = Vec::new();
    for (name, value) in &node.xattrs {
        xattr_name(name, value)?;
        // At most 255 + 1 + 65,535.
        pairs.extend_from_slice(&((name.len() + 1 + value.len()) as u32).to_le_bytes());
        pairs.extend_from_slice(name.as_bytes());
        pairs.push(0);
        pairs.extend_from_slice(value);
    }
    Ok(pairs)
}
