//! Who vouches for the pieces that are here.
//!
//! Beside a blob's map lies a file with one record of 96 bytes per piece: who signed its sum, and the signature. The sum is the map's.
//! A record that is lost or torn does not fit its piece, which is then not told of to others, and fetched again when it is wanted.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nydus_rafs::Digest;

use super::narrow;
use crate::mirror::quota::Store;
use crate::node::Vouched;
use crate::node::identity::Identity;
use crate::node::peer::{Peer, Signature};
use crate::swarm::Object;
use crate::swarm::message::Vouch;
use crate::swarm::port::Input;

const RECORD: u64 = 96;

/// Who vouches for what.
#[derive(Debug)]
pub(super) struct Vouches {
    dir: PathBuf,
    known: Mutex<HashMap<Digest, HashMap<u32, Vouched>>>,
}

impl Vouches {
    pub(super) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Digest, HashMap<u32, Vouched>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.to_string()).with_extension("vouches")
    }

    /// Remembers who vouches for a piece.
    pub(super) fn note(&self, digest: &Digest, piece: u32, vouched: Vouched) {
        self.known().entry(*digest).or_default().insert(piece, vouched);
    }

    /// Returns who vouches for a piece.
    pub(super) fn get(&self, digest: &Digest, piece: u32) -> Option<Vouched> {
        self.known().get(digest)?.get(&piece).copied()
    }

    /// Writes down who vouches for a piece that was stored; blocks.
    pub(super) fn keep(&self, digest: &Digest, piece: u32) {
        let Some(vouched) = self.get(digest, piece) else { return };
        let write = || {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(self.path(digest))?;
            let record = [&vouched.by.0[..], &vouched.signature.0].concat();
            file.write_all_at(&record, u64::from(piece) * RECORD)
        };
        if let Err(error) = write() {
            tracing::debug!(blob = %digest, piece, %error, "could not write down who vouches for a piece");
        }
    }

    /// Forgets who vouched for a piece.
    pub(super) fn forget(&self, digest: &Digest, piece: u32) {
        if let Some(pieces) = self.known().get_mut(digest) {
            pieces.remove(&piece);
        }
    }

    /// Forgets all about a blob.
    pub(super) fn forget_all(&self, digest: &Digest) {
        self.known().remove(digest);
        if let Err(error) = std::fs::remove_file(self.path(digest))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(blob = %digest, %error, "could not remove who vouched for a blob");
        }
    }

    /// Tells what is in the cache and may be told of; blocks.
    ///
    /// What once matched its digest as a whole is vouched for by us; of the rest, what somebody else signed.
    pub(super) fn restore(&self, store: &Arc<Store>, identity: &Identity) -> Vec<Input> {
        let mut inputs = Vec::new();
        for pin in store.all() {
            let (digest, size) = (pin.digest(), pin.size());
            let (sums, sealed) = pin.inventory();
            let records = self.read(&digest).unwrap_or_default();
            let mut pieces = Vec::new();
            for (piece, sum) in sums {
                let Some(piece) = narrow(piece) else { continue };
                let kept = records.get(&piece).map(|(by, signature)| Vouched { by: *by, sum, signature: *signature });
                let vouched = if sealed {
                    Some(Vouched::sign(identity, &digest, piece, sum))
                } else {
                    kept.filter(|vouched| vouched.holds(&digest, piece))
                };
                if let Some(vouched) = vouched {
                    self.note(&digest, piece, vouched);
                    pieces.push((piece, Vouch { by: vouched.by, sum }));
                }
            }
            if !pieces.is_empty() {
                inputs.push(Input::Restored { object: Object(digest), size: Some(size), pieces, sealed });
            }
        }
        inputs
    }

    fn read(&self, digest: &Digest) -> io::Result<HashMap<u32, (Peer, Signature)>> {
        let mut file = File::open(self.path(digest))?;
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut file, &mut bytes)?;
        let records = bytes.chunks_exact(RECORD as usize).enumerate().filter_map(|(piece, record)| {
            let by = Peer(record[..32].try_into().ok()?);
            Some((u32::try_from(piece).ok()?, (by, Signature(record[32..].try_into().ok()?))))
        });
        Ok(records.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_vouched_is_known_after_a_restart_and_a_torn_record_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let ann = Identity::from_seed([1; 32]);
        let digest = Digest([7; 32]);
        let vouches = Vouches::new(dir.path());
        for piece in [0, 5] {
            vouches.note(&digest, piece, Vouched::sign(&ann, &digest, piece, [3; 32]));
            vouches.keep(&digest, piece);
        }
        let read = Vouches::new(dir.path()).read(&digest).unwrap();
        let holds = |piece: u32| {
            let (by, signature) = read[&piece];
            Vouched { by, sum: [3; 32], signature }.holds(&digest, piece)
        };
        assert!(holds(0) && holds(5));
        assert!(!holds(3), "what was never written vouches for nothing");
        vouches.forget_all(&digest);
        assert!(Vouches::new(dir.path()).read(&digest).is_err());
    }
}
