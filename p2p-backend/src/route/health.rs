//! Whether a source is worth asking.
//!
//! A source that breaks connections `limit` times in a row is down; one that lets its readers wait for nothing
//! is down at once, because each such wait costs somebody seconds. While it is down a probe asks it every
//! `interval`. A probe that succeeds puts it on trial: one more failure and it is down again, and the probes
//! come half as often (a daemon may answer on its health port and hang on the other). A success clears all.
//!
//! Apart from that a source may have asked for a pause (`Retry-After`), which is no illness.

use std::time::Duration;

use tokio::time::Instant;

use crate::registry::RegistryError;

/// Probes of a source that keeps relapsing are at most so far apart.
const LONGEST_INTERVAL: Duration = Duration::from_secs(60);

/// How bad a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weight {
    /// It cost no time: refused, broken, an error.
    Quick,
    /// It cost its reader a time limit.
    Silent,
}

/// The health of one source. Time is given in.
#[derive(Debug)]
pub(super) struct Health {
    limit: u32,
    interval: Duration,
    failures: u32,
    down: Option<Down>,
    relapses: u32,
    pause: Option<Pause>,
}

/// What a source asked for, and in which words.
#[derive(Debug, Clone)]
pub(super) struct Pause {
    pub(super) until: Instant,
    pub(super) wish: RegistryError,
}

#[derive(Debug, Clone, Copy)]
struct Down {
    since: Instant,
    weight: Weight,
}

impl Health {
    pub(super) fn new(limit: u32, interval: Duration) -> Self {
        let interval = if interval.is_zero() { Duration::from_secs(5) } else { interval };
        Self { limit: limit.max(1), interval, failures: 0, down: None, relapses: 0, pause: None }
    }

    /// Returns whether this brought the source up.
    pub(super) fn succeeded(&mut self) -> bool {
        self.failures = 0;
        self.relapses = 0;
        self.pause = None;
        self.down.take().is_some()
    }

    /// Returns whether this brought the source down.
    pub(super) fn failed(&mut self, weight: Weight, now: Instant) -> bool {
        self.failures = match weight {
            Weight::Quick => self.failures.saturating_add(1),
            Weight::Silent => self.failures.max(self.limit),
        };
        match &mut self.down {
            // The latest failure tells what asking costs now.
            Some(down) => {
                down.weight = weight;
                false
            }
            None if self.failures >= self.limit => {
                self.down = Some(Down { since: now, weight });
                true
            }
            None => false,
        }
    }

    /// Takes a probe's word that the source is well again.
    pub(super) fn revived(&mut self) {
        if self.down.take().is_some() {
            self.failures = self.limit - 1;
            self.relapses = self.relapses.saturating_add(1);
        }
    }

    pub(super) fn pause(&mut self, pause: Pause) {
        if self.pause.as_ref().is_none_or(|own| own.until < pause.until) {
            self.pause = Some(pause);
        }
    }

    pub(super) fn paused(&self, now: Instant) -> Option<&Pause> {
        self.pause.as_ref().filter(|pause| pause.until > now)
    }

    pub(super) fn end_pause(&mut self) {
        self.pause = None;
    }

    pub(super) fn down_since(&self) -> Option<Instant> {
        self.down.map(|down| down.since)
    }

    /// Tells whether asking it now would probably cost a time limit.
    pub(super) fn is_silent(&self) -> bool {
        self.down.is_some_and(|down| down.weight == Weight::Silent)
    }

    /// Returns the time until the next probe.
    pub(super) fn probe_after(&self) -> Duration {
        let doubled = self.interval.saturating_mul(1 << self.relapses.min(6));
        doubled.min(LONGEST_INTERVAL.max(self.interval))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn a_source_is_down_after_its_limit_or_one_silence_and_on_trial_after_a_probe() {
        let now = Instant::now();
        let mut health = Health::new(3, Duration::from_secs(5));
        assert!(!health.failed(Weight::Quick, now));
        assert!(!health.failed(Weight::Quick, now));
        assert!(!health.succeeded());
        assert!(!health.failed(Weight::Quick, now));
        assert!(!health.failed(Weight::Quick, now));
        assert!(health.failed(Weight::Quick, now));
        assert!(!health.is_silent());
        assert_eq!(health.probe_after(), Duration::from_secs(5));
        health.revived();
        assert_eq!(health.down_since(), None);
        assert!(health.failed(Weight::Silent, now));
        assert!(health.is_silent());
        assert_eq!(health.probe_after(), Duration::from_secs(10));
        assert!(health.succeeded());
        assert_eq!(health.probe_after(), Duration::from_secs(5));
        assert!(health.failed(Weight::Silent, now));
    }

    proptest! {
        #[test]
        fn down_and_failures_never_contradict_each_other(limit in 0_u32..4, steps in prop::collection::vec(0_u8..4, 0..40)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let now = runtime.block_on(async { Instant::now() });
            let mut health = Health::new(limit, Duration::ZERO);
            let mut in_a_row = 0;
            for step in steps {
                match step {
                    0 => { health.succeeded(); in_a_row = 0; }
                    1 => { health.failed(Weight::Quick, now); in_a_row += 1; }
                    2 => { health.failed(Weight::Silent, now); in_a_row = limit.max(1); }
                    _ => health.revived(),
                }
                prop_assert!(in_a_row < limit.max(1) || health.down_since().is_some() || step == 3);
                prop_assert!(in_a_row > 0 || health.down_since().is_none());
                prop_assert!(health.probe_after() <= LONGEST_INTERVAL);
            }
        }
    }
}
