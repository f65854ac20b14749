//! The documents of an image in a registry, as far as a converter reads and writes them.
//!
//! Only what is needed is typed; the image configuration stays JSON, because all of it but two lists must survive.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// Media types and annotation keys.
pub mod names {
    /// OCI manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// OCI image configuration.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// OCI layer, gzip.
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    /// Configuration of a nydus image beside its original in one index.
    pub const NYDUS_CONFIG: &str = "application/vnd.nydus.image.config.v1+json";
    /// What such an index says that its nydus manifests are.
    pub const NYDUS_MANIFEST: &str = "application/vnd.nydus.image.manifest.v1+json";
    /// Docker manifest.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker index.
    pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker image configuration.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// Docker layer; archives say this of bare tars.
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// Docker layer, gzip.
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    /// Nydus blob.
    pub const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
    /// Marks a blob layer.
    pub const ANNOTATION_BLOB: &str = "containerd.io/snapshot/nydus-blob";
    /// On a blob layer that refers to an original one: that one's digest.
    pub const ANNOTATION_REF: &str = "containerd.io/snapshot/nydus-ref";
    /// Marks the bootstrap layer.
    pub const ANNOTATION_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
    /// RAFS version, on the bootstrap layer and the manifest.
    pub const ANNOTATION_FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
    /// Digest of the source manifest.
    pub const ANNOTATION_SOURCE_DIGEST: &str = "containerd.io/snapshot/nydus-source-digest";
    /// Name of the source image.
    pub const ANNOTATION_SOURCE_REFERENCE: &str = "containerd.io/snapshot/nydus-source-reference";
    /// What made the image.
    pub const ANNOTATION_BUILDER: &str = "containerd.io/snapshot/nydus-builder-version";
}

/// A reference to a blob or manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type.
    #[serde(default)]
    pub media_type: String,
    /// Digest, with its algorithm.
    pub digest: String,
    /// Size in bytes.
    pub size: u64,
    /// Other places to get it from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Annotations::is_empty", deserialize_with = "null_is_empty")]
    pub annotations: Annotations,
    /// Platform, in indexes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Artifact type, in indexes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

/// Annotations, by key.
pub type Annotations = BTreeMap<String, String>;

fn null_is_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Annotations, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Descriptor {
    /// Names `size` bytes with this digest.
    pub fn new(media_type: &str, digest: &str, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: digest.to_owned(),
            size,
            urls: Vec::new(),
            annotations: Annotations::new(),
            platform: None,
            artifact_type: None,
        }
    }

    /// Names these bytes.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(bytes)));
        Self::new(media_type, &digest, bytes.len() as u64)
    }

    /// Returns whether this names a list of manifests.
    pub fn is_index(&self) -> bool {
        self.media_type == names::OCI_INDEX || self.media_type == names::DOCKER_INDEX
    }

    /// Returns whether this is a blob or bootstrap layer of a nydus image.
    pub fn is_nydus(&self) -> bool {
        self.media_type == names::NYDUS_BLOB
            || self.annotations.contains_key(names::ANNOTATION_BLOB)
            || self.annotations.contains_key(names::ANNOTATION_BOOTSTRAP)
    }
}

/// A manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Media type of this document.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The image configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<Descriptor>,
    /// The manifest that this one belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Annotations::is_empty", deserialize_with = "null_is_empty")]
    pub annotations: Annotations,
}

/// A list of manifests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Media type of this document.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The manifests.
    pub manifests: Vec<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "Annotations::is_empty", deserialize_with = "null_is_empty")]
    pub annotations: Annotations,
}

/// What a manifest is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Processor, as Go names it.
    pub architecture: String,
    /// Operating system.
    pub os: String,
    /// Processor variant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Operating system version.
    #[serde(rename = "os.version", default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Operating system features.
    #[serde(rename = "os.features", default, skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
}

/// Text that names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` does not name a platform; platforms look like `linux/amd64` or `linux/arm64/v8`")]
pub struct InvalidPlatform(String);

impl FromStr for Platform {
    type Err = InvalidPlatform;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.trim().split('/');
        let (os, architecture, variant) = (parts.next(), parts.next(), parts.next());
        let usable = |part: &&str| {
            !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        match (os.filter(usable), architecture.filter(usable), parts.next()) {
            (Some(os), Some(architecture), None) => Ok(Self {
                architecture: match architecture {
                    "x86_64" => "amd64",
                    "aarch64" => "arm64",
                    other => other,
                }
                .to_owned(),
                os: os.to_owned(),
                variant: variant.map(str::to_owned),
                os_version: None,
                os_features: Vec::new(),
            }),
            _ => Err(InvalidPlatform(text.to_owned())),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

impl Platform {
    /// Returns the platform of this machine.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            variant: None,
            os_version: None,
            os_features: Vec::new(),
        }
    }

    /// Returns whether `offered` serves who asks for this platform; without a variant any is taken.
    pub fn accepts(&self, offered: &Self) -> bool {
        let variant = |platform: &Self| match (platform.architecture.as_str(), platform.variant.as_deref()) {
            ("arm64", None | Some("v8")) => None,
            (_, variant) => variant.map(str::to_owned),
        };
        self.os == offered.os
            && self.architecture == offered.architecture
            && (variant(self).is_none() || variant(self) == variant(offered))
    }
}
