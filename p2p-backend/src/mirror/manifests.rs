//! Manifests that were asked for lately, in memory.
//!
//! A manifest named by digest is what it is, so it is kept. A tag is asked upstream every time; what it last named is
//! remembered per caller, for the hour in which a registry may be down. They are not kept over a restart: readers of
//! images that are mounted need none, and a pull begins at the registry.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderValue;
use nydus_rafs::Digest;

/// How long the last answer for a tag stands in for a registry that is down.
const TAG_LIFE: Duration = Duration::from_secs(3600);
/// Bytes of manifests; beyond it the least recently used go.
const MOST_BYTES: usize = 32 << 20;
/// Remembered tags.
const MOST_TAGS: usize = 4096;
/// The largest manifest that is read into memory; registries allow 4 MiB.
pub(super) const LARGEST: usize = 8 << 20;

/// A manifest or index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) digest: Digest,
    pub(super) media_type: HeaderValue,
    pub(super) body: Bytes,
}

#[derive(Debug)]
struct Kept {
    manifest: Manifest,
    used: u64,
}

/// Manifests by digest, digests by tag.
#[derive(Debug, Default)]
pub(super) struct Manifests {
    kept: HashMap<Digest, Kept>,
    bytes: usize,
    clock: u64,
    tags: HashMap<[u8; 32], (Digest, Instant)>,
}

impl Manifests {
    /// Returns the manifest of this digest.
    pub(super) fn get(&mut self, digest: &Digest) -> Option<Manifest> {
        self.clock += 1;
        let kept = self.kept.get_mut(digest)?;
        kept.used = self.clock;
        Some(kept.manifest.clone())
    }

    /// Keeps a manifest; its digest must have been compared with its bytes.
    pub(super) fn keep(&mut self, manifest: Manifest) {
        self.clock += 1;
        let (digest, used) = (manifest.digest, self.clock);
        self.bytes += manifest.body.len();
        if let Some(old) = self.kept.insert(digest, Kept { manifest, used }) {
            self.bytes -= old.manifest.body.len();
        }
        while self.bytes > MOST_BYTES {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(digest, _)| *digest);
            let Some(old) = oldest.and_then(|digest| self.kept.remove(&digest)) else { return };
            self.bytes -= old.manifest.body.len();
        }
    }

    /// Remembers what a tag names; `key` stands for tag, repository, registry, caller and what it accepts.
    pub(super) fn name(&mut self, key: [u8; 32], digest: Digest, now: Instant) {
        if self.tags.len() >= MOST_TAGS {
            self.tags.retain(|_, (_, at)| now.saturating_duration_since(*at) < TAG_LIFE);
            if self.tags.len() >= MOST_TAGS {
                self.tags.clear();
            }
        }
        self.tags.insert(key, (digest, now));
    }

    /// Forgets a tag, because the registry now refuses it.
    pub(super) fn forget(&mut self, key: &[u8; 32]) {
        self.tags.remove(key);
    }

    /// Returns what a tag last named, if that was not long ago.
    pub(super) fn last(&mut self, key: &[u8; 32], now: Instant) -> Option<Manifest> {
        let (digest, at) = *self.tags.get(key)?;
        if now.saturating_duration_since(at) < TAG_LIFE { self.get(&digest) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(number: u8, size: usize) -> Manifest {
        Manifest {
            digest: Digest([number; 32]),
            media_type: HeaderValue::from_static("x/y"),
            body: vec![number; size].into(),
        }
    }

    #[test]
    fn memory_is_bounded_and_the_least_used_goes() {
        let mut all = Manifests::default();
        for number in 0..4 {
            all.keep(manifest(number, LARGEST));
        }
        assert!(all.get(&Digest([0; 32])).is_some());
        all.keep(manifest(9, 1));
        assert!(all.get(&Digest([1; 32])).is_none());
        assert!(all.get(&Digest([0; 32])).is_some() && all.get(&Digest([9; 32])).is_some());
    }

    #[test]
    fn a_tag_stands_for_an_hour() {
        let mut all = Manifests::default();
        let now = Instant::now();
        all.keep(manifest(1, 1));
        all.name([5; 32], Digest([1; 32]), now);
        assert_eq!(all.last(&[5; 32], now + Duration::from_secs(3599)), Some(manifest(1, 1)));
        assert_eq!(all.last(&[5; 32], now + Duration::from_secs(3600)), None);
        assert_eq!(all.last(&[6; 32], now), None);
        all.forget(&[5; 32]);
        assert_eq!(all.last(&[5; 32], now), None);
    }
}
