//! The body of an answer, which may not stall.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Response;

use super::HttpError;
use super::error::innermost;
use super::lanes::Lane;

/// A body that may not stall.
pub struct Body {
    pub(super) host: String,
    pub(super) stall: Duration,
    pub(super) response: Response,
    /// Where it comes from, if that is known.
    pub(super) lane: Option<Lane>,
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Body {
    /// Returns the next piece, or `None` at the end. Safe to cancel.
    ///
    /// # Errors
    ///
    /// [`HttpError::Stalled`] or [`HttpError::Broken`]; the latter also if the body is shorter than its head said.
    pub async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        let wait = self.lane.as_ref().map(|lane| lane.wait(self.stall));
        let Ok(outcome) = tokio::time::timeout(self.stall, self.response.chunk()).await else {
            drop(wait);
            return Err(HttpError::Stalled { host: self.host.clone(), limit: self.stall });
        };
        if let Some(wait) = wait {
            wait.over();
        }
        outcome.map_err(|error| HttpError::Broken { host: self.host.clone(), reason: innermost(&error) })
    }

    /// Returns at most the first `limit` bytes, and whether that was all. Errors end it early.
    pub async fn beginning(mut self, limit: usize) -> (Bytes, bool) {
        let mut held = Vec::new();
        while held.len() <= limit {
            match self.next().await {
                Ok(Some(piece)) => held.extend_from_slice(&piece),
                Ok(None) => break,
                Err(_) => return (held.into(), false),
            }
        }
        let whole = held.len() <= limit;
        held.truncate(limit);
        (held.into(), whole)
    }
}
