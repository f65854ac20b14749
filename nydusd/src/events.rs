//! The last failures of sources, for whoever asks a daemon what ails it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use crate::api::types::Events;
use crate::clock::Moment;

/// Most failures that are kept.
const MOST: usize = 500;

/// Most bytes that are kept.
const MOST_BYTES: usize = 51_200;

/// A ring of the last failures.
#[derive(Debug, Default)]
pub struct EventLog(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    entries: VecDeque<String>,
    bytes: usize,
    total: usize,
}

impl EventLog {
    /// Adds a failure, dropping the oldest as room is needed.
    pub fn push(&self, text: &str) {
        let entry = format!("{} - {text}", Moment::now().http());
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.total += 1;
        ring.bytes += entry.len();
        ring.entries.push_back(entry);
        while ring.entries.len() > MOST || (ring.bytes > MOST_BYTES && ring.entries.len() > 1) {
            if let Some(oldest) = ring.entries.pop_front() {
                ring.bytes -= oldest.len();
            }
        }
    }

    /// Returns what is kept.
    pub fn snapshot(&self) -> Events {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Events {
            max_errors: MOST,
            total_errors: ring.total,
            max_size: MOST_BYTES,
            total_size: ring.bytes,
            errors: ring.entries.iter().cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_failures_are_kept() {
        let log = EventLog::default();
        for number in 0..MOST + 3 {
            log.push(&format!("failure {number}"));
        }
        let events = log.snapshot();
        assert_eq!((events.errors.len(), events.total_errors), (MOST, MOST + 3));
        assert!(events.errors[0].ends_with("GMT - failure 3"), "{}", events.errors[0]);
        log.push(&"x".repeat(MOST_BYTES));
        assert_eq!(log.snapshot().errors.len(), 1);
    }
}
