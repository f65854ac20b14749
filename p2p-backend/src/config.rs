//! The `backend` section of nydusd's configuration.

use serde::{Deserialize, Serialize};

/// Which kind of place holds the blobs, and how to reach it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", content = "config", rename_all = "lowercase")]
pub enum Config {
    /// Plain files in a directory.
    LocalFs(LocalFs),
    /// An OCI registry, behind mirrors or not.
    Registry(Box<Registry>),
}

/// Files in a directory, named by blob id.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LocalFs {
    /// The one file that every blob id maps to; empty: use `dir`.
    pub blob_file: String,
    /// The directory.
    pub dir: String,
    /// Further directories to look in.
    pub alt_dirs: Vec<String>,
}

/// A repository of a registry.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Registry {
    /// `http` or `https`.
    pub scheme: String,
    /// `host[:port]`.
    pub host: String,
    /// `namespace/name`.
    pub repo: String,
}
