//! An image described as data, so that every part of it can be made to lie.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use nydus_backend::registry::Client;
use nydus_rafs::{Algorithm, Digest};
use nydus_tests::rawtar::{self, Entry};
use serde_json::{Value, json};

const OCI: &str = "application/vnd.oci.image";

/// A layer as stored, and what the image says of it.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    media_type: String,
    stored: Vec<u8>,
    diff_id: String,
    size_off_by: i64,
    corrupt: bool,
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", Algorithm::Sha256.digest(bytes))
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::new(6));
    gzip.write_all(bytes).and_then(|()| gzip.finish()).expect("memory takes all that is written")
}

impl Layer {
    /// A gzip layer of a tar.
    pub(crate) fn tar(tar: &[u8]) -> Self {
        Self::stored("layer.v1.tar+gzip", gzip(tar), tar)
    }

    /// A layer of these entries.
    pub(crate) fn of(entries: &[Entry]) -> Self {
        Self::tar(&rawtar::tar(entries))
    }

    /// A layer of given stored bytes.
    pub(crate) fn stored(media_type: &str, stored: Vec<u8>, tar: &[u8]) -> Self {
        let media_type = format!("{OCI}.{media_type}");
        Self { media_type, stored, diff_id: digest(tar), size_off_by: 0, corrupt: false }
    }

    /// A gzip layer whose tar is known by its digest alone.
    pub(crate) fn streamed(stored: Vec<u8>, diff_id: &Digest) -> Self {
        let media_type = format!("{OCI}.layer.v1.tar+gzip");
        Self { media_type, stored, diff_id: format!("sha256:{diff_id}"), size_off_by: 0, corrupt: false }
    }

    /// A gzip layer of several members.
    pub(crate) fn members(tar: &[u8], cuts: &[usize]) -> Self {
        let (mut stored, mut from) = (Vec::new(), 0);
        for to in cuts.iter().copied().chain([tar.len()]) {
            stored.extend(gzip(&tar[from..to]));
            from = to;
        }
        Self::stored("layer.v1.tar+gzip", stored, tar)
    }

    /// A zstd layer.
    pub(crate) fn zstd(tar: &[u8]) -> Self {
        Self::stored("layer.v1.tar+zstd", zstd::encode_all(tar, 3).expect("memory can be read"), tar)
    }

    /// A zstd layer of several frames.
    pub(crate) fn zstd_frames(tar: &[u8], cuts: &[usize]) -> Self {
        let (mut stored, mut from) = (Vec::new(), 0);
        for to in cuts.iter().copied().chain([tar.len()]) {
            stored.extend(zstd::encode_all(&tar[from..to], 3).expect("memory can be read"));
            from = to;
        }
        Self::stored("layer.v1.tar+zstd", stored, tar)
    }

    /// A layer that is not compressed.
    pub(crate) fn plain(tar: &[u8]) -> Self {
        Self::stored("layer.v1.tar", tar.to_vec(), tar)
    }

    /// Returns the stored bytes.
    pub(crate) fn into_stored(self) -> Vec<u8> {
        self.stored
    }

    /// Changes the stored bytes; the digests follow, that of the tar does not.
    pub(crate) fn edit(mut self, edit: impl FnOnce(&mut Vec<u8>)) -> Self {
        edit(&mut self.stored);
        self
    }

    /// Makes the configuration name another digest of the tar.
    pub(crate) fn wrong_diff_id(mut self) -> Self {
        self.diff_id = digest(b"something else");
        self
    }

    /// Makes the manifest tell a wrong size.
    pub(crate) fn wrong_size(mut self, by: i64) -> Self {
        self.size_off_by = by;
        self
    }

    /// Damages the registry's copy.
    pub(crate) fn corrupt(mut self) -> Self {
        self.corrupt = true;
        self
    }
}

/// An image.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    layers: Vec<Layer>,
    docker: bool,
    config: fn(&mut Value),
}

impl Image {
    /// An image that tells the truth.
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        Self { layers, docker: false, config: |_| () }
    }

    /// Uses docker's media types.
    pub(crate) fn docker(mut self) -> Self {
        self.docker = true;
        self
    }

    /// Changes the configuration.
    pub(crate) fn config(mut self, edit: fn(&mut Value)) -> Self {
        self.config = edit;
        self
    }

    /// Returns how many layers there are.
    pub(crate) fn len(&self) -> usize {
        self.layers.len()
    }

    /// Pushes the image; `data` is where the registry keeps its files.
    pub(crate) async fn push(&self, client: &Client, repo: &str, data: &Path) -> Result<()> {
        let diff_ids: Vec<&str> = self.layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        let mut config = json!({
            "architecture": architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        (self.config)(&mut config);
        let config = serde_json::to_vec(&config)?;
        let mut layers = Vec::new();
        for layer in &self.layers {
            let digest = put(client, repo, &layer.stored).await?;
            let size = i64::try_from(layer.stored.len())? + layer.size_off_by;
            let media_type =
                if self.docker { "application/vnd.docker.image.rootfs.diff.tar.gzip" } else { &layer.media_type };
            layers.push(json!({"mediaType": media_type, "digest": digest, "size": size}));
        }
        let kind = |oci: &str, docker: &str| match self.docker {
            true => format!("application/vnd.docker.{docker}"),
            false => format!("{OCI}.{oci}"),
        };
        let media_type = kind("manifest.v1+json", "distribution.manifest.v2+json");
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2, "mediaType": media_type, "layers": layers,
            "config": {
                "mediaType": kind("config.v1+json", "container.image.v1+json"),
                "digest": put(client, repo, &config).await?, "size": config.len(),
            },
        }))?;
        client.put_manifest(repo, "oci", &media_type, manifest.into()).await.context("pushing the manifest")?;
        for layer in self.layers.iter().filter(|layer| layer.corrupt) {
            let name = digest(&layer.stored);
            let hex = name.trim_start_matches("sha256:");
            let path = data.join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]));
            let mut bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&path, bytes)?;
        }
        Ok(())
    }
}

async fn put(client: &Client, repo: &str, bytes: &[u8]) -> Result<String> {
    let digest = digest(bytes);
    client.push_blob(repo, &digest, bytes.to_vec().into()).await.context("pushing a blob")?;
    Ok(digest)
}
