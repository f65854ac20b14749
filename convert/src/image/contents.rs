//! What the files of an image hold, read from its blobs.

use std::io::Write;
use std::ops::Range;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use nydus_backend::{Config, Route, RouteOptions, Urgency};
use nydus_rafs::blob::format::features;
use nydus_rafs::blob::table::BlobTable;
use nydus_rafs::verified::Decoder;
use nydus_rafs::{BlobId, BlobInfo, Bootstrap, ChunkTable, Extent, Ino};

/// An image with its blobs at hand.
pub(super) struct Contents {
    pub(super) image: Bootstrap<Vec<u8>>,
    route: Route,
    runtime: tokio::runtime::Runtime,
    /// The chunks of each blob.
    tables: Vec<ChunkTable>,
    /// The stored bytes that were fetched last: small files share them.
    last: Option<Fetched>,
}

struct Fetched {
    blob: u16,
    stored: Range<u64>,
    bytes: Bytes,
    decoder: Decoder,
}

impl Contents {
    /// Reads the chunk tables that the bootstrap cannot do without.
    pub(super) fn open(image: Bootstrap<Vec<u8>>, backend: &Config) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let route = {
            let _inside = runtime.enter();
            Route::open(backend, RouteOptions::default())?
        };
        let mut contents = Self { image, route, runtime, tables: Vec::new(), last: None };
        for index in 0..contents.image.blobs().len() {
            let index = u16::try_from(index).context("too many blobs")?;
            let table = contents.table(index).with_context(|| format!("reading the chunks of blob number {index}"))?;
            contents.tables.push(table);
        }
        Ok(contents)
    }

    fn table(&self, index: u16) -> anyhow::Result<ChunkTable> {
        let info: &BlobInfo = &self.image.blobs()[usize::from(index)];
        let named = self.image.chunks(index)?;
        let location = match &info.table {
            Some(location) if info.has(features::CHUNK_INFO_V2) => location,
            _ => return Ok(named),
        };
        let stored = self.read(&info.table_object(), location.with_header())?;
        Ok(BlobTable::read(info, &stored)?.with_digests(&named)?)
    }

    fn read(&self, blob: &BlobId, stored: Range<u64>) -> anyhow::Result<Bytes> {
        Ok(self.runtime.block_on(self.route.read(blob, stored, Urgency::Demand))?)
    }

    /// Writes all bytes of a file to `out`; each chunk is compared with its digest, where it has one.
    pub(super) fn copy(&mut self, ino: Ino, out: &mut impl Write) -> anyhow::Result<()> {
        let extents: Vec<Extent> = self.image.extents(ino, 0..u64::MAX)?.collect::<Result<_, _>>()?;
        for extent in extents {
            let bytes = self.chunk(&extent)?;
            out.write_all(&bytes)?;
        }
        Ok(())
    }

    fn chunk(&mut self, extent: &Extent) -> anyhow::Result<Vec<u8>> {
        let table = &self.tables[usize::from(extent.blob)];
        let Some(chunk) = table.at(extent.chunk, extent.plain.start) else {
            bail!("blob number {} has no chunk {}", extent.blob, extent.chunk.0);
        };
        let fetched = match self.last.take().filter(|last| last.blob == extent.blob && last.stored == chunk.stored) {
            Some(fetched) => fetched,
            None => {
                let id = &self.image.blobs()[usize::from(extent.blob)].id;
                let stored = chunk.stored.clone();
                let bytes = self.read(id, stored.clone())?;
                Fetched { blob: extent.blob, stored, bytes, decoder: Decoder::default() }
            }
        };
        let fetched = self.last.insert(fetched);
        let verified = match chunk.digest {
            Some(_) => fetched.decoder.decode(chunk, &fetched.bytes)?,
            None => fetched.decoder.trusting(chunk, &fetched.bytes)?,
        };
        Ok(verified.into_bytes())
    }
}
