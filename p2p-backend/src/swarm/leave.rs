//! Deletion and departure: others are told first, served for a while, and then it happens.

use std::collections::BTreeMap;
use std::time::Duration;

use super::grid::{Object, Pieces};
use super::message::MOST_OBJECTS;
use super::port::{Failure, Output};
use super::time::Time;
use super::trust::Records;
use super::{Swarm, Timer};

/// What the operator wants forgotten.
#[derive(Debug, Default)]
pub(super) struct Tombs(BTreeMap<Object, Time>);

/// How long it is forgotten everywhere at most: longer than any node is likely to be away.
pub const TOMB: Duration = Duration::from_secs(24 * 3600);
/// How often the departure of a file is tried while it is being sent.
const AGAIN: Duration = Duration::from_secs(1);

impl Tombs {
    /// Whether an object is to be forgotten.
    pub(super) fn has(&self, object: &Object, now: Time) -> bool {
        self.0.get(object).is_some_and(|until| *until > now)
    }

    /// Returns the tombs, with the seconds that they still stand.
    pub(super) fn told(&self, now: Time) -> Vec<(Object, u32)> {
        let left = |until: &Time| u32::try_from(until.since(now).as_secs()).unwrap_or(u32::MAX);
        self.0
            .iter()
            .map(|(object, until)| (*object, left(until)))
            .filter(|(_, left)| *left > 0)
            .take(MOST_OBJECTS)
            .collect()
    }

    pub(super) fn tidy(&mut self, now: Time) {
        self.0.retain(|_, until| *until > now);
    }
}

impl Swarm {
    /// Tells everybody that an object is going, and lets it go a while later.
    pub(super) fn withdraw(&mut self, object: Object) {
        let now = self.now;
        let Some(blob) = self.blobs.get_mut(&object) else {
            self.out.push(Output::Unlink { object });
            return;
        };
        if blob.withdrawn.is_some() {
            return;
        }
        blob.withdrawn = Some(now);
        for piece in blob.have.groups().map(|group| group * super::grid::GROUP).collect::<Vec<_>>() {
            self.tell_loss(object, piece);
        }
        self.plan_summary();
        self.timer(now + self.config.withdrawn, Timer::Unlink(object));
    }

    pub(super) fn unlink(&mut self, object: Object) {
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        // A node that leaves keeps its cache.
        let Some(since) = blob.withdrawn.filter(|_| !self.counter.draining) else { return };
        if !blob.fetches.is_empty() && !self.tombs.has(&object, self.now) {
            // Somebody wants it again.
            blob.withdrawn = None;
            self.plan_summary();
            return;
        }
        if self.is_sending(&object) && self.now.since(since) < self.config.withdrawn * 6 {
            self.timer(self.now + AGAIN, Timer::Unlink(object));
            return;
        }
        if let Some(blob) = self.blobs.get_mut(&object) {
            blob.have = Pieces::new();
            blob.records = Records::default();
            blob.sealed = false;
            blob.withdrawn = None;
        }
        self.out.push(Output::Unlink { object });
    }

    /// Forgets an object as the operator here wants, and tells everybody to.
    pub(super) fn forget(&mut self, object: Object, lasts: Duration) {
        // Others may have filled the place; what is said here counts more.
        if self.tombs.0.len() >= MOST_OBJECTS
            && let Some(first) = self.tombs.0.iter().min_by_key(|(_, until)| **until).map(|(object, _)| *object)
        {
            self.tombs.0.remove(&first);
        }
        self.bury_object(object, lasts);
    }

    /// Forgets an object for a while, and tells everybody to.
    pub(super) fn bury_object(&mut self, object: Object, lasts: Duration) {
        let until = self.now + lasts.min(TOMB);
        if self.tombs.has(&object, self.now) || self.tombs.0.len() >= MOST_OBJECTS {
            return;
        }
        self.tombs.0.insert(object, until);
        let pieces: Vec<u32> =
            self.blobs.get(&object).into_iter().flat_map(|blob| blob.fetches.keys().copied()).collect();
        for piece in pieces {
            self.fail(object, piece, Failure::Forgotten);
        }
        self.withdraw(object);
        self.plan_summary();
    }

    /// Begins nothing new for others, and tells the homes that what is here goes.
    pub(super) fn drain(&mut self) {
        self.counter.draining = true;
        let objects: Vec<Object> = self.blobs.keys().copied().collect();
        for object in objects {
            self.withdraw(object);
        }
        // The process may end as soon as nobody is being answered any more.
        self.flush_news();
        self.summarize();
        self.drained();
    }
}
