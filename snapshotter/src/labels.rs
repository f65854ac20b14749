//! What a snapshot's labels say about its layer.
//!
//! containerd passes a flat map of strings. It is read once, here; nobody else looks for a label by name except the
//! record store, which must keep the map as it came because containerd asks for it back.

use std::collections::BTreeMap;

use nydus_rafs::Digest;

/// The labels of a snapshot, as containerd gave them.
pub type Labels = BTreeMap<String, String>;

/// Chain id of the layer being pulled. Its presence marks a layer of an image, as opposed to a container's own.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// Full reference of the image.
pub const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The same from clients that know only the older lazy-pulling project, BuildKit among them.
pub const STARGZ_REF: &str = "containerd.io/snapshot/remote/stargz.reference";
/// Compressed digest of this layer; of a data layer it is also the blob's id.
pub const LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// The same from the older clients.
pub const STARGZ_DIGEST: &str = "containerd.io/snapshot/remote/stargz.digest";
/// The layer is a RAFS data blob.
pub const NYDUS_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// The layer holds a RAFS bootstrap.
pub const NYDUS_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// Digest of the table of contents of an eStargz layer, `sha256:...`: an annotation of the layer in the manifest.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// The snapshot holds a bootstrap that was made of such a table. Ours alone: nobody else's labels say so.
pub const STARGZ_LAYER: &str = "containerd.io/snapshot/stargz";
/// Wants `volatile` on the overlay.
pub const VOLATILE: &str = "containerd.io/snapshot/overlay.volatile";
/// User ids inside and outside a user namespace, `inner:outer:size`.
pub const UID_MAP: &str = "containerd.io/snapshot/uidmapping";
/// Group ids likewise.
pub const GID_MAP: &str = "containerd.io/snapshot/gidmapping";
/// Name for the registry.
pub const PULL_USER: &str = "containerd.io/snapshot/pullusername";
/// Password or token for the registry.
pub const PULL_SECRET: &str = "containerd.io/snapshot/pullsecret";

/// What kind of layer the snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Files: an ordinary layer, or what a container writes.
    Files,
    /// A RAFS data blob: nothing to unpack, nothing to mount by itself.
    Data,
    /// A RAFS bootstrap: what makes the image mountable.
    Bootstrap,
    /// An original layer whose files stay in the registry, with the bootstrap of the image up to it.
    Indexed,
}

impl Content {
    /// Whether the snapshot holds the bootstrap of an image.
    pub fn is_image(self) -> bool {
        matches!(self, Self::Bootstrap | Self::Indexed)
    }
}

/// The table of contents of an eStargz layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Digest of the layer, 64 hexadecimal digits.
    pub layer: String,
    /// Digest of the table.
    pub toc: Digest,
}

/// Who outside a user namespace owns what root inside owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    /// User ids, as containerd wrote them.
    pub users: String,
    /// Group ids.
    pub groups: String,
    /// The user id outside that inner 0 has.
    pub root_user: u32,
    /// The group id outside that inner 0 has.
    pub root_group: u32,
}

/// The name and secret that came with a pull.
#[derive(Clone, PartialEq, Eq)]
pub struct PullSecret {
    /// May be empty: then the secret is a bearer token.
    pub user: String,
    /// Password or token.
    pub secret: String,
}

impl std::fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PullSecret {{ user: {:?}, .. }}", self.user)
    }
}

/// The labels, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// What kind of layer it is.
    pub content: Content,
    /// The chain id to supply, when this is a layer of an image being pulled.
    pub target: Option<String>,
    /// The image's reference, if the client told.
    pub image: Option<String>,
    /// Whether the overlay may skip syncing.
    pub volatile: bool,
    /// The mapping of ids, if the container has a user namespace.
    pub id_map: Option<IdMap>,
    /// Credentials that came with the pull.
    pub secret: Option<PullSecret>,
    /// The layer's own table of contents, if it has one that can be believed.
    pub table: Option<Table>,
}

/// Why labels cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// A mapping that is not one range of the right form, or only half of it.
    #[error(
        "label {label} is {value:?}: a user namespace needs equal-shaped uid and gid mappings of one range, inner:outer:size"
    )]
    IdMap {
        /// The label.
        label: &'static str,
        /// Its value.
        value: String,
    },
}

/// Reads the labels of one snapshot.
///
/// # Errors
/// When an id mapping is incomplete or malformed; every other label is optional and free text.
pub fn parse(labels: &Labels) -> Result<Layer, LabelError> {
    let text = |key: &str| labels.get(key).filter(|value| !value.is_empty()).cloned();
    let secret = text(PULL_SECRET).map(|secret| PullSecret { user: text(PULL_USER).unwrap_or_default(), secret });
    Ok(Layer {
        content: content(labels),
        target: text(TARGET),
        image: text(IMAGE_REF).or_else(|| text(STARGZ_REF)),
        volatile: labels.contains_key(VOLATILE),
        id_map: id_map(labels)?,
        secret,
        table: table(labels),
    })
}

/// The kind of layer alone.
pub fn content(labels: &Labels) -> Content {
    // The converter writes "true" but only presence counts; a bootstrap wins over a blob if a layer claims to be both.
    if labels.contains_key(NYDUS_BOOTSTRAP) {
        Content::Bootstrap
    } else if labels.contains_key(NYDUS_BLOB) {
        Content::Data
    } else if labels.contains_key(STARGZ_LAYER) {
        Content::Indexed
    } else {
        Content::Files
    }
}

/// The id of the blob behind a layer whose files are not unpacked, if the client told its digest.
pub fn data_blob(labels: &Labels) -> Option<String> {
    let digest = labels.get(LAYER_DIGEST)?;
    matches!(content(labels), Content::Data | Content::Indexed).then(|| hex_of(digest))?
}

fn table(labels: &Labels) -> Option<Table> {
    let toc = hex_of(labels.get(TOC_DIGEST)?)?.parse().ok()?;
    Some(Table { layer: hex_of(labels.get(LAYER_DIGEST).or_else(|| labels.get(STARGZ_DIGEST))?)?, toc })
}

/// The hex part of a sha256 digest.
fn hex_of(digest: &str) -> Option<String> {
    let hex = digest.strip_prefix("sha256:")?;
    (hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase()))
        .then(|| hex.to_owned())
}

fn id_map(labels: &Labels) -> Result<Option<IdMap>, LabelError> {
    let (users, groups) = match (labels.get(UID_MAP), labels.get(GID_MAP)) {
        (None, None) => return Ok(None),
        (Some(users), None) => return Err(LabelError::IdMap { label: UID_MAP, value: users.clone() }),
        (None, Some(groups)) => return Err(LabelError::IdMap { label: GID_MAP, value: groups.clone() }),
        (Some(users), Some(groups)) => (users, groups),
    };
    let outer = |label, value: &String| range(value).ok_or_else(|| LabelError::IdMap { label, value: value.clone() });
    Ok(Some(IdMap {
        users: users.clone(),
        groups: groups.clone(),
        root_user: outer(UID_MAP, users)?,
        root_group: outer(GID_MAP, groups)?,
    }))
}

/// The outer id that inner 0 has in `inner:outer:size`.
fn range(text: &str) -> Option<u32> {
    let mut parts = text.split(':').map(|part| part.parse::<u32>().ok());
    let (inner, outer, size) = (parts.next()??, parts.next()??, parts.next()??);
    // The highest id stands for none, to the kernel.
    let fits = size > 0 && outer.checked_add(size).is_some();
    (inner == 0 && fits && parts.next().is_none()).then_some(outer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn no_labels_are_a_container_of_files() {
        let layer = parse(&Labels::new()).expect("nothing to refuse");
        assert_eq!(layer.content, Content::Files);
        assert_eq!((layer.target, layer.image, layer.volatile), (None, None, false));
    }

    #[test]
    fn presence_alone_tells_data_and_bootstrap() {
        for (pairs, content) in [
            (&[(NYDUS_BLOB, "true")][..], Content::Data),
            (&[(NYDUS_BLOB, "")], Content::Data),
            (&[(NYDUS_BOOTSTRAP, "")], Content::Bootstrap),
            (&[(NYDUS_BLOB, "true"), (NYDUS_BOOTSTRAP, "true")], Content::Bootstrap),
            (&[("containerd.io/snapshot/nydus-ref", "sha256:00")], Content::Files),
        ] {
            assert_eq!(parse(&labels(pairs)).expect("valid").content, content, "{pairs:?}");
        }
    }

    #[test]
    fn the_image_reference_falls_back_to_the_older_label() {
        let both = parse(&labels(&[(IMAGE_REF, "a/b:1"), (STARGZ_REF, "c/d:2")])).expect("valid");
        assert_eq!(both.image.as_deref(), Some("a/b:1"));
        let old = parse(&labels(&[(STARGZ_REF, "c/d:2")])).expect("valid");
        assert_eq!(old.image.as_deref(), Some("c/d:2"));
    }

    #[test]
    fn only_a_sha256_digest_names_a_blob() {
        let hex = "ab".repeat(32);
        let digest = format!("sha256:{hex}");
        assert_eq!(data_blob(&labels(&[(NYDUS_BLOB, "true"), (LAYER_DIGEST, &digest)])), Some(hex));
        assert_eq!(data_blob(&labels(&[(LAYER_DIGEST, &digest)])), None, "an ordinary layer has no blob");
        for bad in ["sha256:../../etc", "sha512:ab", "ab", ""] {
            assert_eq!(data_blob(&labels(&[(NYDUS_BLOB, "true"), (LAYER_DIGEST, bad)])), None, "{bad}");
        }
    }

    #[test]
    fn a_mapping_of_ids_needs_both_halves_and_one_range() {
        let map = parse(&labels(&[(UID_MAP, "0:1000:65536"), (GID_MAP, "0:2000:65536")])).expect("valid").id_map;
        assert_eq!(map.map(|map| (map.root_user, map.root_group)), Some((1000, 2000)));
        for bad in [
            &[(UID_MAP, "0:1:2")][..],
            &[(GID_MAP, "0:1:2")],
            &[(UID_MAP, "0:1:2"), (GID_MAP, "0:1:2,3:4:5")],
            &[(UID_MAP, "0:1"), (GID_MAP, "0:1:2")],
            &[(UID_MAP, "1:1:2"), (GID_MAP, "0:1:2")],
            &[(UID_MAP, "0:4294967295:1"), (GID_MAP, "0:1:2")],
            &[(UID_MAP, "0:1:4294967295"), (GID_MAP, "0:1:2")],
        ] {
            parse(&labels(bad)).expect_err("half a mapping would give files to the wrong owner");
        }
    }

    #[test]
    fn a_secret_does_not_show_in_debug_output() {
        let layer = parse(&labels(&[(PULL_USER, "me"), (PULL_SECRET, "hunter2")])).expect("valid");
        assert!(!format!("{layer:?}").contains("hunter2"));
    }
}
