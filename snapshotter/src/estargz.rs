//! eStargz layers, read lazily where they lie in the registry.
//!
//! Such a layer ends in a table of contents of its own. When containerd prepares one, footer and table are read with two or
//! three requests, by the way that nydusd will read the chunks, and `nydus-image` makes a bootstrap of the table and the
//! bootstrap of the layers below. That is a process of its own: a table is a stranger, and what it costs ends with the
//! process. Every layer's bootstrap is that of the image up to it, so the uppermost is all that nydusd needs.
//!
//! Only tables are believed that the layer's annotation in the manifest names by their digest; the table names the digests of
//! all chunks. A layer that cannot be served is unpacked like any other, and one line says why.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nydus_backend::{Route, RouteOptions, SourceError, Urgency};
use nydus_rafs::estargz::{self, EstargzError, FOOTER_SIZE};
use nydusd::config::{ConfigError, Template};

use crate::configure::{self, ConfigureError};
use crate::keychain::Keychain;
use crate::labels::{Labels, Table};

/// How long a layer may take until it is unpacked instead: a call of containerd waits.
const LIMIT: Duration = Duration::from_secs(10);
/// How long one request may take of that.
const READ_LIMIT: Duration = Duration::from_secs(6);
/// What is read with the footer, in the hope that the table is in it.
const TAIL: u64 = 256 << 10;

/// Why a layer is unpacked instead.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Nobody can make bootstraps.
    #[error("the program nydus-image is neither beside this one nor on PATH (name it with --nydus-image)")]
    NoBuilder,
    /// The registry of the image is not known.
    #[error(transparent)]
    Configure(#[from] ConfigureError),
    /// The template does not say where layers come from.
    #[error(transparent)]
    Template(#[from] ConfigError),
    /// Its end cannot be read.
    #[error("its table of contents cannot be read")]
    Source(#[from] SourceError),
    /// Its table cannot be used.
    #[error(transparent)]
    Table(#[from] EstargzError),
    /// The table describes what cannot be served.
    #[error("{0}")]
    Builder(String),
    /// It took too long.
    #[error("its table of contents was not there after {} s", LIMIT.as_secs())]
    Late,
    /// A file cannot be written.
    #[error("writing {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Makes bootstraps of tables of contents.
#[derive(Debug, Clone)]
pub struct Indexer {
    /// The program that makes them, if there is one.
    pub builder: Option<PathBuf>,
    /// How nydusd reads layers.
    pub template: Template,
    /// Where blobs are cached; the template needs it to be complete.
    pub work_dir: PathBuf,
    /// Whether registries' certificates go unchecked.
    pub skip_verify: bool,
    /// What kubelet pulled with.
    pub keychain: Keychain,
    /// A directory for files that live as long as a call; on the file system of the snapshots.
    pub scratch: PathBuf,
}

/// A bootstrap that goes with this value, unless it is taken.
#[derive(Debug)]
pub struct Fresh {
    directory: PathBuf,
}

impl Fresh {
    fn new(scratch: &Path) -> Result<Self, IndexError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = scratch.join(name);
        fs::create_dir_all(&directory).map_err(|source| IndexError::Io { path: directory.clone(), source })?;
        Ok(Self { directory })
    }

    fn bootstrap(&self) -> PathBuf {
        self.directory.join("image.boot")
    }

    /// Moves the bootstrap to `place`.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn put(&self, place: &Path) -> io::Result<()> {
        // A kill of the machine must not leave half a bootstrap under its name.
        fs::File::open(self.bootstrap())?.sync_all()?;
        fs::rename(self.bootstrap(), place)
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            tracing::debug!(path = %self.directory.display(), %error, "something unused is still there");
        }
    }
}

impl Indexer {
    /// Makes the bootstrap of the layer with this `table`, laid on the image whose bootstrap is `below`.
    ///
    /// # Errors
    /// When it cannot be served; then it is to be unpacked.
    pub async fn index(&self, table: &Table, labels: &Labels, below: Option<PathBuf>) -> Result<Fresh, IndexError> {
        let work = async {
            let builder = self.builder.as_ref().ok_or(IndexError::NoBuilder)?;
            let (json, data_size) = self.fetch(table, labels).await?;
            let fresh = Fresh::new(&self.scratch)?;
            let toc = fresh.directory.join(estargz::TOC_NAME);
            tokio::fs::write(&toc, json).await.map_err(|source| IndexError::Io { path: toc.clone(), source })?;
            let mut command = tokio::process::Command::new(builder);
            command.args(["create", "--log-level", "warn", "--type", "estargztoc-ref", "--blob-id", &table.layer]);
            command.arg("--blob-data-size").arg(format!("{data_size:x}")).arg("--bootstrap").arg(fresh.bootstrap());
            command.arg("-D").arg(&fresh.directory);
            if let Some(below) = below {
                command.arg("--parent-bootstrap").arg(below);
            }
            command.arg(&toc).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
            let ended = command.output().await.map_err(|source| IndexError::Io { path: builder.clone(), source })?;
            if ended.status.success() { Ok(fresh) } else { Err(IndexError::Builder(said(&ended.stderr))) }
        };
        tokio::time::timeout(LIMIT, work).await.unwrap_or(Err(IndexError::Late))
    }

    /// Reads the table of contents, and tells where the layer's data ends.
    async fn fetch(&self, table: &Table, labels: &Labels) -> Result<(Vec<u8>, u64), IndexError> {
        let filled =
            configure::fill(self.template.clone(), 0, labels, &self.work_dir, self.skip_verify, &self.keychain, None)?;
        let config = nydusd::config::parse(&filled.text)?.config;
        let options = RouteOptions { deadline: READ_LIMIT, ..RouteOptions::default() };
        let route = Route::open(&config.backend, options)?;
        let blob = table.layer.parse().expect("64 hexadecimal digits name a blob");
        let size = route.size(&blob).await?;
        let tail_at = size.saturating_sub(TAIL);
        let tail = route.read(&blob, tail_at..size, Urgency::Demand).await?;
        let footer_at = tail.len().saturating_sub(usize::try_from(FOOTER_SIZE).expect("51"));
        let toc_at = estargz::toc_position(&tail[footer_at..], size)?;
        let member = match toc_at.checked_sub(tail_at) {
            Some(at) => tail.slice(usize::try_from(at).expect("it is in the tail")..footer_at),
            None => route.read(&blob, toc_at..size - FOOTER_SIZE, Urgency::Demand).await?,
        };
        let digest = table.toc;
        let json = tokio::task::spawn_blocking(move || estargz::toc(&member, digest)).await;
        Ok((json.unwrap_or(Err(EstargzError::Member("its decoder failed")))?, toc_at))
    }
}

/// What a program said of its failure, in one line.
fn said(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let from = lines.iter().position(|line| line.starts_with("Error:")).unwrap_or(0);
    let line = lines[from..].join(" ");
    if line.is_empty() { "nydus-image ended without a word".to_owned() } else { line.chars().take(500).collect() }
}
