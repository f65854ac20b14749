//! OCI images made from layers in memory, pushed as any client pushes them.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use nydus_backend::registry::{Client, ClientOptions, Scheme};
use nydus_rafs::{Algorithm, Digest};
use serde_json::json;

/// A tar layer.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// The gzip stream.
    pub gzip: Vec<u8>,
    /// Annotations in the manifest.
    pub annotations: BTreeMap<String, String>,
}

impl Layer {
    /// Compresses a tar, the same bytes for the same input.
    pub fn new(tar: &[u8]) -> Result<Self> {
        Self::compressed(tar, Compression::new(6))
    }

    /// The same without making it smaller, which for noise would be in vain.
    pub fn stored(tar: &[u8]) -> Result<Self> {
        Self::compressed(tar, Compression::none())
    }

    fn compressed(tar: &[u8], level: Compression) -> Result<Self> {
        let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), level);
        gzip.write_all(tar)?;
        Ok(Self { diff_id: Algorithm::Sha256.digest(tar), gzip: gzip.finish()?, annotations: BTreeMap::new() })
    }
}

/// Returns a client for a registry that speaks plain HTTP and wants no credentials.
pub fn client(host: &str) -> Result<Client> {
    Client::new(host, ClientOptions { scheme: Scheme::Http, ..ClientOptions::default() }).context("making a client")
}

/// Pushes an image of `layers` with the command and environment of `config`; returns its size in bytes,
/// compressed.
pub async fn push(client: &Client, repo: &str, tag: &str, layers: &[Layer], config: serde_json::Value) -> Result<u64> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", layer.diff_id)).collect();
    let history: Vec<_> = layers.iter().map(|_| json!({"created_by": "layer"})).collect();
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = serde_json::to_vec(&json!({
        "architecture": architecture, "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
    }))?;
    let mut descriptors = Vec::new();
    for layer in layers {
        let digest = put(client, repo, &layer.gzip).await?;
        let mut descriptor = descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &digest, layer.gzip.len());
        if !layer.annotations.is_empty() {
            descriptor.insert("annotations", json!(layer.annotations));
        }
        descriptors.push(descriptor);
    }
    let digest = put(client, repo, &config).await?;
    let manifest = serde_json::to_vec(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &digest, config.len()), "layers": descriptors,
    }))?;
    client
        .put_manifest(repo, tag, "application/vnd.oci.image.manifest.v1+json", manifest.into())
        .await
        .context("pushing the manifest")?;
    Ok(layers.iter().map(|layer| layer.gzip.len() as u64).sum())
}

async fn put(client: &Client, repo: &str, bytes: &[u8]) -> Result<String> {
    let digest = format!("sha256:{}", Algorithm::Sha256.digest(bytes));
    client.push_blob(repo, &digest, bytes.to_vec().into()).await.context("pushing a blob")?;
    Ok(digest)
}

fn descriptor(media_type: &str, digest: &str, size: usize) -> BTreeMap<&'static str, serde_json::Value> {
    BTreeMap::from([("mediaType", json!(media_type)), ("digest", json!(digest)), ("size", json!(size))])
}
