//! Which fault comes when: the same for the same seed.
//!
//! Rounds: in each, every kind comes once, in an order and with numbers of its own.

use std::time::Duration;

use crate::dice::Dice;
use crate::faults::Kind;

/// One fault to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    /// Calm weather before it.
    pub(crate) calm: Duration,
    /// How long it lasts at least.
    pub(crate) lasts: Duration,
    /// What else is to be decided about it.
    pub(crate) salt: u64,
    /// It is the last of its round.
    pub(crate) ends_round: bool,
}

/// All faults to come; it never ends.
#[derive(Debug)]
pub(crate) struct Schedule {
    dice: Dice,
    kinds: Vec<Kind>,
    round: Vec<Kind>,
}

impl Schedule {
    /// The faults of `kinds` that belong to `seed`.
    pub(crate) fn new(seed: u64, kinds: &[Kind]) -> Self {
        Self { dice: Dice::new(seed), kinds: kinds.to_vec(), round: Vec::new() }
    }
}

impl Iterator for Schedule {
    type Item = Fault;

    fn next(&mut self) -> Option<Fault> {
        if self.round.is_empty() {
            self.round.clone_from(&self.kinds);
        }
        let at = usize::try_from(self.dice.below(self.round.len() as u64)).expect("it is below a usize");
        let kind = self.round.swap_remove(at);
        let (shortest, longest) = kind.lasts();
        let spread = u64::try_from((longest - shortest).as_millis()).unwrap_or(0);
        Some(Fault {
            kind,
            calm: Duration::from_millis(500 + self.dice.below(700)),
            lasts: shortest + Duration::from_millis(self.dice.below(spread + 1)),
            salt: self.dice.next(),
            ends_round: self.round.is_empty(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_schedule_and_each_round_has_every_kind_once() {
        let of = |seed| Schedule::new(seed, Kind::ALL).take(3 * Kind::ALL.len()).collect::<Vec<_>>();
        assert_eq!(of(7), of(7));
        assert_ne!(of(7), of(8));
        for round in of(7).chunks(Kind::ALL.len()) {
            let mut kinds: Vec<Kind> = round.iter().map(|fault| fault.kind).collect();
            kinds.sort_unstable();
            assert_eq!(kinds, Kind::ALL);
            assert!(round.last().is_some_and(|fault| fault.ends_round));
            assert!(round.iter().rev().skip(1).all(|fault| !fault.ends_round));
        }
    }
}
