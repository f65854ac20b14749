//! How others stand with us: dead for now, in quarantine, or just slow.
//!
//! Death is our own opinion and short: the membership protocol needs a quarter of a minute to say so, and a read cannot wait.
//! Quarantine is for evidence that we have ourselves: bytes that are not what their sender said, a signature under a hash
//! that the registry refutes, two signatures under different hashes. Nobody is accused on hearsay.

use std::collections::BTreeMap;
use std::time::Duration;

use super::members::Peer;
use super::time::Time;

/// How a peer stands with us.
#[derive(Debug, Default)]
struct Standing {
    dead_until: Time,
    /// It promised for too long, or hardly sent.
    useless_until: Time,
    quarantined_until: Time,
    /// When its last connection broke.
    broke_at: Time,
    /// When it has sent all that it has to send, as far as we know.
    idle_at: Time,
    /// Pieces that we have asked it for.
    asked: u32,
}

/// Connections that break faster than this are not worth another one.
const OFTEN: Duration = Duration::from_secs(1);

/// How everybody stands with us.
#[derive(Debug, Default)]
pub(super) struct Standings {
    peers: BTreeMap<Peer, Standing>,
    /// Smoothed time to the first sign of an answer.
    answer: Duration,
}

impl Standings {
    /// Returns how many are remembered.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    /// Notes a sign of life; an answer to what we asked ends a death that we had only guessed.
    pub(super) fn heard(&mut self, peer: Peer) {
        self.peers.entry(peer).or_default().dead_until = Time::default();
    }

    /// Notes a good piece: it is of use again.
    pub(super) fn gave(&mut self, peer: Peer) {
        self.peers.entry(peer).or_default().useless_until = Time::default();
    }

    /// Notes how many pieces a peer has to send, as it says itself.
    pub(super) fn busy(&mut self, peer: Peer, backlog: u8, pace: Duration, now: Time) {
        self.peers.entry(peer).or_default().idle_at = now + pace * u32::from(backlog);
    }

    /// Notes how many it has to send as somebody else says, who may know less than we do.
    pub(super) fn hint(&mut self, peer: Peer, backlog: u8, pace: Duration, now: Time) {
        let standing = self.peers.entry(peer).or_default();
        standing.idle_at = standing.idle_at.max(now + pace * u32::from(backlog));
    }

    /// Notes that somebody was sent to it for so many pieces.
    pub(super) fn charge(&mut self, peer: Peer, pieces: u32, pace: Duration, now: Time) {
        let standing = self.peers.entry(peer).or_default();
        standing.idle_at = standing.idle_at.max(now) + pace * pieces;
    }

    /// Notes that we asked it for pieces.
    pub(super) fn asked(&mut self, peer: Peer, pieces: u32) {
        self.peers.entry(peer).or_default().asked += pieces;
    }

    /// Notes that a piece came, or will not.
    pub(super) fn settled(&mut self, peer: &Peer) {
        if let Some(standing) = self.peers.get_mut(peer) {
            standing.asked = standing.asked.saturating_sub(1);
        }
    }

    /// Returns how many pieces a peer probably has to send before one that we ask it for now.
    pub(super) fn load(&self, peer: &Peer, pace: Duration, now: Time) -> u32 {
        let Some(standing) = self.peers.get(peer) else { return 0 };
        let left = standing.idle_at.since(now).as_micros() / pace.as_micros().max(1);
        u32::try_from(left).unwrap_or(u32::MAX).saturating_add(standing.asked)
    }

    /// Notes how long a peer took to the first sign of an answer.
    pub(super) fn answered(&mut self, after: Duration) {
        self.answer = if self.answer.is_zero() { after } else { (self.answer * 7 + after) / 8 };
    }

    /// Returns how long an answer may take before somebody else is asked, too.
    pub(super) fn hedge(&self, least: Duration) -> Duration {
        least.max(self.answer * 3)
    }

    /// Notes that a peer refused, or was silent.
    pub(super) fn dead(&mut self, peer: Peer, until: Time) {
        self.peers.entry(peer).or_default().dead_until = until;
    }

    /// Notes that a peer promised for too long, or hardly sent.
    pub(super) fn useless(&mut self, peer: Peer, until: Time) {
        self.peers.entry(peer).or_default().useless_until = until;
    }

    /// Notes that a connection broke; tells whether that happens too often.
    pub(super) fn broke(&mut self, peer: Peer, now: Time) -> bool {
        let standing = self.peers.entry(peer).or_default();
        let often = standing.broke_at > Time::default() && now.since(standing.broke_at) < OFTEN;
        standing.broke_at = now;
        often
    }

    /// Puts a peer in quarantine; tells whether it was not there yet.
    pub(super) fn quarantine(&mut self, peer: Peer, now: Time, until: Time) -> bool {
        let standing = self.peers.entry(peer).or_default();
        let new = standing.quarantined_until <= now;
        standing.quarantined_until = until;
        new
    }

    /// Whether a peer is in quarantine.
    pub(super) fn quarantined(&self, peer: &Peer, now: Time) -> bool {
        self.peers.get(peer).is_some_and(|standing| standing.quarantined_until > now)
    }

    /// Whether a peer may be asked.
    pub(super) fn usable(&self, peer: &Peer, now: Time) -> bool {
        let over = |standing: &Standing| {
            standing.dead_until <= now && standing.useless_until <= now && standing.quarantined_until <= now
        };
        self.peers.get(peer).is_none_or(over)
    }

    /// Forgets what is over, and who is no member and not in quarantine.
    pub(super) fn tidy(&mut self, now: Time, member: impl Fn(&Peer) -> bool) {
        self.peers.retain(|peer, standing| standing.quarantined_until > now || standing.asked > 0 || member(peer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_is_short_and_ends_with_a_sign_of_life() {
        let mut standings = Standings::default();
        let (peer, now) = (Peer([1; 32]), Time(1_000_000));
        standings.dead(peer, now + Duration::from_secs(20));
        assert!(!standings.usable(&peer, now));
        assert!(standings.usable(&peer, now + Duration::from_secs(20)));
        standings.heard(peer);
        assert!(standings.usable(&peer, now));
    }

    #[test]
    fn who_only_promises_is_not_asked_until_it_gives() {
        let mut standings = Standings::default();
        let (peer, now) = (Peer([1; 32]), Time(1_000_000));
        standings.useless(peer, now + Duration::from_secs(20));
        standings.heard(peer);
        assert!(!standings.usable(&peer, now));
        standings.gave(peer);
        assert!(standings.usable(&peer, now));
    }

    #[test]
    fn a_quarantine_outlives_signs_of_life_and_membership() {
        let mut standings = Standings::default();
        let (peer, now) = (Peer([1; 32]), Time(1_000_000));
        let end = now + Duration::from_secs(3600);
        assert!(standings.quarantine(peer, now, end));
        assert!(!standings.quarantine(peer, now, end), "that is no news");
        standings.heard(peer);
        standings.tidy(now, |_| false);
        assert!(!standings.usable(&peer, now) && standings.quarantined(&peer, now));
        assert!(standings.usable(&peer, end));
    }

    #[test]
    fn slow_answers_put_hedging_off() {
        let mut standings = Standings::default();
        let least = Duration::from_millis(30);
        assert_eq!(standings.hedge(least), least);
        (0..50).for_each(|_| standings.answered(Duration::from_millis(40)));
        assert!(standings.hedge(least) > Duration::from_millis(110));
    }
}
