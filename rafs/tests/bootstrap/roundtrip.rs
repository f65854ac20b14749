//! What was written is what is read.

use nydus_rafs::tree::Reading;
use nydus_rafs::write::{Options, write};
use nydus_rafs::{Algorithm, Bootstrap, Compressor, Kind, NodeKind, Tree, Version};
use proptest::prelude::*;

use crate::trees::{blobs, listing, options, to_bytes, trees, versions};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_tree_survives_being_written_and_read(tree in trees(), options in versions()) {
        let bytes = to_bytes(&tree, &options);
        let bootstrap = Bootstrap::open(&bytes[..]).expect("own bytes");
        let read = Tree::read(&bootstrap).expect("own bytes");
        prop_assert_eq!(listing(&read), listing(&tree));
        let named = if options.version == Version::V5 { read.len() } else { listing(&tree).len() };
        prop_assert_eq!(bootstrap.inode_count(), named as u64);
        prop_assert_eq!(bootstrap.version(), options.version.number());
        prop_assert_eq!(to_bytes(&read, &options), bytes, "writing is deterministic");
    }

    #[test]
    fn names_are_found_and_links_are_counted(tree in trees(), options in versions()) {
        let bytes = to_bytes(&tree, &options);
        let bootstrap = Bootstrap::open(&bytes[..]).expect("own bytes");
        let reading = Reading::of(&bootstrap).expect("own bytes");
        let mut names = std::collections::HashMap::<_, u32>::new();
        for (&ino, &id) in &reading.nodes {
            let Some(children) = reading.tree.children(id) else { continue };
            for (name, child) in children {
                *names.entry(*child).or_default() += 1;
                let found = bootstrap.lookup(ino, name).expect("own bytes").expect("the name is there");
                prop_assert_eq!(reading.nodes[&found], *child);
                let mut other = name.clone();
                other.push("\u{1}");
                while children.contains_key(&other) {
                    other.push("\u{1}");
                }
                prop_assert_eq!(bootstrap.lookup(ino, &other).expect("own bytes"), None);
            }
        }
        for (&ino, id) in &reading.nodes {
            let attr = bootstrap.attr(ino).expect("own bytes");
            let wanted = match reading.tree.children(*id) {
                Some(children) => 2 + children.values().filter(|id| reading.tree.children(**id).is_some()).count() as u32,
                None => names[id],
            };
            prop_assert_eq!(attr.nlink, wanted);
            prop_assert_eq!(attr.kind == Kind::Directory, reading.tree.children(*id).is_some());
        }
    }

    #[test]
    fn extents_cover_exactly_what_is_asked_for(tree in trees(), options in versions(), from in 0u64..30_000, len in 0u64..30_000) {
        let bytes = to_bytes(&tree, &options);
        let bootstrap = Bootstrap::open(&bytes[..]).expect("own bytes");
        let reading = Reading::of(&bootstrap).expect("own bytes");
        for (&ino, &id) in &reading.nodes {
            let NodeKind::Regular { size, chunks } = &reading.tree.node(id).kind else { continue };
            let mut at = from.min(*size);
            for extent in bootstrap.extents(ino, from..from + len).expect("own bytes") {
                let extent = extent.expect("own bytes");
                prop_assert_eq!(extent.file.start, at);
                prop_assert!(extent.file.start < extent.file.end);
                prop_assert_eq!(extent.file.end - extent.file.start, extent.plain.end - extent.plain.start);
                let chunk = chunks[(at / 4096) as usize];
                prop_assert_eq!((extent.blob, extent.chunk), (chunk.blob, chunk.chunk));
                at = extent.file.end;
            }
            prop_assert_eq!(at, (from + len).min(*size).max(from.min(*size)));
        }
    }
}

#[test]
fn chunk_records_come_back_with_digest_and_crc() {
    let (infos, tables) = blobs();
    let mut tree = Tree::new(Default::default());
    let chunks: Vec<_> =
        tables[1].all().iter().map(|chunk| nydus_rafs::tree::ChunkRef { blob: 1, chunk: chunk.index }).collect();
    let kind = NodeKind::Regular { size: 4096 * chunks.len() as u64, chunks: chunks.into() };
    let file =
        tree.add(nydus_rafs::Node { stat: Default::default(), xattrs: Default::default(), kind, implied: false });
    let NodeKind::Directory(children) = &mut tree.node_mut(Tree::ROOT).kind else { panic!("the root is a directory") };
    children.insert("file".into(), file);
    let bytes = write(&tree, &infos, &tables, &options()).expect("a sound tree");
    let bootstrap = Bootstrap::open(bytes).expect("own bytes");
    assert_eq!(bootstrap.chunks(1).expect("chunks"), tables[1]);
    assert_eq!(bootstrap.chunks(0).expect("chunks").all(), []);
    assert_eq!(bootstrap.blobs(), infos);
}

#[test]
fn an_old_image_that_names_no_digest_has_blake3() {
    let tree = Tree::new(Default::default());
    let options = Options { version: Version::V5, compressor: Compressor::None, ..options() };
    let mut bytes = write::<nydus_rafs::ChunkTable>(&tree, &[], &[], &options).expect("a sound tree");
    bytes[16] &= !0xc;
    let bootstrap = Bootstrap::open(&bytes[..]).expect("an old image");
    assert_eq!((bootstrap.flags().algorithm(), bootstrap.flags().compressor()), (Algorithm::Blake3, Compressor::None));
    bytes[17] |= 0x80;
    assert!(Bootstrap::open(&bytes[..]).is_err(), "a flag that nobody knows");
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let (infos, tables) = blobs();
    let node = |kind| nydus_rafs::Node { stat: Default::default(), xattrs: Default::default(), kind, implied: false };
    let chunk = |blob, chunk| nydus_rafs::tree::ChunkRef { blob, chunk: nydus_rafs::ChunkIndex(chunk) };
    let with = |name: &str, node| {
        let mut tree = Tree::new(Default::default());
        let id = tree.add(node);
        let NodeKind::Directory(children) = &mut tree.node_mut(Tree::ROOT).kind else { panic!("a directory") };
        children.insert(name.into(), id);
        write(&tree, &infos, &tables, &options()).map(|_| ()).map_err(|error| error.to_string())
    };
    let bad = [
        with("..", node(NodeKind::Fifo)),
        with("a/b", node(NodeKind::Fifo)),
        with(&"n".repeat(256), node(NodeKind::Fifo)),
        with("link", node(NodeKind::Symlink("".into()))),
        with("link", node(NodeKind::Symlink("t".repeat(4097).into()))),
        with("file", node(NodeKind::Regular { size: 1, chunks: nydus_rafs::tree::ChunkList::new() })),
        with("file", node(NodeKind::Regular { size: 1, chunks: [chunk(2, 0)].into() })),
        with("file", node(NodeKind::Regular { size: 1, chunks: [chunk(0, 77)].into() })),
        with("x", nydus_rafs::Node { xattrs: [("btrfs.a".into(), vec![])].into(), ..node(NodeKind::Fifo) }),
        with("x", nydus_rafs::Node { xattrs: [("user.a".into(), vec![0; 65536])].into(), ..node(NodeKind::Fifo) }),
    ];
    assert!(bad.iter().all(Result::is_err), "{bad:?}");
    assert_eq!(with("fine", node(NodeKind::Fifo)), Ok(()));
}
