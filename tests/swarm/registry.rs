//! The registry: an uplink, a latency, and moods.

use crate::net::Line;

/// How the registry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// It answers.
    Well,
    /// It answers requests beyond so many per second with 429 and a Retry-After of a second.
    Sparing(u64),
    /// It answers nobody without a token.
    Strict,
    /// It cannot be reached.
    Down,
}

/// The registry.
#[derive(Debug)]
pub struct Registry {
    /// What it sends.
    pub line: Line,
    /// Microseconds to the first byte.
    pub latency: u64,
    /// How it is.
    pub mood: Mood,
    /// Requests for bytes.
    pub requests: u64,
    /// Requests that were told to come later.
    pub refused: u64,
    /// Requests that were refused in vain: before the time that they were told.
    pub early: u64,
    second: (u64, u64),
    /// When those who were told to come later may.
    pub open_at: u64,
}

impl Registry {
    /// Returns one that is well.
    pub fn new(rate: u64, latency: u64) -> Self {
        Self {
            line: Line::new(rate),
            latency,
            mood: Mood::Well,
            requests: 0,
            refused: 0,
            early: 0,
            second: (0, 0),
            open_at: 0,
        }
    }

    /// Whether a request at `now` is one too many.
    pub fn too_many(&mut self, now: u64) -> bool {
        let Mood::Sparing(most) = self.mood else { return false };
        if self.second.0 != now / 1_000_000 {
            self.second = (now / 1_000_000, 0);
        }
        self.second.1 += 1;
        let refused = self.second.1 > most;
        if refused {
            self.refused += 1;
        }
        refused
    }
}
