//! What local readers want, with which right, and how far what is here may be believed.

use std::collections::BTreeSet;
use std::ops::Range;

use super::Swarm;
use super::config::Trust;
use super::grant::Known;
use super::grid::{MOST_PIECES, Object, Pieces};
use super::members::Peer;
use super::message::{Origin, Urgency, Vouch};
use super::port::{Blame, Caller, Failure, Order, Output, Reader, Verdict, Want};

/// A local reader's wish.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) object: Object,
    pub(super) pieces: Range<u32>,
    pub(super) reader: Reader,
    pub(super) origin: Origin,
}

/// How something is wanted.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) origin: Origin,
    pub(super) urgency: Urgency,
    pub(super) order: Order,
    pub(super) reader: Reader,
}

impl Swarm {
    pub(super) fn want(&mut self, want: Want, object: Object, size: Option<u64>, pieces: Range<u32>, terms: Terms) {
        let Terms { origin, urgency, order, reader } = terms;
        let end = pieces.end.min(MOST_PIECES);
        let pieces = pieces.start.min(end)..end;
        if self.tombs.has(&object, self.now) {
            self.out.push(Output::Fail { want, pieces: pieces.into(), why: Failure::Forgotten });
            return;
        }
        let blob = self.blob(object);
        blob.learn(size, &origin);
        blob.withdrawn = None;
        if let Some(size) = size {
            self.sized(object, size);
        }
        match self.grants.want(want, reader.caller, object, &origin, self.now) {
            Known::Granted => self.out.push(Output::Grant { want }),
            Known::Ask => self.out.push(Output::Check { caller: reader.caller, object, origin: origin.clone() }),
            Known::Asked => {}
        }
        self.wants.insert(want, Wanted { object, pieces: pieces.clone(), reader, origin });
        // In proof mode a part of an object has no proof but the registry's own bytes. Of what is whole soon, its digest is.
        let whole = self.blobs.get(&object).is_some_and(|blob| {
            let coming = |piece| pieces.contains(&piece) || blob.have.has(piece) || blob.fetches.contains_key(&piece);
            blob.pieces().is_some_and(|all| (0..all).all(coming))
        });
        let unproved = self.config.trust == Trust::Proof && !reader.verifies && !whole;
        for piece in pieces {
            let here = self.blobs.get(&object).is_some_and(|blob| blob.have.has(piece));
            let stale = reader.no_peer || (unproved && !self.proved(object, piece));
            if here && stale {
                self.discard(object, piece);
            }
            if let Some(fetch) = self.begin(object, piece, urgency, order) {
                fetch.wants.insert(want);
                fetch.no_peer |= stale;
            }
        }
    }

    pub(super) fn unwant(&mut self, want: Want) {
        self.grants.unwant(want);
        let Some(wanted) = self.wants.remove(&want) else { return };
        self.release(want, &wanted);
    }

    /// Takes a reader off what it wanted; what nobody else waits for is not fetched any further, unless it is flowing.
    fn release(&mut self, want: Want, wanted: &Wanted) {
        let Some(blob) = self.blobs.get_mut(&wanted.object) else { return };
        let mut idle = Vec::new();
        for (piece, fetch) in blob.fetches.range_mut(wanted.pieces.clone()) {
            fetch.wants.remove(&want);
            if fetch.wants.is_empty() && !fetch.duty && fetch.got == 0 {
                idle.push(*piece);
            }
        }
        for piece in idle {
            self.give_up(wanted.object, piece);
        }
        self.dirty.insert(wanted.object);
    }

    /// Ends a fetch without result.
    pub(super) fn give_up(&mut self, object: Object, piece: u32) {
        let fetch = self.blobs.get_mut(&object).and_then(|blob| blob.end_fetch(piece));
        for via in fetch.into_iter().flat_map(|fetch| fetch.sources) {
            self.let_go(via, object, piece);
        }
        self.refuse_waiting(object, piece);
    }

    /// No source is left for a piece: its readers are told.
    pub(super) fn fail(&mut self, object: Object, piece: u32, why: Failure) {
        let wants = self.blobs.get(&object).and_then(|blob| blob.fetches.get(&piece)).map(|fetch| fetch.wants.clone());
        for want in wants.into_iter().flatten() {
            self.out.push(Output::Fail { want, pieces: Pieces::from(piece..piece + 1), why });
        }
        self.give_up(object, piece);
    }

    pub(super) fn checked(&mut self, caller: Caller, object: Object, origin: &Origin, verdict: Verdict) {
        let terms = (self.config.grant, self.config.public, self.config.grace);
        let (waiting, may) = self.grants.checked(caller, object, origin, verdict, self.now, terms);
        let why = if verdict == Verdict::Denied { Failure::Denied } else { Failure::Unproved };
        for want in waiting {
            if may {
                self.out.push(Output::Grant { want });
            } else if let Some(wanted) = self.wants.remove(&want) {
                self.out.push(Output::Fail { want, pieces: wanted.pieces.clone().into(), why });
                self.release(want, &wanted);
            }
        }
        self.dirty.insert(object);
    }

    /// Returns the token of a caller here with which the registry may be read for `piece`, and where: it goes nowhere else.
    pub(super) fn token_for(&self, object: Object, piece: u32) -> Option<([u8; 32], Origin)> {
        let fetch = self.blobs.get(&object)?.fetches.get(&piece)?;
        fetch.wants.iter().find_map(|want| {
            let wanted = self.wants.get(want)?;
            let reads = self.grants.reads(wanted.reader.caller, object, &wanted.origin, self.now);
            wanted.reader.caller.filter(|_| reads).map(|caller| (caller, wanted.origin.clone()))
        })
    }

    /// The size of an object is known now: what was wanted behind its end is not there.
    pub(super) fn sized(&mut self, object: Object, size: u64) {
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        blob.learn(Some(size), &Origin::default());
        let Some(pieces) = blob.pieces() else { return };
        let behind: Vec<u32> = blob.fetches.range(pieces..).map(|(piece, _)| *piece).collect();
        for piece in behind {
            self.give_up(object, piece);
        }
    }

    pub(super) fn restored(&mut self, object: Object, size: Option<u64>, pieces: Vec<(u32, Vouch)>, sealed: bool) {
        let blob = self.blob(object);
        blob.learn(size, &Origin::default());
        for (piece, vouch) in pieces {
            if blob.have.insert(piece) {
                blob.records.vouched(piece, vouch);
            }
        }
        blob.sealed = sealed;
        self.plan_summary();
    }

    fn proved(&self, object: Object, piece: u32) -> bool {
        self.blobs.get(&object).is_some_and(|blob| blob.sealed || blob.records.proved(piece))
    }

    /// Releases a kept piece to readers that do not verify, if there is enough behind it.
    pub(super) fn believe(&mut self, object: Object, piece: u32) {
        if self.config.trust == Trust::Members || self.proved(object, piece) {
            self.out.push(Output::Trust { object, pieces: Pieces::from(piece..piece + 1) });
        }
    }

    pub(super) fn sealed(&mut self, object: Object) {
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        blob.sealed = true;
        self.out.push(Output::Trust { object, pieces: blob.have.clone() });
    }

    /// Drops wrong pieces; those that readers wait for are read from the registry, which tells who lied.
    pub(super) fn wrong(&mut self, object: Object, pieces: &Pieces) {
        for piece in pieces.iter() {
            self.discard(object, piece);
            self.want_again(object, piece, true);
        }
    }

    fn discard(&mut self, object: Object, piece: u32) {
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        if blob.have.remove(piece) {
            blob.records.wrong(piece);
            blob.sealed = false;
            self.out.push(Output::Drop { object, pieces: Pieces::from(piece..piece + 1) });
            self.refuse_queued(object, piece);
            self.tell_loss(object, piece);
        }
    }

    /// Drops what only a liar vouched for, and fetches it anew for those who want it.
    pub(super) fn discard_vouched(&mut self, by: Peer) {
        let unsealed = self.blobs.iter().filter(|(_, blob)| !blob.sealed);
        let all: Vec<(Object, u32)> =
            unsealed.flat_map(|(object, blob)| blob.records.only_by(&by).map(|piece| (*object, piece))).collect();
        for (object, piece) in all {
            self.discard(object, piece);
            self.want_again(object, piece, false);
        }
    }

    /// Fetches a piece anew that was dropped, for the readers that want it.
    fn want_again(&mut self, object: Object, piece: u32, no_peer: bool) {
        let wanted = |wanted: &&Wanted| wanted.object == object && wanted.pieces.contains(&piece);
        let again: BTreeSet<Want> = self.wants.iter().filter(|(_, all)| wanted(all)).map(|(want, _)| *want).collect();
        if !again.is_empty()
            && let Some(fetch) = self.begin(object, piece, Urgency::Demand, Order::InOrder)
        {
            fetch.wants.extend(again);
            fetch.no_peer |= no_peer;
            fetch.doubted = true;
        }
    }

    pub(super) fn lost(&mut self, object: Object, piece: u32) {
        let Some(blob) = self.blobs.get_mut(&object) else { return };
        if blob.have.remove(piece) {
            blob.records.forget(piece);
            blob.sealed = false;
            self.refuse_queued(object, piece);
            self.tell_loss(object, piece);
        }
    }

    /// Puts a liar in quarantine, if a record gave one away.
    pub(super) fn judge(&mut self, object: Object, piece: u32, finding: &super::trust::Finding) {
        if let Some(peer) = finding.liar {
            self.quarantine(peer, Blame::Vouch, object, piece);
        }
        if let Some(peer) = finding.two_faced {
            self.quarantine(peer, Blame::TwoVouches, object, piece);
        }
    }
}
