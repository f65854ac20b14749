//! Who this node is: an Ed25519 key that outlives restarts, and how often it has begun anew.
//!
//! ```text
//!     DATA_DIR/identity     secret = "<64 hex digits>"    the key's seed; for the owner only
//!                           boot = 7                      rises with every start
//!                           cache = "<16 hex digits>"     the id of the cache that the claims were about
//!                           generation = 2                rises when the cache is another one
//!     DATA_DIR/blobs/id     <16 hex digits>               the cache's own id: gone with it
//! ```
//!
//! The peer id is libp2p's name of the key. What others remember of us is about a generation: a disk that was wiped has none
//! of what its node once said. Two nodes with one key (a disk that was copied) are found by the others, and by each other;
//! then `boot` tells nothing, and both are told to stop.

use std::io::{self, Write as _};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::{Deserialize, Serialize};

use super::peer::{Peer, Signature};

/// Why a node has no identity; completes "could not take up the node's identity".
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("{}: {source}; check data_dir, its owner and its disk", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is damaged.
    #[error("{}: {reason}; restore it, or remove it and the node becomes a new member", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Others may read the key.
    #[error("{} has mode {mode:03o}, so others may read the node's key; run chmod 600 on it", path.display())]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// There is no randomness.
    #[error("the system gives no random bytes")]
    Random,
}

/// What the file says.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    secret: String,
    boot: u32,
    cache: String,
    generation: u64,
}

/// The identity of a running node.
pub struct Identity {
    seed: [u8; 32],
    pair: Ed25519KeyPair,
    peer: Peer,
    boot: u32,
    generation: u64,
}

impl Identity {
    /// Reads the identity in `data_dir`, or makes one, and begins another life of it. Blocks.
    pub fn take_up(data_dir: &Path) -> Result<Self, IdentityError> {
        let path = data_dir.join("identity");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| IdentityError::Io { path, source }
        };
        let mut kept = match std::fs::read_to_string(&path) {
            Ok(text) => {
                let mode = path.metadata().map_err(failed(&path))?.permissions().mode() & 0o777;
                if mode & 0o077 != 0 {
                    return Err(IdentityError::Readable { path, mode });
                }
                let damaged = |error: toml::de::Error| IdentityError::Damaged {
                    path: path.clone(),
                    reason: error.message().to_owned(),
                };
                toml::from_str::<Kept>(&text).map_err(damaged)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Kept { secret: hex::encode(random::<32>()?), boot: 0, cache: String::new(), generation: 0 }
            }
            Err(error) => return Err(failed(&path)(error)),
        };
        let mut seed = [0; 32];
        hex::decode_to_slice(&kept.secret, &mut seed).map_err(|_| IdentityError::Damaged {
            path: path.clone(),
            reason: "`secret` is not 64 hex digits".into(),
        })?;
        let cache = data_dir.join("blobs/id");
        let id = match std::fs::read_to_string(&cache) {
            Ok(id) => id.trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let id = hex::encode(random::<8>()?);
                std::fs::create_dir_all(data_dir.join("blobs")).map_err(failed(&cache))?;
                std::fs::write(&cache, &id).map_err(failed(&cache))?;
                id
            }
            Err(error) => return Err(failed(&cache)(error)),
        };
        if id != kept.cache {
            kept.generation += 1;
            kept.cache = id;
        }
        kept.boot = kept.boot.wrapping_add(1);
        write(&path, &kept).map_err(failed(&path))?;
        let mut identity = Self::from_seed(seed);
        (identity.boot, identity.generation) = (kept.boot, kept.generation);
        Ok(identity)
    }

    /// Returns the identity of this seed in its first life.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).expect("every 32 bytes are a seed");
        let peer = Peer(pair.public_key().as_ref().try_into().expect("Ed25519 keys have 32 bytes"));
        Self { seed, pair, peer, boot: 1, generation: 1 }
    }

    /// Returns the peer id.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Returns which start of the node this is.
    pub fn boot(&self) -> u32 {
        self.boot
    }

    /// Returns which life of its cache this is.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Signs `text`, whose beginning must say what it is.
    pub fn sign(&self, text: &[u8]) -> Signature {
        Signature(self.pair.sign(text).as_ref().try_into().expect("Ed25519 signatures have 64 bytes"))
    }

    /// Returns the seed, for the libraries that have connections of their own.
    pub(super) fn seed(&self) -> &[u8; 32] {
        &self.seed
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("peer", &self.peer).field("boot", &self.boot).finish_non_exhaustive()
    }
}

/// Returns bytes that nobody can guess.
pub(super) fn random<const N: usize>() -> Result<[u8; N], IdentityError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| IdentityError::Random)?;
    Ok(bytes)
}

/// Replaces the file as a whole: half a key would be another node.
fn write(path: &Path, kept: &Kept) -> io::Result<()> {
    let draft = path.with_extension("draft");
    let _ = std::fs::remove_file(&draft);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    file.write_all(toml::to_string(kept).map_err(io::Error::other)?.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_outlives_restarts_and_a_wiped_cache_begins_a_generation() {
        let dir = tempfile::tempdir().unwrap();
        let first = Identity::take_up(dir.path()).unwrap();
        assert_eq!((first.boot(), first.generation()), (1, 1));
        assert_eq!(dir.path().join("identity").metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let second = Identity::take_up(dir.path()).unwrap();
        assert_eq!((second.peer(), second.boot(), second.generation()), (first.peer(), 2, 1));
        std::fs::remove_dir_all(dir.path().join("blobs")).unwrap();
        let third = Identity::take_up(dir.path()).unwrap();
        assert_eq!((third.peer(), third.boot(), third.generation()), (first.peer(), 3, 2));
    }

    #[test]
    fn a_damaged_or_readable_identity_is_refused_with_the_fix() {
        let dir = tempfile::tempdir().unwrap();
        Identity::take_up(dir.path()).unwrap();
        let path = dir.path().join("identity");
        let good = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &good[..40]).unwrap();
        let told = Identity::take_up(dir.path()).unwrap_err().to_string();
        assert!(told.contains("identity") && told.contains("remove it"), "{told}");
        assert!(!told.contains(&good[12..30]), "the secret is never printed: {told}");
        std::fs::write(&path, good).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let told = Identity::take_up(dir.path()).unwrap_err().to_string();
        assert!(told.contains("640") && told.contains("chmod 600"), "{told}");
    }

    #[test]
    fn a_signature_is_of_one_peer_and_one_text() {
        let (ann, bob) = (Identity::from_seed([1; 32]), Identity::from_seed([2; 32]));
        let signature = ann.sign(b"text");
        assert!(ann.peer().signed(b"text", &signature));
        assert!(!ann.peer().signed(b"texT", &signature));
        assert!(!bob.peer().signed(b"text", &signature));
        assert!(!format!("{ann:?}").contains("0101"));
    }
}
