//! The grid that all nodes agree on: pieces of 1 MiB of an object as stored, groups of four of them.
//!
//! A group is what has a home, and what one ask is about. Smaller groups spread the first seconds of a crowd better, larger
//! ones cost fewer requests to the registry; four is where neither hurts (docs/SWARM.md).

use std::fmt;
use std::ops::Range;

use nydus_rafs::Digest;

/// Bytes of a piece; the last one of an object is shorter.
pub const PIECE: u64 = 1 << 20;
/// Pieces of a group; the last one of an object may have fewer.
pub const GROUP: u32 = 4;
/// Pieces of an object at most: 1 TiB.
pub const MOST_PIECES: u32 = 1 << 20;

/// What is shared: named by its content's digest where the protocol has one, else by a hash of its URL and validator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Object(pub Digest);

/// Returns the group of a piece.
pub fn group_of(piece: u32) -> u32 {
    piece / GROUP
}

/// Some pieces of one group: bit `n` is its `n`th piece.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mask(u8);

impl Mask {
    /// No piece.
    pub const NONE: Self = Self(0);
    /// All pieces that a group can have.
    pub const ALL: Self = Self((1 << GROUP) - 1);

    /// Returns the mask of these bits, none if there are bits beyond a group.
    pub fn from_bits(bits: u8) -> Option<Self> {
        (bits & !Self::ALL.0 == 0).then_some(Self(bits))
    }

    /// Returns the bits.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Returns the mask of one piece of an object in its group.
    pub fn of(piece: u32) -> Self {
        Self(1 << (piece % GROUP))
    }

    /// Whether there is no piece in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Returns the number of pieces in it.
    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    /// Whether `piece` of the object is in it, given that it is of this group.
    pub fn has(self, piece: u32) -> bool {
        !self.and(Self::of(piece)).is_empty()
    }

    /// Returns the pieces in either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns the pieces in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Returns the pieces that are not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Returns the pieces of the object that this means in `group`.
    pub fn pieces(self, group: u32) -> impl Iterator<Item = u32> {
        (0..GROUP).filter(move |bit| self.0 & (1 << bit) != 0).map(move |bit| group.saturating_mul(GROUP) + bit)
    }
}

impl fmt::Debug for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04b}", self.0)
    }
}

/// Some pieces of an object.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Pieces {
    words: Vec<u64>,
}

impl Pieces {
    /// Returns no pieces.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the pieces whose bits are set; pieces beyond [`MOST_PIECES`] are left out.
    pub fn from_words(mut words: Vec<u64>) -> Self {
        words.truncate(MOST_PIECES as usize / 64);
        while words.last() == Some(&0) {
            words.pop();
        }
        Self { words }
    }

    /// Returns the bits, without zeros at the end.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether `piece` is among them.
    pub fn has(&self, piece: u32) -> bool {
        self.words.get(piece as usize / 64).is_some_and(|word| word & (1 << (piece % 64)) != 0)
    }

    /// Adds a piece; tells whether it was not there.
    pub fn insert(&mut self, piece: u32) -> bool {
        if piece >= MOST_PIECES {
            return false;
        }
        let at = piece as usize / 64;
        if self.words.len() <= at {
            self.words.resize(at + 1, 0);
        }
        let new = !self.has(piece);
        self.words[at] |= 1 << (piece % 64);
        new
    }

    /// Takes a piece away; tells whether it was there.
    pub fn remove(&mut self, piece: u32) -> bool {
        let had = self.has(piece);
        if had {
            self.words[piece as usize / 64] &= !(1 << (piece % 64));
            while self.words.last() == Some(&0) {
                self.words.pop();
            }
        }
        had
    }

    /// Adds those of another set.
    pub fn extend(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        self.words.iter_mut().zip(&other.words).for_each(|(mine, more)| *mine |= more);
    }

    /// Leaves out those from `end` on.
    #[must_use]
    pub fn below(mut self, end: u32) -> Self {
        self.words.truncate(end.div_ceil(64) as usize);
        if !end.is_multiple_of(64)
            && let Some(last) = self.words.get_mut(end as usize / 64)
        {
            *last &= (1 << (end % 64)) - 1;
        }
        while self.words.last() == Some(&0) {
            self.words.pop();
        }
        self
    }

    /// Returns those in `group`.
    pub fn in_group(&self, group: u32) -> Mask {
        let Some(first) = group.checked_mul(GROUP) else { return Mask::NONE };
        let word = self.words.get(first as usize / 64).copied().unwrap_or(0);
        Mask((word >> (first % 64)) as u8 & Mask::ALL.0)
    }

    /// Replaces those in `group`.
    pub fn set_group(&mut self, group: u32, mask: Mask) {
        for piece in Mask::ALL.pieces(group) {
            if mask.has(piece) {
                self.insert(piece);
            } else {
                self.remove(piece);
            }
        }
    }

    /// Returns their number.
    pub fn len(&self) -> u32 {
        self.words.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Returns them in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.words.iter().enumerate().flat_map(|(at, word)| {
            (0..64).filter(move |bit| word & (1 << bit) != 0).map(move |bit| at as u32 * 64 + bit)
        })
    }

    /// Returns the groups that have any of them, in order.
    pub fn groups(&self) -> impl Iterator<Item = u32> {
        let groups = self.words.len() as u32 * (64 / GROUP);
        (0..groups).filter(|group| !self.in_group(*group).is_empty())
    }
}

impl FromIterator<u32> for Pieces {
    fn from_iter<I: IntoIterator<Item = u32>>(pieces: I) -> Self {
        let mut all = Self::new();
        for piece in pieces {
            all.insert(piece);
        }
        all
    }
}

impl From<Range<u32>> for Pieces {
    fn from(range: Range<u32>) -> Self {
        range.collect()
    }
}

impl fmt::Debug for Pieces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::btree_set;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_are_a_set(mut model in btree_set(0..300_u32, 0..40), changes in prop::collection::vec((0..300_u32, any::<bool>()), 0..40)) {
            let mut pieces: Pieces = model.iter().copied().collect();
            for (piece, add) in changes {
                if add {
                    prop_assert_eq!(pieces.insert(piece), model.insert(piece));
                } else {
                    prop_assert_eq!(pieces.remove(piece), model.remove(&piece));
                }
            }
            prop_assert_eq!(pieces.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(pieces.len() as usize, model.len());
            prop_assert_eq!(&Pieces::from_words(pieces.words().to_vec()), &pieces);
            for end in [0, 1, 63, 64, 65, 150, 299, 1000] {
                let below = pieces.clone().below(end);
                prop_assert_eq!(below.iter().collect::<Vec<_>>(), model.range(..end).copied().collect::<Vec<_>>());
                prop_assert_eq!(&Pieces::from_words(below.words().to_vec()), &below);
            }
            let by_group: Vec<u32> = pieces.groups().flat_map(|group| pieces.in_group(group).pieces(group).collect::<Vec<_>>()).collect();
            prop_assert_eq!(by_group, model.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_object_has_no_pieces_beyond_the_limit() {
        let mut pieces = Pieces::new();
        assert!(!pieces.insert(MOST_PIECES));
        assert!(pieces.insert(MOST_PIECES - 1));
        assert_eq!(Pieces::from_words(vec![1; MOST_PIECES as usize / 64 + 1]).len(), MOST_PIECES / 64);
    }
}
