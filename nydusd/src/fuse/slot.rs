//! What each serving thread is doing, for interruptions and for whoever asks.
//!
//! A thread has one slot for life and writes down the request that it serves before it serves it. All writes
//! are plain atomics: nothing here slows a request down.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;

use crate::api::types::Inflight;

/// One thread's present request.
#[derive(Debug, Default)]
pub struct Slot {
    unique: AtomicU64,
    node: AtomicU64,
    opcode: AtomicU32,
    since: AtomicU64,
    interrupted: AtomicU64,
    interruption: Notify,
}

impl Slot {
    /// Writes down a request.
    pub(crate) fn begin(&self, unique: u64, opcode: u32, node: u64) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        self.opcode.store(opcode, Ordering::Relaxed);
        self.node.store(node, Ordering::Relaxed);
        self.since.store(now, Ordering::Relaxed);
        self.unique.store(unique, Ordering::Release);
    }

    /// Crosses the request out.
    pub(crate) fn end(&self) {
        self.unique.store(0, Ordering::Release);
    }

    /// Waits until the present request is interrupted.
    pub(crate) async fn interrupted(&self) {
        let unique = self.unique.load(Ordering::Relaxed);
        loop {
            let interruption = self.interruption.notified();
            if self.interrupted.load(Ordering::Acquire) == unique {
                return;
            }
            // May wake for an interruption of an earlier request that ended first; hence the loop.
            interruption.await;
        }
    }

    fn interrupt(&self, unique: u64) -> bool {
        if self.unique.load(Ordering::Acquire) != unique {
            return false;
        }
        self.interrupted.store(unique, Ordering::Release);
        self.interruption.notify_one();
        true
    }
}

/// The slots of all threads of a session. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Slots(Arc<Mutex<Vec<Arc<Slot>>>>);

impl Slots {
    /// Adds a slot, for a new thread.
    pub(crate) fn add(&self) -> Arc<Slot> {
        let slot = Arc::new(Slot::default());
        self.lock().push(slot.clone());
        slot
    }

    /// Removes the slot of a thread that ends.
    pub(crate) fn remove(&self, slot: &Arc<Slot>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, slot));
    }

    /// Interrupts the request `unique`; returns whether a thread serves it.
    pub(crate) fn interrupt(&self, unique: u64) -> bool {
        self.lock().iter().any(|slot| slot.interrupt(unique))
    }

    /// Returns the requests that are being served.
    pub fn inflight(&self) -> Vec<Inflight> {
        let busy = |slot: &Arc<Slot>| {
            let unique = slot.unique.load(Ordering::Acquire);
            (unique != 0).then(|| Inflight {
                inode: slot.node.load(Ordering::Relaxed),
                opcode: slot.opcode.load(Ordering::Relaxed),
                unique,
                timestamp_secs: slot.since.load(Ordering::Relaxed),
            })
        };
        self.lock().iter().filter_map(busy).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Slot>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn only_the_interrupted_request_wakes() {
        let slots = Slots::default();
        let slot = slots.add();
        slot.begin(6, 15, 1);
        assert!(!slots.interrupt(4), "nobody serves request 4");
        assert!(slots.interrupt(6));
        slot.interrupted().await;
        slot.end();
        slot.begin(8, 15, 1);
        let waited = tokio::time::timeout(Duration::from_millis(20), slot.interrupted()).await;
        assert!(waited.is_err(), "request 8 was not interrupted");
        assert!(slots.interrupt(8));
        slot.interrupted().await;
        assert_eq!(slots.inflight().len(), 1);
        slots.remove(&slot);
        assert_eq!(slots.inflight().len(), 0);
    }
}
