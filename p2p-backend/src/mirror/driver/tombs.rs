//! What is to be forgotten, over a restart.
//!
//! ```text
//!     DATA_DIR/forgotten      <64 hex digits> <seconds since 1970 at which it ends>     one object a line
//! ```
//!
//! The file is replaced as a whole. A lost one is made up for by what other members say.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use nydus_rafs::Digest;

use super::Driver;
use crate::swarm::Object;
use crate::swarm::port::Input;

/// How often it is tried to remove what is being read.
const AGAIN: Duration = Duration::from_secs(1);

/// The file, and what was last written into it.
#[derive(Debug)]
pub(super) struct Tombs {
    path: PathBuf,
    written: Mutex<Vec<Digest>>,
    /// What was to be forgotten when it was last heard of.
    buried: Mutex<HashSet<Digest>>,
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Tombs {
    pub(super) fn new(dir: &Path) -> Self {
        Self { path: dir.join("forgotten"), written: Mutex::default(), buried: Mutex::default() }
    }

    fn buried(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.buried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is still to be forgotten, and for how long. Blocks.
    pub(super) fn read(&self, now: SystemTime) -> Vec<(Object, Duration)> {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        let tomb = |line: &str| {
            let (digest, end) = line.split_once(' ')?;
            let left = end.parse::<u64>().ok()?.checked_sub(seconds(now)).filter(|left| *left > 0)?;
            Some((Object(digest.parse().ok()?), Duration::from_secs(left)))
        };
        text.lines().filter_map(tomb).collect()
    }

    /// Writes down what is to be forgotten, each with the seconds that this still holds. Blocks.
    fn write(&self, forgotten: &[(Object, u32)], now: SystemTime) {
        let line = |(object, left): &(Object, u32)| format!("{} {}\n", object.0, seconds(now) + u64::from(*left));
        let new = self.path.with_extension("new");
        let text: String = forgotten.iter().map(line).collect();
        if let Err(error) = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &self.path)) {
            tracing::warn!(path = %self.path.display(), %error, "could not write down what is to be forgotten; after a restart other members tell it");
        }
    }
}

impl Driver {
    /// Forgets an object for a while.
    pub(super) fn bury(&self, object: Object, lasts: Duration) {
        self.tombs.buried().insert(object.0);
        self.feed(Input::Forget { object, lasts });
    }

    /// Notes what others have forgotten.
    pub(super) fn hear_of_tombs(&self, forgotten: &[(Object, u32)]) {
        self.tombs.buried().extend(forgotten.iter().map(|(object, _)| object.0));
    }

    /// Removes a blob's files; what is to be forgotten goes as soon as nobody here reads it any more.
    pub(super) fn unlink(self: &Arc<Self>, digest: Digest) {
        self.store.unlink(&digest);
        if !self.tombs.buried().contains(&digest) {
            return;
        }
        let own = self.clone();
        self.spawn(async move {
            while own.store.has(&digest) {
                tokio::time::sleep(AGAIN).await;
                own.store.unlink(&digest);
            }
        });
    }

    /// Keeps what is to be forgotten, if that is not what was kept last.
    pub(super) fn keep_tombs(&self, forgotten: &[(Object, u32)]) {
        let digests: Vec<Digest> = forgotten.iter().map(|(object, _)| object.0).collect();
        let mut written = self.tombs.written.lock().unwrap_or_else(PoisonError::into_inner);
        if *written == digests {
            return;
        }
        self.tombs.buried().retain(|digest| digests.contains(digest));
        *written = digests;
        drop(written);
        let (Some(own), forgotten) = (self.me.upgrade(), forgotten.to_vec()) else { return };
        self.tasks.spawn_blocking(move || own.tombs.write(&forgotten, SystemTime::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forgotten_is_so_after_a_restart_for_as_long_as_it_was_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let begin = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let (one, other) = (Object(Digest([1; 32])), Object(Digest([2; 32])));
        let tombs = Tombs::new(dir.path());
        assert_eq!(tombs.read(begin), []);
        tombs.write(&[(one, 100), (other, 5)], begin);
        let later = begin + Duration::from_secs(10);
        assert_eq!(Tombs::new(dir.path()).read(later), [(one, Duration::from_secs(90))]);
        std::fs::write(dir.path().join("forgotten"), "nonsense\n\u{0} 7\n").unwrap();
        assert_eq!(tombs.read(begin), []);
    }
}
