//! A converted image, taken out of the registry into plain files.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;
use nydus_backend::registry::{BlobRequest, Client};
use nydus_rafs::{Bootstrap, Verified};
use serde_json::{Value, json};

/// The parts of a Nydus image.
#[derive(Debug)]
pub struct Converted {
    /// The manifest.
    pub manifest: Value,
    /// The merged bootstrap.
    pub bootstrap: PathBuf,
    /// A folder with the data blobs, named by their digests.
    pub blobs: PathBuf,
}

impl Converted {
    /// Downloads `repo:tag` into `dir`.
    pub async fn pull(client: &Client, repo: &str, tag: &str, dir: &Path) -> Result<Self> {
        let blobs = dir.join("blobs");
        fs::create_dir_all(&blobs)?;
        let manifest: Value = serde_json::from_slice(&client.manifest(repo, tag).await?.bytes)?;
        let layers = manifest["layers"].as_array().context("a manifest has layers")?;
        let (last, data) = layers.split_last().context("a converted image has layers")?;
        for layer in data {
            let (digest, bytes) = fetch(client, repo, layer).await?;
            fs::write(blobs.join(digest), bytes)?;
            // What only refers to an original layer is nothing without it.
            if let Some(original) = layer["annotations"]["containerd.io/snapshot/nydus-ref"].as_str() {
                let size = client.blob_size(repo, original).await?;
                let (digest, bytes) = fetch(client, repo, &json!({"digest": original, "size": size})).await?;
                fs::write(blobs.join(digest), bytes)?;
            }
        }
        let (_, layer) = fetch(client, repo, last).await?;
        let bootstrap = dir.join("bootstrap");
        let mut archive = tar::Archive::new(GzDecoder::new(layer.as_slice()));
        for entry in archive.entries()? {
            let mut entry = entry?;
            if entry.path()?.as_ref() == Path::new("image/image.boot") {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes)?;
                fs::write(&bootstrap, bytes)?;
                return Ok(Self { manifest, bootstrap, blobs });
            }
        }
        anyhow::bail!("the last layer holds no image/image.boot")
    }

    /// Writes each blob's plain address space to a file of its own, in the order of the bootstrap's devices.
    pub fn devices(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        use std::os::unix::fs::FileExt;
        fs::create_dir_all(dir)?;
        let bootstrap = Bootstrap::open(fs::read(&self.bootstrap)?)?;
        let mut devices = Vec::new();
        for (index, blob) in (0..).zip(bootstrap.blobs()) {
            let stored = fs::read(self.blobs.join(blob.id.as_str()))?;
            let path = dir.join(blob.id.as_str());
            let file = fs::File::create(&path)?;
            file.set_len(blob.plain_size)?;
            for chunk in bootstrap.chunks(index)?.all() {
                let range = usize::try_from(chunk.stored.start)?..usize::try_from(chunk.stored.end)?;
                let bytes = stored.get(range).with_context(|| format!("{chunk:?} lies outside its blob"))?;
                file.write_all_at(Verified::decode(chunk, bytes)?.bytes(), chunk.plain.start)?;
            }
            devices.push(path);
        }
        Ok(devices)
    }
}

/// Fetches what a descriptor names; returns the digest's hexadecimal digits and the bytes.
async fn fetch(client: &Client, repo: &str, descriptor: &Value) -> Result<(String, Vec<u8>)> {
    let digest = descriptor["digest"].as_str().context("a descriptor has a digest")?;
    let size = descriptor["size"].as_u64().context("a descriptor has a size")?;
    let bytes = client.blob(repo, digest, &BlobRequest::default()).await?.read(size).await?;
    let hex = digest.trim_start_matches("sha256:").to_owned();
    ensure!(nydus_rafs::Algorithm::Sha256.digest(&bytes).to_string() == hex, "{digest} has other bytes");
    Ok((hex, bytes.to_vec()))
}
