//! A chunk dictionary: an image whose blobs are used rather than stored again.

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, bail};
use nydus_backend::registry::Reference;
use nydus_rafs::{BlobInfo, Bootstrap};

use super::fetch::{self, Wanted};
use super::place::Place;
use super::push::Destination;
use super::readback;
use crate::dictionary::Dictionary;
use crate::oci::{Descriptor, names};
use crate::pack::Recipe;

/// Where a dictionary is named to be: `bootstrap:registry:IMAGE` or `bootstrap:local:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// A nydus image.
    Image(Reference),
    /// A bootstrap in a file; its blobs are in the target already.
    File(PathBuf),
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || "it is written `bootstrap:registry:IMAGE` or `bootstrap:local:PATH`".to_owned();
        let rest = text.strip_prefix("bootstrap:").ok_or_else(form)?;
        match rest.split_once(':') {
            Some(("registry", image)) => Ok(Self::Image(image.parse().map_err(|error| format!("{error}"))?)),
            Some(("local", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(form()),
        }
    }
}

/// A dictionary that can be read.
#[derive(Debug, Clone)]
pub struct Known {
    /// What names it.
    pub named: Named,
    /// Where its image lies, if it is one.
    pub place: Option<Place>,
}

impl Known {
    /// Reads its chunks.
    pub(super) async fn load(&self, recipe: Recipe) -> anyhow::Result<Dictionary> {
        let image = match (&self.named, &self.place) {
            (Named::Image(name), Some(place)) => {
                let wanted = Wanted::of(false, &[]);
                let (found, _) = fetch::manifests(place, name.target(), &wanted, true)
                    .await
                    .with_context(|| format!("reading the chunk dictionary {name}"))?;
                let layer =
                    found.iter().filter_map(|found| found.manifest.layers.last()).find(|layer| layer.is_nydus());
                let Some(layer) = layer else { bail!("the chunk dictionary {name} is not a nydus image") };
                readback::bootstrap(place, layer).await?
            }
            (Named::File(path), _) => {
                let bytes = std::fs::read(path).with_context(|| format!("reading {}", path.display()))?;
                Bootstrap::open(bytes).with_context(|| format!("reading {}", path.display()))?
            }
            (Named::Image(name), None) => bail!("nobody has said where the chunk dictionary {name} is"),
        };
        let mut dictionary = Dictionary::default();
        dictionary.add(&image, recipe).context("using the chunk dictionary")?;
        Ok(dictionary)
    }

    /// Makes the target have a blob of the dictionary; returns its descriptor.
    pub(super) async fn bring(
        &self,
        info: &BlobInfo,
        destination: &Destination,
        work_dir: &std::path::Path,
    ) -> anyhow::Result<Descriptor> {
        let digest = format!("sha256:{}", info.id);
        let place = self.place.as_ref().unwrap_or(&destination.place);
        let size = place.size(&digest).await.with_context(|| {
            format!("blob {digest} of the chunk dictionary is not in {place}; name the dictionary as bootstrap:registry:IMAGE")
        })?;
        let mut blob = Descriptor::new(names::NYDUS_BLOB, &digest, size);
        if self.place.is_some() {
            let to = Destination::new(destination.place.clone(), destination.name.clone(), place);
            to.bring(place, &blob, work_dir).await.with_context(|| format!("bringing blob {digest}"))?;
        }
        blob.annotations.insert(names::ANNOTATION_BLOB.into(), "true".into());
        Ok(blob)
    }
}
