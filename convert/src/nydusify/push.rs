//! Blobs on their way to the target repository.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use futures::{Stream, stream};
use nydus_backend::registry::{Client, Mounted, RegistryError, Upload};

use super::layer::{TRIES, pause};

/// How much of a file is read at once.
const PIECE: usize = 128 << 10;

/// Where blobs go.
#[derive(Debug, Clone)]
pub(super) struct Destination {
    pub(super) client: Client,
    pub(super) repository: String,
    /// A repository of the same registry that may hold the blob already.
    pub(super) sibling: Option<String>,
}

impl Destination {
    /// Makes the repository have the blob; returns whether it had to be sent.
    pub(super) async fn push(&self, digest: &str, size: u64, file: &Arc<File>) -> anyhow::Result<bool> {
        let mut attempt = 0;
        loop {
            match self.attempt(digest, size, file).await {
                Ok(sent) => return Ok(sent),
                Err(error) => {
                    attempt += 1;
                    if attempt >= TRIES || !(error.is_transient() || Upload::may_restart(&error)) {
                        return Err(error).with_context(|| {
                            format!("pushing blob {digest} to {}/{}", self.client.host(), self.repository)
                        });
                    }
                    tracing::warn!(digest, %error, attempt, "push broke off, beginning again");
                    tokio::time::sleep(pause(attempt, error.retry_after())).await;
                }
            }
        }
    }

    async fn attempt(&self, digest: &str, size: u64, file: &Arc<File>) -> Result<bool, RegistryError> {
        if self.client.has_blob(&self.repository, digest).await? {
            tracing::debug!(digest, "the target has the blob");
            return Ok(false);
        }
        let upload = match &self.sibling {
            Some(sibling) => match self.client.mount_blob(&self.repository, digest, sibling).await? {
                Mounted::Done => return Ok(false),
                Mounted::Upload(upload) => upload,
            },
            None => self.client.start_upload(&self.repository).await?,
        };
        if size == 0 {
            upload.finish(digest, Bytes::new()).await?;
        } else {
            upload.stream(Some(size), pieces(Arc::clone(file), size)).await?.finish(digest, Bytes::new()).await?;
        }
        Ok(true)
    }

    /// Pushes a document that is in memory.
    pub(super) async fn push_bytes(&self, digest: &str, bytes: Bytes) -> anyhow::Result<()> {
        let mut attempt = 0;
        loop {
            match self.client.push_blob(&self.repository, digest, bytes.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    attempt += 1;
                    if attempt >= TRIES || !error.is_transient() {
                        return Err(error).with_context(|| {
                            format!("pushing blob {digest} to {}/{}", self.client.host(), self.repository)
                        });
                    }
                    tokio::time::sleep(pause(attempt, error.retry_after())).await;
                }
            }
        }
    }
}

/// Reads a file piece by piece; its cursor is not moved, so several readers do not disturb each other.
fn pieces(file: Arc<File>, size: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    stream::unfold((file, 0), move |(file, at)| async move {
        if at >= size {
            return None;
        }
        let len = usize::try_from(size - at).unwrap_or(usize::MAX).min(PIECE);
        let reader = Arc::clone(&file);
        let read = tokio::task::spawn_blocking(move || {
            let mut piece = vec![0; len];
            reader.read_exact_at(&mut piece, at).map(|()| Bytes::from(piece))
        });
        let piece = read.await.map_err(io::Error::other).and_then(|piece| piece);
        // After an error there is nothing more to send.
        let next = if piece.is_ok() { at + len as u64 } else { size };
        Some((piece, (file, next)))
    })
}
