//! Who is in the cluster, as one node sees it, and who is the home of what.
//!
//! Homes are found by rendezvous hashing: every node gives every (object, group) a weight that all nodes compute alike, and
//! the heaviest is the home. A member that joins or dies moves only the groups that are its own, and two views that differ
//! in a few members agree on nearly every home. Where they disagree one piece is read twice, and nothing else happens.

use std::collections::BTreeMap;
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
    homes: usize,
    /// Zones that were small, and since when they are large enough to leave the pool.
    pooled: BTreeMap<Zone, Option<Time>>,
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
/// A zone leaves the pool with so many, when it had them for a while: one that grows and shrinks by a few would move everything
/// that it holds each time.
const LEAVES_POOL: usize = 12;
/// So long.
const STAYS_LARGE: Duration = Duration::from_secs(60);
/// Zones with more split.
const LARGE_ZONE: usize = 256;
/// Clusters with fewer settled members use all that are ready.
const FEW: usize = 8;

/// How far one looks for a home before one goes to the registry oneself.
pub const RANKS: usize = 8;

impl View {
    /// How long a member is ready before it is a home: the others must have heard of it.
    pub const SETTLE: Duration = Duration::from_secs(5);

    /// Returns the first view, of these members at `now`.
    pub fn new(members: Vec<Member>, now: Time) -> Self {
        Self::default().next(members, now)
    }

    /// Returns the view after this one; the driver makes one when members change, and when [`View::settles`] says so.
    #[must_use]
    pub fn next(&self, mut members: Vec<Member>, now: Time) -> Self {
        members.sort_by_key(|member| member.peer);
        members.dedup_by_key(|member| member.peer);
        let weights = members.iter().map(|member| seed(&member.peer.0)).collect();
        let settled = |member: &Member| member.home && now.since(member.since) >= Self::SETTLE;
        let few = members.iter().filter(|member| settled(member)).count() < FEW;
        let is_home = |member: &Member| if few { member.home } else { settled(member) };
        let mut sizes = BTreeMap::<Zone, usize>::new();
        for member in &members {
            *sizes.entry(member.zone).or_default() += usize::from(is_home(member));
        }
        let pooled: BTreeMap<Zone, Option<Time>> = sizes
            .iter()
            .filter_map(|(zone, size)| self.pools(*zone, *size, now).map(|large_since| (*zone, large_since)))
            .collect();
        let pool = |member: &Member| match sizes.get(&member.zone).copied().unwrap_or(0) {
            _ if pooled.contains_key(&member.zone) => u64::MAX,
            size => {
                let parts = size.div_ceil(LARGE_ZONE).max(1) as u64;
                (u64::from(member.zone.0) << 16) | ((seed(&member.peer.0) >> 7) % parts)
            }
        };
        let duties = members.iter().map(|member| Duty { pool: pool(member), home: is_home(member) }).collect();
        let homes = members.iter().filter(|member| is_home(member)).count();
        Self { members, weights, duties, homes, pooled }
    }

    /// Tells whether a zone with so many homes now is in the pool, and since when it is large enough to leave it.
    fn pools(&self, zone: Zone, size: usize, now: Time) -> Option<Option<Time>> {
        let first = self.members.len() <= 1;
        let own = !first && !self.pooled.contains_key(&zone) && self.members.iter().any(|member| member.zone == zone);
        if own || first {
            // One who has just come cannot know what was, and takes a zone as it is.
            return (size < SMALL_ZONE).then_some(None);
        }
        if size < LEAVES_POOL {
            return Some(None);
        }
        let since = self.pooled.get(&zone).copied().flatten().unwrap_or(now);
        (now.since(since) < STAYS_LARGE).then_some(Some(since))
    }

    /// Returns the members, by peer.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Returns how many of them are homes.
    pub fn home_count(&self) -> usize {
        self.homes
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
        let leave = self.pooled.values().flatten().map(|since| *since + STAYS_LARGE);
        self.members.iter().map(|member| member.since + Self::SETTLE).chain(leave).filter(|at| *at > now).min()
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use nydus_rafs::Digest;
    use proptest::collection::{btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    const THING: Object = Object(Digest([7; 32]));
    const GROUPS: u32 = 400;

    fn at(seconds: u64) -> Time {
        Time(seconds * 1_000_000)
    }

    fn peer(number: u64) -> Peer {
        let mut name = [0; 32];
        fastrand::Rng::with_seed(number).fill(&mut name);
        Peer(name)
    }

    fn member(number: u64) -> Member {
        Member { peer: peer(number), zone: Zone(0), since: at(0), home: true }
    }

    fn view(numbers: impl IntoIterator<Item = u64>) -> View {
        View::new(numbers.into_iter().map(member).collect(), at(100))
    }

    fn home(view: &View, group: u32) -> Peer {
        view.homes(&view.members()[0].peer, &THING, group).all[0]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn one_that_comes_or_goes_moves_only_its_share(numbers in btree_set(0..1_000_000_u64, 12..60), pick in any::<prop::sample::Index>()) {
            let one = *pick.get(&numbers.iter().copied().collect::<Vec<_>>());
            let (with, without) = (view(numbers.clone()), view(numbers.iter().copied().filter(|number| *number != one)));
            let mut moved = 0;
            for group in 0..GROUPS {
                let (before, after) = (home(&with, group), home(&without, group));
                prop_assert_eq!(before != after, before == peer(one), "what was somebody else's stays there");
                moved += usize::from(before != after);
                // Whoever is next in rank takes over, so that the others know whom to ask.
                if before != after {
                    prop_assert_eq!(with.homes(&peer(one), &THING, group).all[1], after);
                }
            }
            // Six standard deviations of a fair share.
            let share = f64::from(GROUPS) / numbers.len() as f64;
            prop_assert!((moved as f64) < share + 6.0 * share.sqrt() + 1.0, "{moved} of {share} moved");
        }

        #[test]
        fn whoever_sees_whom_somebody_reads(
            numbers in btree_set(0..1_000_000_u64, 2..40),
            seen in vec(any::<u64>(), 40),
            group in 0..GROUPS,
        ) {
            let numbers: Vec<u64> = numbers.into_iter().collect();
            // Each sees itself and some others.
            let views: Vec<View> = (0..numbers.len())
                .map(|me| view(numbers.iter().enumerate().filter(|(other, _)| *other == me || seen[me] >> other & 1 == 1).map(|(_, number)| *number)))
                .collect();
            for start in 0..numbers.len() {
                let (mut now, mut been) = (start, BTreeSet::new());
                // Everybody asks whom it takes for the home; who takes itself for it reads.
                while home(&views[now], group) != peer(numbers[now]) {
                    prop_assert!(been.insert(now), "they ask each other in a circle");
                    let next = home(&views[now], group);
                    now = numbers.iter().position(|number| peer(*number) == next).unwrap();
                }
            }
        }
    }

    #[test]
    fn a_zone_leaves_the_pool_late_and_enters_it_early() {
        let members = |zone: u32, numbers: std::ops::Range<u64>| {
            numbers.map(move |number| Member { zone: Zone(zone), ..member(u64::from(zone) * 1000 + number) })
        };
        let of = |size: u64| members(1, 0..20).chain(members(2, 0..size)).collect::<Vec<_>>();
        let one = peer(2000);
        let pooled = |view: &View| view.homes(&one, &THING, 0).zone.len() > 1 && view.pooled.contains_key(&Zone(2));
        let mut now = 100;
        let mut view = View::new(of(6), at(now));
        for (size, later, in_pool) in [
            (8, 1, true),
            (11, 100, true),
            (12, 1, true),
            (12, 59, true),
            (11, 1, true),
            (12, 5, true),
            (12, 61, false),
            (9, 1, false),
            (8, 1, false),
            (7, 1, true),
            (8, 1, true),
        ] {
            now += later;
            view = view.next(of(size), at(now));
            assert_eq!(pooled(&view), in_pool, "{size} members at {now} s");
        }
        let large = View::new(of(6), at(0)).next(of(12), at(1000));
        assert_eq!(large.settles(at(1000)), Some(at(1060)), "the driver is told when to look again");
        assert!(!pooled(&View::new(of(9), at(100))), "who has just come takes it as it is");
    }

    #[test]
    fn one_is_a_home_when_the_others_have_heard_of_it() {
        let mut members: Vec<Member> = (0..10).map(member).collect();
        members[3].since = at(97);
        let homes = |view: &View| (0..GROUPS).map(|group| home(view, group)).collect::<BTreeSet<_>>();
        let view = View::new(members.clone(), at(100));
        assert!(!homes(&view).contains(&peer(3)) && view.home_count() == 9);
        assert_eq!(view.settles(at(100)), Some(at(102)));
        assert!(homes(&View::new(members, at(102))).contains(&peer(3)));
        // Few have no choice.
        let mut few: Vec<Member> = (0..4).map(member).collect();
        few[2].since = at(100);
        assert!(homes(&View::new(few, at(100))).contains(&peer(2)));
    }
}
