//! Which local caller may have which object.
//!
//! The registry says so, once per caller, place and object; what it said is fresh for some minutes, or longer where nobody
//! had to show a token. While the registry cannot be asked, what it once said lives on for an hour. Pieces are
//! fetched beside the question, but no byte is given to a caller before the answer. A read with the caller's own token is
//! such a question: its first byte says yes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::grid::Object;
use super::message::Origin;
use super::port::{Caller, Verdict, Want};
use super::time::Time;

/// A caller, an object, and where it is read.
type Key = (Caller, Object, Origin);

#[derive(Debug, Clone, Copy)]
struct Grant {
    fresh: Time,
    end: Time,
}

/// Grants beyond it are forgotten, the oldest half at once; each costs a question then.
const MOST: usize = 65_536;

/// What registries said.
#[derive(Debug, Default)]
pub(super) struct Grants {
    given: BTreeMap<Key, Grant>,
    asked: BTreeMap<Key, BTreeSet<Want>>,
}

/// What is to be done for a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// It may.
    Granted,
    /// The registry is to be asked.
    Ask,
    /// It is being asked.
    Asked,
}

impl Grants {
    /// Tells whether a reader may have an object; remembers that it waits if that is not known.
    pub(super) fn want(&mut self, want: Want, caller: Caller, object: Object, origin: &Origin, now: Time) -> Known {
        if self.fresh(caller, object, origin, now) {
            return Known::Granted;
        }
        let waiting = self.asked.entry((caller, object, origin.clone())).or_default();
        let first = waiting.is_empty();
        waiting.insert(want);
        if first { Known::Ask } else { Known::Asked }
    }

    fn fresh(&self, caller: Caller, object: Object, origin: &Origin, now: Time) -> bool {
        let good = |caller| self.given.get(&(caller, object, origin.clone())).is_some_and(|grant| grant.fresh > now);
        good(caller) || good(None)
    }

    /// Whether the registry may be read with the caller's token: it was accepted, or it is being found out, which reading
    /// does as well.
    pub(super) fn reads(&self, caller: Caller, object: Object, origin: &Origin, now: Time) -> bool {
        let key = (caller, object, origin.clone());
        caller.is_some() && (self.given.get(&key).is_some_and(|grant| grant.end > now) || self.asked.contains_key(&key))
    }

    /// Takes the registry's answer; returns the readers that waited for it, and whether they may.
    pub(super) fn checked(
        &mut self,
        caller: Caller,
        object: Object,
        origin: &Origin,
        verdict: Verdict,
        now: Time,
        (fresh, public, grace): (Duration, Duration, Duration),
    ) -> (BTreeSet<Want>, bool) {
        let key = (caller, object, origin.clone());
        let waiting = self.asked.remove(&key).unwrap_or_default();
        let may = match verdict {
            Verdict::Granted => {
                if self.given.len() >= MOST {
                    let mut ends: Vec<Time> = self.given.values().map(|grant| grant.end).collect();
                    let middle = ends.len() / 2;
                    let median = *ends.select_nth_unstable(middle).1;
                    self.given.retain(|_, grant| grant.end > median);
                }
                let fresh = now + if caller.is_none() { public } else { fresh };
                self.given.insert(key, Grant { fresh, end: fresh + grace });
                true
            }
            Verdict::Denied => {
                self.given.remove(&key);
                false
            }
            Verdict::Unknown => {
                let old =
                    |caller| self.given.get(&(caller, object, origin.clone())).is_some_and(|grant| grant.end > now);
                old(caller) || old(None)
            }
        };
        (waiting, may)
    }

    /// Forgets a reader that is gone.
    pub(super) fn unwant(&mut self, want: Want) {
        self.asked.retain(|_, waiting| !waiting.remove(&want) || !waiting.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use nydus_rafs::Digest;

    use super::*;

    const TERMS: (Duration, Duration, Duration) =
        (Duration::from_secs(300), Duration::from_secs(3600), Duration::from_secs(3600));
    const THING: Object = Object(Digest([7; 32]));
    const OTHER: Object = Object(Digest([8; 32]));

    fn at(seconds: u64) -> Time {
        Time(seconds * 1_000_000)
    }

    #[test]
    fn a_grant_is_for_one_caller_one_place_and_one_object() {
        let mut grants = Grants::default();
        let (place, elsewhere): (Origin, Origin) = ("r/x".into(), "r/y".into());
        let (ann, bob) = (Some([1; 32]), Some([2; 32]));
        assert_eq!(grants.want(Want(1), ann, THING, &place, at(0)), Known::Ask);
        assert_eq!(grants.want(Want(2), ann, THING, &place, at(0)), Known::Asked);
        let (waited, may) = grants.checked(ann, THING, &place, Verdict::Granted, at(0), TERMS);
        assert!(may && waited == BTreeSet::from([Want(1), Want(2)]));
        assert_eq!(grants.want(Want(3), ann, THING, &place, at(299)), Known::Granted);
        for (caller, object, origin) in
            [(bob, THING, &place), (None, THING, &place), (ann, OTHER, &place), (ann, THING, &elsewhere)]
        {
            assert_ne!(grants.want(Want(4), caller, object, origin, at(1)), Known::Granted);
        }
        assert_eq!(grants.want(Want(5), ann, THING, &place, at(301)), Known::Ask);
    }

    #[test]
    fn silence_keeps_what_was_granted_and_a_no_ends_it() {
        let mut grants = Grants::default();
        let place: Origin = "r/x".into();
        let (ann, bob) = (Some([1; 32]), Some([2; 32]));
        grants.checked(ann, THING, &place, Verdict::Granted, at(0), TERMS);
        assert!(grants.checked(ann, THING, &place, Verdict::Unknown, at(3899), TERMS).1);
        assert!(!grants.checked(ann, THING, &place, Verdict::Unknown, at(3901), TERMS).1);
        assert!(!grants.checked(bob, THING, &place, Verdict::Unknown, at(1), TERMS).1);
        assert!(!grants.checked(ann, THING, &place, Verdict::Denied, at(10), TERMS).1);
        assert!(!grants.checked(ann, THING, &place, Verdict::Unknown, at(11), TERMS).1);
    }

    #[test]
    fn what_nobody_needs_a_token_for_is_for_everybody() {
        let mut grants = Grants::default();
        let place: Origin = "r/x".into();
        grants.checked(None, THING, &place, Verdict::Granted, at(0), TERMS);
        assert_eq!(grants.want(Want(1), Some([1; 32]), THING, &place, at(3599)), Known::Granted);
        assert!(!grants.reads(None, THING, &place, at(1)), "there is no token to read with");
    }

    #[test]
    fn a_token_is_read_with_until_the_registry_refuses_it() {
        let mut grants = Grants::default();
        let (place, elsewhere): (Origin, Origin) = ("r/x".into(), "q/x".into());
        let ann = Some([1; 32]);
        assert!(!grants.reads(ann, THING, &place, at(0)));
        grants.want(Want(1), ann, THING, &place, at(0));
        assert!(grants.reads(ann, THING, &place, at(0)), "to read is to ask");
        assert!(!grants.reads(ann, THING, &elsewhere, at(0)), "a token is for one place");
        grants.checked(ann, THING, &place, Verdict::Denied, at(0), TERMS);
        assert!(!grants.reads(ann, THING, &place, at(0)));
    }

    #[test]
    fn memory_is_bounded() {
        let mut grants = Grants::default();
        for number in 0..MOST as u64 + 10 {
            let mut caller = [0; 32];
            caller[..8].copy_from_slice(&number.to_le_bytes());
            grants.checked(Some(caller), THING, &"r/x".into(), Verdict::Granted, Time(number), TERMS);
        }
        assert!(grants.given.len() <= MOST && grants.given.len() > MOST / 4);
    }
}
