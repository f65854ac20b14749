//! Inflating a gzip stream and noting where it can be entered again.
//!
//! Deflate can be entered between two of its blocks by whoever knows the 32 KiB of plain bytes before. [`Indexer`] hands
//! the plain bytes out and remembers the last such place; [`Indexer::begin_chunk`] and [`Indexer::end_chunk`] tell it what
//! of them a file holds, and it makes a [`Point`] of the place where the reach of the last one would get too long. A
//! point reaches to the end of its last chunk, over the headers between files.
//!
//! The stream may have several members; checksums of all of them are checked. Bytes are inflated only as they are asked
//! for, so that the place of the input is that of the output.

use std::io::{self, Read};
use std::sync::Arc;

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};
use nydus_rafs::blob::table::Point;
use nydus_rafs::{Codec, Container};

/// How far back deflate looks.
const WINDOW: usize = 32 << 10;
/// Plain bytes that are kept; the window is moved to the front when they are full.
const BUFFER: usize = 256 << 10;
/// Stored bytes that are read at once.
const INPUT: usize = 64 << 10;
/// What a point aims at: numbers of established builders, which hold for every chunk size.
const MIN_STORED: u64 = 512 << 10;
const MAX_STORED: u64 = 1 << 20;
const MAX_PLAIN: u64 = 2 << 20;

/// A place between two blocks.
#[derive(Debug, Clone, Default)]
struct Boundary {
    stored: u64,
    plain: u64,
    bits: u8,
    byte: u8,
    window: Vec<u8>,
}

/// A point whose end is not known yet.
#[derive(Debug)]
struct Open {
    from: Boundary,
    /// Ends of its last chunk.
    stored_end: u64,
    plain_end: u64,
}

enum Member {
    /// A header comes next.
    Header,
    /// Inside the deflate stream.
    Data,
    /// After the last member.
    End,
}

/// Reads the plain bytes of a gzip stream.
pub(crate) struct Indexer<R> {
    input: R,
    stored: Vec<u8>,
    used: usize,
    /// Position of the next unused byte.
    at: u64,
    ended: bool,
    member: Member,
    inflater: Box<DecompressorOxide>,
    /// What was inflated, the last [`WINDOW`] bytes of it at least.
    plain: Vec<u8>,
    filled: usize,
    /// Position of the next plain byte.
    plain_at: u64,
    member_at: u64,
    crc: flate2::Crc,
    last_byte: u8,
    boundary: Boundary,
    /// The boundary as it was when the chunk began, and where that was.
    chunk: Option<(u64, u64)>,
    open: Option<Open>,
    points: Vec<Arc<Container>>,
}

fn bad(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl<R: Read> Indexer<R> {
    pub(crate) fn new(input: R) -> Self {
        Self {
            input,
            stored: vec![0; INPUT],
            used: INPUT,
            at: 0,
            ended: false,
            member: Member::Header,
            inflater: Box::default(),
            plain: vec![0; BUFFER],
            filled: 0,
            plain_at: 0,
            member_at: 0,
            crc: flate2::Crc::new(),
            last_byte: 0,
            boundary: Boundary::default(),
            chunk: None,
            open: None,
            points: Vec::new(),
        }
    }

    /// Begins a chunk of at most `size` bytes at the next plain byte.
    pub(crate) fn begin_chunk(&mut self, size: u64) {
        self.chunk = Some((self.at, self.plain_at));
        if let Some(open) = &self.open {
            let stored = self.boundary.stored.saturating_sub(open.from.stored);
            let own = open.stored_end - open.from.stored;
            let another_block = self.boundary.stored != open.from.stored || self.boundary.plain != open.from.plain;
            let long = stored >= MAX_STORED / 2 || self.plain_at - open.from.plain + size >= MAX_PLAIN;
            let sparse = stored > 2 * own && own > MIN_STORED;
            if !another_block || !(long || sparse) {
                return;
            }
        }
        self.close();
        let from = self.boundary.clone();
        self.open = Some(Open { stored_end: from.stored, plain_end: from.plain, from });
    }

    /// Ends the chunk; returns how it is found again and which bytes of the stream were read for it.
    pub(crate) fn end_chunk(&mut self) -> (Codec, std::ops::Range<u64>) {
        let (stored, plain) = self.chunk.take().expect("a chunk was begun");
        let open = self.open.as_mut().expect("a point was opened for the chunk");
        (open.stored_end, open.plain_end) = (self.at, self.plain_at);
        // Points are closed long before 4 GiB, and there are fewer than chunks.
        let (context, offset) = (self.points.len() as u32, (plain - open.from.plain) as u32);
        (Codec::Zran { context, offset }, stored..self.at)
    }

    fn close(&mut self) {
        let Some(Open { from, stored_end, plain_end }) = self.open.take() else { return };
        self.points.push(Arc::new(Container::Point(Point {
            stored: from.stored..stored_end,
            plain_at: from.plain,
            plain_size: u32::try_from(plain_end - from.plain).unwrap_or(u32::MAX),
            dictionary: from.window,
            byte: from.byte,
            bits: from.bits,
        })));
    }

    /// Returns what was wrapped and the points.
    pub(crate) fn finish(mut self) -> (R, Vec<Arc<Container>>) {
        self.close();
        (self.input, self.points)
    }

    /// Makes sure that there are unused stored bytes; false at the end.
    fn refill(&mut self) -> io::Result<bool> {
        while self.used == self.stored.len() && !self.ended {
            self.stored.resize(INPUT, 0);
            let len = self.input.read(&mut self.stored)?;
            self.stored.truncate(len);
            (self.used, self.ended) = (0, len == 0);
        }
        Ok(!self.ended)
    }

    fn byte(&mut self) -> io::Result<Option<u8>> {
        if !self.refill()? {
            return Ok(None);
        }
        let byte = self.stored[self.used];
        self.take(1);
        Ok(Some(byte))
    }

    fn take(&mut self, len: usize) {
        if len > 0 {
            self.last_byte = self.stored[self.used + len - 1];
        }
        self.used += len;
        self.at += len as u64;
    }

    fn must(&mut self) -> io::Result<u8> {
        self.byte()?.ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the gzip stream is cut short"))
    }

    /// Reads the header of a member, if there is another.
    fn header(&mut self) -> io::Result<()> {
        let Some(first) = self.byte()? else {
            self.member = Member::End;
            return Ok(());
        };
        if (first, self.must()?, self.must()?) != (0x1f, 0x8b, 8) {
            return Err(bad("it is not a gzip stream, or something else follows it"));
        }
        let flags = self.must()?;
        for _ in 0..6 {
            self.must()?;
        }
        if flags & 4 != 0 {
            let len = u16::from_le_bytes([self.must()?, self.must()?]);
            for _ in 0..len {
                self.must()?;
            }
        }
        for text in [8, 16] {
            if flags & text != 0 {
                while self.must()? != 0 {}
            }
        }
        if flags & 2 != 0 {
            self.must()?;
            self.must()?;
        }
        *self.inflater = DecompressorOxide::new();
        self.crc.reset();
        self.member = Member::Data;
        self.member_at = self.plain_at;
        self.note(0, Vec::new());
        Ok(())
    }

    /// Remembers that the stream can be entered here.
    fn note(&mut self, bits: u8, window: Vec<u8>) {
        let byte = if bits == 0 { 0 } else { self.last_byte };
        self.boundary = Boundary { stored: self.at, plain: self.plain_at, bits, byte, window };
    }

    fn trailer(&mut self) -> io::Result<()> {
        let mut trailer = [0; 8];
        for byte in &mut trailer {
            *byte = self.must()?;
        }
        let word = |at: usize| u32::from_le_bytes([trailer[at], trailer[at + 1], trailer[at + 2], trailer[at + 3]]);
        if word(0) != self.crc.sum() || word(4) != self.crc.amount() {
            return Err(bad("the gzip stream does not match its checksum"));
        }
        self.member = Member::Header;
        Ok(())
    }

    /// Inflates up to `wanted` bytes; 0 where something else came first.
    fn inflate(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.filled == self.plain.len() {
            self.plain.copy_within(BUFFER - WINDOW.., 0);
            self.filled = WINDOW;
        }
        self.refill()?;
        let wanted = into.len().min(self.plain.len() - self.filled);
        let mut flags = TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY;
        if !self.ended {
            flags |= TINFL_FLAG_HAS_MORE_INPUT;
        }
        let room = &mut self.plain[..self.filled + wanted];
        let (status, used, made) = decompress(&mut self.inflater, &self.stored[self.used..], room, self.filled, flags);
        self.take(used);
        let made_bytes = &self.plain[self.filled..self.filled + made];
        into[..made].copy_from_slice(made_bytes);
        self.crc.update(made_bytes);
        self.filled += made;
        self.plain_at += made as u64;
        match status {
            TINFLStatus::Done => self.trailer()?,
            TINFLStatus::BlockBoundary => {
                let bits = self.inflater.block_boundary_state().map_or(0, |state| state.num_bits);
                let member = usize::try_from(self.plain_at - self.member_at).unwrap_or(usize::MAX);
                let window = self.plain[self.filled - WINDOW.min(self.filled).min(member)..self.filled].to_vec();
                self.note(bits, window);
            }
            TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => {}
            TINFLStatus::FailedCannotMakeProgress => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the gzip stream is cut short"));
            }
            _ => return Err(bad("the gzip stream is damaged")),
        }
        Ok(made)
    }
}

impl<R: Read> Read for Indexer<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        loop {
            match self.member {
                Member::Header => self.header()?,
                Member::End => return Ok(0),
                Member::Data => match self.inflate(into)? {
                    0 => {}
                    made => return Ok(made),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use nydus_rafs::{Algorithm, Chunk, ChunkIndex, Verified};
    use proptest::prelude::*;

    use super::*;

    /// Bytes that compress to about half, in blocks of several kinds.
    fn text(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut bytes = Vec::new();
        while bytes.len() < len {
            match next() % 4 {
                0 => bytes.extend_from_slice(&vec![next() as u8; (next() % 3000) as usize]),
                1 => (0..next() % 5000).for_each(|_| bytes.push(next() as u8)),
                _ => (0..next() % 9000).for_each(|_| bytes.push(b'a' + (next() % 9) as u8)),
            }
        }
        bytes.truncate(len);
        bytes
    }

    fn gzip(members: &[&[u8]], level: u32) -> Vec<u8> {
        let mut stream = Vec::new();
        for member in members {
            let mut encoder = flate2::GzBuilder::new().filename("n").write(Vec::new(), flate2::Compression::new(level));
            encoder.write_all(member).expect("memory");
            stream.extend_from_slice(&encoder.finish().expect("memory"));
        }
        stream
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn every_chunk_is_found_again_through_its_point(
            seed in any::<u64>(),
            lens in prop::collection::vec(0usize..3_000_000, 1..3),
            cuts in prop::collection::vec((0usize..2000, 1usize..300_000), 1..40),
            level in 0u32..10,
        ) {
            let texts: Vec<Vec<u8>> = lens.iter().map(|&len| text(len, seed)).collect();
            let members: Vec<&[u8]> = texts.iter().map(Vec::as_slice).collect();
            let (plain, stream) = (texts.concat(), gzip(&members, level));
            let mut indexer = Indexer::new(&stream[..]);
            let mut chunks = Vec::new();
            let mut at = 0;
            for (gap, len) in cuts {
                if at + gap + len > plain.len() {
                    break;
                }
                let mut bytes = vec![0; gap];
                indexer.read_exact(&mut bytes).expect("sound");
                indexer.begin_chunk(1 << 20);
                bytes.resize(len, 0);
                indexer.read_exact(&mut bytes).expect("sound");
                prop_assert_eq!(&bytes, &plain[at + gap..at + gap + len]);
                chunks.push((at + gap..at + gap + len, indexer.end_chunk()));
                at += gap + len;
            }
            let mut rest = Vec::new();
            indexer.read_to_end(&mut rest).expect("sound");
            prop_assert_eq!(&rest, &plain[at..]);
            let (_, points) = indexer.finish();
            for (range, (codec, _)) in chunks {
                let Codec::Zran { context, .. } = codec else { panic!("{codec:?}") };
                let container = Arc::clone(&points[context as usize]);
                let Container::Point(point) = &*container else { panic!("{container:?}") };
                prop_assert!(point.plain_size < 4 << 20 && point.stored.end <= stream.len() as u64);
                let stored = point.stored.start as usize..point.stored.end as usize;
                let chunk = Chunk {
                    index: ChunkIndex(0),
                    plain: range.start as u64..range.end as u64,
                    stored: point.stored.clone(),
                    codec,
                    encrypted: false,
                    algorithm: Algorithm::Sha256,
                    digest: Some(Algorithm::Sha256.digest(&plain[range])),
                    container: Some(container.clone()),
                    crc32: None,
                };
                prop_assert!(Verified::decode(&chunk, &stream[stored]).is_ok());
            }
        }
    }

    #[test]
    fn damage_is_an_error() {
        let plain = text(100_000, 7);
        let stream = gzip(&[&plain], 6);
        let read = |bytes: &[u8]| Indexer::new(bytes).read_to_end(&mut Vec::new());
        assert_eq!(read(&stream).expect("sound"), plain.len());
        for cut in [0, 1, 9, 30, stream.len() / 2, stream.len() - 1] {
            assert!(cut == 0 || read(&stream[..cut]).is_err(), "{cut} bytes");
        }
        for flip in [40, stream.len() / 2, stream.len() - 6, stream.len() - 2] {
            let mut bad = stream.clone();
            bad[flip] ^= 4;
            assert!(read(&bad).is_err(), "byte {flip}");
        }
        assert!(read(&[&stream[..], b"garbage"].concat()).is_err());
    }
}
