//! `nydus-image create`: a directory or tar to a blob and a bootstrap.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use nydus_rafs::blob::write::{BlobWriter, Form};
use nydus_rafs::{Algorithm, BlobId, BlobInfo};

use super::report::{Report, Trace};
use crate::bootstrap::{self, Blob, Style};
use crate::layer::stream::{self, Packing};
use crate::layer::{Layer, Rules};
use crate::pack::{Body, Packer, Pool, Recipe};
use crate::source::directory::{self, Whiteouts};

/// What to make an image from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A directory.
    Directory(Whiteouts),
    /// A tar, compressed or not.
    Tar,
}

/// Where the bootstrap goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BootstrapPlace {
    /// Into the blob.
    Inline,
    /// Into this file.
    File(PathBuf),
    /// Into the directory of the blobs, named by its digest.
    Directory,
}

/// Where the blob goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlobPlace {
    /// Into this file, which may be a pipe.
    File(PathBuf),
    /// Into this directory, named by its id.
    Directory(PathBuf),
    /// Nowhere: only its table and digests matter.
    Nowhere,
}

/// What to make, and how.
#[derive(Debug, Clone)]
pub struct Request {
    /// The kind of source.
    pub source: Source,
    /// The source.
    pub path: PathBuf,
    /// Where the blob goes.
    pub blob: BlobPlace,
    /// Where the bootstrap goes.
    pub bootstrap: BootstrapPlace,
    /// Whether the blob ends with a table of contents.
    pub toc: bool,
    /// The blob's id, if it shall not be its digest.
    pub blob_id: Option<BlobId>,
    /// How chunks are made.
    pub recipe: Recipe,
    /// What is fetched first.
    pub prefetch: Vec<PathBuf>,
    /// Whether that is written into the bootstrap.
    pub prefetch_table: bool,
    /// Whether owners are left out.
    pub repeatable: bool,
}

impl Request {
    fn form(&self) -> Form {
        match (self.bootstrap == BootstrapPlace::Inline, self.toc) {
            (true, true) => Form::InlineToc,
            (true, false) => Form::Inline,
            (false, true) => Form::Toc,
            (false, false) => Form::Plain,
        }
    }
}

/// Makes an image.
///
/// # Errors
///
/// If the source cannot be read or the result cannot be written.
pub fn create(request: &Request) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let mut trace = Trace::default();
    let (out, place) = open_blob(&request.blob)?;
    let pool = Pool::for_this_machine().context("starting worker threads")?;
    let packer = Packer::new(&pool, request.recipe, request.form(), BufWriter::with_capacity(256 << 10, out));
    let (mut layer, _, blob) = read(request, packer)?;
    layer.mark_implied();
    trace.took("build_tree", begun.elapsed());

    let writing = Instant::now();
    let sealed = blob.seal().context("writing the blob")?;
    let id = request.blob_id.clone().unwrap_or_else(|| sealed.builder_id().into());
    let inline = request.bootstrap == BootstrapPlace::Inline;
    let info =
        sealed.info().map(|info| if inline { info.clone() } else { BlobInfo { id: id.clone(), ..info.clone() } });
    let chunks = sealed.chunks().to_vec();
    let blobs: Vec<Blob<'_>> = info.iter().map(|info| Blob { info: info.clone(), chunks: &chunks }).collect();
    let prefetch: &[PathBuf] = if request.prefetch_table { &request.prefetch } else { &[] };
    let style = Style { repeatable: request.repeatable, merged: false };
    let boot = bootstrap::write(&layer.tree, &blobs, request.recipe, prefetch, style)?;
    trace.took("dump_bootstrap", writing.elapsed());
    let finished = sealed.finish(&boot).context("writing the blob")?;
    let id = if inline { finished.builder_id.into() } else { id };
    let out = finished.out.into_inner().map_err(io::IntoInnerError::into_error).context("writing the blob")?;
    let wrote = finished.size > 0;
    keep_blob(out, place, &id, wrote)?;
    let bootstrap_path = match &request.bootstrap {
        BootstrapPlace::Inline => None,
        BootstrapPlace::File(path) => Some(path.clone()),
        BootstrapPlace::Directory => {
            let BlobPlace::Directory(dir) = &request.blob else {
                bail!("the bootstrap needs --bootstrap or --blob-dir")
            };
            Some(dir.join(Algorithm::Sha256.digest(&boot).to_string()))
        }
    };
    if let Some(path) = &bootstrap_path {
        write_whole(path, &boot)?;
    }
    trace.took("total_build", begun.elapsed());
    let size: u64 = chunks.iter().map(|chunk| chunk.plain.end - chunk.plain.start).sum();
    trace.registered_events.insert("blob_uncompressed_size", size.into());
    let blobs: Vec<BlobId> = info.map(|_| id).into_iter().collect();
    Ok(Report::new(bootstrap_path.as_deref(), &blobs, 6, request.recipe.compressor, trace))
}

fn read<W: Write>(request: &Request, packer: Packer<'_, W>) -> anyhow::Result<(Layer, Vec<Body>, BlobWriter<W>)> {
    let chunk_size = request.recipe.chunk_size;
    let path = &request.path;
    match request.source {
        Source::Directory(whiteouts) => Ok(directory::pack(path, whiteouts, &request.prefetch, chunk_size, packer)?),
        Source::Tar => {
            let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
            let mut input = BufReader::with_capacity(256 << 10, file);
            let packing = Packing::of(input.fill_buf().with_context(|| format!("reading {}", path.display()))?);
            let tar = packing.open(input).context("opening the archive")?;
            stream::pack_tar(tar, Rules::Alone, chunk_size, packer)
                .with_context(|| format!("unpacking {}", path.display()))
        }
    }
}

/// An open blob.
enum Output {
    /// A file under its own name, or a pipe.
    Named(File),
    /// A file of the blob directory that gets its name at the end.
    Unnamed(tempfile::NamedTempFile),
    Nowhere,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Named(file) => file.write(bytes),
            Self::Unnamed(file) => file.write(bytes),
            Self::Nowhere => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Named(file) => file.flush(),
            Self::Unnamed(file) => file.flush(),
            Self::Nowhere => Ok(()),
        }
    }
}

fn open_blob(place: &BlobPlace) -> anyhow::Result<(Output, Option<&Path>)> {
    match place {
        BlobPlace::File(path) => {
            // A pipe can be neither truncated nor sought; whoever made it reads what we write.
            let pipe = fs::metadata(path).is_ok_and(|metadata| !metadata.is_file());
            let file = File::options().write(true).create(!pipe).truncate(!pipe).open(path);
            Ok((Output::Named(file.with_context(|| format!("opening {}", path.display()))?), None))
        }
        BlobPlace::Directory(dir) => {
            let file = tempfile::Builder::new().prefix(".blob-").tempfile_in(dir);
            Ok((Output::Unnamed(file.with_context(|| format!("making a file in {}", dir.display()))?), Some(dir)))
        }
        BlobPlace::Nowhere => Ok((Output::Nowhere, None)),
    }
}

fn keep_blob(out: Output, dir: Option<&Path>, id: &BlobId, wrote: bool) -> anyhow::Result<()> {
    if let (Output::Unnamed(file), Some(dir), true) = (out, dir, wrote) {
        let path = dir.join(id.as_str());
        file.persist(&path).map_err(|error| error.error).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Writes a file so that under its name there is all of it or what was there before.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let context = || format!("writing {}", path.display());
    if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return File::options().write(true).open(path).and_then(|mut file| file.write_all(bytes)).with_context(context);
    }
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    let mut file = tempfile::Builder::new().permissions(permissions).tempfile_in(dir).with_context(context)?;
    file.write_all(bytes).with_context(context)?;
    file.persist(path).map_err(|error| error.error).with_context(context)?;
    Ok(())
}

#[cfg(test)]
mod tests;
