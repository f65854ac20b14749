//! `nydusify copy`: images as they are, from one place to another.
//!
//! Blobs that the target has are not sent again; those in another repository of the same registry are mounted from
//! there. A layer that only refers to an original one is useless without it, so that one comes along.

use std::path::Path;

use anyhow::Context as _;
use nydus_backend::registry::Reference;

use super::convert::join;
use super::fetch::{self, Found, Wanted};
use super::place::Place;
use super::progress::Progress;
use super::push::Destination;
use crate::oci::{Descriptor, names};

/// What to copy, and where to.
#[derive(Debug, Clone)]
pub struct Request {
    /// The source image.
    pub source: Reference,
    /// Where it lies.
    pub origin: Place,
    /// The target image; a tag.
    pub target: Reference,
    /// Where it goes.
    pub destination: Place,
    /// Which platforms of an index.
    pub wanted: Wanted,
    /// Where blobs lie on their way; must exist.
    pub work_dir: std::path::PathBuf,
}

/// Copies an image; returns the digest of what the target's tag names.
///
/// # Errors
///
/// If something of the image is missing or damaged, or cannot be pushed.
pub async fn copy(request: &Request, progress: &Progress) -> anyhow::Result<String> {
    let (found, index) = fetch::manifests(&request.origin, request.source.target(), &request.wanted, true)
        .await
        .with_context(|| format!("reading {}", request.source))?;
    let destination = Destination::new(request.destination.clone(), request.target.clone(), &request.origin);
    for found in &found {
        image(&request.origin, &destination, found, &request.work_dir, progress).await?;
    }
    let (media_type, bytes) = match (<[_; 1]>::try_from(found), index) {
        (Ok([Found { descriptor, bytes, .. }]), _) => (descriptor.media_type, bytes),
        (Err(several), index) => {
            for Found { descriptor, bytes, .. } in &several {
                destination.put(&descriptor.digest, &descriptor.media_type, bytes).await?;
            }
            join(several.into_iter().map(|found| found.descriptor).collect(), index, false)?
        }
    };
    destination.tag(&media_type, &bytes).await?;
    Ok(Descriptor::of(&media_type, &bytes).digest)
}

/// Brings everything that a manifest names.
pub(super) async fn image(
    origin: &Place,
    destination: &Destination,
    found: &Found,
    work_dir: &Path,
    progress: &Progress,
) -> anyhow::Result<()> {
    let Found { manifest, .. } = found;
    for layer in &manifest.layers {
        let bar = progress.layer(super::convert::short(&layer.digest), layer.size);
        bar.say("copying");
        let bring = async |blob: &Descriptor| {
            let named = || format!("copying blob {}", blob.digest);
            destination.bring(origin, blob, work_dir).await.with_context(named)
        };
        let sent = bring(layer).await?;
        if let Some(original) = layer.annotations.get(names::ANNOTATION_REF) {
            let size = origin.size(original).await.with_context(|| format!("the original layer {original}"))?;
            bring(&Descriptor::new(names::OCI_LAYER_GZIP, original, size)).await?;
        }
        bar.end(if sent { "copied" } else { "was there" });
    }
    let config = fetch::blob(origin, &manifest.config, fetch::MAX_CONFIG).await?;
    destination.push_bytes(&manifest.config.digest, config).await
}
