//! Why an image is not mounted, and what containerd is told about it.

use std::path::{Path, PathBuf};

use nydusd::api::client::ClientError;

use crate::bootstrap::BootstrapError;
use crate::configure::ConfigureError;
use crate::status::SnapshotError;

/// Why an image is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The snapshot does not hold a bootstrap that can be mounted.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// There is no configuration for it.
    #[error(transparent)]
    Configure(#[from] ConfigureError),
    /// The daemon did not start.
    #[error("could not start {}: {why}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What happened.
        why: String,
    },
    /// The daemon did not mount it.
    #[error("nydusd could not mount the image: {0}")]
    Mount(#[from] ClientError),
    /// The mount is there and does not answer.
    #[error("the mount at {} does not answer: {why}", path.display())]
    Dead {
        /// Where.
        path: PathBuf,
        /// How it fails.
        why: String,
    },
    /// A file or directory of ours could not be written.
    #[error("{doing} {}: {source}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The records.
    #[error("{0}")]
    Records(String),
}

impl ServeError {
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { doing, path, source }
    }

    pub(super) fn status(&self, image: u64) -> SnapshotError {
        let text = format!("image of snapshot {image}: {self}");
        match self {
            Self::Start { .. } | Self::Dead { .. } => SnapshotError::Unavailable(text),
            Self::Mount(error) if !matches!(error, ClientError::Refused { .. }) => SnapshotError::Unavailable(text),
            _ => SnapshotError::Image(text),
        }
    }
}

impl From<SnapshotError> for ServeError {
    fn from(error: SnapshotError) -> Self {
        Self::Records(error.full_text())
    }
}
