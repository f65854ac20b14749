//! Who has which pieces of an object, as far as a node that fetches them has heard.
//!
//! Have-maps and referrals end up here. Most pieces are found here and not through their home, which is why a home
//! with ten thousand askers is not asked ten thousand times for each. What is heard is a hint: it is wrong by the time that
//! passed, or because it was a lie, and all that follows is an ask in vain.

use std::collections::BTreeMap;

use super::grid::Pieces;
use super::members::Peer;
use super::time::Time;

/// A node that has some of an object.
#[derive(Debug, Default)]
pub(super) struct Neighbour {
    pub(super) have: Pieces,
    pub(super) coming: Pieces,
    heard: Time,
    /// Times that it had not what we were told that it has.
    misses: u8,
}

/// Times that somebody has not got what it should have, after which nothing is believed that is said of it.
const MISSES: u8 = 3;

/// All that are known for an object.
#[derive(Debug, Default)]
pub(super) struct Known(BTreeMap<Peer, Neighbour>);

impl Known {
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Peer, &Neighbour)> {
        self.0.iter()
    }

    pub(super) fn get(&self, peer: &Peer) -> Option<&Neighbour> {
        self.0.get(peer)
    }

    pub(super) fn get_mut(&mut self, peer: &Peer) -> Option<&mut Neighbour> {
        self.0.get_mut(peer)
    }

    /// Returns what is known of a peer, to be added to; the one that was not heard of for longest makes room.
    pub(super) fn hear(&mut self, peer: Peer, most: usize, now: Time) -> &mut Neighbour {
        if !self.0.contains_key(&peer)
            && self.0.len() >= most
            && let Some(oldest) = self.0.iter().min_by_key(|(_, neighbour)| neighbour.heard).map(|(peer, _)| *peer)
        {
            self.0.remove(&oldest);
        }
        let neighbour = self.0.entry(peer).or_default();
        neighbour.heard = now;
        neighbour
    }

    /// Takes what a peer says of itself.
    pub(super) fn map(&mut self, peer: Peer, have: Pieces, coming: Pieces, most: usize, now: Time) {
        let neighbour = self.hear(peer, most, now);
        neighbour.have = have;
        neighbour.coming = coming;
    }

    /// Takes what a peer says of another one; that is older than what the other said itself, so it only adds.
    pub(super) fn hear_of(&mut self, peer: Peer, have: &Pieces, coming: &Pieces, most: usize, now: Time) {
        let neighbour = self.hear(peer, most, now);
        neighbour.have.extend(have);
        neighbour.coming.extend(coming);
    }

    /// Notes that a peer has not got a piece that it was said to have; who often does is forgotten.
    pub(super) fn miss(&mut self, peer: &Peer, piece: u32) {
        if let Some(neighbour) = self.0.get_mut(peer) {
            neighbour.have.remove(piece);
            neighbour.coming.remove(piece);
            neighbour.misses += 1;
            if neighbour.misses >= MISSES {
                self.0.remove(peer);
            }
        }
    }

    /// Forgets a peer.
    pub(super) fn forget(&mut self, peer: &Peer) {
        self.0.remove(peer);
    }
}
