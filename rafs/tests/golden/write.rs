//! Bootstraps of the established builder, read into a tree and written again, byte for byte.

use nydus_rafs::tree::Reading;
use nydus_rafs::write::{Options, write};
use nydus_rafs::{Bootstrap, ChunkTable, Flags, Ino, Version};

use crate::fixtures::fixtures;

/// Sorts the extended attributes of every inode: the established builder leaves them in the order of a
/// hash map, which is another one in every run.
fn sort_xattrs(bootstrap: &mut [u8]) {
    if bootstrap.starts_with(b"SFAR") { sort_xattrs_v5(bootstrap) } else { sort_xattrs_v6(bootstrap) }
}

fn sort_xattrs_v5(bootstrap: &mut [u8]) {
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes")) as usize;
    for index in 0..word(bootstrap, 56) {
        let at = 8 * word(bootstrap, 8192 + 4 * index);
        let text = |field: usize| usize::from(u16::from_le_bytes([bootstrap[at + field], bootstrap[at + field + 1]]));
        let table = at + 128 + text(100).next_multiple_of(8) + text(102).next_multiple_of(8);
        if word(bootstrap, at + 80) & 4 == 0 {
            continue;
        }
        let len = word(bootstrap, table);
        let area = &mut bootstrap[table + 8..table + 8 + len];
        let mut pairs: Vec<Vec<u8>> = Vec::new();
        let mut rest = &area[..];
        while !rest.is_empty() {
            let (pair, later) = rest.split_at(4 + word(rest, 0));
            pairs.push(pair.to_vec());
            rest = later;
        }
        pairs.sort_by_key(|pair| pair[4..].split(|&byte| byte == 0).next().expect("a name").to_vec());
        area.copy_from_slice(&pairs.concat());
    }
}

fn sort_xattrs_v6(bootstrap: &mut [u8]) {
    let opened = Bootstrap::open(&bootstrap[..]).expect("a sound bootstrap");
    let meta = u64::from(u32::from_le_bytes(bootstrap[1064..1068].try_into().expect("4 bytes"))) << bootstrap[1036];
    let inodes: Vec<Ino> = Reading::of(&opened).expect("a tree").nodes.into_keys().collect();
    for ino in inodes {
        let at = (meta + 32 * ino.0) as usize;
        let count = usize::from(u16::from_le_bytes([bootstrap[at + 2], bootstrap[at + 3]]));
        if count > 2 {
            let area = &mut bootstrap[at + 64 + 12..at + 64 + 12 + 4 * (count - 1)];
            let mut entries: Vec<Vec<u8>> = Vec::new();
            let mut rest = &area[..];
            while !rest.is_empty() {
                let len = 4 + usize::from(rest[0]) + usize::from(u16::from_le_bytes([rest[2], rest[3]]));
                let (entry, later) = rest.split_at(len.next_multiple_of(4));
                entries.push(entry.to_vec());
                rest = later;
            }
            let key = |entry: &Vec<u8>| {
                let prefix =
                    ["", "user.", "system.posix_acl_access", "system.posix_acl_default", "trusted.", "", "security."];
                [prefix[usize::from(entry[1])].as_bytes(), &entry[4..4 + usize::from(entry[0])]].concat()
            };
            entries.sort_by_key(key);
            area.copy_from_slice(&entries.concat());
        }
    }
}

fn rewrite(path: &str) {
    let mut wanted = fixtures().get(path).to_vec();
    sort_xattrs(&mut wanted);
    let bootstrap = Bootstrap::open(&wanted[..]).expect("a sound bootstrap");
    let reading = Reading::of(&bootstrap).expect("a tree");
    let chunks: Vec<ChunkTable> =
        (0..bootstrap.blobs().len()).map(|blob| bootstrap.chunks(blob as u16).expect("chunks")).collect();
    let flags = bootstrap.flags();
    let options = Options {
        version: Version::from_number(bootstrap.version()).expect("5 or 6"),
        chunk_size: bootstrap.chunk_size(),
        compressor: flags.compressor(),
        algorithm: flags.algorithm(),
        explicit_ids: flags.has(Flags::EXPLICIT_IDS),
        claim_xattrs: flags.has(Flags::HAS_XATTR),
        tarfs: flags.has(Flags::TARFS),
        prefetch: bootstrap.prefetch().expect("nids").iter().map(|ino| reading.nodes[ino]).collect(),
    };
    let written = write(&reading.tree, bootstrap.blobs(), &chunks, &options).expect("a tree that was written before");
    assert_eq!(written.len(), wanted.len(), "{path}");
    let differences: Vec<String> = (0..wanted.len())
        .filter(|&at| wanted[at] != written[at])
        .map(|at| format!("{at:#x}: {:#x} for {:#x}", written[at], wanted[at]))
        .take(20)
        .collect();
    assert!(differences.is_empty(), "{path}: {differences:?}");
}

macro_rules! golden {
    ($($name:ident: $path:literal;)*) => { $(#[test] fn $name() { rewrite($path); })* };
}

golden! {
    zstd: "out/v6-zstd/bootstrap";
    lz4_block: "out/v6-lz4_block/bootstrap";
    uncompressed: "out/v6-none/bootstrap";
    with_a_prefetch_table: "out/v6-prefetch/bootstrap";
    with_everything_to_prefetch: "out/v6-prefetch-root/bootstrap";
    from_a_tar: "out/v6-tar/bootstrap";
    with_thousands_of_empty_files: "out/v6-meta-only/bootstrap";
    without_anything: "out/v6-empty/bootstrap";
    merged_of_two_layers: "out/merge6/bootstrap";
    of_a_lower_layer: "out/merge6/layer1/image.boot";
    of_an_upper_layer: "out/merge6/layer2/image.boot";
    with_a_table_of_contents: "out/v6-toc/bootstrap";
    on_a_parent: "out/parent-oci/bootstrap";
    with_a_chunk_dictionary: "out/chunk-dict/bootstrap";
    inlined: "out/v6-inline/image.boot";
    v5_zstd: "out/v5-zstd/bootstrap";
    v5_lz4_block: "out/v5-lz4_block/bootstrap";
    v5_with_aligned_chunks: "out/v5-aligned/bootstrap";
    v5_with_a_prefetch_table: "out/v5-prefetch/bootstrap";
    v5_with_a_prefetch_region: "out/v5-prefetch-blob/bootstrap";
    v5_inlined: "out/v5-inline/image.boot";
}
