//! A piece on its way: bytes that readers may have before the whole piece is there.
//!
//! One fetch writes, any number of readers follow. A reader says so by holding an [`Interest`]; when the last one goes, the
//! fetch is told, so that nobody's bytes are asked of a registry.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{Notify, watch};

use super::upstream::UpstreamError;

/// What the pieces of one upstream request have in common.
#[derive(Debug)]
pub(super) struct Launch {
    /// Stands for the Authorization and the place that the bytes are asked with; its refusal is nobody else's.
    pub(super) key: [u8; 32],
    /// Whether the registry is being asked, not another mirror.
    pub(super) at_registry: AtomicBool,
    /// Told when a piece of it has lost its last reader.
    pub(super) left: Notify,
}

impl Launch {
    pub(super) fn new(key: [u8; 32], at_registry: bool) -> Arc<Self> {
        Arc::new(Self { key, at_registry: AtomicBool::new(at_registry), left: Notify::new() })
    }
}

/// How a piece's way ended.
#[derive(Debug, Clone)]
pub(super) enum End {
    /// On the disk.
    Stored,
    /// Whole, but only in the memory of those who hold it.
    Unstored,
    /// The fetch was given up; whoever still wants the piece may claim it.
    Abandoned,
    /// No source gave it.
    Failed(Arc<UpstreamError>),
}

#[derive(Debug, Default)]
struct Flow {
    /// With the offset in the piece at which each begins.
    segments: Vec<(u64, Bytes)>,
    got: u64,
    end: Option<End>,
}

/// A piece on its way.
#[derive(Debug)]
pub(super) struct Filling {
    length: u64,
    flow: Mutex<Flow>,
    tick: watch::Sender<()>,
    readers: AtomicUsize,
    launch: Arc<Launch>,
}

/// What a reader finds.
#[derive(Debug)]
pub(super) enum Step {
    /// The next bytes.
    Bytes(Bytes),
    /// No more of them.
    End(End),
}

impl Filling {
    pub(super) fn new(length: u64, launch: Arc<Launch>) -> Self {
        Self { length, flow: Mutex::default(), tick: watch::Sender::new(()), readers: AtomicUsize::new(0), launch }
    }

    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many bytes are still to come.
    pub(super) fn missing(&self) -> u64 {
        self.length - self.flow().got
    }

    /// Returns how many bytes have come.
    pub(super) fn got(&self) -> u64 {
        self.flow().got
    }

    /// Whether somebody waits for it.
    pub(super) fn wanted(&self) -> bool {
        self.readers.load(Ordering::Acquire) > 0
    }

    /// Adds the next bytes; not more than are missing.
    pub(super) fn push(&self, bytes: Bytes) {
        let mut flow = self.flow();
        let at = flow.got;
        debug_assert!(bytes.len() as u64 <= self.length - at, "more bytes than the piece has");
        flow.got += bytes.len() as u64;
        flow.segments.push((at, bytes));
        drop(flow);
        self.tick.send_replace(());
    }

    /// Whether it has ended, however.
    pub(super) fn ended(&self) -> bool {
        self.flow().end.is_some()
    }

    /// Adds bytes that begin at offset `at`, as far as they are new and next.
    pub(super) fn go_on(&self, at: u64, bytes: &Bytes) {
        let got = self.got();
        if let Some(new) = got.checked_sub(at).and_then(|skip| usize::try_from(skip).ok())
            && new < bytes.len()
        {
            self.push(bytes.slice(new..));
        }
    }

    /// Adds what is missing of the `whole` piece; false if what has come is not its beginning.
    pub(super) fn complete(&self, whole: &Bytes) -> bool {
        let mut at = 0;
        for segment in self.segments() {
            let end = at + segment.len();
            if whole.get(at..end) != Some(&segment[..]) {
                return false;
            }
            at = end;
        }
        if whole.len() as u64 != self.length {
            return false;
        }
        if at < whole.len() {
            self.push(whole.slice(at..));
        }
        true
    }

    /// Returns all bytes that have come.
    pub(super) fn segments(&self) -> Vec<Bytes> {
        self.flow().segments.iter().map(|(_, bytes)| bytes.clone()).collect()
    }

    /// Ends it and tells its readers.
    pub(super) fn end(&self, end: End) {
        let mut flow = self.flow();
        if matches!(end, End::Stored) {
            // Slow readers take it from the disk, not from our memory.
            flow.segments = Vec::new();
        }
        flow.end = Some(end);
        drop(flow);
        self.tick.send_replace(());
    }
}

/// A reader's hold on a piece on its way.
#[derive(Debug)]
pub(super) struct Interest {
    filling: Arc<Filling>,
    tick: watch::Receiver<()>,
}

impl Interest {
    pub(super) fn new(filling: &Arc<Filling>) -> Self {
        filling.readers.fetch_add(1, Ordering::AcqRel);
        Self { filling: filling.clone(), tick: filling.tick.subscribe() }
    }

    /// Returns what its fetch has in common with others.
    pub(super) fn launch(&self) -> &Launch {
        &self.filling.launch
    }

    /// Whether it ended without bytes.
    pub(super) fn failed(&self) -> bool {
        matches!(self.filling.flow().end, Some(End::Failed(_) | End::Abandoned))
    }

    /// Returns bytes from `offset` in the piece on, at least one, or how it ended. Cancel-safe.
    pub(super) async fn after(&mut self, offset: u64) -> Step {
        loop {
            self.tick.mark_unchanged();
            if let Some(step) = self.now(offset) {
                return step;
            }
            // The sender lives in the filling that we hold.
            let _ = self.tick.changed().await;
        }
    }

    fn now(&self, offset: u64) -> Option<Step> {
        let flow = self.filling.flow();
        if let Some(End::Stored) = flow.end {
            return Some(Step::End(End::Stored));
        }
        let past = flow.segments.partition_point(|(start, _)| *start <= offset);
        if let Some((start, bytes)) = past.checked_sub(1).and_then(|last| flow.segments.get(last)) {
            let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
            if skip < bytes.len() {
                return Some(Step::Bytes(bytes.slice(skip..)));
            }
        }
        flow.end.clone().map(Step::End)
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        if self.filling.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.filling.launch.left.notify_one();
        }
    }
}
