//! Pieces on their way to this node: who fills them, and what of them has come from peers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nydus_rafs::Digest;

use crate::mirror::filling::Filling;
use crate::mirror::pieces::Claim;
use crate::mirror::upstream::UpstreamError;
use crate::swarm::port::{Reading, Want};

/// Bytes of a piece that a peer has sent so far; nobody has checked them.
pub(super) type Draft = Arc<Mutex<Vec<u8>>>;
type WeakDraft = Weak<Mutex<Vec<u8>>>;

/// On whose account a piece is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// A local reader's.
    Want(Want),
    /// A request's to the registry.
    Reading(Reading),
}

/// What is on its way.
#[derive(Debug, Default)]
pub(super) struct Flights {
    /// Those that somebody here waits for, or that come from the registry.
    claims: HashMap<(Digest, u32), (Claim, Owner)>,
    /// What senders have sent of pieces, and may still be.
    drafts: HashMap<(Digest, u32), Vec<WeakDraft>>,
    /// The longest draft that was broken off.
    broken: HashMap<(Digest, u32), Vec<u8>>,
}

impl Flights {
    /// Takes over the duty to fill a piece.
    pub(super) fn board(&mut self, digest: &Digest, claim: Claim, owner: Owner) {
        let Ok(piece) = u32::try_from(claim.piece()) else { return };
        self.claims.insert((*digest, piece), (claim, owner));
    }

    /// Returns where readers see the bytes of a piece come.
    pub(super) fn filling(&self, digest: &Digest, piece: u32) -> Option<Arc<Filling>> {
        self.claims.get(&(*digest, piece)).and_then(|(claim, _)| claim.shared())
    }

    /// Ends the flight of a piece that is here.
    pub(super) fn land(&mut self, digest: &Digest, piece: u32) -> Option<Claim> {
        self.drafts.remove(&(*digest, piece));
        self.broken.remove(&(*digest, piece));
        self.claims.remove(&(*digest, piece)).map(|(claim, _)| claim)
    }

    /// Ends the flight of a piece that `owner` cannot have.
    pub(super) fn fail(&mut self, digest: &Digest, piece: u32, owner: Owner, error: &Arc<UpstreamError>) {
        if self.claims.get(&(*digest, piece)).is_some_and(|(_, now)| *now == owner)
            && let Some(claim) = self.land(digest, piece)
        {
            claim.fail(error.clone());
        }
    }

    /// Gives back what `owner` had, except where `heir` names another one.
    pub(super) fn give_back(&mut self, owner: Owner, heir: impl Fn(&Digest, u32) -> Option<Owner>) {
        self.claims.retain(|(digest, piece), (_, now)| {
            if *now != owner {
                return true;
            }
            match heir(digest, *piece) {
                Some(heir) => {
                    *now = heir;
                    true
                }
                None => false,
            }
        });
        if self.claims.is_empty() {
            self.drafts.retain(|_, drafts| drafts.iter().any(|draft| draft.strong_count() > 0));
            self.broken.retain(|key, _| self.drafts.contains_key(key));
        }
    }

    /// Begins to receive a piece from its byte `offset` on; none if what comes before is not here.
    pub(super) fn draft(&mut self, digest: &Digest, piece: u32, offset: usize) -> Option<Draft> {
        let key = (*digest, piece);
        let begun = if offset == 0 { Some(Vec::with_capacity(64 << 10)) } else { self.begun(&key, offset) };
        let draft = Arc::new(Mutex::new(begun?));
        let drafts = self.drafts.entry(key).or_default();
        drafts.retain(|draft| draft.strong_count() > 0);
        drafts.push(Arc::downgrade(&draft));
        Some(draft)
    }

    /// Returns the first `length` bytes of a piece, from whoever sent them.
    fn begun(&self, key: &(Digest, u32), length: usize) -> Option<Vec<u8>> {
        let part = |bytes: &[u8]| bytes.get(..length).map(<[u8]>::to_vec);
        let live = self.drafts.get(key).into_iter().flatten().filter_map(Weak::upgrade);
        let live = live.filter_map(|draft| part(&draft.lock().unwrap_or_else(PoisonError::into_inner))).next();
        live.or_else(|| self.broken.get(key).and_then(|bytes| part(bytes)))
    }

    /// Keeps what a sender sent who was left in the middle, for the next to go on with.
    pub(super) fn break_off(&mut self, digest: &Digest, piece: u32, draft: &Draft) {
        let mut draft = draft.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = self.broken.entry((*digest, piece)).or_default();
        if draft.len() > kept.len() {
            *kept = std::mem::take(&mut draft);
        }
    }
}
