//! One upstream: how it is asked, and how it has fared.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::UpstreamError;
use crate::registry::Client;

/// How long a mirror that did not answer is left alone.
const ILL: Duration = Duration::from_secs(5);
/// How often the log tells of one upstream's trouble: every caller's request meets it.
const TOLD: Duration = Duration::from_secs(30);

/// A mirror or registry that is configured.
#[derive(Debug)]
pub(super) struct Link {
    /// As shown in logs.
    pub(super) name: String,
    pub(super) client: Client,
    /// It is shown the callers' Authorization.
    pub(super) trusted: bool,
    /// An account is lent to callers who bring none.
    pub(super) lends: bool,
    /// Until when a mirror that was dead or silent is not asked.
    ill: Mutex<Option<Instant>>,
    /// When the log told of its trouble.
    told: Mutex<Option<Instant>>,
}

impl Link {
    pub(super) fn new(name: String, client: Client, trusted: bool, lends: bool) -> Self {
        Self { name, client, trusted, lends, ill: Mutex::default(), told: Mutex::default() }
    }

    pub(super) fn is_ill(&self) -> bool {
        self.ill.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| Instant::now() < until)
    }

    /// Leaves the link alone for a while if it is dead or silent, and tells the log of its trouble. That it is ill is
    /// looked at for mirrors only: nobody stands in for a registry.
    pub(super) fn note(&self, error: &UpstreamError, what: &str) {
        let now = Instant::now();
        if error.is_illness() {
            *self.ill.lock().unwrap_or_else(PoisonError::into_inner) = Some(now + ILL);
        }
        if error.is_trouble() && is_news(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner), now) {
            let advice = error.advice();
            tracing::warn!(upstream = %self.name, what, "could not read upstream: {error}{advice}");
        }
    }

    pub(super) fn odd(&self, reason: &str) -> UpstreamError {
        UpstreamError::Odd { by: self.name.clone(), reason: reason.into() }
    }
}

/// Whether trouble of `now` is worth a line, given when there was one.
fn is_news(told: &mut Option<Instant>, now: Instant) -> bool {
    let news = told.is_none_or(|before| now.saturating_duration_since(before) >= TOLD);
    if news {
        *told = Some(now);
    }
    news
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_told_at_once_and_then_from_time_to_time() {
        let begin = Instant::now();
        let mut told = None;
        let news: Vec<bool> = [0, 1, 29, 30, 31, 60].map(|s| is_news(&mut told, begin + Duration::from_secs(s))).into();
        assert_eq!(news, [true, false, false, true, false, true]);
    }
}
