//! The cluster key: who knows it is a member.
//!
//! A file has one or two keys, one a line. The first proves us, both are accepted, so that a key is replaced without a moment in
//! which half of the cluster refuses the other half: add the new one below the old one on every node, then put it first,
//! then take the old one away, restarting the nodes each time. Keys are never printed; a fingerprint tells which is meant.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Keys that are accepted at a time.
const MOST: usize = 2;

/// Why there is no cluster key; completes "could not read the cluster key".
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("swarm.cluster_key_file {}: {source}; make one with `openssl rand -hex 32` and copy it to every node", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file holds something else.
    #[error("swarm.cluster_key_file {}: {reason}; give one or two lines of 64 hex digits, as `openssl rand -hex 32` prints them", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Everybody may read it.
    #[error("swarm.cluster_key_file {} has mode {mode:03o}, so every user may read it; run chmod 600 on it", path.display())]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

/// Tells keys apart without telling them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 4]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One cluster key.
#[derive(Clone)]
pub struct ClusterKey {
    secret: [u8; 32],
    fingerprint: Fingerprint,
}

impl ClusterKey {
    /// Returns the key of these bytes.
    pub fn new(secret: [u8; 32]) -> Self {
        let hash = blake3::derive_key("shoal swarm: fingerprint of a cluster key, version 1", &secret);
        Self { secret, fingerprint: Fingerprint([hash[0], hash[1], hash[2], hash[3]]) }
    }

    /// Returns what may be printed.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Returns a key for one `purpose`, a text that no other purpose has.
    pub(super) fn derive(&self, purpose: &str) -> [u8; 32] {
        blake3::derive_key(purpose, &self.secret)
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({})", self.fingerprint)
    }
}

/// The keys that are accepted.
#[derive(Debug, Clone)]
pub struct ClusterKeys(Vec<ClusterKey>);

impl ClusterKeys {
    /// Reads the file. Blocks.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let failed = |source| KeyError::Io { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(failed)?;
        let mode = path.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o007 != 0 {
            return Err(KeyError::Readable { path: path.to_owned(), mode });
        }
        Self::parse(&text).map_err(|reason| KeyError::Form { path: path.to_owned(), reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut keys = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut secret = [0; 32];
            hex::decode_to_slice(line, &mut secret).map_err(|_| format!("line {} is not a key", number + 1))?;
            keys.push(ClusterKey::new(secret));
        }
        match keys.len() {
            0 => Err("it has no key".into()),
            1..=MOST => Ok(Self(keys)),
            more => Err(format!("it has {more} keys, and {MOST} are accepted at a time")),
        }
    }

    /// Returns the key that proves us.
    pub fn own(&self) -> &ClusterKey {
        &self.0[0]
    }

    /// Returns the key that another means, if it is one of ours.
    pub fn find(&self, fingerprint: Fingerprint) -> Option<&ClusterKey> {
        self.0.iter().find(|key| key.fingerprint == fingerprint)
    }
}

impl From<ClusterKey> for ClusterKeys {
    fn from(key: ClusterKey) -> Self {
        Self(vec![key])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_or_two_keys_and_the_first_is_ours() {
        let (a, b) = ("ab".repeat(32), "cd".repeat(32));
        let keys = ClusterKeys::parse(&format!("# the new one\n{a}\n\n  {b}\n")).unwrap();
        let other = ClusterKeys::parse(&b).unwrap();
        assert_eq!(keys.find(other.own().fingerprint()).unwrap().derive("x"), other.own().derive("x"));
        assert!(other.find(keys.own().fingerprint()).is_none());
        for (text, reason) in [
            (String::new(), "no key"),
            (format!("{a}\n{b}\n{a}"), "3 keys"),
            ("secret".into(), "line 1"),
            (a[1..].to_owned(), "line 1"),
        ] {
            let told = ClusterKeys::parse(&text).unwrap_err();
            assert!(told.contains(reason) && !told.contains("secret"), "{told}");
        }
    }

    #[test]
    fn a_key_that_is_missing_or_for_everybody_is_refused_with_the_fix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(ClusterKeys::read(&path).unwrap_err().to_string().contains("openssl rand -hex 32"));
        std::fs::write(&path, "ab".repeat(32)).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(ClusterKeys::read(&path).unwrap_err().to_string().contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let keys = ClusterKeys::read(&path).unwrap();
        assert!(!format!("{keys:?}").contains("abab"), "a key is never printed");
    }
}
