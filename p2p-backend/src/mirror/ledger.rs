//! What the registries said about who may have what, over a restart.
//!
//! A mirror that is started again while the registry is down would hold blobs that it may give to nobody. So grants are
//! written beside the cache, as the keyed hashes that memory has, with the key: whoever can read the file can read the
//! blobs as well. They never stand in for the registry's word, only for its silence, and no longer than they would have
//! in the process that got them.
//!
//! ```text
//! magic 8 | key 32 | written, seconds since 1970, 8 | (hash 32, size 8, seconds left 4) * n | blake3 of it all 32
//! ```
//!
//! The file is replaced as a whole and not synced: a lost one costs questions, a torn one does not match its sum.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const MAGIC: &[u8; 8] = b"shoalrt1";
const HEAD: usize = 8 + 32 + 8;
const ENTRY: usize = 32 + 8 + 4;
const SUM: usize = 32;

/// One grant as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    /// Stands for caller, registry, repository and digest.
    pub(super) key: [u8; 32],
    /// Of the blob, in bytes.
    pub(super) size: u64,
    /// How long it is still of use.
    pub(super) left: Duration,
}

/// The file of a data directory.
#[derive(Debug, Clone)]
pub(super) struct Ledger {
    path: PathBuf,
}

impl Ledger {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self { path: data_dir.join("rights") }
    }

    /// Returns the key and what is left of the grants, or nothing where there is no sound file. Blocks.
    pub(super) fn read(&self, now: SystemTime) -> Option<([u8; 32], Vec<Entry>)> {
        match std::fs::read(&self.path) {
            Ok(bytes) => decode(&bytes, now),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "could not read who may have what; registries are asked");
                None
            }
        }
    }

    /// Replaces the file. Blocks.
    pub(super) fn write(&self, secret: &[u8; 32], entries: &[Entry], now: SystemTime) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&encode(secret, entries, now))?;
        std::fs::rename(&new, &self.path)
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn encode(secret: &[u8; 32], entries: &[Entry], now: SystemTime) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + entries.len() * ENTRY + SUM);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(secret);
    bytes.extend_from_slice(&seconds(now).to_le_bytes());
    for Entry { key, size, left } in entries {
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(left.as_secs()).unwrap_or(u32::MAX).to_le_bytes());
    }
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(sum.as_bytes());
    bytes
}

fn decode(bytes: &[u8], now: SystemTime) -> Option<([u8; 32], Vec<Entry>)> {
    let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(SUM)?)?;
    if blake3::hash(body).as_bytes() != sum {
        return None;
    }
    let rest = body.strip_prefix(MAGIC)?;
    let (secret, rest) = rest.split_first_chunk::<32>()?;
    let (written, rest) = rest.split_first_chunk::<8>()?;
    // A clock that was set back makes nothing older; what is left is bounded by who takes it.
    let passed = Duration::from_secs(seconds(now).saturating_sub(u64::from_le_bytes(*written)));
    let entry = |bytes: &[u8]| -> Option<Entry> {
        let (key, rest) = bytes.split_first_chunk::<32>()?;
        let (size, left) = rest.split_first_chunk::<8>()?;
        let left = Duration::from_secs(u32::from_le_bytes(*left.first_chunk::<4>()?).into());
        Some(Entry { key: *key, size: u64::from_le_bytes(*size), left: left.checked_sub(passed)? })
    };
    Some((*secret, rest.chunks_exact(ENTRY).filter_map(entry).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_comes_back_older_and_ends() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(dir.path());
        let begin = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        assert!(ledger.read(begin).is_none());
        let entry = |number: u8, left| Entry { key: [number; 32], size: 7, left: Duration::from_secs(left) };
        ledger.write(&[9; 32], &[entry(1, 100), entry(2, 3600)], begin).unwrap();
        for (passed, expected) in [
            (0, vec![entry(1, 100), entry(2, 3600)]),
            (60, vec![entry(1, 40), entry(2, 3540)]),
            (101, vec![entry(2, 3499)]),
            (86_400, vec![]),
        ] {
            let now = begin + Duration::from_secs(passed);
            assert_eq!(ledger.read(now), Some(([9; 32], expected)), "after {passed} s");
        }
        assert_eq!(ledger.read(begin - Duration::from_secs(86_400)).unwrap().1[0], entry(1, 100));
        use std::os::unix::fs::PermissionsExt as _;
        let path = dir.path().join("rights");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_file_that_is_not_whole_is_none() {
        let now = SystemTime::now();
        let entry = Entry { key: [1; 32], size: 7, left: Duration::from_secs(60) };
        let good = encode(&[9; 32], &[entry], now);
        for length in 0..good.len() {
            assert_eq!(decode(&good[..length], now), None);
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(decode(&bad, now), None);
        }
    }
}
