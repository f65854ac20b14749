//! Whether readers wait: what is done ahead of them steps aside.

use std::time::Duration;

use tokio::sync::watch;

/// How long prefetch steps aside at most: readers that never rest do not stop it for good.
const COURTESY: Duration = Duration::from_millis(500);

/// The number of readers that wait for a source.
#[derive(Debug)]
pub(super) struct Demand(watch::Sender<usize>);

/// A reader that waits.
#[derive(Debug)]
#[must_use = "a reader waits as long as this lives"]
pub(super) struct Waiting<'d>(&'d Demand);

impl Default for Demand {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl Demand {
    /// Counts a reader until the value returned is dropped.
    pub(super) fn wait(&self) -> Waiting<'_> {
        self.0.send_modify(|waiting| *waiting += 1);
        Waiting(self)
    }

    /// Returns when no reader waits, or after a while.
    pub(super) async fn step_aside(&self) {
        let mut waiting = self.0.subscribe();
        let _ = tokio::time::timeout(COURTESY, waiting.wait_for(|waiting| *waiting == 0)).await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.0.send_modify(|waiting| *waiting -= 1);
    }
}
