//! Blobs and manifests on their way to the target.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use bytes::Bytes;
use futures::{Stream, stream};
use nydus_backend::registry::{Client, Mounted, Reference, RegistryError, Upload};

use super::fetch::persist;
use super::layer::{self, TRIES, pause};
use super::place::{Place, blocking};
use crate::oci::{Descriptor, Index, Manifest, names};

/// How much of a file is read at once.
const PIECE: usize = 128 << 10;

/// What is tried where a registry, or a proxy before it, finds a request too large: the largest part, in bytes, then
/// each time a quarter of it, down to what the strictest proxies take if nobody configures them.
const PARTS: [u64; 4] = [64 << 20, 16 << 20, 4 << 20, 1 << 20];

/// Where blobs go.
#[derive(Debug, Clone)]
pub(super) struct Destination {
    pub(super) place: Place,
    /// What the image will be called.
    pub(super) name: Reference,
    /// A repository of the same registry that may hold the blob already.
    pub(super) sibling: Option<String>,
    /// How many of [`PARTS`] were found too large.
    pub(super) too_large: Arc<AtomicUsize>,
}

impl Destination {
    /// Blobs go to `place`; those that lie in another repository of the same registry may be had from there.
    pub(super) fn new(place: Place, name: Reference, origin: &Place) -> Self {
        let sibling = match (&place, origin) {
            (Place::Repository { client, name }, Place::Repository { client: other, name: sibling })
                if client.host() == other.host() && name != sibling =>
            {
                Some(sibling.clone())
            }
            _ => None,
        };
        Self { place, name, sibling, too_large: Arc::default() }
    }

    /// Makes the target have the blob; returns whether it had to be sent.
    pub(super) async fn push(&self, digest: &str, size: u64, file: &Arc<File>) -> anyhow::Result<bool> {
        match &self.place {
            Place::Repository { client, name } => self.upload(client, name, digest, size, file).await,
            Place::Layout(layout) => {
                let (layout, digest, file) = (Arc::clone(layout), digest.to_owned(), Arc::clone(file));
                Ok(blocking(move || layout.add(&digest, size, &file)).await?)
            }
        }
    }

    async fn upload(
        &self,
        client: &Client,
        repository: &str,
        digest: &str,
        size: u64,
        file: &Arc<File>,
    ) -> anyhow::Result<bool> {
        let mut attempt = 0;
        let mut session = None;
        loop {
            let tried = self.too_large.load(Ordering::Relaxed);
            let part = tried.checked_sub(1).map(|index| PARTS[index]);
            let error = match self.attempt(client, repository, (digest, size), part, file, &mut session).await {
                Ok(sent) => return Ok(sent),
                Err(error) => error,
            };
            let named = || format!("pushing blob {digest} to {}", self.place);
            if error.status().is_some_and(|status| status.as_u16() == 413) {
                if tried == PARTS.len() {
                    if let Some(upload) = session {
                        upload.cancel().await;
                    }
                    return Err(error).with_context(|| {
                        format!(
                            "{}: the registry, or a proxy before it, takes not even {} bytes at once; raise its limit (nginx calls it client_max_body_size)",
                            named(),
                            PARTS[tried - 1]
                        )
                    });
                }
                tracing::warn!(digest, %error, "sending the blob in parts of {} bytes", PARTS[tried]);
                // Another layer may have found out meanwhile.
                self.too_large.fetch_max(tried + 1, Ordering::Relaxed);
                continue;
            }
            attempt += 1;
            if attempt >= TRIES || !(error.is_transient() || Upload::may_restart(&error)) {
                if let Some(upload) = session {
                    upload.cancel().await;
                }
                return Err(error).with_context(named);
            }
            tracing::warn!(digest, %error, attempt, "push broke off");
            tokio::time::sleep(pause(attempt, error.retry_after())).await;
        }
    }

    /// Opens an upload, or goes on with `session`, which stays if this breaks off.
    async fn attempt(
        &self,
        client: &Client,
        repository: &str,
        (digest, size): (&str, u64),
        part: Option<u64>,
        file: &Arc<File>,
        session: &mut Option<Upload>,
    ) -> Result<bool, RegistryError> {
        if let Some(mut upload) = session.take() {
            match upload.resume().await {
                Ok(arrived) if arrived <= size => {
                    tracing::info!(digest, arrived, "going on where the push broke off");
                    *session = Some(upload);
                }
                Ok(_) => upload.cancel().await,
                Err(error) if error.is_transient() && !matches!(error, RegistryError::Form { .. }) => {
                    *session = Some(upload);
                    return Err(error);
                }
                Err(error) => tracing::info!(digest, %error, "the registry has lost the upload; beginning again"),
            }
        }
        let upload = match session {
            Some(upload) => upload,
            None => {
                if client.has_blob(repository, digest).await? {
                    tracing::debug!(digest, "the target has the blob");
                    return Ok(false);
                }
                session.insert(match &self.sibling {
                    Some(sibling) => match client.mount_blob(repository, digest, sibling).await? {
                        Mounted::Done => return Ok(false),
                        Mounted::Upload(upload) => upload,
                    },
                    None => client.start_upload(repository).await?,
                })
            }
        };
        while upload.sent() < size {
            let at = upload.sent();
            let end = part.map_or(size, |part| size.min(at.saturating_add(part)));
            let bytes = pieces(Arc::clone(file), at..end);
            // Of a blob in one piece nobody needs to hear where it begins.
            match (at, end) == (0, size) {
                true => upload.stream(Some(size), bytes).await?,
                false => upload.part(end - at, bytes).await?,
            }
        }
        upload.finish(digest, Bytes::new()).await?;
        Ok(true)
    }

    /// Makes the target have a blob of the source as it is; returns whether it had to be sent.
    pub(super) async fn bring(&self, origin: &Place, blob: &Descriptor, work_dir: &Path) -> anyhow::Result<bool> {
        if let Place::Repository { client, name } = &self.place {
            let there = persist("asking for a blob", async || Ok(client.has_blob(name, &blob.digest).await?)).await?;
            if there {
                return Ok(false);
            }
            if let Some(sibling) = &self.sibling {
                let mounting = persist("mounting a blob from another repository", async || {
                    Ok(client.mount_blob(name, &blob.digest, sibling).await?)
                });
                match mounting.await? {
                    Mounted::Done => return Ok(false),
                    // Begun again below, when its bytes are at hand.
                    Mounted::Upload(upload) => upload.cancel().await,
                }
            }
        }
        let spool = layer::keep(origin, blob, work_dir).await?;
        self.push(&blob.digest, blob.size, &spool).await
    }

    /// Pushes a document that is in memory.
    pub(super) async fn push_bytes(&self, digest: &str, bytes: Bytes) -> anyhow::Result<()> {
        match &self.place {
            Place::Repository { client, name } => {
                let what = format!("pushing blob {digest} to {}", self.place);
                persist(&what, async || Ok(client.push_blob(name, digest, bytes.clone()).await?)).await
            }
            Place::Layout(layout) => {
                let (layout, digest) = (Arc::clone(layout), digest.to_owned());
                blocking(move || layout.add_bytes(&digest, &bytes)).await?;
                Ok(())
            }
        }
    }

    /// Pushes a manifest or index that others refer to by its digest.
    pub(super) async fn put(&self, digest: &str, media_type: &str, bytes: &Bytes) -> anyhow::Result<()> {
        match &self.place {
            Place::Repository { client, name } => {
                persist("pushing a manifest", async || {
                    Ok(client.put_manifest(name, digest, media_type, bytes.clone()).await?)
                })
                .await?;
                Ok(())
            }
            Place::Layout(_) => self.push_bytes(digest, bytes.clone()).await,
        }
    }

    /// Makes a manifest findable by its subject: where the registry does not do so itself, in the index under the tag that
    /// the subject's digest makes.
    pub(super) async fn refer(&self, mut descriptor: Descriptor, bytes: &Bytes) -> anyhow::Result<()> {
        let manifest: Manifest = serde_json::from_slice(bytes).context("reading the manifest that was made")?;
        let (Place::Repository { client, name }, Some(subject)) = (&self.place, &manifest.subject) else {
            return Ok(());
        };
        self.put(&descriptor.digest, &descriptor.media_type, bytes).await?;
        let known =
            persist("asking for referrers", async || Ok(client.referrers(name, &subject.digest, None).await?)).await?;
        let mut index: Index =
            serde_json::from_value(serde_json::to_value(&known)?).context("reading the list of referrers")?;
        if index.manifests.iter().any(|entry| entry.digest == descriptor.digest) {
            return Ok(());
        }
        descriptor.platform = None;
        descriptor.artifact_type = Some(manifest.config.media_type);
        descriptor.annotations = manifest.annotations;
        index.media_type = names::OCI_INDEX.to_owned();
        index.manifests.push(descriptor);
        let index = Bytes::from(serde_json::to_vec(&index).context("writing the list of referrers")?);
        self.put(&subject.digest.replace(':', "-"), names::OCI_INDEX, &index).await
    }

    /// Gives a manifest or index the image's name. Nobody who asks for the image sees anything of it before.
    pub(super) async fn tag(&self, media_type: &str, bytes: &Bytes) -> anyhow::Result<()> {
        match &self.place {
            Place::Repository { .. } => self.put(self.name.tag().unwrap_or("latest"), media_type, bytes).await,
            Place::Layout(layout) => {
                let (layout, name) = (Arc::clone(layout), self.name.clone());
                let (media_type, bytes) = (media_type.to_owned(), bytes.clone());
                blocking(move || layout.name(&name, &media_type, &bytes)).await?;
                Ok(())
            }
        }
    }
}

/// Reads a range of a file piece by piece; its cursor is not moved, so several readers do not disturb each other.
fn pieces(file: Arc<File>, range: Range<u64>) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    stream::unfold((file, range), move |(file, Range { start, end })| async move {
        if start >= end {
            return None;
        }
        let len = usize::try_from(end - start).unwrap_or(usize::MAX).min(PIECE);
        let reader = Arc::clone(&file);
        let read = tokio::task::spawn_blocking(move || {
            let mut piece = vec![0; len];
            reader.read_exact_at(&mut piece, start).map(|()| Bytes::from(piece))
        });
        let piece = read.await.map_err(io::Error::other).and_then(|piece| piece);
        let piece = piece.map_err(|error| io::Error::new(error.kind(), format!("in the work directory: {error}")));
        // After an error there is nothing more to send.
        let next = if piece.is_ok() { start + len as u64 } else { end };
        Some((piece, (file, next..end)))
    })
}
