//! Who is in the cluster, as one node sees it, and who is the home of what.
//!
//! Homes are found by rendezvous hashing: every node gives every (object, group) a weight that all nodes compute alike, and
//! the heaviest is the home. A member that joins or dies moves only the groups that are its own, and two views that differ
//! in a few members agree on nearly every home. Where they disagree one piece is read twice, and nothing else happens.

use std::fmt;
use std::time::Duration;

use super::grid::Object;
use super::time::Time;

/// Who: the Ed25519 key of a node, which every connection proves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(pub [u8; 32]);

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", hex::encode(&self.0[..4]))
    }
}

/// A zone, by number: names are the driver's. All nodes must number alike, so it hashes the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Zone(pub u32);

/// A node as the view knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Who.
    pub peer: Peer,
    /// Where it says that it is.
    pub zone: Zone,
    /// When it was first seen ready; it has home duty [`View::settles`] later.
    pub since: Time,
    /// Whether it may be a home: not draining, its data address reachable.
    pub home: bool,
}

/// All members at a moment, ourselves included. Shared, never changed: another view is another value.
#[derive(Debug, Default)]
pub struct View {
    members: Vec<Member>,
    weights: Vec<u64>,
    duties: Vec<Duty>,
}

/// What a member's zone came to, when homes were counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Duty {
    /// The pool in which it is a zone home.
    pool: u64,
    home: bool,
}

/// Zones with fewer homes pool into one.
const SMALL_ZONE: usize = 8;
/// Zones with more split.
const LARGE_ZONE: usize = 256;
/// Clusters with fewer settled members use all that are ready.
const FEW: usize = 8;

/// How far one looks for a home before one goes to the registry oneself.
pub const RANKS: usize = 8;

impl View {
    /// How long a member is ready before it is a home: the others must have heard of it.
    pub const SETTLE: Duration = Duration::from_secs(5);

    /// Returns the view of these members at `now`; the driver makes a new one when [`View::settles`] says so.
    pub fn new(mut members: Vec<Member>, now: Time) -> Self {
        members.sort_by_key(|member| member.peer);
        members.dedup_by_key(|member| member.peer);
        let weights = members.iter().map(|member| seed(&member.peer.0)).collect();
        let settled = |member: &Member| member.home && now.since(member.since) >= Self::SETTLE;
        let few = members.iter().filter(|member| settled(member)).count() < FEW;
        let is_home = |member: &Member| if few { member.home } else { settled(member) };
        let mut sizes = std::collections::BTreeMap::<Zone, usize>::new();
        for member in members.iter().filter(|member| is_home(member)) {
            *sizes.entry(member.zone).or_default() += 1;
        }
        let pool = |member: &Member| match sizes.get(&member.zone).copied().unwrap_or(0) {
            size if size < SMALL_ZONE => u64::MAX,
            size => {
                let parts = size.div_ceil(LARGE_ZONE) as u64;
                (u64::from(member.zone.0) << 16) | ((seed(&member.peer.0) >> 7) % parts)
            }
        };
        let duties = members.iter().map(|member| Duty { pool: pool(member), home: is_home(member) }).collect();
        Self { members, weights, duties }
    }

    /// Returns the members, by peer.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Returns what is known of a member.
    pub fn member(&self, peer: &Peer) -> Option<&Member> {
        self.place(peer).map(|at| &self.members[at])
    }

    fn place(&self, peer: &Peer) -> Option<usize> {
        self.members.binary_search_by_key(peer, |member| member.peer).ok()
    }

    /// Returns when a member settles next, after which the view is another one.
    pub fn settles(&self, now: Time) -> Option<Time> {
        self.members.iter().map(|member| member.since + Self::SETTLE).filter(|at| *at > now).min()
    }

    /// Returns the homes of a group if only these were members, in rank.
    pub fn homes_among(&self, object: &Object, group: u32, among: impl Fn(&Peer) -> bool) -> Vec<Peer> {
        let key = key(object, group);
        let mut ranks = Ranks::default();
        for (at, member) in self.members.iter().enumerate() {
            if member.home && among(&member.peer) {
                ranks.offer(mix(self.weights[at] ^ key), at);
            }
        }
        self.name(&ranks)
    }

    fn name(&self, ranks: &Ranks) -> Vec<Peer> {
        ranks.0.iter().flatten().map(|(_, at)| self.members[*at].peer).collect()
    }

    /// Returns the homes of a group for whom `peer` asks, first the one to ask: of its zone, then of all.
    pub fn homes(&self, peer: &Peer, object: &Object, group: u32) -> Homes {
        let pool = self.place(peer).map(|at| self.duties[at].pool);
        let key = key(object, group);
        let (mut zone, mut all) = (Ranks::default(), Ranks::default());
        for (at, duty) in self.duties.iter().enumerate().filter(|(_, duty)| duty.home) {
            let weight = mix(self.weights[at] ^ key);
            all.offer(weight, at);
            if Some(duty.pool) == pool {
                zone.offer(weight, at);
            }
        }
        Homes { zone: self.name(&zone), all: self.name(&all) }
    }
}

/// Who is responsible for a group, in rank.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Homes {
    /// In the zone of the asker. The same as `all` where there is one zone.
    pub zone: Vec<Peer>,
    /// In the whole cluster; the first asks the registry.
    pub all: Vec<Peer>,
}

/// The heaviest few.
#[derive(Debug, Default)]
struct Ranks([Option<(u64, usize)>; RANKS]);

impl Ranks {
    fn offer(&mut self, weight: u64, at: usize) {
        let mut new = Some((weight, at));
        for slot in &mut self.0 {
            if new > *slot {
                std::mem::swap(&mut new, slot);
            }
        }
    }
}

/// Returns what all nodes mix into a member's weight for a group.
fn key(object: &Object, group: u32) -> u64 {
    seed(&object.0.0) ^ mix(u64::from(group).wrapping_add(0x9e37_79b9_7f4a_7c15))
}

/// Returns the first bytes of a name that is random already, mixed.
fn seed(name: &[u8; 32]) -> u64 {
    let (words, _) = name.as_chunks::<8>();
    words.iter().fold(0, |all, word| mix(all ^ u64::from_le_bytes(*word)))
}

/// A bijection that spreads every bit over all others (the finalizer of MurmurHash3, twice with other shifts as splitmix64
/// has it): all nodes must compute it alike, so it is written down here and never changes.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}
