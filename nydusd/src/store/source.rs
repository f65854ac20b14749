//! Where the store's bytes come from: a [`Route`], or in tests a backend whose faults are known.

use std::ops::Range;

use bytes::Bytes;
use nydus_backend::{Route, SourceError, Urgency};
use nydus_rafs::BlobId;

/// Who may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// Mirrors, then the origin.
    Anyone,
    /// The origin only: what a mirror gave was not what it should be.
    Origin,
}

/// A place that serves blobs.
#[derive(Debug, Clone)]
pub(super) enum Source {
    Route(Route),
    #[cfg(test)]
    Fake(std::sync::Arc<super::tests::fake::Fake>),
}

impl From<Route> for Source {
    fn from(route: Route) -> Self {
        Self::Route(route)
    }
}

impl Source {
    /// Returns exactly the bytes `stored` of `blob`.
    pub(super) async fn read(
        &self,
        blob: &BlobId,
        stored: Range<u64>,
        urgency: Urgency,
        ask: Ask,
    ) -> Result<Bytes, SourceError> {
        match self {
            Self::Route(route) => {
                let _ = ask;
                route.read(blob, stored, urgency).await
            }
            #[cfg(test)]
            Self::Fake(fake) => fake.read(blob, stored, urgency, ask).await,
        }
    }
}
