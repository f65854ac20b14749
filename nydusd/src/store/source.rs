//! Where the store's bytes come from: a [`Route`], or in tests a backend whose faults are known.

use std::ops::Range;

use nydus_backend::{Avoid, Route, Served, SourceError, Urgency};
use nydus_rafs::BlobId;

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
    /// Returns the bytes `stored` of `blob`.
    pub(super) async fn read(
        &self,
        blob: &BlobId,
        stored: Range<u64>,
        urgency: Urgency,
        avoid: Avoid,
    ) -> Result<Served, SourceError> {
        match self {
            Self::Route(route) => route.read_from(blob, stored, urgency, avoid).await,
            #[cfg(test)]
            Self::Fake(fake) => fake.read(blob, stored, urgency, avoid).await,
        }
    }
}
