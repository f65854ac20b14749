//! Which missing chunks are asked for together.
//!
//! A request costs a round trip; bytes that nobody wants cost the link. Chunks whose stored bytes are at most
//! [`GAP`] apart go into one request (on the start-up trace of a python image this makes 119 requests of 305 for
//! 3.6 % more bytes), as long as it stays within the size given.

use std::ops::Range;

/// Stored bytes that nobody wants between two chunks of one request, at most.
pub(super) const GAP: u64 = 16 << 10;

/// Groups `items` by neighbourhood of their stored bytes. A group spans at most `max` bytes unless it is one item.
pub(super) fn group<T>(mut items: Vec<T>, stored: impl Fn(&T) -> Range<u64>, max: u64) -> Vec<Vec<T>> {
    items.sort_by_key(|item| stored(item).start);
    let mut groups: Vec<Vec<T>> = Vec::new();
    let mut span = 0..0;
    for item in items {
        let range = stored(&item);
        let union = span.start..range.end.max(span.end);
        match groups.last_mut() {
            Some(group) if range.start <= span.end.saturating_add(GAP) && union.end - union.start <= max => {
                span = union;
                group.push(item);
            }
            _ => {
                span = range;
                groups.push(vec![item]);
            }
        }
    }
    groups
}

/// Returns the stored bytes from the first to the last of `ranges`; empty for none.
pub(super) fn span(ranges: impl Iterator<Item = Range<u64>>) -> Range<u64> {
    ranges.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn grouped(items: &[Range<u64>], max: u64) -> Vec<Vec<Range<u64>>> {
        group(items.to_vec(), Clone::clone, max)
    }

    #[test]
    fn neighbours_within_the_gap_share_a_request() {
        let (a, b, c) = (0..1000, 1000 + GAP..2000 + GAP, 2001 + 2 * GAP..3000 + 2 * GAP);
        assert_eq!(grouped(&[c.clone(), a.clone(), b.clone()], 1 << 20), [vec![a, b], vec![c]]);
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a group of one chunk is meant")]
    fn a_request_stays_within_its_size_unless_one_chunk_exceeds_it() {
        assert_eq!(grouped(&[0..600, 600..1200, 1200..4000], 1200), [vec![0..600, 600..1200], vec![1200..4000]]);
        assert_eq!(grouped(&[0..600, 600..700], 0), [vec![0..600], vec![600..700]]);
    }

    #[test]
    fn members_of_one_batch_share_a_request() {
        assert_eq!(grouped(&[0..600, 0..600, 0..600], 0).len(), 3);
        assert_eq!(grouped(&[0..600, 0..600, 0..600], 600).len(), 1);
    }

    proptest! {
        #[test]
        fn every_chunk_is_in_one_group_and_groups_are_bounded(
            starts in proptest::collection::vec((0u64..1 << 22, 1u64..1 << 18), 0..60), max in 0u64..1 << 20,
        ) {
            let items: Vec<_> = starts.into_iter().map(|(at, len)| at..at + len).collect();
            let groups = grouped(&items, max);
            for group in &groups {
                let span = span(group.iter().cloned());
                prop_assert!(group.len() == 1 || span.end - span.start <= max);
            }
            let mut all: Vec<_> = groups.into_iter().flatten().map(|r| (r.start, r.end)).collect();
            let mut want: Vec<_> = items.into_iter().map(|r| (r.start, r.end)).collect();
            all.sort_unstable();
            want.sort_unstable();
            prop_assert_eq!(all, want);
        }
    }
}
