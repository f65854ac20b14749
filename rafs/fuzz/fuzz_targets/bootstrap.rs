//! Any bytes as a bootstrap: all of it is read, and what can be read can be written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nydus_rafs::tree::Reading;
use nydus_rafs::write::{Options, write};
use nydus_rafs::{Bootstrap, ChunkTable, Flags};

fuzz_target!(|bytes: &[u8]| {
    let Ok(bootstrap) = Bootstrap::open(bytes) else { return };
    let chunks: Result<Vec<ChunkTable>, _> =
        (0..bootstrap.blobs().len()).map(|blob| bootstrap.chunks(blob as u16)).collect();
    let prefetch = bootstrap.prefetch().unwrap_or_default();
    let Ok(reading) = Reading::of(&bootstrap) else { return };
    for (&ino, &id) in &reading.nodes {
        for name in reading.tree.children(id).into_iter().flat_map(|children| children.keys()) {
            let _ = bootstrap.lookup(ino, name);
        }
    }
    if let Ok(chunks) = chunks {
        let options = Options {
            chunk_size: bootstrap.chunk_size(),
            tarfs: bootstrap.flags().has(Flags::TARFS),
            prefetch: prefetch.iter().filter_map(|ino| reading.nodes.get(ino).copied()).collect(),
            ..Options::default()
        };
        let _ = write(&reading.tree, bootstrap.blobs(), &chunks, &options);
    }
});
