//! Blobs in memory, with faults on request: what the tests of every crate read from.
//!
//! It is a real source, not a list of expected calls. Faults are a queue: each read takes the next one, and
//! when the queue is empty, or was given [`Fault::None`], the read is answered truly.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use nydus_rafs::BlobId;

use crate::registry::lock;
use crate::route::SourceError;

/// What goes wrong with one read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The source is not available.
    Fail,
    /// The answer comes later.
    Delay(Duration),
    /// The answer never comes.
    Hang,
    /// The bit `1` of the byte at this place of the answer is flipped.
    WrongByte(usize),
    /// The answer has fewer bytes than were asked for, by this many. A caller that trusts lengths is wrong.
    Short(usize),
}

/// A store of blobs in memory. Cheap to clone; clones are the same store.
#[derive(Debug, Clone, Default)]
pub struct Memory(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    blobs: Mutex<HashMap<BlobId, Bytes>>,
    faults: Mutex<VecDeque<Fault>>,
    always: Mutex<Option<Fault>>,
    reads: AtomicU64,
    bytes: AtomicU64,
}

impl Memory {
    /// Makes an empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a blob.
    pub fn insert(&self, blob: BlobId, bytes: impl Into<Bytes>) {
        lock(&self.0.blobs).insert(blob, bytes.into());
    }

    /// Removes a blob.
    pub fn remove(&self, blob: &BlobId) {
        lock(&self.0.blobs).remove(blob);
    }

    /// Makes the next reads go wrong, one fault each.
    pub fn inject(&self, faults: impl IntoIterator<Item = Fault>) {
        lock(&self.0.faults).extend(faults);
    }

    /// Makes every read go wrong while the queue of faults is empty; `None` ends that.
    pub fn inject_always(&self, fault: Option<Fault>) {
        *lock(&self.0.always) = fault;
    }

    /// Returns how many reads came.
    pub fn reads(&self) -> u64 {
        self.0.reads.load(Relaxed)
    }

    /// Returns how many bytes were given.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Relaxed)
    }

    /// Reads the bytes `stored`, unless a fault is due.
    ///
    /// # Errors
    ///
    /// [`SourceError`] if the blob or the range is not there, or a fault says so.
    pub async fn read(&self, blob: &BlobId, stored: Range<u64>) -> Result<Bytes, SourceError> {
        self.0.reads.fetch_add(1, Relaxed);
        let fault = lock(&self.0.faults).pop_front().or_else(|| lock(&self.0.always).clone());
        let fault = fault.unwrap_or(Fault::None);
        match &fault {
            Fault::Fail => return Err(SourceError::Injected { blob: blob.clone() }),
            Fault::Delay(time) => tokio::time::sleep(*time).await,
            Fault::Hang => std::future::pending().await,
            Fault::None | Fault::WrongByte(_) | Fault::Short(_) => {}
        }
        let all = self.get(blob)?;
        let outside = || SourceError::Outside {
            place: "memory".to_owned(),
            blob: blob.clone(),
            stored: stored.clone(),
            size: all.len() as u64,
        };
        let start = usize::try_from(stored.start).map_err(|_| outside())?;
        let end = usize::try_from(stored.end).map_err(|_| outside())?;
        if start > end || end > all.len() {
            return Err(outside());
        }
        let mut bytes = all.slice(start..end);
        match fault {
            Fault::WrongByte(at) if at < bytes.len() => {
                let mut wrong = bytes.to_vec();
                wrong[at] ^= 1;
                bytes = wrong.into();
            }
            Fault::Short(by) => bytes.truncate(bytes.len().saturating_sub(by)),
            _ => {}
        }
        self.0.bytes.fetch_add(bytes.len() as u64, Relaxed);
        Ok(bytes)
    }

    /// Returns the size of a blob.
    ///
    /// # Errors
    ///
    /// [`SourceError`] if it is not there.
    pub async fn size(&self, blob: &BlobId) -> Result<u64, SourceError> {
        Ok(self.get(blob)?.len() as u64)
    }

    fn get(&self, blob: &BlobId) -> Result<Bytes, SourceError> {
        let found = lock(&self.0.blobs).get(blob).cloned();
        found.ok_or_else(|| SourceError::File {
            path: "memory".into(),
            blob: blob.clone(),
            reason: "it is not there".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn faults_come_once_each_and_in_order() {
        let blob: BlobId = "b".parse().unwrap();
        let memory = Memory::new();
        memory.insert(blob.clone(), "0123456789");
        memory.inject([Fault::Fail, Fault::WrongByte(0), Fault::Short(2)]);
        assert!(memory.read(&blob, 0..4).await.is_err());
        assert_eq!(memory.read(&blob, 0..4).await.unwrap(), "1123");
        assert_eq!(memory.read(&blob, 0..4).await.unwrap(), "01");
        assert_eq!(memory.read(&blob, 0..4).await.unwrap(), "0123");
        assert!(memory.read(&blob, 8..11).await.is_err());
        assert_eq!((memory.reads(), memory.bytes()), (5, 10));
    }
}
