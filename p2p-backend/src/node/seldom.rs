//! Not saying the same thing over and over.

use std::time::{Duration, Instant};

/// How often one thing is worth a line in the log.
const SPAN: Duration = Duration::from_secs(30);

/// When something was last told.
#[derive(Debug, Default)]
pub(super) struct Seldom(Option<Instant>);

impl Seldom {
    /// Whether it is to be told now.
    pub(super) fn now(&mut self) -> bool {
        let due = self.0.is_none_or(|before| before.elapsed() >= SPAN);
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}
