//! Where an image lies: in a repository of a registry, or in an OCI layout on disk.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use nydus_backend::registry::{BlobRequest, BlobStream, Client, Manifest, RegistryError};

use super::layout::{Layout, LayoutError, Span};

/// A place that holds images.
#[derive(Debug, Clone)]
pub enum Place {
    /// A repository.
    Repository {
        /// Speaks to the registry.
        client: Client,
        /// The repository's name.
        name: String,
    },
    /// An OCI layout, in a directory or an archive.
    Layout(Arc<Layout>),
}

/// Why something cannot be had from a place, or brought there.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The registry says so.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The layout does.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl PlaceError {
    /// Returns what the registry said, if there is one.
    pub(super) fn registry(&self) -> Option<&RegistryError> {
        match self {
            Self::Registry(error) => Some(error),
            Self::Layout(_) => None,
        }
    }

    /// Tells whether the same may succeed a little later.
    pub(super) fn is_transient(&self) -> bool {
        self.registry().is_some_and(RegistryError::is_transient)
    }

    /// Returns how long to wait before the next attempt, if the answer says so.
    pub(super) fn retry_after(&self) -> Option<std::time::Duration> {
        self.registry().and_then(RegistryError::retry_after)
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Repository { client, name } => write!(f, "{}/{name}", client.host()),
            Self::Layout(layout) => write!(f, "{}", layout.path().display()),
        }
    }
}

impl Place {
    /// Reads the manifest or index that a tag or digest names.
    pub(super) async fn manifest(&self, target: &str) -> Result<Manifest, PlaceError> {
        match self {
            Self::Repository { client, name } => Ok(client.manifest(name, target).await?),
            Self::Layout(layout) => {
                let layout = Arc::clone(layout);
                let target = target.to_owned();
                Ok(blocking(move || layout.manifest(&target)).await?)
            }
        }
    }

    /// Returns the size of a blob.
    pub(super) async fn size(&self, digest: &str) -> Result<u64, PlaceError> {
        match self {
            Self::Repository { client, name } => Ok(client.blob_size(name, digest).await?),
            Self::Layout(layout) => {
                let layout = Arc::clone(layout);
                let digest = digest.to_owned();
                Ok(blocking(move || layout.blob(&digest)).await?.len())
            }
        }
    }

    /// Opens a blob, or a part of it.
    pub(super) async fn blob(&self, digest: &str, range: Option<Range<u64>>) -> Result<Reading, PlaceError> {
        match self {
            Self::Repository { client, name } => {
                let request = BlobRequest { range, ..BlobRequest::default() };
                Ok(Reading::Stream(Box::new(client.blob(name, digest, &request).await?)))
            }
            Self::Layout(layout) => {
                let layout = Arc::clone(layout);
                let digest = digest.to_owned();
                let span = blocking(move || layout.blob(&digest)).await?;
                let (span, at) = match range {
                    Some(Range { start, end }) => (span.up_to(end), start),
                    None => (span, 0),
                };
                Ok(Reading::Span { span, at })
            }
        }
    }
}

/// The bytes of a blob as they come.
#[derive(Debug)]
pub(super) enum Reading {
    Stream(Box<BlobStream>),
    Span { span: Span, at: u64 },
}

impl Reading {
    /// Returns the next bytes, or `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, PlaceError> {
        match self {
            Self::Stream(stream) => Ok(stream.next().await?),
            Self::Span { span, at } => {
                let (span, from) = (span.clone(), *at);
                let piece = blocking(move || span.piece(from)).await?;
                *at += piece.len() as u64;
                Ok(Some(piece).filter(|piece| !piece.is_empty()))
            }
        }
    }

    /// Returns all bytes; fails rather than hold more than `limit`.
    pub(super) async fn read(self, limit: u64) -> Result<Bytes, PlaceError> {
        match self {
            Self::Stream(stream) => Ok(stream.read(limit).await?),
            Self::Span { span, at } => Ok(blocking(move || span.read(at, limit)).await?),
        }
    }
}

/// Does what waits for a disk where waiting is allowed.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LayoutError> + Send + 'static,
) -> Result<T, LayoutError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(LayoutError::Stopped))
}
