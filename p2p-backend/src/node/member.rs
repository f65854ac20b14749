//! A member as the others know it: what is gossiped about it.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::peer::Peer;
use crate::http::Reach;

/// Bytes of a zone's name at most.
pub(super) const MOST_ZONE: usize = 63;

/// What a member can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// It was not reached under its own address yet: it asks, and is not asked.
    Joining,
    /// It serves.
    Ready,
    /// It is about to go.
    Leaving,
}

/// A member. Of two versions of one peer the later one counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    peer: [u8; 32],
    /// Where it answers: TCP for asks and bytes, UDP of the same port for membership.
    pub address: SocketAddr,
    /// The TCP port of its gossip; zero if it has none.
    pub gossip: u16,
    /// Where it says that it is.
    pub zone: Box<str>,
    /// Which start of the node this is.
    pub boot: u32,
    /// Rises when it says something new of itself within one start.
    pub revision: u32,
    /// Which life of its cache it speaks of.
    pub generation: u64,
    /// What it can be asked for.
    pub standing: Standing,
}

impl Member {
    /// Describes `peer` in its first version.
    pub fn new(peer: Peer, address: SocketAddr, zone: &str, boot: u32, generation: u64) -> Self {
        Self {
            peer: peer.0,
            address,
            gossip: 0,
            zone: zone.into(),
            boot,
            revision: 0,
            generation,
            standing: Standing::Joining,
        }
    }

    /// Returns who it is.
    pub fn peer(&self) -> Peer {
        Peer(self.peer)
    }

    /// Returns a later version of the same member.
    pub(super) fn later(&self) -> Self {
        Self { revision: self.revision.wrapping_add(1), ..self.clone() }
    }

    /// Whether it is what a member can be: what came from elsewhere may be anything.
    pub(super) fn is_sound(&self) -> bool {
        let ip = self.address.ip();
        let reachable = !ip.is_unspecified() && !ip.is_multicast() && Reach::NotLinkLocal.covers(ip);
        self.zone.len() <= MOST_ZONE && self.address.port() != 0 && reachable
    }
}

impl foca::Identity for Member {
    type Addr = [u8; 32];

    fn renew(&self) -> Option<Self> {
        Some(self.later())
    }

    fn addr(&self) -> [u8; 32] {
        self.peer
    }

    fn win_addr_conflict(&self, other: &Self) -> bool {
        (self.boot, self.revision) > (other.boot, other.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_nowhere_where_no_member_can_be() {
        let at = |address: &str| Member::new(Peer([1; 32]), address.parse().unwrap(), "a", 1, 1);
        assert!(at("10.0.0.2:4011").is_sound() && at("[fd00::2]:4011").is_sound());
        for address in
            ["0.0.0.0:4011", "169.254.169.254:80", "[fe80::1]:4011", "224.0.0.1:4011", "10.0.0.2:0", "[::]:4011"]
        {
            assert!(!at(address).is_sound(), "{address}");
        }
        let long = Member::new(Peer([1; 32]), "10.0.0.2:1".parse().unwrap(), &"z".repeat(64), 1, 1);
        assert!(!long.is_sound());
    }
}
