//! A file that is written here and there.
//!
//! Writers of bootstraps put inodes where they were placed, not one after the other, yet mostly close to the one before. A
//! few windows of the file are in memory, and the one that was not needed for longest goes to the file when another is wanted: so a
//! bootstrap of any size takes 2 MiB.

use std::io::{self, Read, Seek, SeekFrom, Write};

/// Bytes of a window.
const WINDOW: u64 = 128 << 10;

/// How many there are.
const WINDOWS: usize = 16;

/// The file, empty when this begins.
#[derive(Debug)]
pub(crate) struct Sheet<F> {
    file: F,
    /// How far it was written, windows in memory included.
    len: u64,
    /// How far the file itself reaches.
    reaches: u64,
    /// The one that was used last comes first.
    windows: Vec<Window>,
}

#[derive(Debug)]
struct Window {
    /// Its position in the file, in windows.
    number: u64,
    bytes: Vec<u8>,
}

impl<F: Read + Write + Seek> Sheet<F> {
    pub(crate) fn new(file: F) -> Self {
        Self { file, len: 0, reaches: 0, windows: Vec::new() }
    }

    /// Returns where what was written ends.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Writes bytes; what lies between them and what was written before is zero.
    pub(crate) fn put(&mut self, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
        self.len = self.len.max(at + bytes.len() as u64);
        while !bytes.is_empty() {
            let inside = (at % WINDOW) as usize;
            let now = bytes.len().min(WINDOW as usize - inside);
            self.window(at / WINDOW)?.bytes[inside..inside + now].copy_from_slice(&bytes[..now]);
            (at, bytes) = (at + now as u64, &bytes[now..]);
        }
        Ok(())
    }

    /// Makes the file at least this long.
    pub(crate) fn reach(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    /// Brings everything to the file, and returns its length.
    pub(crate) fn finish(mut self) -> io::Result<u64> {
        self.windows.sort_by_key(|window| window.number);
        for window in std::mem::take(&mut self.windows) {
            self.bring(&window)?;
        }
        if self.reaches < self.len {
            self.file.seek(SeekFrom::Start(self.len - 1))?;
            self.file.write_all(&[0])?;
        }
        self.file.flush()?;
        Ok(self.len)
    }

    /// Returns a window, from the file if need be.
    fn window(&mut self, number: u64) -> io::Result<&mut Window> {
        if let Some(found) = self.windows.iter().position(|window| window.number == number) {
            self.windows[..=found].rotate_right(1);
            return Ok(&mut self.windows[0]);
        }
        let mut window = match self.windows.len() {
            WINDOWS.. => self.windows.pop(),
            _ => None,
        };
        if let Some(window) = &window {
            self.bring(window)?;
        }
        let mut bytes = window.take().map_or_else(|| vec![0; WINDOW as usize], |window| window.bytes);
        let start = number * WINDOW;
        let there = self.reaches.saturating_sub(start).min(WINDOW) as usize;
        if there > 0 {
            self.file.seek(SeekFrom::Start(start))?;
            self.file.read_exact(&mut bytes[..there])?;
        }
        bytes[there..].fill(0);
        self.windows.insert(0, Window { number, bytes });
        Ok(&mut self.windows[0])
    }

    fn bring(&mut self, window: &Window) -> io::Result<()> {
        let start = window.number * WINDOW;
        let bytes = &window.bytes[..self.len.saturating_sub(start).min(WINDOW) as usize];
        self.file.seek(SeekFrom::Start(start))?;
        self.file.write_all(bytes)?;
        self.reaches = self.reaches.max(start + bytes.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_put_anywhere_is_there_and_the_rest_is_zero(
            puts in prop::collection::vec((0..40 * WINDOW, prop_oneof![1usize..200, Just(WINDOW as usize + 7)]), 0..80),
            reach in 0..50 * WINDOW,
        ) {
            let (mut file, mut wanted) = (Cursor::new(Vec::new()), Vec::new());
            let mut sheet = Sheet::new(&mut file);
            for (turn, &(at, len)) in puts.iter().enumerate() {
                let bytes = vec![turn as u8 + 1; len];
                let (start, end) = (at as usize, at as usize + len);
                wanted.resize(wanted.len().max(end), 0);
                wanted[start..end].copy_from_slice(&bytes);
                sheet.put(at, &bytes).expect("memory");
                prop_assert_eq!(sheet.len(), wanted.len() as u64);
            }
            sheet.reach(reach);
            wanted.resize(wanted.len().max(reach as usize), 0);
            prop_assert_eq!(sheet.finish().expect("memory"), wanted.len() as u64);
            prop_assert!(file.into_inner() == wanted);
        }
    }
}
