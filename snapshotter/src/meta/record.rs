//! What is recorded.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::labels::Labels;
use crate::usage::Usage;

/// What a snapshot is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Looked at.
    View,
    /// Written to.
    Active,
    /// Finished; others may be based on it.
    Committed,
}

impl Kind {
    /// The word that containerd's filters use.
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Number, also the directory's name.
    pub id: u64,
    /// What it is for.
    pub kind: Kind,
    /// Name of the parent, or empty.
    pub parent: String,
    /// As containerd gave them.
    pub labels: Labels,
    /// Nanoseconds since 1970.
    pub created: u64,
    /// Nanoseconds since 1970.
    pub updated: u64,
    /// Known once a committed snapshot was measured.
    pub usage: Option<Usage>,
}

impl Record {
    /// When it was created or committed.
    pub fn created_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.created)
    }

    /// When it last changed.
    pub fn updated_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.updated)
    }
}

/// How far the mount of an image got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Asked for; nydusd may or may not have it.
    Intended,
    /// nydusd said that it is mounted.
    Live,
}

/// An image that nydusd mounts, or is about to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// The bootstrap snapshot.
    pub id: u64,
    /// Name of the daemon that serves it.
    pub daemon: String,
    /// Reference of the image, if the client told.
    pub image: Option<String>,
    /// Ids of its blobs; `None` when the bootstrap could not be read for them.
    pub blobs: Option<Vec<String>>,
    /// How far it got.
    pub stage: Stage,
}

/// Everything recorded, at one moment.
#[derive(Debug, Default)]
pub struct Frozen {
    /// All snapshots.
    pub records: Vec<Record>,
    /// All images.
    pub instances: Vec<Instance>,
    /// Blobs that something no longer wants; others may.
    pub garbage: Vec<String>,
}
