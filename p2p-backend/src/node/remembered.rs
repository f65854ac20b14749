//! Where members were when this node last looked, for the time after a restart or a cut.
//!
//! ```text
//!     DATA_DIR/members      10.0.0.3:4011          one address a line, no more than are of use
//! ```
//!
//! They are hints, as good as seeds: whoever is found there proves that it is a member like everybody else. The file is replaced as a
//! whole; a lost or torn one costs nothing but that the seeds have to do.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Addresses that are remembered.
const MOST: usize = 64;

/// Addresses where members were.
#[derive(Debug)]
pub(super) struct Remembered {
    path: PathBuf,
    /// The last seen at the end.
    addresses: VecDeque<SocketAddr>,
}

impl Remembered {
    /// Reads what an earlier life has left in `data_dir`. Blocks.
    pub(super) fn read(data_dir: &Path) -> Self {
        let path = data_dir.join("members");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::debug!(path = %path.display(), %error, "could not read where members were");
                }
                String::new()
            }
        };
        let addresses = text.lines().filter_map(|line| line.parse().ok()).take(MOST).collect();
        Self { path, addresses }
    }

    /// Returns the addresses, the last seen first.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.addresses.iter().rev().copied().collect()
    }

    /// Notes that members are there now; those that are not any more are remembered as long as there is room.
    pub(super) async fn note(&mut self, there: &[SocketAddr]) {
        let before = self.addresses.clone();
        self.addresses.retain(|address| !there.contains(address));
        self.addresses.extend(there);
        while self.addresses.len() > MOST {
            self.addresses.pop_front();
        }
        let same = |one: &VecDeque<SocketAddr>, other: &VecDeque<SocketAddr>| {
            one.len() == other.len() && one.iter().all(|address| other.contains(address))
        };
        if same(&before, &self.addresses) {
            return;
        }
        let text: String = self.addresses.iter().map(|address| format!("{address}\n")).collect();
        let new = self.path.with_extension("new");
        let write = async {
            tokio::fs::write(&new, text).await?;
            tokio::fs::rename(&new, &self.path).await
        };
        if let Err(error) = write.await {
            tracing::debug!(path = %self.path.display(), %error, "could not write down where members are");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(number: u16) -> SocketAddr {
        ([10, 0, 0, 1], number).into()
    }

    #[tokio::test]
    async fn members_are_remembered_over_a_restart_and_those_who_left_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let mut remembered = Remembered::read(dir.path());
        assert_eq!(remembered.addresses(), []);
        remembered.note(&[at(1), at(2)]).await;
        remembered.note(&[at(2), at(3)]).await;
        assert_eq!(Remembered::read(dir.path()).addresses(), [at(3), at(2), at(1)]);
        let many: Vec<SocketAddr> = (100..300).map(at).collect();
        remembered.note(&many).await;
        let addresses = Remembered::read(dir.path()).addresses();
        assert_eq!((addresses.len(), addresses[0]), (MOST, at(299)));
        std::fs::write(dir.path().join("members"), "10.0.0.1:4011\nnonsense\n\u{0}").unwrap();
        assert_eq!(Remembered::read(dir.path()).addresses(), [SocketAddr::from(([10, 0, 0, 1], 4011))]);
    }
}
