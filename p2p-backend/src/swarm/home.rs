//! What the home of a group knows: who has its pieces, and whom to send the next asker to.
//!
//! A home is not told everything at once, so it counts: whom it sends somebody to will be busy for as long as a piece
//! takes, and whoever was sent somewhere will have the piece soon. That is what makes a crowd form a tree by itself.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use super::grid::Mask;
use super::members::Peer;
use super::message::{Holder, MOST_HOLDERS};
use super::time::Time;

/// A holder as its home sees it.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    have: Mask,
    coming: Mask,
    heard: Time,
}

/// A run that an asker reads from the registry because the home may not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    pub(super) to: Peer,
    pub(super) mask: Mask,
    pub(super) until: Time,
    /// When it ends, whatever its holder says.
    end: Time,
}

/// The holders of a group.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: BTreeMap<Peer, Entry>,
    pub(super) leases: Vec<Lease>,
}

/// Holders that are looked at for a referral: enough to find an idle one, and no more with ten thousand.
const LOOKED_AT: usize = 48;
/// A claim to be getting a piece that was not renewed or fulfilled for so long is void.
const STALE: Duration = Duration::from_secs(2);
/// One who says for so long that it reads, and does not get done, is not believed any more: a group at 5 Mbit/s.
const LONGEST_LEASE: Duration = Duration::from_secs(8);

impl Ledger {
    /// Whether anything is noted of a peer.
    pub(super) fn lists(&self, peer: &Peer) -> bool {
        self.entries.contains_key(peer)
    }

    /// Forgets who is no member, and claims that came to nothing; counts the rest.
    pub(super) fn tidy(&mut self, now: Time, member: impl Fn(&Peer) -> bool, listed: &mut BTreeMap<Peer, u32>) {
        self.entries.retain(|peer, entry| {
            if now.since(entry.heard) > STALE {
                entry.coming = Mask::NONE;
            }
            let stays = member(peer) && !entry.have.or(entry.coming).is_empty();
            if stays {
                *listed.entry(*peer).or_default() += 1;
            }
            stays
        });
        self.leases.retain(|lease| lease.until > now);
    }

    /// Notes that a peer was given, or sent for, these.
    pub(super) fn expect(&mut self, peer: Peer, mask: Mask, now: Time) {
        let entry = self.entries.entry(peer).or_default();
        entry.coming = entry.coming.or(mask.without(entry.have));
        entry.heard = now;
    }

    /// Notes that a peer has these; with `all`, and no others.
    pub(super) fn has(&mut self, peer: Peer, mask: Mask, all: bool, now: Time) {
        let entry = self.entries.entry(peer).or_default();
        entry.have = if all { mask } else { entry.have.or(mask) };
        entry.coming = entry.coming.without(entry.have);
        entry.heard = now;
        if entry.have.or(entry.coming).is_empty() {
            self.entries.remove(&peer);
        }
    }

    /// Forgets a peer.
    pub(super) fn forget(&mut self, peer: &Peer) {
        self.entries.remove(peer);
        self.leases.retain(|lease| lease.to != *peer);
    }

    /// Returns who is known to have any of `mask`.
    pub(super) fn holders(&self, mask: Mask) -> impl Iterator<Item = (&Peer, Mask)> {
        self.entries.iter().map(move |(peer, entry)| (peer, entry.have.and(mask))).filter(|(_, have)| !have.is_empty())
    }

    /// Returns the pieces of a group that a lease is out for, after voiding those that were silent.
    pub(super) fn leased(&mut self, now: Time) -> Mask {
        let (gone, kept): (Vec<Lease>, Vec<Lease>) = self.leases.drain(..).partition(|lease| lease.until <= now);
        self.leases = kept;
        for lease in gone {
            if let Some(entry) = self.entries.get_mut(&lease.to) {
                entry.coming = entry.coming.without(lease.mask);
            }
        }
        self.leases.iter().fold(Mask::NONE, |all, lease| all.or(lease.mask))
    }

    /// Notes that a peer reads these in our stead.
    pub(super) fn lease(&mut self, to: Peer, mask: Mask, until: Time, now: Time) {
        self.expect(to, mask, now);
        self.leases.push(Lease { to, mask, until, end: now + LONGEST_LEASE });
    }

    /// Notes that a peer is still at what it reads in our stead.
    pub(super) fn renew(&mut self, peer: &Peer, reading: Mask, until: Time) {
        for lease in self.leases.iter_mut().filter(|lease| lease.to == *peer) {
            lease.mask = lease.mask.and(reading);
            lease.until = until.min(lease.end);
        }
        self.leases.retain(|lease| !lease.mask.is_empty());
    }

    /// Whether nobody is known.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.leases.is_empty()
    }

    /// Returns up to three whom to ask for `mask`, the best first, and the pieces that they have or will have. `start` is
    /// where to begin to look; `complete` leaves out those that are still getting them; `load` tells how many pieces a
    /// peer has to send, or that it is out of the question.
    pub(super) fn refer(
        &self,
        mask: Mask,
        start: Peer,
        complete: bool,
        load: impl Fn(&Peer) -> Option<u32>,
        now: Time,
    ) -> (Mask, Vec<Holder>) {
        let around = self.entries.range(start..).chain(self.entries.range(..start)).take(LOOKED_AT);
        let mut found: Vec<(u32, Reverse<u32>, Holder)> = around
            .filter_map(|(peer, entry)| {
                let coming = if complete || now.since(entry.heard) > STALE { Mask::NONE } else { entry.coming };
                let of_use = entry.have.or(coming).and(mask);
                let load = load(peer).filter(|_| !of_use.is_empty())?;
                // One who waits for it itself is as good as one with two pieces to send first.
                let waits = if entry.have.and(mask) == of_use { 0 } else { 2 };
                let backlog = u8::try_from(load).unwrap_or(u8::MAX);
                let holder = Holder { peer: *peer, have: entry.have, coming, backlog };
                Some((load.saturating_add(waits), Reverse(of_use.len()), holder))
            })
            .collect();
        found.sort_by_key(|(cost, covers, holder)| (*cost, *covers, holder.peer));
        let holders: Vec<Holder> = found.into_iter().take(MOST_HOLDERS).map(|(.., holder)| holder).collect();
        let covered = holders.iter().fold(Mask::NONE, |all, holder| all.or(holder.have.or(holder.coming))).and(mask);
        (covered, holders)
    }
}
