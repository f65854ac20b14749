//! How many bytes may pass in a second, so that a node's swarm leaves something of its link to others.
//!
//! Whoever passes bytes on waits for its turn first. Turns are given in the order in which they are asked for, and what was not used
//! for a while may be made up for by a tenth of a second at most.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::node;

/// What may be made up for.
const BURST: Duration = Duration::from_millis(100);
/// Longer parts would let those who wait for them believe that nothing comes.
const PART: u64 = 10;

/// A limit that is shared by all who hold it.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes per second; zero is no limit.
    rate: u64,
    free_at: Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(rate: u64) -> Self {
        Self { rate, free_at: Mutex::new(Instant::now()) }
    }

    /// Returns how many bytes should pass at a time, `most` at most.
    pub(super) fn part(&self, most: u64) -> u64 {
        if self.rate == 0 { most } else { (self.rate / PART).clamp(1, most) }
    }

    /// Waits until so many bytes may pass.
    pub(super) async fn take(&self, bytes: u64) {
        if self.rate == 0 {
            return;
        }
        let turn = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let begin = (*free_at).max(now.checked_sub(BURST).unwrap_or(now));
            *free_at = begin + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            *free_at
        };
        tokio::time::sleep_until(turn).await;
    }
}

/// The limits of a node's swarm.
#[derive(Debug)]
pub(super) struct Limits {
    /// To members.
    pub(super) up: Pace,
    /// From members.
    pub(super) down: Pace,
    /// From registries.
    pub(super) source: Pace,
}

impl Limits {
    pub(super) fn new(config: &node::Config) -> Self {
        let [up, down, source] = [config.upload_rate, config.download_rate, config.source_rate].map(Pace::new);
        Self { up, down, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn so_many_bytes_pass_in_a_second_whoever_passes_them() {
        let pace = Pace::new(1000);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let begin = Instant::now();
        let pass = async || {
            for _ in 0..50 {
                pace.take(100).await;
            }
        };
        tokio::join!(pass(), pass());
        let took = begin.elapsed();
        assert!((Duration::from_millis(9_800)..Duration::from_millis(10_100)).contains(&took), "{took:?}");
        assert_eq!([pace.part(1 << 20), Pace::new(0).part(1 << 20)], [100, 1 << 20]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_limit_costs_no_time() {
        let (pace, begin) = (Pace::new(0), Instant::now());
        pace.take(u64::MAX).await;
        assert_eq!(begin.elapsed(), Duration::ZERO);
    }
}
