//! `nydus-image create --blob-cache-dir`: a blob in the form in which a daemon's cache holds it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use nydus_rafs::blob::table::BlobTable;
use nydus_rafs::verified::Decoder;
use nydus_rafs::{BlobInfo, Chunk, ChunkTable, codec};

/// Tables and headers begin at multiples of this.
const BLOCK: usize = 4096;

/// Spreads the chunks of a blob over `<id>.blob.data`, at their plain addresses, and keeps its chunk table in
/// `<id>.blob.meta`. The chunks lie in `data`, the table in `object`; the same file, unless the blob is an original layer.
pub(super) fn keep(dir: &Path, data: &File, object: &File, info: &BlobInfo, chunks: &[Chunk]) -> anyhow::Result<()> {
    let named = |suffix: &str| dir.join(format!("{}.blob.{suffix}", info.id));
    let (data_path, meta_path) = (named("data"), named("meta"));
    let context = || format!("writing {}", data_path.display());
    let Some(location) = &info.table else { bail!("a blob without a chunk table has no place in a cache") };
    let range = location.with_header();
    let mut stored = vec![0; usize::try_from(range.end - range.start).context("the chunk table")?];
    object.read_exact_at(&mut stored, range.start).context("reading the chunk table")?;

    let table = BlobTable::read(info, &stored)?.with_digests(&ChunkTable::new(chunks.to_vec()))?;
    let plain = tempfile::NamedTempFile::new_in(dir).with_context(context)?;
    plain.as_file().set_len(info.plain_size).with_context(context)?;
    let mut decoder = Decoder::default();
    let mut bytes = Vec::new();
    for chunk in table.all() {
        bytes.resize(usize::try_from(chunk.stored.end - chunk.stored.start).context("a chunk")?, 0);
        data.read_exact_at(&mut bytes, chunk.stored.start)
            .with_context(|| format!("reading chunk {}", chunk.index.0))?;
        let chunk_plain = decoder.decode(chunk, &bytes)?;
        plain.as_file().write_all_at(chunk_plain.bytes(), chunk.plain.start).with_context(context)?;
    }

    let (entries, header) = stored.split_at(usize::try_from(location.stored.end - location.stored.start)?);
    let size = usize::try_from(location.plain_size).context("the chunk table")?;
    let mut meta = codec::decode(location.compressor.codec(), entries, size)?;
    meta.resize(meta.len().next_multiple_of(BLOCK), 0);
    meta.extend_from_slice(header);
    plain.persist(&data_path).map_err(|error| error.error).with_context(context)?;
    super::output::write_whole(&meta_path, &meta[..])
}
