//! Generated trees, and trees in a form that can be compared.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nydus_rafs::tree::ChunkRef;
use nydus_rafs::write::{Options, write};
use nydus_rafs::{
    Algorithm, BlobInfo, Chunk, ChunkIndex, ChunkTable, Codec, Compressor, Node, NodeId, NodeKind, Stat, Tree, Version,
};
use proptest::prelude::*;

pub(crate) const CHUNK: u64 = 4096;
const CHUNKS: u32 = 40;

/// Chunks from here on are short.
const WHOLE: u32 = CHUNKS - 6;

/// Returns how many bytes a chunk has, and its index: that of the last needs more than 16 bits.
fn chunk_of(number: u32) -> (u64, ChunkIndex) {
    let len = if number < WHOLE { CHUNK } else { 100 + u64::from(number) };
    (len, ChunkIndex(if number == CHUNKS - 1 { 0x12_3456 } else { number }))
}

/// Two blobs of 40 chunks each.
pub(crate) fn blobs() -> (Vec<BlobInfo>, Vec<ChunkTable>) {
    let mut infos = Vec::new();
    let mut tables = Vec::new();
    for blob in 0..2u8 {
        let chunks = (0..CHUNKS).map(|index| {
            let start = u64::from(index) * CHUNK;
            let (len, number) = chunk_of(index);
            Chunk {
                index: number,
                plain: start..start + len,
                stored: u64::from(index) * 50..u64::from(index) * 50 + 50,
                codec: Codec::Zstd,
                encrypted: false,
                algorithm: Algorithm::Blake3,
                digest: Some(Algorithm::Blake3.digest(&[blob, index as u8])),
                container: None,
                crc32: (index % 2 == 0).then_some(index),
            }
        });
        tables.push(ChunkTable::new(chunks.collect()));
        let id = nydus_rafs::BlobId::from(Algorithm::Sha256.digest(&[blob]));
        let info = BlobInfo::new(id, Compressor::Zstd, Algorithm::Blake3);
        infos.push(BlobInfo { plain_size: u64::from(CHUNKS) * CHUNK, stored_size: 2000, chunk_count: CHUNKS, ..info });
    }
    (infos, tables)
}

pub(crate) fn options() -> Options {
    Options { chunk_size: CHUNK as u32, ..Options::default() }
}

pub(crate) fn versions() -> impl Strategy<Value = Options> {
    prop_oneof![Just(Version::V5), Just(Version::V6)].prop_map(|version| Options { version, ..options() })
}

pub(crate) fn to_bytes(tree: &Tree, options: &Options) -> Vec<u8> {
    let (infos, tables) = blobs();
    write(tree, &infos, &tables, options).expect("generated trees can be written")
}

/// What is asked of one new entry: a place to hang it in, its name, and what it is.
type Step = (prop::sample::Index, Vec<u8>, Shape, Stat, BTreeMap<OsString, Vec<u8>>);

#[derive(Debug, Clone)]
enum Shape {
    Kind(NodeKind),
    /// A second name of an earlier node.
    Link(prop::sample::Index),
    /// A directory with this many empty files, for those that need several blocks.
    Crowd(u16),
}

fn names() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![Just(b'a'), Just(b'.'), Just(b'!'), any::<u8>()];
    let name = prop_oneof![
        4 => prop::collection::vec(byte.clone(), 1..6),
        1 => prop::collection::vec(byte, 200..=255),
    ];
    name.prop_map(|mut name| {
        name.iter_mut().filter(|byte| matches!(byte, b'/' | 0)).for_each(|byte| *byte = b'x');
        if name == b"." || name == b".." { b"dots".to_vec() } else { name }
    })
}

fn stats() -> impl Strategy<Value = Stat> {
    (0u16..0o10000, any::<u32>(), any::<u32>(), any::<i64>(), 0u32..1_000_000_000).prop_map(
        |(permissions, uid, gid, mtime, mtime_nsec)| Stat { permissions, uid, gid, mtime, mtime_nsec, hidden_links: 0 },
    )
}

fn xattrs() -> impl Strategy<Value = BTreeMap<OsString, Vec<u8>>> {
    let name = prop_oneof![
        "(user|trusted|security)\\.[a-z]{1,9}",
        Just("system.posix_acl_access".to_owned()),
        Just("system.posix_acl_default".to_owned()),
    ];
    let value = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..20),
        1 => prop::collection::vec(any::<u8>(), 3000..6000),
    ];
    prop_oneof![
        3 => Just(BTreeMap::new()),
        1 => prop::collection::btree_map(name.prop_map(OsString::from), value, 1..4),
    ]
}

fn files() -> impl Strategy<Value = NodeKind> {
    let scattered = prop::collection::vec((0u16..2, 0..WHOLE), 0..6);
    let contiguous = (0u16..2, 0..WHOLE - 8, 0u32..8)
        .prop_map(|(blob, from, count)| (from..from + count).map(|number| (blob, number)).collect());
    let last = prop::option::of((0u16..2, WHOLE..CHUNKS));
    (prop_oneof![scattered, contiguous], last).prop_map(move |(chunks, last): (Vec<(u16, u32)>, _)| {
        let all = chunks.into_iter().chain(last);
        let mut size = 0;
        let refs = all.map(|(blob, number)| {
            let (len, chunk) = chunk_of(number);
            size += len;
            ChunkRef { blob, chunk }
        });
        let chunks = refs.collect();
        NodeKind::Regular { size, chunks }
    })
}

fn shapes() -> impl Strategy<Value = Shape> {
    let target = prop_oneof![
        3 => prop::collection::vec(1u8.., 1..40),
        1 => prop::collection::vec(1u8.., 3900..=4096),
    ];
    let kind = prop_oneof![
        4 => Just(NodeKind::Directory(BTreeMap::new())),
        4 => files(),
        2 => target.prop_map(|target| NodeKind::Symlink(OsString::from_vec(target))),
        1 => any::<u32>().prop_map(NodeKind::CharDevice),
        1 => any::<u32>().prop_map(NodeKind::BlockDevice),
        1 => Just(NodeKind::Fifo),
        1 => Just(NodeKind::Socket),
    ];
    prop_oneof![
        8 => kind.prop_map(Shape::Kind),
        1 => any::<prop::sample::Index>().prop_map(Shape::Link),
        1 => (0u16..400).prop_map(Shape::Crowd),
    ]
}

fn hang(tree: &mut Tree, dir: NodeId, name: Vec<u8>, child: NodeId) {
    if let NodeKind::Directory(children) = &mut tree.node_mut(dir).kind {
        children.entry(OsString::from_vec(name)).or_insert(child);
    }
}

/// Trees of up to 40 entries and some crowded directories.
pub(crate) fn trees() -> impl Strategy<Value = Tree> {
    let step = (any::<prop::sample::Index>(), names(), shapes(), stats(), xattrs());
    (stats(), prop::collection::vec(step, 0..40)).prop_map(|(root, steps): (Stat, Vec<Step>)| {
        let mut tree = Tree::new(root);
        let mut directories = vec![Tree::ROOT];
        let mut others = Vec::new();
        for (place, name, shape, stat, xattrs) in steps {
            let dir = *place.get(&directories);
            let node = |kind| Node { stat: stat.clone(), xattrs: xattrs.clone(), kind, implied: false };
            let taken =
                tree.children(dir).is_some_and(|children| children.contains_key(&OsString::from_vec(name.clone())));
            if taken {
                continue;
            }
            match shape {
                Shape::Link(which) => {
                    if !others.is_empty() {
                        hang(&mut tree, dir, name, *which.get(&others));
                    }
                }
                Shape::Crowd(count) => {
                    let crowd = tree.add(node(NodeKind::Directory(BTreeMap::new())));
                    for index in 0..count {
                        let file =
                            tree.add(node(NodeKind::Regular { size: 0, chunks: nydus_rafs::tree::ChunkList::new() }));
                        hang(
                            &mut tree,
                            crowd,
                            format!("{index:05}{}", "n".repeat(usize::from(index % 41))).into_bytes(),
                            file,
                        );
                    }
                    hang(&mut tree, dir, name, crowd);
                }
                Shape::Kind(kind) => {
                    let is_directory = matches!(kind, NodeKind::Directory(_));
                    let id = tree.add(node(kind));
                    hang(&mut tree, dir, name, id);
                    if is_directory { directories.push(id) } else { others.push(id) }
                }
            }
        }
        tree
    })
}

/// What a path leads to, and the first path that leads to the same node.
type Seen = (Stat, BTreeMap<OsString, Vec<u8>>, Option<NodeKind>, PathBuf);

/// Lists a tree by path, without node numbers.
pub(crate) fn listing(tree: &Tree) -> BTreeMap<PathBuf, Seen> {
    fn walk(
        tree: &Tree,
        id: NodeId,
        path: PathBuf,
        first: &mut HashMap<NodeId, PathBuf>,
        all: &mut BTreeMap<PathBuf, Seen>,
    ) {
        let node = tree.node(id);
        let alias = first.entry(id).or_insert_with(|| path.clone()).clone();
        let kind = if tree.children(id).is_some() { None } else { Some(node.kind.clone()) };
        all.insert(path.clone(), (node.stat.clone(), node.xattrs.clone(), kind, alias));
        for (name, &child) in tree.children(id).into_iter().flatten() {
            walk(tree, child, path.join(name), first, all);
        }
    }
    let mut all = BTreeMap::new();
    walk(tree, Tree::ROOT, PathBuf::new(), &mut HashMap::new(), &mut all);
    all
}
