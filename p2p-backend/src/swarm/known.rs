//! Who has which pieces of an object, as far as a node that fetches them has heard.
//!
//! Have-maps and referrals end up here. Most pieces are found here and not through their home, which is why a home
//! with ten thousand askers is not asked ten thousand times for each. What is heard is a hint: it is wrong by the time that
//! passed, or because it was a lie, and all that follows is an ask in vain.

use std::collections::BTreeMap;
use std::time::Duration;

use super::grid::Pieces;
use super::members::Peer;
use super::time::Time;

/// A node that has some of an object.
#[derive(Debug, Default)]
pub(super) struct Neighbour {
    pub(super) have: Pieces,
    pub(super) coming: Pieces,
    /// Pieces that it had to send when we last heard of it.
    backlog: u8,
    heard: Time,
    /// Pieces that we have asked it for.
    pub(super) asked: u32,
    /// Times that it had not what we were told that it has.
    misses: u8,
}

impl Neighbour {
    /// Returns how many pieces it probably has to send before ours.
    pub(super) fn load(&self, now: Time, pace: Duration) -> u32 {
        let done = now.since(self.heard).as_micros() / pace.as_micros().max(1);
        u32::from(self.backlog).saturating_sub(u32::try_from(done).unwrap_or(u32::MAX)) + self.asked
    }
}

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
        if !self.0.contains_key(&peer) && self.0.len() >= most {
            let idle = self.0.iter().filter(|(_, neighbour)| neighbour.asked == 0);
            if let Some(oldest) = idle.min_by_key(|(_, neighbour)| neighbour.heard).map(|(peer, _)| *peer) {
                self.0.remove(&oldest);
            }
        }
        let neighbour = self.0.entry(peer).or_default();
        neighbour.heard = now;
        neighbour
    }

    /// Takes what a peer says of itself.
    pub(super) fn map(&mut self, peer: Peer, have: Pieces, coming: Pieces, backlog: u8, most: usize, now: Time) {
        let neighbour = self.hear(peer, most, now);
        neighbour.have = have;
        neighbour.coming = coming;
        neighbour.backlog = backlog;
    }

    /// Takes what a peer says of another one; that is older than what the other says itself.
    pub(super) fn hear_of(&mut self, peer: Peer, have: Pieces, most: usize, now: Time) {
        match self.0.get_mut(&peer) {
            Some(neighbour) => have.iter().for_each(|piece| {
                neighbour.have.insert(piece);
            }),
            None => self.hear(peer, most, now).have = have,
        }
    }

    /// Notes how busy a peer is.
    pub(super) fn busy(&mut self, peer: &Peer, backlog: u8, now: Time) {
        if let Some(neighbour) = self.0.get_mut(peer) {
            neighbour.backlog = backlog;
            neighbour.heard = now;
        }
    }

    /// Notes that a peer has not got a piece that it was said to have; who often does is forgotten.
    pub(super) fn miss(&mut self, peer: &Peer, piece: u32) {
        if let Some(neighbour) = self.0.get_mut(peer) {
            neighbour.have.remove(piece);
            neighbour.coming.remove(piece);
            neighbour.misses += 1;
            if neighbour.misses >= 3 {
                neighbour.have = Pieces::new();
                neighbour.coming = Pieces::new();
                neighbour.misses = 0;
            }
        }
    }

    /// Forgets a peer, but not that it was asked.
    pub(super) fn forget(&mut self, peer: &Peer) {
        if let Some(neighbour) = self.0.get_mut(peer) {
            neighbour.have = Pieces::new();
            neighbour.coming = Pieces::new();
        }
    }
}
