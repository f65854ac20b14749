//! Blobs of the established builder, taken apart and put together again.

use std::io::Cursor;

use nydus_rafs::blob::section::{self, Section};
use nydus_rafs::blob::table::BlobTable;
use nydus_rafs::blob::write::{BlobWriter, Form, Options, Reference, Sealed, StoredChunk};
use nydus_rafs::{Algorithm, BlobInfo, Bootstrap, ChunkTable, Codec, Compressor, Container, Version};

use crate::fixtures::fixtures;

fn table(info: &BlobInfo, blob: &[u8]) -> BlobTable {
    let range = info.table.as_ref().expect("a table").with_header();
    BlobTable::read(info, &blob[range.start as usize..range.end as usize]).expect("a sound table")
}

fn open<'a>(variant: &str, file: &str) -> (Bootstrap<&'a [u8]>, &'a [u8]) {
    let bootstrap = Bootstrap::open(fixtures().get(&format!("out/{variant}/{file}"))).expect("a sound bootstrap");
    let blobs = fixtures().blobs(variant);
    let named = blobs.get(bootstrap.blobs()[0].id.as_str());
    (bootstrap, named.copied().unwrap_or_else(|| blobs.values().next().expect("a blob")))
}

#[test]
fn chunk_tables_agree_with_bootstraps() {
    let variants = [
        ("v6-zstd", "bootstrap"),
        ("v6-lz4_block", "bootstrap"),
        ("v6-none", "bootstrap"),
        ("v6-toc", "bootstrap"),
        ("v6-inline", "image.boot"),
    ];
    for (variant, file) in variants {
        let (bootstrap, blob) = open(variant, file);
        let info = &bootstrap.blobs()[0];
        let named = bootstrap.chunks(0).expect("chunks");
        let mut joined = table(info, blob).with_digests(&named).expect("the same chunks").all().to_vec();
        assert_eq!(joined.len(), info.chunk_count as usize);
        // Tables of version 1 hold no CRC.
        for (joined, named) in joined.iter_mut().zip(named.all()) {
            joined.crc32 = named.crc32;
        }
        assert_eq!(joined, named.all(), "{variant}");
    }
}

#[test]
fn bootstraps_are_found_in_their_blobs() {
    for variant in ["v6-inline", "v5-inline", "merge6/layer1", "merge6/layer2"] {
        let blobs = fixtures().blobs(variant);
        let blob = blobs.iter().find(|(name, _)| !name.ends_with(".image.boot")).expect("a blob").1;
        let found = section::read_bootstrap(&mut Cursor::new(*blob)).expect("a bootstrap");
        assert_eq!(found, fixtures().get(&format!("out/{variant}/image.boot")), "{variant}");
        for cut in [1, 512, 700, blob.len() / 2, blob.len() - 1] {
            assert!(section::read_bootstrap(&mut Cursor::new(&blob[..blob.len() - cut])).is_err());
        }
    }
}

#[test]
fn digest_sections_hold_the_digests_of_the_bootstrap() {
    let (bootstrap, blob) = open("v6-toc", "bootstrap");
    let toc = section::read_toc(&mut Cursor::new(blob)).expect("readable").expect("a table of contents");
    let range = toc.get(Section::Digests).expect("digests").stored.clone();
    let digests: Vec<u8> =
        bootstrap.chunks(0).expect("chunks").all().iter().flat_map(|chunk| chunk.digest.expect("named").0).collect();
    assert_eq!(&blob[range.start as usize..range.end as usize], digests);
}

/// Writes the chunks of a golden blob again and compares the result with the blob.
///
/// Where zstd compresses the chunk table another version of the library gives other bytes; then all up to the
/// table and all sizes that do not depend on it are compared.
fn rewrite(variant: &str, file: &str, form: Form) {
    let (bootstrap, blob) = open(variant, file);
    let info = &bootstrap.blobs()[0];
    let chunks = bootstrap.chunks(0).expect("chunks");
    let version = Version::from_number(bootstrap.version()).expect("5 or 6");
    let options =
        Options { version, aligned: variant == "v5-aligned", ..Options::new(form, info.compressor, info.algorithm) };
    let mut writer = BlobWriter::new(Vec::new(), options);
    let mut in_order = chunks.all().to_vec();
    in_order.sort_by_key(|chunk| chunk.index);
    for chunk in &in_order {
        let bytes = &blob[chunk.stored.start as usize..chunk.stored.end as usize];
        let digest = chunk.digest.expect("a digest");
        let (crc32, plain_len, codec) = (chunk.crc32, chunk.plain_len() as u32, chunk.codec);
        writer.append(StoredChunk { digest, crc32, plain_len, codec, bytes }).expect("memory");
    }
    let sealed = writer.seal().expect("memory");
    assert_eq!(&ChunkTable::new(sealed.chunks().to_vec()), &chunks);
    let written = sealed.info().expect("chunks were written").clone();
    assert_eq!(written.features, info.features, "{variant}");
    let builder_id = sealed.builder_id();
    let finished = sealed.finish(bootstrap.bytes()).expect("memory");
    if finished.out == blob {
        assert_eq!(finished.digest, Algorithm::Sha256.digest(blob));
        if !form.inline() {
            assert_eq!(info.id.digest(), Some(if form == Form::Toc { builder_id } else { finished.digest }));
        }
        assert_eq!(BlobInfo { id: info.id.clone(), prefetch_size: info.prefetch_size, ..written }, *info);
    } else {
        assert_eq!((info.compressor, version), (Compressor::Zstd, Version::V6), "{variant}: others are reproducible");
        let data = chunks.all().last().expect("a chunk").stored.end as usize;
        assert_eq!(
            finished.out[..data + 512 * usize::from(form != Form::Plain)],
            blob[..data + 512 * usize::from(form != Form::Plain)]
        );
        let (ours, theirs) = (table(&written, &finished.out), table(info, blob));
        assert_eq!(ours, theirs, "{variant}");
    }
}

#[test]
fn plain_blobs_are_written_as_the_established_builder_writes_them() {
    rewrite("v6-lz4_block", "bootstrap", Form::Plain);
    rewrite("v6-none", "bootstrap", Form::Plain);
    rewrite("v6-zstd", "bootstrap", Form::Plain);
}

#[test]
fn blobs_of_version_5_are_written_as_the_established_builder_writes_them() {
    for variant in ["v5-lz4_block", "v5-zstd", "v5-aligned", "v5-prefetch", "v5-prefetch-blob"] {
        rewrite(variant, "bootstrap", Form::Plain);
    }
    rewrite("v5-inline", "image.boot", Form::Inline);
}

#[test]
fn inline_blobs_are_written_as_the_established_builder_writes_them() {
    rewrite("v6-inline", "image.boot", Form::Inline);
}

#[test]
fn blobs_with_a_table_of_contents_are_written_as_the_established_builder_writes_them() {
    rewrite("v6-toc", "bootstrap", Form::Toc);
    rewrite("merge6/layer1", "image.boot", Form::InlineToc);
    rewrite("merge6/layer2", "image.boot", Form::InlineToc);
}

#[test]
fn small_chunks_are_batched_as_the_established_builder_batches_them() {
    let (bootstrap, blob) = open("v6-batch", "bootstrap");
    let info = &bootstrap.blobs()[0];
    let theirs = table(info, blob);
    let named = theirs.clone().with_digests(&bootstrap.chunks(0).expect("chunks")).expect("the same chunks");
    let options = Options { batch_size: Some(0x40000), ..Options::new(Form::Plain, info.compressor, info.algorithm) };
    let mut writer = BlobWriter::new(Vec::new(), options);
    for chunk in named.all() {
        let stored = &blob[chunk.stored.start as usize..chunk.stored.end as usize];
        let (digest, crc32) = (chunk.digest.expect("a digest"), chunk.crc32);
        match chunk.codec {
            Codec::Batch { .. } => {
                let plain = nydus_rafs::Verified::decode(chunk, stored).expect("sound").into_bytes();
                writer.append_small(digest, crc32, &plain)
            }
            codec => {
                let plain_len = chunk.plain_len() as u32;
                writer.append(StoredChunk { digest, crc32, plain_len, codec, bytes: stored })
            }
        }
        .expect("memory");
    }
    let sealed = writer.seal().expect("memory");
    let written = sealed.info().expect("chunks were written").clone();
    assert_eq!((written.features, written.plain_size), (info.features, info.plain_size));
    let finished = sealed.finish(&[]).expect("memory");
    // Batches are compressed anew, and zstd's next version gives other lengths; which chunk is where in which batch, and
    // how long that is, must be the same.
    let ours = table(&written, &finished.out);
    let places = |table: &BlobTable| -> Vec<_> {
        let batch = |chunk: &nydus_rafs::Chunk| match chunk.container.as_deref() {
            Some(Container::Batch { batch, .. }) => Some(batch.plain_size),
            _ => None,
        };
        let codec = |codec| if let Codec::Batch { .. } = codec { Some(codec) } else { None };
        table
            .chunks()
            .iter()
            .map(|chunk| (chunk.plain.clone(), codec(chunk.codec), batch(chunk), chunk.crc32))
            .collect()
    };
    assert_eq!(places(&ours), places(&theirs));
}

#[test]
fn tables_of_original_layers_are_written_as_the_established_builder_writes_them() {
    let bootstrap = Bootstrap::open(fixtures().get("out/v6-zran/bootstrap")).expect("a sound bootstrap");
    let info = &bootstrap.blobs()[0];
    let meta = fixtures().blobs("v6-zran")[info.meta_digest.to_string().as_str()];
    let theirs = table(info, meta);
    let named = bootstrap.chunks(0).expect("chunks");
    let joined = theirs.clone().with_digests(&named).expect("the same chunks");
    let mut chunks = joined.all().to_vec();
    for chunk in &mut chunks {
        chunk.stored = named.at(chunk.index, chunk.plain.start).expect("named").stored.clone();
    }
    let reference = Reference {
        id: info.id.clone(),
        stored_size: info.stored_size,
        compressor: info.compressor,
        algorithm: info.algorithm,
        chunks,
        points: theirs.containers().to_vec(),
    };
    let sealed = Sealed::reference(Vec::new(), Form::Toc, reference).expect("memory");
    let written = sealed.info().expect("chunks were written").clone();
    assert_eq!((written.features, written.plain_size), (info.features, info.plain_size));
    let builder_id = sealed.builder_id();
    let finished = sealed.finish(&[]).expect("memory");
    assert_eq!(table(&written, &finished.out), theirs);
    if finished.out == meta {
        assert_eq!(BlobInfo { meta_digest: builder_id, ..written }, *info);
    }
}

#[test]
fn lz4_chunks_are_encoded_as_the_established_builder_encodes_them() {
    let (bootstrap, blob) = open("v6-lz4_block", "bootstrap");
    for chunk in bootstrap.chunks(0).expect("chunks").all() {
        let stored = &blob[chunk.stored.start as usize..chunk.stored.end as usize];
        let plain = nydus_rafs::Verified::decode(chunk, stored).expect("sound").into_bytes();
        let (codec, ours) = nydus_rafs::codec::encode(Compressor::Lz4Block, &plain);
        assert_eq!((codec, &*ours), (chunk.codec, stored));
    }
}
