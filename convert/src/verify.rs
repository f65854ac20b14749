//! The made image against its source, entry by entry and byte by byte.
//!
//! What is checked is what a node will read: the bootstrap as it was pushed, opened by the reader, and every chunk of
//! every blob as it was pushed, decoded and checked against the bootstrap's digest by the only door through which
//! nydusd lets bytes pass. What it is compared with comes from the source alone: the merged tree, and for each file a
//! digest folded from its pieces while the layer's tar was read. Where a piece went, and whether it was stored once or
//! twice, is not part of that digest; so a file whose chunks were mixed up is found even if each chunk is sound.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt as _;

use nydus_rafs::blob::table::BlobTable;
use nydus_rafs::verified::{ChunkError, Decoder};
use nydus_rafs::{
    Algorithm, BlobInfo, Bootstrap, Chunk, ChunkIndex, ChunkTable, Digest, FormatError, Ino, Kind, NodeId, NodeKind,
    Tree,
};

use crate::pack::fold;

/// What differs, or why it cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The bootstrap cannot be read.
    #[error("could not read the metadata of `{path}`")]
    Metadata {
        /// The entry.
        path: String,
        /// What is wrong.
        #[source]
        source: FormatError,
    },
    /// An entry is not as in the source.
    #[error("`{path}` has {what} {found} and the source has {wanted}")]
    Differs {
        /// The entry.
        path: String,
        /// What differs.
        what: &'static str,
        /// In the made image.
        found: String,
        /// In the source.
        wanted: String,
    },
    /// A chunk is not what the bootstrap says.
    #[error("chunk {chunk} of blob {blob} is damaged")]
    Chunk {
        /// The blob.
        blob: String,
        /// The chunk.
        chunk: u32,
        /// What is wrong.
        #[source]
        source: ChunkError,
    },
    /// A blob cannot be read.
    #[error("could not read blob {blob}")]
    Blob {
        /// The blob.
        blob: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// The image's tables contradict each other.
    #[error("could not read the tables of the image")]
    Tables(#[source] FormatError),
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rigour {
    /// Everything.
    Everything,
    /// All but times and the root directory's attributes, which established builders do not keep and established checkers do not
    /// look at.
    Established,
}

/// What a file must hold: the folded digest of its pieces, by node.
pub type Contents = HashMap<NodeId, Digest>;

/// The chunks of one blob whose stored bytes were read back and match, by their index: digests and numbers of plain bytes.
#[derive(Debug, Default)]
pub struct Sound(Vec<(ChunkIndex, u32, Digest)>);

impl Sound {
    fn get(&self, chunk: ChunkIndex) -> Option<(Digest, u64)> {
        let found = self.0.binary_search_by_key(&chunk, |&(index, ..)| index).ok()?;
        let (_, len, digest) = self.0[found];
        Some((digest, u64::from(len)))
    }
}

/// Joins the chunks of blob `info` that an image names with the blob's own table (from the bytes that
/// [`nydus_rafs::blob::table::TableLocation::with_header`] names): some daemons go by one, some by the other.
///
/// # Errors
///
/// If the two contradict each other.
pub fn chunks(info: &BlobInfo, named: &ChunkTable, table: &[u8]) -> Result<ChunkTable, VerifyError> {
    let joined = BlobTable::read(info, table).and_then(|own| own.with_digests(named)).map_err(VerifyError::Tables)?;
    agree(info, named, &joined)?;
    Ok(joined)
}

/// Checks that each chunk of blob `info` that an image names is where `own` has it, and has the same digest.
///
/// # Errors
///
/// The first that is not.
pub fn agree(info: &BlobInfo, named: &ChunkTable, own: &ChunkTable) -> Result<(), VerifyError> {
    for chunk in named.all() {
        let own = own.at(chunk.index, chunk.plain.start);
        // Of a part of something larger the bootstrap does not tell where it is stored.
        let same = own.is_some_and(|own| {
            own.digest == chunk.digest
                && (own.container.is_some()
                    || (&own.plain, &own.stored, own.codec) == (&chunk.plain, &chunk.stored, chunk.codec))
        });
        if !same {
            let why = format!("its table does not have chunk {} where the bootstrap has it", chunk.index.0);
            let source = io::Error::new(io::ErrorKind::InvalidData, why);
            return Err(VerifyError::Blob { blob: info.id.to_string(), source });
        }
    }
    Ok(())
}

/// Reads blob `info` from its first byte on, decodes every one of `chunks` that the image refers to and checks it.
///
/// # Errors
///
/// If a chunk does not match, or the blob cannot be read.
pub fn check_blob(info: &BlobInfo, chunks: &ChunkTable, mut stored: impl Read) -> Result<Sound, VerifyError> {
    let failed = |source| VerifyError::Blob { blob: info.id.to_string(), source };
    // Chunks that the image does not refer to have no digest.
    let mut chunks: Vec<_> = chunks.all().iter().filter(|chunk| chunk.digest.is_some()).collect();
    chunks.sort_by_key(|chunk| (chunk.stored.start, chunk.stored.end, chunk.index));
    let mut at = 0_u64;
    let mut sound = Vec::with_capacity(chunks.len());
    let mut buffer = Vec::new();
    for together in chunks.chunk_by(|one, other| one.stored == other.stored) {
        let first = together[0];
        // What is fed to inflate from one point of a gzip stream may reach into what is fed from the next.
        let shared = usize::try_from(at.saturating_sub(first.stored.start)).unwrap_or(usize::MAX);
        let len = usize::try_from(first.stored.end - first.stored.start).unwrap_or(usize::MAX);
        if shared > buffer.len().min(len) {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "its chunks overlap")));
        }
        skip(&mut stored, first.stored.start.saturating_sub(at)).map_err(failed)?;
        buffer.drain(..buffer.len() - shared);
        buffer.resize(len, 0);
        stored.read_exact(&mut buffer[shared..]).map_err(failed)?;
        at = first.stored.end;
        let wrong =
            |chunk: &Chunk, source| VerifyError::Chunk { blob: info.id.to_string(), chunk: chunk.index.0, source };
        let mut decoder = Decoder::default();
        for chunk in together {
            let verified = decoder.decode(chunk, &buffer).map_err(|source| wrong(chunk, source))?;
            let plain = verified.bytes();
            let digest = chunk.digest.unwrap_or_else(|| chunk.algorithm.digest(plain));
            let len = u32::try_from(plain.len()).expect("a chunk has 16 MiB at most");
            sound.push((chunk.index, len, digest));
        }
    }
    sound.sort_by_key(|&(index, ..)| index);
    Ok(Sound(sound))
}

fn skip(from: &mut impl Read, len: u64) -> io::Result<()> {
    let skipped = io::copy(&mut from.by_ref().take(len), &mut io::sink())?;
    if skipped == len { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Compares the whole image with its source; `sound` holds what [`check_blob`] found for each of the image's blobs.
///
/// Returns how many entries were compared.
///
/// # Errors
///
/// The first difference.
pub fn compare<B: AsRef<[u8]>>(
    image: &Bootstrap<B>,
    sound: &[Sound],
    source: &Tree,
    contents: &Contents,
    algorithm: Algorithm,
    rigour: Rigour,
) -> Result<u64, VerifyError> {
    let mut comparison = Comparison {
        image,
        sound,
        source,
        contents,
        algorithm,
        rigour,
        names: count_names(source),
        seen: HashMap::new(),
        entries: 0,
    };
    comparison.entry(image.root(), Tree::ROOT, &mut Vec::new())?;
    Ok(comparison.entries)
}

/// Counts the names of each node that is not a directory.
fn count_names(tree: &Tree) -> HashMap<NodeId, u32> {
    let mut names = HashMap::new();
    let mut todo = vec![Tree::ROOT];
    while let Some(id) = todo.pop() {
        if let NodeKind::Directory(children) = &tree.node(id).kind {
            for &child in children.values() {
                *names.entry(child).or_insert(0) += 1;
                todo.push(child);
            }
        }
    }
    names
}

struct Comparison<'c, B> {
    image: &'c Bootstrap<B>,
    sound: &'c [Sound],
    source: &'c Tree,
    contents: &'c Contents,
    algorithm: Algorithm,
    rigour: Rigour,
    names: HashMap<NodeId, u32>,
    /// Which inode the names of a file of several names led to.
    seen: HashMap<NodeId, Ino>,
    entries: u64,
}

fn text(path: &[u8]) -> String {
    if path.is_empty() { "/".to_owned() } else { String::from_utf8_lossy(path).into_owned() }
}

fn differs(path: &[u8], what: &'static str, found: impl ToString, wanted: impl ToString) -> VerifyError {
    VerifyError::Differs { path: text(path), what, found: found.to_string(), wanted: wanted.to_string() }
}

impl<B: AsRef<[u8]>> Comparison<'_, B> {
    fn entry(&mut self, ino: Ino, id: NodeId, path: &mut Vec<u8>) -> Result<(), VerifyError> {
        self.entries += 1;
        let node = self.source.node(id);
        let metadata = |source| VerifyError::Metadata { path: text(path), source };
        let attr = self.image.attr(ino).map_err(metadata)?;
        let (kind, rdev) = match node.kind {
            NodeKind::Directory(_) => (Kind::Directory, 0),
            NodeKind::Regular { .. } => (Kind::Regular, 0),
            NodeKind::Symlink(_) => (Kind::Symlink, 0),
            NodeKind::CharDevice(rdev) => (Kind::CharDevice, rdev),
            NodeKind::BlockDevice(rdev) => (Kind::BlockDevice, rdev),
            NodeKind::Fifo => (Kind::Fifo, 0),
            NodeKind::Socket => (Kind::Socket, 0),
        };
        if attr.kind != kind {
            return Err(differs(path, "type", format!("{:?}", attr.kind), format!("{kind:?}")));
        }
        let stat = &node.stat;
        let mode = |permissions| format!("{permissions:04o}");
        let checks = [
            ("mode", mode(attr.permissions), mode(stat.permissions)),
            ("owner", attr.uid.unwrap_or(0).to_string(), stat.uid.to_string()),
            ("group", attr.gid.unwrap_or(0).to_string(), stat.gid.to_string()),
            ("device number", attr.rdev.to_string(), rdev.to_string()),
            ("modification time", time(attr.mtime, attr.mtime_nsec), time(stat.mtime, stat.mtime_nsec)),
        ];
        let lenient = self.rigour == Rigour::Established;
        for (what, found, wanted) in checks {
            if lenient && (path.is_empty() || what == "modification time") {
                continue;
            }
            if found != wanted {
                return Err(differs(path, what, found, wanted));
            }
        }
        let found: BTreeMap<OsString, Vec<u8>> = self.image.xattrs(ino).map_err(metadata)?.into_iter().collect();
        if found != node.xattrs && !(lenient && path.is_empty()) {
            return Err(differs(path, "extended attributes", shown(&found), shown(&node.xattrs)));
        }
        match &node.kind {
            NodeKind::Directory(children) => self.directory(ino, children, path),
            NodeKind::Symlink(target) => {
                let found = self.image.readlink(ino).map_err(metadata)?;
                if &found != target {
                    return Err(differs(path, "target", found.display(), target.display()));
                }
                Ok(())
            }
            NodeKind::Regular { size, .. } => {
                if attr.size != *size {
                    return Err(differs(path, "size", attr.size, size));
                }
                let names = self.names.get(&id).copied().unwrap_or(1);
                let links = names + node.stat.hidden_links;
                if attr.nlink != links {
                    return Err(differs(path, "link count", attr.nlink, links));
                }
                if names > 1 {
                    match self.seen.insert(id, ino) {
                        Some(before) if before != ino => {
                            return Err(differs(path, "inode", ino.0, before.0));
                        }
                        // The same inode: its bytes were compared under the first name.
                        Some(_) => return Ok(()),
                        None => {}
                    }
                }
                self.content(ino, *size, self.contents.get(&id).copied(), path)
            }
            _ => Ok(()),
        }
    }

    fn directory(
        &mut self,
        ino: Ino,
        children: &BTreeMap<OsString, NodeId>,
        path: &mut Vec<u8>,
    ) -> Result<(), VerifyError> {
        let metadata = |path: &[u8], source| VerifyError::Metadata { path: text(path), source };
        let mut wanted = children.iter();
        let image = self.image;
        for entry in image.entries(ino, 0).map_err(|source| metadata(path, source))? {
            let entry = entry.map_err(|source| metadata(path, source))?;
            if entry.name == OsStr::new(".") || entry.name == OsStr::new("..") {
                continue;
            }
            let Some((name, &id)) = wanted.next().filter(|(name, _)| name.as_os_str() == entry.name) else {
                return Err(differs(path, "the entry", entry.name.display(), "another or none there"));
            };
            let found = image.lookup(ino, name).map_err(|source| metadata(path, source))?;
            if found != Some(entry.ino) {
                return Err(differs(path, "an entry that is listed and not found:", name.display(), "it"));
            }
            let len = path.len();
            path.push(b'/');
            path.extend_from_slice(name.as_bytes());
            self.entry(entry.ino, id, path)?;
            path.truncate(len);
        }
        match wanted.next() {
            Some((name, _)) => Err(differs(path, "no entry", name.display(), "it")),
            None => Ok(()),
        }
    }

    fn content(&self, ino: Ino, size: u64, wanted: Option<Digest>, path: &[u8]) -> Result<(), VerifyError> {
        let metadata = |source| VerifyError::Metadata { path: text(path), source };
        let mut at = 0;
        let mut folded = None;
        for extent in self.image.extents(ino, 0..size).map_err(metadata)? {
            let extent = extent.map_err(metadata)?;
            let chunk = self.sound.get(usize::from(extent.blob)).and_then(|sound| sound.get(extent.chunk));
            let Some((digest, len)) = chunk else {
                return Err(differs(path, "a chunk", "that is in no blob", "its bytes"));
            };
            let whole = extent.file.start == at && extent.file.end - at == len;
            if !whole || extent.plain.end - extent.plain.start != len {
                return Err(differs(path, "a piece at", extent.file.start, format!("one of {len} bytes at {at}")));
            }
            at = extent.file.end;
            folded = Some(fold(self.algorithm, folded, digest));
        }
        if at != size {
            return Err(differs(path, "bytes", at, size));
        }
        if folded != wanted {
            let hex = |digest: Option<Digest>| digest.map_or_else(|| "none".to_owned(), |digest| digest.to_string());
            return Err(differs(path, "content", hex(folded), hex(wanted)));
        }
        Ok(())
    }
}

fn time(seconds: i64, nanos: u32) -> String {
    format!("{seconds}.{nanos:09}")
}

fn shown(xattrs: &BTreeMap<OsString, Vec<u8>>) -> String {
    let one = |(name, value): (&OsString, &Vec<u8>)| format!("{}={}", name.display(), value.escape_ascii());
    xattrs.iter().map(one).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests;
