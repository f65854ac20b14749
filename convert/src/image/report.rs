//! What a command tells its caller: the JSON that `-J` writes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use nydus_rafs::{BlobId, Compressor, Version};
use serde::Serialize;

/// The result of a command. The order of the fields is that of the documents that callers know.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of the builder.
    pub version: String,
    /// Where the bootstrap was written, if it is a file of its own.
    pub bootstrap: String,
    /// The blobs that files refer to, in the order of the image.
    pub blobs: Vec<String>,
    /// Always empty: nothing is kept in external blobs.
    pub external_bootstrap: String,
    /// Always empty.
    pub external_blobs: Vec<String>,
    /// What it cost.
    pub trace: Trace,
    /// RAFS version.
    pub fs_version: String,
    /// The builder's compressor.
    pub compressor: &'static str,
}

/// Times and counters.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Trace {
    /// Seconds, by step.
    pub consumed_time: BTreeMap<&'static str, f64>,
    /// Counters, by name.
    pub registered_events: BTreeMap<&'static str, serde_json::Value>,
}

impl Trace {
    /// Notes how long a step took.
    pub fn took(&mut self, step: &'static str, time: Duration) {
        self.consumed_time.insert(step, time.as_secs_f64());
    }
}

/// Returns the version that reports carry.
pub fn version() -> String {
    format!("v{}", env!("CARGO_PKG_VERSION"))
}

/// Returns the name of a compressor on command lines.
pub fn compressor_name(compressor: Compressor) -> &'static str {
    match compressor {
        Compressor::None => "none",
        Compressor::Lz4Block => "lz4_block",
        Compressor::Gzip => "gzip",
        Compressor::Zstd => "zstd",
    }
}

impl Report {
    /// Makes a report.
    pub fn new(
        bootstrap: Option<&Path>,
        blobs: &[BlobId],
        format: Version,
        compressor: Compressor,
        trace: Trace,
    ) -> Self {
        Self {
            version: version(),
            bootstrap: bootstrap.map_or_else(String::new, |path| path.display().to_string()),
            blobs: blobs.iter().map(BlobId::to_string).collect(),
            external_bootstrap: String::new(),
            external_blobs: Vec::new(),
            trace,
            fs_version: format.number().to_string(),
            compressor: compressor_name(compressor),
        }
    }

    /// Writes the report to `path`, if there is one, over several lines.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn save(&self, path: Option<&PathBuf>) -> anyhow::Result<()> {
        self.put(path, serde_json::to_vec_pretty(self))
    }

    /// Writes the report to `path`, if there is one, in one line.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn save_compact(&self, path: Option<&PathBuf>) -> anyhow::Result<()> {
        self.put(path, serde_json::to_vec(self))
    }

    fn put(&self, path: Option<&PathBuf>, json: serde_json::Result<Vec<u8>>) -> anyhow::Result<()> {
        let Some(path) = path else { return Ok(()) };
        let json = json.context("writing the report")?;
        std::fs::write(path, json).with_context(|| format!("writing {}", path.display()))
    }
}
