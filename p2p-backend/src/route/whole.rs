//! All of a blob, from the first byte to the last, without holding it.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use nydus_rafs::BlobId;

use super::{Route, SourceError, Urgency, error};
use crate::registry::BlobStream;

/// Bytes read at once from places that are no streams.
const PIECE: u64 = 1 << 20;

/// A blob as it comes from one source.
pub struct WholeBlob {
    route: Route,
    blob: BlobId,
    source: Arc<str>,
    from_mirror: bool,
    from: From,
}

enum From {
    Stream(Box<BlobStream>),
    Pieces { at: u64, size: u64, urgency: Urgency },
}

impl fmt::Debug for WholeBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WholeBlob").field("blob", &self.blob).field("source", &self.source).finish_non_exhaustive()
    }
}

impl WholeBlob {
    pub(super) fn from_registry(
        route: Route,
        blob: BlobId,
        stream: Box<BlobStream>,
        source: Arc<str>,
        from_mirror: bool,
    ) -> Self {
        Self { route, blob, source, from_mirror, from: From::Stream(stream) }
    }

    pub(super) fn in_pieces(route: Route, blob: BlobId, size: u64, urgency: Urgency) -> Self {
        let source = route.place().into();
        Self { route, blob, source, from_mirror: false, from: From::Pieces { at: 0, size, urgency } }
    }

    /// Returns who gives the bytes, for messages.
    pub fn source(&self) -> &Arc<str> {
        &self.source
    }

    /// Returns the size of the blob, if the source told.
    pub fn size(&self) -> Option<u64> {
        match &self.from {
            From::Stream(stream) => stream.total(),
            From::Pieces { size, .. } => Some(*size),
        }
    }

    /// Returns the next bytes, or `None` at the end. Safe to cancel.
    ///
    /// # Errors
    ///
    /// [`SourceError`] if the source breaks, stalls, or ends early.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        match &mut self.from {
            From::Stream(stream) => match stream.next().await {
                Ok(piece) => {
                    let length = piece.as_ref().map_or(0, |piece| piece.len() as u64);
                    self.route.counters().arrived(length, self.from_mirror);
                    Ok(piece)
                }
                Err(source) => {
                    let (advice, source) = (error::advice(&source), Box::new(source));
                    Err(SourceError::Unavailable { place: self.route.place(), blob: self.blob.clone(), source, advice })
                }
            },
            From::Pieces { at, size, .. } if *at >= *size => Ok(None),
            From::Pieces { at, size, urgency } => {
                let end = (*size).min(*at + PIECE);
                let piece = self.route.read(&self.blob, *at..end, *urgency).await?;
                *at = end;
                Ok(Some(piece))
            }
        }
    }
}
