//! `nydus-image stat`: how many files and chunks images have, and how much of one a base image holds already.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nydus_rafs::{Bootstrap, ChunkTable, Digest, Kind, NodeKind, Tree};
use serde::Serialize;

use super::open;

/// Plain addresses of chunks are multiples of this.
const PAGE: u64 = 4096;

/// Chunks by digest and number of plain bytes.
type Known = HashSet<(Digest, u64)>;

/// What images hold.
#[derive(Debug, Default, Serialize)]
pub struct Statistics {
    dedup_enabled: bool,
    target_enabled: bool,
    base_image: Counts,
    target_image: Counts,
}

/// What one image, or several together, hold. Names and meanings are those that callers know.
#[derive(Debug, Default, Serialize)]
struct Counts {
    dirs: u64,
    files: u64,
    symlinks: u64,
    chunks: u64,
    file_size: u64,
    comp_size: u64,
    uncomp_size: u64,
    padding_size: u64,
    /// How many chunks there would be with chunks of 4 KiB, 8 KiB and so on to 1 MiB.
    chunk_sizes: [u64; 9],
    /// How many files have a size of so many bits.
    file_sizes: Vec<u64>,
    dedup_chunks: u64,
    dedup_comp_size: u64,
    dedup_uncomp_size: u64,
    own_chunks: u64,
    own_comp_size: u64,
    own_uncomp_size: u64,
    ref_chunks: u64,
    ref_comp_size: u64,
    ref_uncomp_size: u64,
}

/// Counts what is in the bootstraps `base`, and in `target` if there is one.
///
/// # Errors
///
/// If a bootstrap cannot be read.
pub fn stat(base: &[PathBuf], target: Option<&Path>) -> anyhow::Result<Statistics> {
    let (nothing, mut known) = (Known::new(), Known::new());
    let mut statistics = Statistics { base_image: Counts::new(), target_image: Counts::new(), ..Statistics::default() };
    for path in base {
        let context = || format!("reading {}", path.display());
        statistics.base_image.add(&open(path)?, &nothing, &mut known).with_context(context)?;
    }
    if let Some(path) = target {
        (statistics.dedup_enabled, statistics.target_enabled) = (true, true);
        let image = open(path)?;
        statistics
            .target_image
            .add(&image, &known, &mut Known::new())
            .with_context(|| format!("reading {}", path.display()))?;
    }
    Ok(statistics)
}

impl Counts {
    fn new() -> Self {
        Self { file_sizes: vec![0; 45], ..Self::default() }
    }

    /// Counts an image: its chunks are those of `base`, or its own once each.
    fn add(&mut self, image: &Bootstrap<Vec<u8>>, base: &Known, own: &mut Known) -> anyhow::Result<()> {
        let tree = Tree::read(image)?;
        let tables: Vec<ChunkTable> =
            (0..image.blobs().len()).map(|blob| image.chunks(blob as u16)).collect::<Result<_, _>>()?;
        let by_index: Vec<HashMap<_, _>> =
            tables.iter().map(|table| table.all().iter().map(|chunk| (chunk.index, chunk)).collect()).collect();
        let mut open = vec![Tree::ROOT];
        let mut counted = HashSet::new();
        while let Some(id) = open.pop() {
            match &tree.node(id).kind {
                NodeKind::Directory(children) => {
                    self.dirs += 1;
                    open.extend(children.values().copied());
                }
                NodeKind::Regular { size, chunks } => {
                    self.files += 1;
                    // Names of one file share its bytes.
                    if !counted.insert(id) {
                        continue;
                    }
                    self.file(*size);
                    for chunk in chunks {
                        let of_blob = by_index.get(usize::from(chunk.blob)).context("a file refers to no blob")?;
                        let chunk = of_blob.get(&chunk.chunk).context("a file refers to no chunk")?;
                        let (stored, plain) = (chunk.stored.end - chunk.stored.start, chunk.plain_len());
                        self.chunk(stored, plain);
                        let name = (chunk.digest.unwrap_or(Digest([0; 32])), plain);
                        if base.contains(&name) {
                            self.dedup_chunks += 1;
                            self.dedup_comp_size += stored;
                            self.dedup_uncomp_size += plain;
                        } else if own.insert(name) {
                            self.own_chunks += 1;
                            self.own_comp_size += stored;
                            self.own_uncomp_size += plain;
                        }
                    }
                }
                other if other.kind() == Kind::Symlink => self.symlinks += 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn file(&mut self, size: u64) {
        self.file_size += size;
        let bits = (u64::BITS - size.leading_zeros()) as usize;
        if let Some(count) = self.file_sizes.get_mut(bits) {
            *count += 1;
        }
        for (shift, count) in self.chunk_sizes.iter_mut().enumerate() {
            *count += size.div_ceil(PAGE << shift);
        }
    }

    fn chunk(&mut self, stored: u64, plain: u64) {
        self.chunks += 1;
        self.comp_size += stored;
        self.uncomp_size += plain.next_multiple_of(PAGE);
        self.padding_size += plain.next_multiple_of(PAGE) - plain;
    }

    fn print(&self, title: &str, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "\n{title}:\n")?;
        let lines = [
            ("Directories:", self.dirs),
            ("Files:", self.files),
            ("Symlinks:", self.symlinks),
            ("Chunks:", self.chunks),
            ("File Size:", self.file_size),
            ("Padding Size:", self.padding_size),
            ("Uncompressed Size:", self.uncomp_size),
            ("Compressed Size:", self.comp_size),
            ("Own Chunks:", self.own_chunks),
            ("Shared Chunks:", self.dedup_chunks),
        ];
        for (name, value) in lines {
            writeln!(out, "{name:<24}{value}")?;
        }
        writeln!(out, "\nFile Size Bits:\t\tFile Count:")?;
        for (bits, count) in self.file_sizes.iter().enumerate() {
            writeln!(out, "{bits}:\t\t\t{count}")?;
        }
        writeln!(out, "\nChunk Size:\t\tChunk Count:")?;
        for (shift, count) in self.chunk_sizes.iter().enumerate() {
            writeln!(out, "{}K:\t\t\t{count}", 4 << shift)?;
        }
        Ok(())
    }
}

impl Statistics {
    /// Prints what was counted for people.
    ///
    /// # Errors
    ///
    /// If `out` cannot be written.
    pub fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        self.base_image.print("Base Image Statistics", out)?;
        if self.target_enabled {
            self.target_image.print("Target Image Statistics", out)?;
        }
        Ok(())
    }
}
