//! What to fetch after what a reader asked for.
//!
//! A reader that misses will mostly want the neighbours next: they follow its chunk, up to the size of one
//! request. A reader that goes on where it was is sequential, and gets a window of chunks ahead of it: at 5 ms per
//! chunk that is the difference between 100 and 1,000 MB/s, and matters more than the front end. The first chunk
//! of each window is *marked*; the reader that reaches it asks for the next window, so that the fetch is never
//! waited for by a reader that is slower than the link.
//!
//! Only decisions are made here, in chunk positions of one blob.

use std::ops::Range;

/// Readers of one blob that are followed at once.
const STREAMS: usize = 8;

/// Chunks that one window has at most, however small they are: each miss looks at all of them, and with files of ten bytes
/// a request's worth would be a hundred thousand.
const MOST_CHUNKS: usize = 2048;

/// The readers followed.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Most recently seen first.
    streams: Vec<Stream>,
    /// Chunks in a window.
    chunks: usize,
    /// Stored bytes of neighbours.
    bytes: u64,
}

#[derive(Debug)]
struct Stream {
    /// The chunk that comes after the last one read.
    next: usize,
    /// The chunk after the last one asked for.
    until: usize,
}

/// What to fetch, and whether its first chunk is to be marked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) chunks: Range<usize>,
    pub(super) mark: bool,
}

impl Ahead {
    pub(super) fn new(chunks: u32, bytes: u64) -> Self {
        Self { streams: Vec::new(), chunks: chunks as usize, bytes }
    }

    /// A reader of the chunks `read` missed one, or came by a mark. `stored` gives the size of a chunk as stored,
    /// `None` past the last.
    pub(super) fn after(&mut self, read: Range<usize>, stored: impl Fn(usize) -> Option<u64>) -> Option<Window> {
        // Inside what was fetched ahead, or again in the last chunk read: parts of chunks are read in turn.
        let known = self.streams.iter().position(|s| read.end >= s.next && read.start <= s.until.max(s.next));
        let (from, sequential) = match known {
            Some(at) => {
                let mut stream = self.streams.remove(at);
                stream.next = read.end;
                let from = stream.until.max(read.end);
                self.streams.insert(0, stream);
                (from, true)
            }
            None => {
                self.streams.truncate(STREAMS - 1);
                self.streams.insert(0, Stream { next: read.end, until: read.end });
                (read.end, false)
            }
        };
        let mut until = from;
        let mut bytes = 0;
        while let Some(size) = stored(until) {
            bytes += size;
            let count = until - from;
            let wanted = bytes <= self.bytes && count < MOST_CHUNKS || sequential && count < self.chunks;
            if !wanted {
                break;
            }
            until += 1;
        }
        self.streams[0].until = until.max(self.streams[0].until);
        (until > from).then_some(Window { chunks: from..until, mark: self.chunks > 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn large(at: usize) -> Option<u64> {
        (at < 1000).then_some(MIB)
    }

    #[test]
    fn a_first_miss_brings_neighbours_within_one_request_only() {
        let small = |at: usize| (at < 1000).then_some(MIB / 10);
        assert_eq!(Ahead::new(8, MIB).after(5..6, small), Some(Window { chunks: 6..16, mark: true }));
        assert_eq!(Ahead::new(8, MIB).after(5..6, |_| Some(MIB + 1)), None);
        assert_eq!(Ahead::new(8, 0).after(5..6, large), None);
    }

    #[test]
    fn tiny_chunks_do_not_make_a_miss_look_at_all_of_them() {
        let looked = std::cell::Cell::new(0);
        let tiny = |_| {
            looked.set(looked.get() + 1);
            Some(10)
        };
        assert_eq!(Ahead::new(8, MIB).after(5..6, tiny).unwrap().chunks, 6..6 + MOST_CHUNKS);
        assert_eq!(looked.get(), MOST_CHUNKS + 1);
    }

    #[test]
    fn a_reader_that_goes_on_gets_a_window() {
        let mut ahead = Ahead::new(8, 0);
        assert_eq!(ahead.after(5..6, large), None);
        assert_eq!(ahead.after(6..7, large).unwrap().chunks, 7..15);
        // At the mark, chunk 7, the next window begins where the last ended.
        assert_eq!(ahead.after(7..8, large).unwrap().chunks, 15..23);
    }

    #[test]
    fn readers_in_different_places_are_not_taken_for_one() {
        let mut ahead = Ahead::new(8, 0);
        assert_eq!(ahead.after(5..6, large), None);
        assert_eq!(ahead.after(500..501, large), None);
        assert_eq!(ahead.after(100..101, large), None);
        assert_eq!(ahead.after(501..502, large).unwrap().chunks, 502..510);
        assert_eq!(ahead.after(6..7, large).unwrap().chunks, 7..15);
    }

    #[test]
    fn nothing_is_fetched_beyond_the_end() {
        let mut ahead = Ahead::new(8, 4 * MIB);
        assert_eq!(ahead.after(998..999, large).unwrap().chunks, 999..1000);
        assert_eq!(ahead.after(999..1000, large), None);
    }
}
