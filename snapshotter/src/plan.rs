//! What is to be done for a new or existing snapshot. Pure.
//!
//! One function, [`chain`], looks for the image among the ancestors; Prepare, View and Mounts all ask it, so they cannot
//! disagree about what is below a container.

use crate::labels::{Content, Layer, Table};
use crate::meta::Kind;
use crate::mounts::Chain;

/// A committed snapshot below the one in question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ancestor {
    /// Its number.
    pub id: u64,
    /// What it holds.
    pub content: Content,
}

/// What a call leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The layer is supplied without a download: commit it as this chain id.
    Supply {
        /// The chain id that containerd asked for.
        target: String,
    },
    /// The layer has a table of contents of its own: supply it with the bootstrap that is made of that, or else mount it
    /// as any other.
    Index {
        /// The chain id that containerd asked for.
        target: String,
        /// The table.
        table: Table,
        /// The snapshot with the bootstrap of the layers below.
        below: Option<u64>,
    },
    /// Plain directories.
    Unpack(Chain),
    /// The image in [`Chain::image`] must be mounted first.
    Serve {
        /// Everything below the snapshot.
        chain: Chain,
        /// The bootstrap snapshot, the same as in `chain`.
        image: u64,
    },
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A view of a data layer, which has no files.
    #[error(
        "a data layer of a nydus image has no files of its own: only the topmost layer, its bootstrap, can be viewed"
    )]
    DataOnly,
    /// A user namespace over an image.
    #[error(
        "the owners of a lazily loaded image cannot be mapped into a user namespace yet: remove \"remap-ids\" from the capabilities of the proxy plugin, or run without a user namespace"
    )]
    MappedImage,
}

/// What is below a snapshot, given its ancestors from the uppermost down.
///
/// The nearest bootstrap is the image; layers above it keep their files, everything below it is part of the image. Data
/// layers have no files and are left out.
pub fn chain(ancestors: &[Ancestor]) -> Chain {
    let mut chain = Chain::default();
    for ancestor in ancestors {
        match ancestor.content {
            Content::Files => chain.local.push(ancestor.id),
            Content::Data => {}
            Content::Bootstrap | Content::Indexed => {
                chain.image = Some(ancestor.id);
                break;
            }
        }
    }
    chain
}

/// Decides about a new snapshot of `kind` with these labels on these ancestors.
///
/// # Errors
/// When no mount could show what was asked for.
pub fn create(kind: Kind, layer: &Layer, ancestors: &[Ancestor]) -> Result<Plan, Refusal> {
    if let (Kind::Active, Content::Data, Some(target)) = (kind, layer.content, &layer.target) {
        return Ok(Plan::Supply { target: target.clone() });
    }
    if let (Kind::Active, Content::Files, Some(target), Some(table)) =
        (kind, layer.content, &layer.target, &layer.table)
    {
        let below = ancestors.first();
        // Files that were unpacked cannot lie below an image.
        if below.is_none_or(|below| below.content == Content::Indexed) {
            let below = below.map(|below| below.id);
            return Ok(Plan::Index { target: target.clone(), table: table.clone(), below });
        }
    }
    mount(kind, layer, ancestors)
}

/// Decides about the mounts of a snapshot that exists.
///
/// # Errors
/// As [`create`].
pub fn mount(kind: Kind, layer: &Layer, ancestors: &[Ancestor]) -> Result<Plan, Refusal> {
    let chain = chain(ancestors);
    match chain.image {
        Some(_) if layer.id_map.is_some() => Err(Refusal::MappedImage),
        Some(image) => Ok(Plan::Serve { chain, image }),
        None if kind == Kind::View && ancestors.first().is_some_and(|top| top.content == Content::Data) => {
            Err(Refusal::DataOnly)
        }
        None => Ok(Plan::Unpack(chain)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels;

    fn layer(pairs: &[(&str, &str)]) -> Layer {
        labels::parse(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
            .expect("valid labels")
    }

    fn ancestors(contents: &[Content]) -> Vec<Ancestor> {
        // The uppermost has the highest number.
        let top = contents.len() as u64;
        contents.iter().zip(0..).map(|(content, depth)| Ancestor { id: top - depth, content: *content }).collect()
    }

    const DATA: (&str, &str) = (labels::NYDUS_BLOB, "true");
    const BOOT: (&str, &str) = (labels::NYDUS_BOOTSTRAP, "true");
    const TARGET: (&str, &str) = (labels::TARGET, "sha256:c");
    use Content::{Bootstrap as B, Data as D, Files as F, Indexed as I};

    fn indexed() -> Layer {
        let (toc, digest) = (format!("sha256:{}", "a".repeat(64)), format!("sha256:{}", "b".repeat(64)));
        layer(&[TARGET, (labels::TOC_DIGEST, &toc), (labels::LAYER_DIGEST, &digest)])
    }

    fn index(below: Option<u64>) -> Result<Plan, Refusal> {
        let table = indexed().table.expect("both digests are there");
        Ok(Plan::Index { target: "sha256:c".to_owned(), table, below })
    }

    fn unpack(local: &[u64]) -> Result<Plan, Refusal> {
        Ok(Plan::Unpack(Chain { local: local.to_vec(), image: None }))
    }

    fn serve(local: &[u64], image: u64) -> Result<Plan, Refusal> {
        Ok(Plan::Serve { chain: Chain { local: local.to_vec(), image: Some(image) }, image })
    }

    #[test]
    fn every_kind_of_layer_has_its_plan() {
        let supply = Ok(Plan::Supply { target: "sha256:c".to_owned() });
        let table = [
            ("plain layer", Kind::Active, layer(&[TARGET]), vec![F, F], unpack(&[2, 1])),
            ("first plain layer", Kind::Active, layer(&[TARGET]), vec![], unpack(&[])),
            ("data layer", Kind::Active, layer(&[TARGET, DATA]), vec![], supply.clone()),
            ("second data layer", Kind::Active, layer(&[TARGET, DATA]), vec![D], supply),
            ("data layer not being pulled", Kind::Active, layer(&[DATA]), vec![], unpack(&[])),
            ("bootstrap layer", Kind::Active, layer(&[TARGET, BOOT]), vec![D, D], unpack(&[])),
            ("container of an image", Kind::Active, layer(&[]), vec![B, D, D], serve(&[], 3)),
            ("container of a committed container", Kind::Active, layer(&[]), vec![F, F, B, D], serve(&[4, 3], 2)),
            ("plain layer pulled over an image", Kind::Active, layer(&[TARGET]), vec![B, D], serve(&[], 2)),
            ("layer with a table of contents", Kind::Active, indexed(), vec![], index(None)),
            ("second layer with a table of contents", Kind::Active, indexed(), vec![I], index(Some(1))),
            ("layer with a table of contents on plain files", Kind::Active, indexed(), vec![F], unpack(&[1])),
            ("the same above such layers", Kind::Active, indexed(), vec![F, I, I], serve(&[3], 2)),
            ("layer without one above those that have", Kind::Active, layer(&[TARGET]), vec![I, I], serve(&[], 2)),
            ("container of an eStargz image", Kind::Active, layer(&[]), vec![I, I, I], serve(&[], 3)),
            ("view asked for with a table of contents", Kind::View, indexed(), vec![I], serve(&[], 1)),
            ("image converted twice", Kind::Active, layer(&[]), vec![B, D, B, D], serve(&[], 4)),
            ("view of an image", Kind::View, layer(&[]), vec![B, D], serve(&[], 2)),
            ("view of a layer above", Kind::View, layer(&[]), vec![F, B, D], serve(&[3], 2)),
            ("view of nothing", Kind::View, layer(&[]), vec![], unpack(&[])),
            ("view of a plain image", Kind::View, layer(&[]), vec![F, F], unpack(&[2, 1])),
            ("view of a data layer", Kind::View, layer(&[]), vec![D, D], Err(Refusal::DataOnly)),
            ("view asked for with data labels", Kind::View, layer(&[TARGET, DATA]), vec![F], unpack(&[1])),
        ];
        for (name, kind, layer, contents, want) in table {
            assert_eq!(create(kind, &layer, &ancestors(&contents)), want, "{name}");
        }
    }

    #[test]
    fn an_existing_snapshot_is_mounted_on_what_it_was_prepared_on() {
        for contents in [vec![], vec![F], vec![B, D], vec![F, B, D], vec![F, F]] {
            let below = ancestors(&contents);
            for kind in [Kind::Active, Kind::View] {
                assert_eq!(create(kind, &layer(&[]), &below), mount(kind, &layer(&[]), &below));
            }
        }
    }

    #[test]
    fn owners_of_an_image_are_never_mapped_by_overlayfs() {
        let mapped = layer(&[(labels::UID_MAP, "0:1:9"), (labels::GID_MAP, "0:1:9")]);
        assert_eq!(create(Kind::Active, &mapped, &ancestors(&[B, D])), Err(Refusal::MappedImage));
        assert_eq!(create(Kind::Active, &mapped, &ancestors(&[F])), unpack(&[1]));
    }
}
