//! `nydus-image create --blob-cache-dir`: a blob in the form in which a daemon's cache holds it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use nydus_rafs::{BlobInfo, Chunk, Codec};

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

/// Spreads the blob in `stored`, whose chunks are not compressed, over `<id>.blob.data`, and keeps its chunk table in
/// `<id>.blob.meta`.
pub(super) fn keep(dir: &Path, stored: &File, info: &BlobInfo, chunks: &[Chunk]) -> anyhow::Result<()> {
    let named = |suffix: &str| dir.join(format!("{}.blob.{suffix}", info.id));
    let (data_path, meta_path) = (named("data"), named("meta"));
    let context = || format!("writing {}", data_path.display());
    let data = tempfile::NamedTempFile::new_in(dir).with_context(context)?;
    data.as_file().set_len(info.plain_size).with_context(context)?;
    let mut buffer = Vec::new();
    for chunk in chunks {
        if chunk.codec != Codec::Plain || chunk.encrypted {
            bail!("a cache holds plain chunks, and chunk {} is not", chunk.index.0);
        }
        let (mut from, mut to) = (chunk.stored.start, chunk.plain.start);
        while from < chunk.stored.end {
            let len = PIECE.min(chunk.stored.end - from);
            buffer.resize(usize::try_from(len).expect("1 MiB at most"), 0);
            stored.read_exact_at(&mut buffer, from).with_context(context)?;
            data.as_file().write_all_at(&buffer, to).with_context(context)?;
            (from, to) = (from + len, to + len);
        }
    }
    let Some(table) = &info.table else { bail!("a blob without a chunk table has no place in a cache") };
    let mut meta = vec![0; usize::try_from(table.stored.end - table.stored.start).context("the chunk table")?];
    stored.read_exact_at(&mut meta, table.stored.start)?;
    meta.resize(meta.len().next_multiple_of(4096), 0);
    let header_at = meta.len();
    meta.resize(header_at + 4096, 0);
    stored.read_exact_at(&mut meta[header_at..], table.stored.end)?;
    data.persist(&data_path).map_err(|error| error.error).with_context(context)?;
    super::output::write_whole(&meta_path, &meta)
}
