//! Who may have which blob.
//!
//! A piece in the cache was fetched with somebody's token; another caller gets it only if its own token opens the same
//! digest in the same repository, as the registry itself says. What was said is remembered for 300 s per caller, and for
//! 1 h where nobody had to show a token. When the registry cannot answer, what it once said lives on for 1 h more; whom it
//! has never seen is refused. Memory holds keyed hashes only, so nothing here can be used elsewhere. What an earlier process
//! was told (`ledger`) is never fresh.
//!
//! The decisions are in [`Rights`], which has no clock and sends nothing.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use http::HeaderValue;
use nydus_rafs::Digest;

use super::ledger::Entry;

/// How long a grant to one caller is fresh.
const GRANT: Duration = Duration::from_secs(300);
/// How long what is public stays so.
const PUBLIC: Duration = Duration::from_secs(3600);
/// How long either lives on while the registry is down.
const GRACE: Duration = Duration::from_secs(3600);
/// Entries, 64 bytes or so each; beyond it the oldest half goes, which costs a request each.
const MOST: usize = 65_536;

/// Stands for a caller's Authorization, or for one without.
pub(super) type Caller = [u8; 32];

/// What is known about a caller and a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// It may, and this is the size of the blob.
    Fresh(u64),
    /// It might, some time ago; good enough if the registry cannot be asked.
    Stale(u64),
    /// Nothing.
    Nothing,
}

/// One thing that somebody may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claimed<'a> {
    pub(super) registry: &'a str,
    pub(super) repo: &'a str,
    pub(super) digest: &'a Digest,
}

#[derive(Debug)]
struct Grant {
    size: u64,
    /// Until when it is good by itself; none if an earlier process got it.
    fresh: Option<Instant>,
    /// Until when it is good if the registry cannot be asked.
    end: Instant,
}

/// What the registries said about who may have what.
#[derive(Debug)]
pub(super) struct Rights {
    secret: [u8; 32],
    grants: HashMap<[u8; 32], Grant>,
    /// Something changed since [`Rights::entries`].
    changed: bool,
}

impl Rights {
    /// Knows nothing; `secret` keys the hashes.
    pub(super) fn new(secret: [u8; 32]) -> Self {
        Self { secret, grants: HashMap::new(), changed: false }
    }

    /// Knows what an earlier process knew, as far as it is still of use.
    pub(super) fn restore(secret: [u8; 32], entries: Vec<Entry>, now: Instant) -> Self {
        let grant = |Entry { size, left, .. }: &Entry| Grant { size: *size, fresh: None, end: now + GRACE.min(*left) };
        let grants = entries.iter().take(MOST).map(|entry| (entry.key, grant(entry))).collect();
        Self { secret, grants, changed: false }
    }

    /// Returns what a later process needs, if that has changed.
    pub(super) fn entries(&mut self, now: Instant) -> Option<([u8; 32], Vec<Entry>)> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let left = |grant: &Grant| grant.end.saturating_duration_since(now);
        let entries = self.grants.iter().map(|(key, grant)| Entry { key: *key, size: grant.size, left: left(grant) });
        Some((self.secret, entries.collect()))
    }

    /// Returns what stands for `authorization` here.
    pub(super) fn caller(&self, authorization: Option<&HeaderValue>) -> Caller {
        let mut hash = blake3::Hasher::new_keyed(&self.secret);
        match authorization {
            Some(value) => hash.update(b"caller").update(value.as_bytes()),
            None => hash.update(b"nobody"),
        };
        *hash.finalize().as_bytes()
    }

    /// Returns what stands for `caller` and `what` together.
    pub(super) fn key(&self, caller: &Caller, what: Claimed<'_>) -> [u8; 32] {
        let mut hash = blake3::Hasher::new_keyed(&self.secret);
        hash.update(b"grant").update(caller);
        for text in [what.registry, what.repo] {
            hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        *hash.update(&what.digest.0).finalize().as_bytes()
    }

    /// Tells what is known: the caller's own grant, or that everybody may.
    pub(super) fn known(&self, caller: &Caller, what: Claimed<'_>, now: Instant) -> Known {
        let nobody = self.caller(None);
        let look = |caller: &Caller| match self.grants.get(&self.key(caller, what)) {
            Some(grant) if grant.fresh.is_some_and(|fresh| now < fresh) => Known::Fresh(grant.size),
            Some(grant) if now < grant.end => Known::Stale(grant.size),
            Some(_) | None => Known::Nothing,
        };
        match (look(caller), look(&nobody)) {
            (Known::Fresh(size), _) | (_, Known::Fresh(size)) => Known::Fresh(size),
            (Known::Stale(size), _) | (_, Known::Stale(size)) => Known::Stale(size),
            (Known::Nothing, Known::Nothing) => Known::Nothing,
        }
    }

    /// Remembers that `caller` may have `what`, of `size` bytes.
    pub(super) fn grant(&mut self, caller: &Caller, what: Claimed<'_>, size: u64, now: Instant) {
        if self.grants.len() >= MOST {
            self.grants.retain(|_, grant| now < grant.end);
            if self.grants.len() >= MOST {
                let mut ends: Vec<Instant> = self.grants.values().map(|grant| grant.end).collect();
                let middle = ends.len() / 2;
                let median = *ends.select_nth_unstable(middle).1;
                self.grants.retain(|_, grant| grant.end > median);
            }
        }
        let fresh = now + if *caller == self.caller(None) { PUBLIC } else { GRANT };
        self.grants.insert(self.key(caller, what), Grant { size, fresh: Some(fresh), end: fresh + GRACE });
        self.changed = true;
    }

    /// Forgets that `caller` might have `what`, because the registry now says no.
    pub(super) fn revoke(&mut self, caller: &Caller, what: Claimed<'_>) {
        self.changed |= self.grants.remove(&self.key(caller, what)).is_some();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn what(repo: &'static str, digest: &'static Digest) -> Claimed<'static> {
        Claimed { registry: "r", repo, digest }
    }

    const A: Digest = Digest([1; 32]);
    const B: Digest = Digest([2; 32]);

    #[test]
    fn a_grant_is_for_one_caller_one_repository_and_one_digest() {
        let mut rights = Rights::new([9; 32]);
        let now = Instant::now();
        let ann = rights.caller(Some(&HeaderValue::from_static("Bearer ann")));
        let bob = rights.caller(Some(&HeaderValue::from_static("Bearer bob")));
        let nobody = rights.caller(None);
        rights.grant(&ann, what("x", &A), 7, now);
        assert_eq!(rights.known(&ann, what("x", &A), now), Known::Fresh(7));
        for (caller, repo, digest) in [(&bob, "x", &A), (&nobody, "x", &A), (&ann, "y", &A), (&ann, "x", &B)] {
            assert_eq!(rights.known(caller, what(repo, digest), now), Known::Nothing);
        }
        rights.revoke(&ann, what("x", &A));
        assert_eq!(rights.known(&ann, what("x", &A), now), Known::Nothing);
    }

    #[test]
    fn what_nobody_needed_a_token_for_is_for_everybody() {
        let mut rights = Rights::new([9; 32]);
        let now = Instant::now();
        let nobody = rights.caller(None);
        let bob = rights.caller(Some(&HeaderValue::from_static("Bearer bob")));
        rights.grant(&nobody, what("x", &A), 7, now);
        assert_eq!(rights.known(&bob, what("x", &A), now), Known::Fresh(7));
        assert_eq!(rights.known(&bob, what("y", &A), now), Known::Nothing);
    }

    #[test]
    fn grants_grow_stale_and_end() {
        let mut rights = Rights::new([9; 32]);
        let start = Instant::now();
        let ann = rights.caller(Some(&HeaderValue::from_static("Bearer ann")));
        let nobody = rights.caller(None);
        rights.grant(&ann, what("x", &A), 1, start);
        rights.grant(&nobody, what("x", &B), 2, start);
        for (seconds, anns, public) in [
            (299, Known::Fresh(1), Known::Fresh(2)),
            (301, Known::Stale(1), Known::Fresh(2)),
            (3601, Known::Stale(1), Known::Stale(2)),
            (3901, Known::Nothing, Known::Stale(2)),
            (7201, Known::Nothing, Known::Nothing),
        ] {
            let now = start + Duration::from_secs(seconds);
            assert_eq!(rights.known(&ann, what("x", &A), now), anns, "after {seconds} s");
            assert_eq!(rights.known(&ann, what("x", &B), now), public, "after {seconds} s");
        }
    }

    #[test]
    fn what_an_earlier_process_knew_stands_in_for_silence_only() {
        let mut rights = Rights::new([9; 32]);
        let start = Instant::now();
        let ann = rights.caller(Some(&HeaderValue::from_static("Bearer ann")));
        assert!(rights.entries(start).is_none(), "nothing is nothing new");
        rights.grant(&ann, what("x", &A), 7, start);
        let (secret, entries) = rights.entries(start).unwrap();
        assert!(rights.entries(start).is_none());
        let later = Rights::restore(secret, entries, start);
        let known = |seconds| later.known(&ann, what("x", &A), start + Duration::from_secs(seconds));
        assert_eq!([known(0), known(3599), known(3600)], [Known::Stale(7), Known::Stale(7), Known::Nothing]);
        let bob = later.caller(Some(&HeaderValue::from_static("Bearer bob")));
        assert_eq!(later.known(&bob, what("x", &A), start), Known::Nothing);
    }

    #[test]
    fn memory_is_bounded() {
        let mut rights = Rights::new([9; 32]);
        let start = Instant::now();
        for number in 0..MOST as u64 + 10 {
            let caller = rights.caller(Some(&HeaderValue::from(number)));
            rights.grant(&caller, what("x", &A), 1, start + Duration::from_millis(number));
        }
        assert!(rights.grants.len() <= MOST);
        assert!(rights.grants.len() > MOST / 4);
    }
}
