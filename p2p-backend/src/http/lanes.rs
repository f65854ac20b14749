//! Which connections a request may use, and when a pool of them is given up.
//!
//! Many requests share one HTTP/2 connection, and one whose far end is alive and does not answer (a balancer in front of
//! a dead host, which answers pings) would be shared for ever: each reader waits its time limit and the next one goes
//! the same way. So a pool on which somebody waited in vain is left: what is under way there goes on, and new requests
//! get new connections. A wait that its reader gave up counts as well, if it was long; it may have had less time than
//! the limit.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A wait that its reader gave up is held against the connection from here on, if the limit is not shorter.
const LONG: Duration = Duration::from_secs(3);

/// How a pool differs from its sisters; the value indexes [`Lanes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Direct = 0,
    Proxied = 1,
    /// Keeps no connection.
    DirectFresh = 2,
    /// Keeps no connection.
    ProxiedFresh = 3,
}

impl Kind {
    pub(super) fn of(proxied: bool) -> Self {
        if proxied { Self::Proxied } else { Self::Direct }
    }

    pub(super) fn fresh(self) -> Self {
        match self {
            Self::Direct | Self::DirectFresh => Self::DirectFresh,
            Self::Proxied | Self::ProxiedFresh => Self::ProxiedFresh,
        }
    }

    pub(super) fn is_proxied(self) -> bool {
        matches!(self, Self::Proxied | Self::ProxiedFresh)
    }
}

/// The pools of one set of options, made when they are first used.
#[derive(Debug, Default)]
pub(super) struct Lanes(Mutex<[Option<Arc<reqwest::Client>>; 4]>);

impl Lanes {
    /// Returns the pool of this kind, made by `make` if there is none.
    pub(super) fn get<E>(
        self: &Arc<Self>,
        kind: Kind,
        make: impl FnOnce() -> Result<reqwest::Client, E>,
    ) -> Result<Lane, E> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let client = match &mut all[kind as usize] {
            Some(client) => Arc::clone(client),
            // Made under the lock: it takes milliseconds, once, and others would only make theirs meanwhile.
            empty => Arc::clone(empty.insert(Arc::new(make()?))),
        };
        Ok(Lane { all: Arc::clone(self), kind, client })
    }

    fn leave(&self, kind: Kind, client: &Arc<reqwest::Client>) {
        let slot = &mut self.0.lock().unwrap_or_else(PoisonError::into_inner)[kind as usize];
        if slot.as_ref().is_some_and(|current| Arc::ptr_eq(current, client)) {
            tracing::debug!(?kind, "leaving connections on which somebody waited in vain");
            *slot = None;
        }
    }
}

/// A pool in use; it travels with the answer that came through it.
#[derive(Debug, Clone)]
pub(super) struct Lane {
    all: Arc<Lanes>,
    kind: Kind,
    pub(super) client: Arc<reqwest::Client>,
}

impl Lane {
    /// Gives the pool up: what is under way in it goes on, and new requests get new connections.
    pub(super) fn leave(&self) {
        self.all.leave(self.kind, &self.client);
    }

    /// Begins to wait for something that should take less than `limit`.
    pub(super) fn wait(&self, limit: Duration) -> Wait<'_> {
        Wait { lane: self, since: Some(Instant::now()), patience: limit.min(LONG) }
    }
}

/// Somebody waits; dropped before [`Wait::over`] after a long time, it gives the pool up.
#[must_use = "dropping it early says that the wait was in vain"]
pub(super) struct Wait<'l> {
    lane: &'l Lane,
    since: Option<Instant>,
    patience: Duration,
}

impl Wait<'_> {
    /// Something came, be it an error.
    pub(super) fn over(mut self) {
        self.since = None;
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if self.since.is_some_and(|since| since.elapsed() >= self.patience) {
            self.lane.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pool_is_left_after_a_wait_in_vain_and_only_then() {
        drop(rustls::crypto::ring::default_provider().install_default());
        let lanes = Arc::new(Lanes::default());
        let get = || lanes.get(Kind::Direct, || reqwest::Client::builder().build()).unwrap();
        let limit = Duration::from_secs(10);
        let first = get();
        let wait = first.wait(limit);
        tokio::time::sleep(limit).await;
        wait.over();
        let impatient = first.wait(limit);
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(impatient);
        assert!(Arc::ptr_eq(&first.client, &get().client), "an answer, and a reader that went soon");
        let (one, other) = (first.wait(limit), first.wait(limit));
        tokio::time::sleep(LONG).await;
        drop(one);
        let second = get();
        assert!(!Arc::ptr_eq(&first.client, &second.client), "a reader that waited long");
        drop(other);
        assert!(Arc::ptr_eq(&second.client, &get().client), "its neighbour says nothing about the new one");
        first.leave();
        assert!(Arc::ptr_eq(&second.client, &get().client), "nor does its own end");
        second.leave();
        assert!(!Arc::ptr_eq(&second.client, &get().client));
    }
}
