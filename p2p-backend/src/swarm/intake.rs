//! How fast pieces come in here, so that a slow node does not ask for more than it can take.
//!
//! What is asked for too early fills queues on the way, and then sources look silent that are only slow to get through.

use std::time::Duration;

use super::time::Time;

/// How fast pieces come in.
#[derive(Debug, Default)]
pub(super) struct Intake {
    /// Smoothed time between two pieces.
    pace: Duration,
    last: Time,
}

/// A longer pause is no sign of slowness.
const PAUSE: Duration = Duration::from_secs(1);

impl Intake {
    /// Notes that a piece has come.
    pub(super) fn took(&mut self, now: Time) {
        let since = now.since(self.last).min(PAUSE);
        self.last = now;
        self.pace = if self.pace.is_zero() { since.min(PAUSE / 100) } else { (self.pace * 7 + since) / 8 };
    }

    /// Returns how long a source may be silent, `least` or longer where our own line is slow: then what it sends is on its way,
    /// behind what others send.
    pub(super) fn silence(&self, least: Duration) -> Duration {
        least.max(self.pace * 3)
    }

    /// Returns how many pieces may be under way: at most `most`, and two at least.
    pub(super) fn window(&self, most: usize, ahead: Duration) -> usize {
        let fit = ahead.as_micros() / self.pace.as_micros().max(1);
        usize::try_from(fit).unwrap_or(usize::MAX).clamp(2.min(most), most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_node_asks_for_less() {
        let mut intake = Intake::default();
        let ahead = Duration::from_millis(150);
        assert_eq!(intake.window(6, ahead), 6, "nothing is known yet");
        (0..50).for_each(|turn| intake.took(Time(1_000_000 + turn * 8_500)));
        assert_eq!(intake.window(6, ahead), 6);
        (0..50).for_each(|turn| intake.took(Time(2_000_000 + turn * 170_000)));
        assert_eq!(intake.window(6, ahead), 2);
    }
}
