//! Where a command finds the blobs of an image.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use nydus_backend::Config;
use serde_json::{Value, json};

#[derive(Debug, Args)]
pub(crate) struct Backend {
    /// File that is every blob
    #[arg(short = 'b', long)]
    blob: Option<PathBuf>,
    /// Directory of the blobs
    #[arg(short = 'D', long, conflicts_with = "blob")]
    blob_dir: Option<PathBuf>,
    /// Type of a storage backend
    #[arg(long, conflicts_with_all = ["blob", "blob_dir"])]
    backend_type: Option<String>,
    /// Configuration of the storage backend, as JSON
    #[arg(long, requires = "backend_type")]
    backend_config: Option<String>,
    /// File with the configuration of the storage backend, as JSON
    #[arg(long, requires = "backend_type", conflicts_with = "backend_config")]
    backend_config_file: Option<PathBuf>,
    /// Configuration of a daemon, whose backend is used
    #[arg(short = 'C', long, conflicts_with_all = ["blob", "blob_dir", "backend_type"])]
    config: Option<PathBuf>,
}

impl Backend {
    /// Returns the backend that the flags name; without any the directory of the bootstrap.
    pub(crate) fn config(&self, bootstrap: &Path) -> anyhow::Result<Config> {
        let (kind, table) = if let Some(kind) = &self.backend_type {
            if kind == "localfs" {
                bail!("use --blob-dir for blobs in a directory");
            }
            let text = match (&self.backend_config, &self.backend_config_file) {
                (Some(text), _) => text.clone(),
                (None, Some(path)) => {
                    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?
                }
                (None, None) => bail!("--backend-type needs --backend-config or --backend-config-file"),
            };
            (kind.clone(), serde_json::from_str(&text).context("reading the configuration of the storage backend")?)
        } else if let Some(path) = &self.config {
            let context = || format!("reading {}", path.display());
            let text = std::fs::read_to_string(path).with_context(context)?;
            backend_of(&serde_json::from_str(&text).with_context(context)?)
                .with_context(|| format!("{} names no backend", path.display()))?
        } else if let Some(file) = &self.blob {
            ("localfs".to_owned(), json!({ "blob_file": file }))
        } else {
            let beside =
                || bootstrap.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")).into();
            ("localfs".to_owned(), json!({ "dir": self.blob_dir.clone().unwrap_or_else(beside) }))
        };
        Ok(Config::from_parts(&kind, table)?)
    }
}

/// Returns type and table of the backend in a daemon's configuration, old form or new.
fn backend_of(document: &Value) -> Option<(String, Value)> {
    if let Some(backend) = document.pointer("/device/backend") {
        return Some((backend.get("type")?.as_str()?.to_owned(), backend.get("config")?.clone()));
    }
    let backend = document.get("backend")?;
    let kind = backend.get("type")?.as_str()?;
    Some((kind.to_owned(), backend.get(kind)?.clone()))
}
