//! A backend in memory that fails as it is told.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use nydus_backend::{Avoid, Served, SourceError, Urgency};
use nydus_rafs::BlobId;
use tokio::sync::Semaphore;

/// What goes wrong with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// No source answers.
    Fail,
    /// A byte is another one.
    Wrong,
    /// Bytes are missing at the end.
    Short,
    /// The answer takes a while.
    Slow,
    /// No answer comes.
    Hang,
}

/// One request that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) stored: Range<u64>,
    pub(crate) urgency: Urgency,
    pub(crate) avoid: Avoid,
}

#[derive(Debug, Default)]
pub(crate) struct Fake {
    pub(crate) blobs: Mutex<HashMap<BlobId, Bytes>>,
    /// Faults of the next requests, in order; then none.
    pub(crate) faults: Mutex<Vec<Fault>>,
    pub(crate) requests: Mutex<Vec<Request>>,
    /// Requests pass one by one when a test says so.
    pub(crate) gate: Option<Semaphore>,
    /// Every answer had to pass over all that comes before it.
    pub(crate) ignores_ranges: bool,
    pub(crate) under_way: AtomicU64,
}

impl Fake {
    pub(crate) async fn read(
        &self,
        blob: &BlobId,
        stored: Range<u64>,
        urgency: Urgency,
        avoid: Avoid,
    ) -> Result<Served, SourceError> {
        self.requests.lock().unwrap().push(Request { stored: stored.clone(), urgency, avoid });
        self.under_way.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &self.gate {
            gate.acquire().await.unwrap().forget();
        }
        let fault = {
            let mut faults = self.faults.lock().unwrap();
            if faults.is_empty() { Fault::None } else { faults.remove(0) }
        };
        let bytes = self.blobs.lock().unwrap()[blob].clone();
        let given = bytes.slice(usize::try_from(stored.start).unwrap()..usize::try_from(stored.end).unwrap());
        let bytes = match fault {
            Fault::None => given,
            Fault::Fail => return Err(SourceError::Config("told to fail".into())),
            Fault::Wrong => {
                let mut wrong = given.to_vec();
                let at = wrong.len() / 2;
                wrong[at] ^= 0x55;
                wrong.into()
            }
            Fault::Short => given.slice(..given.len() - 1),
            Fault::Slow => {
                tokio::time::sleep(Duration::from_millis(2)).await;
                given
            }
            Fault::Hang => std::future::pending().await,
        };
        let ignores_ranges = self.ignores_ranges;
        Ok(Served { bytes, source: "fake".into(), from_mirror: avoid == Avoid::Nothing, ignores_ranges })
    }
}
