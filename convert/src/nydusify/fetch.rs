//! Documents of the source image, each checked against the digest that named it.

use anyhow::{Context as _, bail};
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::layer::{self, TRIES, pause};
use super::place::{Place, PlaceError};
use crate::oci::{Descriptor, Index, Manifest, Platform, names};

/// The largest image configuration that is read. Some carry long histories; none that we know of 1 MiB.
pub(super) const MAX_CONFIG: u64 = 16 << 20;

/// The most indexes within an index that are read.
const MAX_DEPTH: usize = 8;

/// Runs `ask` again while it fails in a way that may pass.
pub(super) async fn persist<T>(what: &str, mut ask: impl AsyncFnMut() -> Result<T, PlaceError>) -> anyhow::Result<T> {
    let mut attempt = 0;
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                attempt += 1;
                if attempt >= TRIES || !error.is_transient() {
                    return Err(error).with_context(|| what.to_owned());
                }
                tracing::warn!(%error, attempt, "{what} failed, trying again");
                tokio::time::sleep(pause(attempt, error.retry_after())).await;
            }
        }
    }
}

/// A manifest of the source with the descriptor that names it.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) descriptor: Descriptor,
    pub(super) manifest: Manifest,
    /// The manifest as it is.
    pub(super) bytes: Bytes,
}

/// Reads the manifests of an image: one, or those of an index that `wanted` accepts, with those that are converted already
/// if `nydus` says so.
pub(super) async fn manifests(
    place: &Place,
    target: &str,
    wanted: &Wanted,
    nydus: bool,
) -> anyhow::Result<(Vec<Found>, Option<Index>)> {
    let document = persist("reading the source's manifest", async || place.manifest(target).await).await?;
    if !document.is_index() {
        let descriptor = Descriptor::new(&document.media_type, &document.digest, document.bytes.len() as u64);
        let manifest = parse(&document.media_type, &document.bytes)?;
        return Ok((vec![Found { descriptor, manifest, bytes: document.bytes }], None));
    }
    let mut index = parse_index(&document.bytes)?;
    for _ in 0..MAX_DEPTH {
        let Some(at) = index.manifests.iter().position(Descriptor::is_index) else { break };
        // What an inner index lists counts as listed in its place.
        let inner = index.manifests.remove(at);
        let digest = inner.digest.as_str();
        let document = persist("reading an index of the index", async || place.manifest(digest).await).await?;
        if !document.is_index() {
            bail!("{digest} is a manifest, and the source's index calls it an index: one of the two is damaged");
        }
        let listed = parse_index(&document.bytes)?.manifests;
        index.manifests.splice(at..at, listed);
    }
    if let Some(left) = index.manifests.iter().find(|entry| entry.is_index()) {
        bail!("the source's index leads to more than {MAX_DEPTH} others, {} among them", left.digest);
    }
    let chosen = wanted.choose(&index, nydus)?;
    let mut found = Vec::new();
    for descriptor in chosen {
        let digest = descriptor.digest.as_str();
        let document = persist("reading a manifest of the index", async || place.manifest(digest).await).await?;
        if document.is_index() {
            bail!("{digest} is an index, and the source's index calls it a manifest: one of the two is damaged");
        }
        let manifest = parse(&document.media_type, &document.bytes)?;
        found.push(Found { descriptor, manifest, bytes: document.bytes });
    }
    Ok((found, Some(index)))
}

/// A document that is an index and a manifest is another image to each reader.
fn refuse_both(bytes: &[u8]) -> anyhow::Result<()> {
    #[derive(serde::Deserialize)]
    struct Both {
        #[serde(default)]
        manifests: Option<serde::de::IgnoredAny>,
        #[serde(default)]
        config: Option<serde::de::IgnoredAny>,
        #[serde(default)]
        layers: Option<serde::de::IgnoredAny>,
    }
    let both: Both = serde_json::from_slice(bytes).context("the source's document is not a JSON object")?;
    if both.manifests.is_some() && (both.config.is_some() || both.layers.is_some()) {
        bail!("the source's document is both an index and a manifest, so nobody can tell which image it is");
    }
    Ok(())
}

fn parse_index(bytes: &[u8]) -> anyhow::Result<Index> {
    refuse_both(bytes)?;
    serde_json::from_slice(bytes).context("the source's index cannot be understood")
}

fn parse(media_type: &str, bytes: &[u8]) -> anyhow::Result<Manifest> {
    if media_type.contains("manifest.v1+") && media_type.contains("docker") {
        bail!(
            "the source is a docker schema 1 image, which cannot be converted; pull and push it with a current docker first"
        );
    }
    refuse_both(bytes)?;
    let mut manifest: Manifest = serde_json::from_slice(bytes).context("the source's manifest cannot be understood")?;
    if manifest.media_type.is_empty() {
        manifest.media_type = media_type.to_owned();
    }
    Ok(manifest)
}

/// Which platforms of an index are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Every one.
    All,
    /// These.
    Platforms(Vec<Platform>),
}

impl Wanted {
    /// Takes all, or those that are named, or this machine's.
    pub fn of(all: bool, named: &[Platform]) -> Self {
        match (all, named.is_empty()) {
            (true, _) => Self::All,
            (false, true) => Self::Platforms(vec![Platform::host()]),
            (false, false) => Self::Platforms(named.to_vec()),
        }
    }

    fn choose(&self, index: &Index, nydus: bool) -> anyhow::Result<Vec<Descriptor>> {
        let images = || {
            index.manifests.iter().filter(|entry| {
                let attestation = entry.annotations.contains_key("vnd.docker.reference.type")
                    || entry.platform.as_ref().is_some_and(|platform| platform.os == "unknown");
                let is_nydus = entry.artifact_type.as_deref() == Some("application/vnd.nydus.image.manifest.v1+json")
                    || entry.platform.as_ref().is_some_and(|platform| {
                        platform.os_features.iter().any(|feature| feature == "nydus.remoteimage.v1")
                    });
                !attestation && (nydus || !is_nydus) && entry.platform.is_some()
            })
        };
        let offered = || {
            let all: Vec<_> = images().filter_map(|entry| entry.platform.as_ref()).map(Platform::to_string).collect();
            if all.is_empty() { "none".to_owned() } else { all.join(", ") }
        };
        match self {
            Self::All => {
                let all: Vec<_> = images().cloned().collect();
                if all.is_empty() {
                    bail!("the source's index lists no image");
                }
                Ok(all)
            }
            Self::Platforms(platforms) => {
                let mut chosen: Vec<Descriptor> = Vec::new();
                for platform in platforms {
                    let accepts =
                        |entry: &&Descriptor| entry.platform.as_ref().is_some_and(|offered| platform.accepts(offered));
                    let mut accepted = images().filter(accepts).peekable();
                    if accepted.peek().is_none() {
                        if images().next().is_none() && index.manifests.iter().any(|entry| entry.platform.is_none()) {
                            bail!(
                                "the source's index does not say for which platforms its manifests are; name one of them by its digest"
                            );
                        }
                        bail!("the source has no image for {platform}; it has {}", offered());
                    }
                    // Of one platform there may be an image of each kind.
                    for entry in accepted.take(if nydus { usize::MAX } else { 1 }) {
                        if !chosen.contains(entry) {
                            chosen.push(entry.clone());
                        }
                    }
                }
                Ok(chosen)
            }
        }
    }
}

/// Refuses what is no container image. A configuration of an unknown type is believed if all layers are layers of files.
pub(super) fn refuse_artifact(manifest: &Manifest) -> anyhow::Result<()> {
    let kind = manifest.config.media_type.as_str();
    let known = kind == names::OCI_CONFIG || kind == names::DOCKER_CONFIG;
    let odd = manifest.layers.iter().find(|layer| layer::stated(&layer.media_type).is_err());
    match odd {
        Some(layer) if !known => bail!(
            "the source is not a container image: its configuration has the type `{kind}`, and layer {} the type `{}`",
            layer.digest,
            layer.media_type
        ),
        _ => Ok(()),
    }
}

/// Reads an image's configuration.
pub(super) async fn config(place: &Place, descriptor: &Descriptor) -> anyhow::Result<serde_json::Value> {
    let bytes = blob(place, descriptor, MAX_CONFIG).await.context("reading the image's configuration")?;
    serde_json::from_slice(&bytes).context("the image's configuration cannot be understood")
}

/// Reads a blob into memory and checks its digest.
pub(super) async fn blob(place: &Place, descriptor: &Descriptor, limit: u64) -> anyhow::Result<Bytes> {
    let digest = descriptor.digest.as_str();
    let bytes = persist("reading a blob", async || place.blob(digest, None).await?.read(limit).await).await?;
    if bytes.len() as u64 != descriptor.size {
        bail!(
            "blob {digest} of {place} has {} bytes and the manifest tells of {}: one of the two is damaged",
            bytes.len(),
            descriptor.size
        );
    }
    let found = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
    if found != digest {
        bail!("blob {digest} of {place} has the digest {found}: it is damaged there");
    }
    Ok(bytes)
}
