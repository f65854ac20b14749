//! News: what homes are told of finished pieces, leases and losses, and what everybody is told now and then.

use std::collections::{BTreeMap, BTreeSet};

use super::grid::{GROUP, Object, group_of};
use super::members::Peer;
use super::message::{self, MOST_NEWS, MOST_OBJECTS, Report, Summary};
use super::port::Output;
use super::time::Time;
use super::{Swarm, Timer};

/// News that wait to be told, and what others told everybody.
#[derive(Debug, Default)]
pub(super) struct News {
    /// Per home; with whether the home may know too much.
    waiting: BTreeMap<Peer, BTreeMap<(Object, u32), bool>>,
    summary_planned: bool,
    /// Who says that it holds some of an object, a few of them.
    claims: BTreeMap<Object, BTreeSet<Peer>>,
    generations: BTreeMap<Peer, u64>,
    /// Groups of which a peer is listed as a holder here, for each.
    listed: BTreeMap<Peer, u32>,
    leases_planned: bool,
}

/// Claims that are remembered per object.
const MOST_CLAIMS: usize = 8;
/// Objects of which anything is known because others said so.
pub(super) const MOST_KNOWN: usize = 65_536;
/// Groups of which one member is listed as a holder at most: 256 GiB at one home.
const MOST_LISTED: u32 = 65_536;

impl News {
    /// Whether anybody says that it holds some of an object.
    pub(super) fn claims(&self, object: &Object) -> bool {
        self.claims.contains_key(object)
    }

    /// Forgets who is no member.
    pub(super) fn tidy(&mut self, member: impl Fn(&Peer) -> bool) {
        self.generations.retain(|peer, _| member(peer));
        self.claims.retain(|_, peers| {
            peers.retain(&member);
            !peers.is_empty()
        });
    }

    /// Notes in how many groups each is listed.
    pub(super) fn count(&mut self, listed: BTreeMap<Peer, u32>) {
        self.listed = listed;
    }

    /// Returns who says so.
    pub(super) fn claimants(&self, object: &Object) -> Vec<Peer> {
        self.claims.get(object).into_iter().flatten().copied().collect()
    }
}

impl Swarm {
    /// Tells the home of a piece that it is here.
    pub(super) fn tell(&mut self, object: Object, piece: u32) {
        self.plan_news(object, group_of(piece), false);
    }

    /// Tells the home of a piece that it is not here any more.
    pub(super) fn tell_loss(&mut self, object: Object, piece: u32) {
        self.plan_news(object, group_of(piece), true);
    }

    fn plan_news(&mut self, object: Object, group: u32, all: bool) {
        if self.withdrawn(&object) && !all {
            return;
        }
        let Some(home) = self.listener(object, group) else { return };
        let waiting = self.news.waiting.entry(home).or_default();
        if waiting.is_empty() {
            self.timers.insert((self.now + self.config.report, Timer::News(home)));
        }
        *waiting.entry((object, group)).or_default() |= all;
    }

    /// Returns the home that wants to hear of a group: of our zone, or of all if that is us.
    fn listener(&mut self, object: Object, group: u32) -> Option<Peer> {
        let homes = self.homes(object, group);
        for line in [&homes.zone, &homes.all] {
            match line.iter().find(|peer| **peer == self.me || self.usable(peer)) {
                Some(peer) if *peer == self.me => {}
                Some(peer) => return Some(*peer),
                None => {}
            }
        }
        None
    }

    /// Tells everything that waits to be told, now.
    pub(super) fn flush_news(&mut self) {
        let homes: Vec<Peer> = self.news.waiting.keys().copied().collect();
        for home in homes {
            while self.news.waiting.contains_key(&home) {
                self.send_news(home);
            }
        }
    }

    pub(super) fn send_news(&mut self, home: Peer) {
        let Some(mut waiting) = self.news.waiting.remove(&home) else { return };
        let rest = waiting.keys().nth(MOST_NEWS).copied().map(|key| waiting.split_off(&key)).unwrap_or_default();
        if !rest.is_empty() {
            self.news.waiting.insert(home, rest);
            self.timer(self.now + self.config.report, Timer::News(home));
        }
        let news = waiting.into_iter().map(|((object, group), all)| self.news_of(object, group, all)).collect();
        let report = Report { backlog: self.counter.backlog(), news };
        self.out.push(Output::Report { to: home, report });
    }

    fn news_of(&self, object: Object, group: u32, all: bool) -> message::News {
        let blob = self.blobs.get(&object).filter(|blob| blob.withdrawn.is_none());
        let have = blob.map(|blob| blob.have.in_group(group)).unwrap_or_default();
        let reading = blob.map(|blob| blob.leased(group)).unwrap_or_default();
        message::News { object, group, have, reading, all }
    }

    /// Tells the homes that leased us something that we are at it.
    pub(super) fn renew_leases(&mut self) {
        self.news.leases_planned = false;
        let mut again = false;
        let leases: BTreeSet<(Peer, Object, u32)> = self
            .blobs
            .iter()
            .flat_map(|(object, blob)| blob.lessors().map(|(lessor, group)| (lessor, *object, group)))
            .collect();
        for (lessor, object, group) in leases {
            again = true;
            let report = Report { backlog: self.counter.backlog(), news: vec![self.news_of(object, group, false)] };
            self.out.push(Output::Report { to: lessor, report });
        }
        if again {
            self.plan_leases(self.now + self.config.pending);
        }
    }

    /// Tells those in whose stead we read of it at `at`, unless that is planned.
    pub(super) fn plan_leases(&mut self, at: Time) {
        if !std::mem::replace(&mut self.news.leases_planned, true) {
            self.timer(at, Timer::Leases);
        }
    }

    /// After a change of the view: the homes that are new for what we hold are told of it.
    pub(super) fn tell_new_homes(&mut self) {
        let mut moved = Vec::new();
        let objects: Vec<Object> =
            self.blobs.iter().filter(|(_, blob)| !blob.have.is_empty()).map(|(object, _)| *object).collect();
        for object in objects {
            let groups: Vec<u32> = self.blobs[&object].have.groups().collect();
            for group in groups {
                let before = self.blobs[&object].last_homes(group).cloned();
                let now = self.homes(object, group);
                let first = |homes: &super::members::Homes| (homes.zone.first().copied(), homes.all.first().copied());
                if before.is_none_or(|before| first(&before) != first(&now)) {
                    moved.push((object, group));
                }
            }
        }
        for (object, group) in moved {
            self.plan_news(object, group, false);
        }
    }

    pub(super) fn reported(&mut self, from: Peer, report: Report) {
        let (now, pace, lease) = (self.now, self.counter.pace(), self.config.lease);
        if self.standings.quarantined(&from, now) {
            return;
        }
        self.standings.busy(from, report.backlog, pace, now);
        for news in report.news {
            let known = self.blobs.get(&news.object);
            let listed = known.is_some_and(|blob| blob.ledgers.get(&news.group).is_some_and(|old| old.lists(&from)));
            let odd = known.is_some_and(|blob| !blob.may_have(news.group.saturating_mul(GROUP)));
            if odd || (!listed && (news.have.is_empty() || !self.may_list(from, news.object))) {
                continue;
            }
            let ledger = self.blob(news.object).ledgers.entry(news.group).or_default();
            ledger.has(from, news.have, news.all, now);
            ledger.renew(&from, news.reading, now + lease);
        }
    }

    /// Whether there is room to note another group of which a member is a holder, and counts it.
    pub(super) fn may_list(&mut self, peer: Peer, object: Object) -> bool {
        let room = self.blobs.len() < MOST_KNOWN || self.blobs.contains_key(&object);
        let listed = self.news.listed.entry(peer).or_default();
        let may = room && *listed < MOST_LISTED;
        *listed += u32::from(may);
        may
    }

    pub(super) fn plan_summary(&mut self) {
        if !std::mem::replace(&mut self.news.summary_planned, true) {
            let jitter = self.config.summary.mul_f64(self.rng.f64());
            self.timer(self.now + jitter, Timer::Summary);
        }
    }

    pub(super) fn summarize(&mut self) {
        self.news.summary_planned = false;
        let tenths = |blob: &super::blob::Blob| match blob.pieces() {
            Some(all) if all > 0 => u8::try_from(u64::from(blob.have.len()) * 10 / u64::from(all)).unwrap_or(10),
            _ => 0,
        };
        let held = self.blobs.iter().filter(|(_, blob)| !blob.have.is_empty() && blob.withdrawn.is_none());
        let objects = held.map(|(object, blob)| (*object, tenths(blob))).take(MOST_OBJECTS).collect();
        let forgotten = self.tombs.told(self.now);
        let summary = Summary { generation: self.generation, objects, forgotten };
        self.out.push(Output::Gossip { summary });
    }

    pub(super) fn summarized(&mut self, from: Peer, summary: Summary) {
        if self.standings.quarantined(&from, self.now) || self.view.member(&from).is_none() {
            return;
        }
        match self.news.generations.insert(from, summary.generation) {
            Some(before) if summary.generation < before => {
                self.news.generations.insert(from, before);
                return;
            }
            // Its cache is another one: whatever it had is not there any more.
            Some(before) if summary.generation > before => self.forget_claims(&from),
            _ => {}
        }
        self.news.claims.retain(|_, peers| {
            peers.remove(&from);
            !peers.is_empty()
        });
        for (object, _) in summary.objects {
            if self.news.claims.len() < MOST_KNOWN || self.news.claims.contains_key(&object) {
                let peers = self.news.claims.entry(object).or_default();
                if peers.len() < MOST_CLAIMS {
                    peers.insert(from);
                }
            }
        }
        for (object, seconds) in summary.forgotten {
            self.bury_object(object, std::time::Duration::from_secs(u64::from(seconds)));
        }
    }
}
