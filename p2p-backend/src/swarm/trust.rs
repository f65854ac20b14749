//! What is believed of a piece, and because of whom.
//!
//! Whoever takes a piece from the registry signs its hash. A receiver compares what came with the hash that came along before
//! it keeps, serves or forwards anything, so a sender that changes bytes is found out at once. A member that *signs* a wrong
//! hash is found out by whoever reads the piece from the registry itself, or compares the whole with its digest.

use std::collections::BTreeMap;

use super::members::Peer;
use super::message::{Sum, Vouch};

/// What is known of a kept piece.
#[derive(Debug, Clone, Copy)]
struct Record {
    vouch: Vouch,
    /// A second member signed the same hash, or we read it from the registry ourselves.
    second: bool,
}

/// What is known of an object's pieces.
#[derive(Debug, Default)]
pub(super) struct Records {
    kept: BTreeMap<u32, Record>,
    /// What was said of pieces that turned out to be wrong, until they are read anew.
    suspects: BTreeMap<u32, Vouch>,
}

/// What a kept piece tells about others.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Finding {
    /// Signed something that is not so.
    pub(super) liar: Option<Peer>,
    /// Signed two hashes.
    pub(super) two_faced: Option<Peer>,
    /// Two members disagree, and only the registry can say who is right.
    pub(super) disputed: bool,
}

impl Records {
    /// Notes a piece that a peer sent, with hash and signature that fit the bytes.
    pub(super) fn vouched(&mut self, piece: u32, vouch: Vouch) -> Finding {
        let before = self.suspects.get(&piece).copied().or(self.kept.get(&piece).map(|record| record.vouch));
        let mut finding = Finding::default();
        if let Some(before) = before
            && before.sum != vouch.sum
        {
            finding.two_faced = (before.by == vouch.by).then_some(vouch.by);
            finding.disputed = before.by != vouch.by;
        }
        let second = self
            .kept
            .get(&piece)
            .is_some_and(|record| record.second || (record.vouch.sum == vouch.sum && record.vouch.by != vouch.by));
        self.kept.entry(piece).or_insert(Record { vouch, second }).second = second;
        finding
    }

    /// Notes a piece that we read from the registry.
    pub(super) fn read(&mut self, piece: u32, me: Peer, sum: Sum) -> Finding {
        let before = self.suspects.remove(&piece).or(self.kept.get(&piece).map(|record| record.vouch));
        let liar = before.filter(|before| before.sum != sum && before.by != me).map(|before| before.by);
        self.kept.insert(piece, Record { vouch: Vouch { by: me, sum }, second: true });
        Finding { liar, ..Finding::default() }
    }

    /// Notes that a kept piece is wrong; it is read anew, and then we know who lied.
    pub(super) fn wrong(&mut self, piece: u32) {
        if let Some(record) = self.kept.remove(&piece) {
            self.suspects.insert(piece, record.vouch);
        }
    }

    /// Forgets a piece.
    pub(super) fn forget(&mut self, piece: u32) {
        self.kept.remove(&piece);
    }

    /// Returns the kept pieces behind which there is nothing but this member's word.
    pub(super) fn only_by(&self, peer: &Peer) -> impl Iterator<Item = u32> {
        let alone = |record: &&Record| record.vouch.by == *peer && !record.second;
        self.kept.iter().filter(move |(_, record)| alone(record)).map(|(piece, _)| *piece)
    }

    /// Whether a piece has more behind it than one member's word.
    pub(super) fn proved(&self, piece: u32) -> bool {
        self.kept.get(&piece).is_some_and(|record| record.second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANN: Peer = Peer([1; 32]);
    const BOB: Peer = Peer([2; 32]);
    const ME: Peer = Peer([9; 32]);

    fn says(by: Peer, sum: u8) -> Vouch {
        Vouch { by, sum: [sum; 32] }
    }

    #[test]
    fn one_word_is_a_word_and_two_are_a_proof() {
        let mut records = Records::default();
        assert_eq!(records.vouched(0, says(ANN, 1)), Finding::default());
        assert!(!records.proved(0));
        records.vouched(0, says(ANN, 1));
        assert!(!records.proved(0), "the same member twice is one word");
        records.vouched(0, says(BOB, 1));
        assert!(records.proved(0));
    }

    #[test]
    fn the_registry_tells_who_lied() {
        let mut records = Records::default();
        records.vouched(0, says(ANN, 1));
        records.wrong(0);
        assert_eq!(records.read(0, ME, [2; 32]).liar, Some(ANN));
        records.vouched(1, says(ANN, 1));
        records.wrong(1);
        assert_eq!(records.read(1, ME, [1; 32]).liar, None, "then it is the registry's own fault");
        assert!(records.proved(1));
    }

    #[test]
    fn two_hashes_of_one_signer_are_evidence_and_of_two_a_dispute() {
        let mut records = Records::default();
        records.vouched(0, says(ANN, 1));
        assert_eq!(records.vouched(0, says(ANN, 2)).two_faced, Some(ANN));
        let finding = records.vouched(0, says(BOB, 2));
        assert!(finding.disputed && finding.two_faced.is_none());
    }
}
