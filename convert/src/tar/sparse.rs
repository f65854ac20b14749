//! Files with holes: which bytes of the file the archive holds, and the zeros between.

use super::header::number;

/// Pieces of data in a file of a known size, in order and apart.
#[derive(Debug)]
pub(super) struct Map {
    size: u64,
    pieces: Vec<(u64, u64)>,
}

/// The most pieces that are believed: at 16 bytes each this bounds memory, and no file needs more.
const PIECES: usize = 1 << 20;

impl Map {
    pub(super) fn new(size: u64) -> Self {
        Self { size, pieces: Vec::new() }
    }

    pub(super) fn push(&mut self, offset: u64, len: u64) -> Result<(), String> {
        let from = self.pieces.last().map_or(0, |&(offset, len)| offset + len);
        let end = offset.checked_add(len).filter(|&end| end <= self.size);
        if offset < from || end.is_none() || self.pieces.len() == PIECES {
            return Err(format!("its sparse map has a piece of {len} bytes at {offset}, which does not fit"));
        }
        self.pieces.push((offset, len));
        Ok(())
    }

    /// Takes pieces of 24 bytes in the old GNU form; `false` once a blank one was met.
    pub(super) fn extend_old(&mut self, pieces: &[u8]) -> Result<bool, String> {
        for piece in pieces.chunks_exact(24) {
            if piece[0] == 0 {
                return Ok(false);
            }
            let one = |field| number(field).and_then(|number| u64::try_from(number).ok());
            let (Some(offset), Some(len)) = (one(&piece[..12]), one(&piece[12..])) else {
                return Err("its sparse map holds something other than numbers".to_owned());
            };
            self.push(offset, len)?;
        }
        Ok(true)
    }
}

/// What to do for the next bytes of a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// So many zeros.
    Hole(usize),
    /// Up to so many bytes of the archive.
    Data(usize),
}

/// Walks a file from its first byte to its last.
#[derive(Debug)]
pub(super) struct Expander {
    size: u64,
    at: u64,
    pieces: std::vec::IntoIter<(u64, u64)>,
    piece: Option<(u64, u64)>,
}

impl Expander {
    /// A file without holes.
    pub(super) fn whole(size: u64) -> Self {
        Self { size, at: 0, pieces: Vec::new().into_iter(), piece: Some((0, size)) }
    }

    /// A file with holes, of whose data the archive has `stored` bytes.
    pub(super) fn sparse(map: Map, stored: u64) -> Result<Self, String> {
        let held: u64 = map.pieces.iter().map(|&(_, len)| len).sum();
        if held != stored {
            return Err(format!("its sparse map tells of {held} bytes and the entry has {stored}"));
        }
        let mut pieces = map.pieces.into_iter();
        let piece = pieces.next();
        Ok(Self { size: map.size, at: 0, pieces, piece })
    }

    /// Returns whether the archive holds all bytes of the file, none of which was read yet.
    pub(super) fn is_whole(&self) -> bool {
        self.piece == Some((0, self.size))
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Returns what the next bytes are, at most `limit` of them; `None` at the end. A hole is passed at once.
    pub(super) fn step(&mut self, limit: usize) -> Option<Step> {
        while let Some((offset, len)) = self.piece
            && self.at == offset + len
        {
            self.piece = self.pieces.next();
        }
        if self.at == self.size || limit == 0 {
            return None;
        }
        let clip = |left: u64| usize::try_from(left).unwrap_or(usize::MAX).min(limit);
        match self.piece {
            Some((offset, len)) if self.at >= offset => Some(Step::Data(clip(offset + len - self.at))),
            next => {
                let hole = clip(next.map_or(self.size, |(offset, _)| offset) - self.at);
                self.at += hole as u64;
                Some(Step::Hole(hole))
            }
        }
    }

    /// Notes that `len` bytes of data were read.
    pub(super) fn took(&mut self, len: usize) {
        self.at += len as u64;
    }
}
