//! Who takes nydusd's cache away, a little all the time, so that readers go cold again and meet the weather.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nydus_tests::cache::{cut, data_files};

use crate::dice::Dice;

/// Between two thefts.
const PAUSE: Duration = Duration::from_millis(200);

/// What the thief does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trade {
    /// Cuts one blob's file after another to nothing.
    Steals,
    /// Fills the disk, and keeps it full.
    Hoards,
    /// Nothing.
    Rests,
    /// It is over.
    Ends,
}

/// A thief at work; ends when dropped.
#[derive(Debug)]
pub(crate) struct Thief {
    dir: PathBuf,
    trade: Arc<Mutex<Trade>>,
    thread: Option<JoinHandle<()>>,
}

impl Thief {
    /// Lets one loose in a cache directory; it rests at first.
    pub(crate) fn start(dir: &Path, seed: u64) -> Self {
        let trade = Arc::new(Mutex::new(Trade::Rests));
        let (shared, own) = (Arc::clone(&trade), dir.to_owned());
        let thread = std::thread::spawn(move || work(&own, &shared, Dice::new(seed)));
        Self { dir: dir.to_owned(), trade, thread: Some(thread) }
    }

    /// Changes the trade. When it returns the old one is not being done any more.
    pub(crate) fn turn(&self, trade: Trade) {
        *self.trade.lock().unwrap_or_else(PoisonError::into_inner) = trade;
        if trade != Trade::Hoards {
            // It is there only after hoarding.
            drop(std::fs::remove_file(hoard(&self.dir)));
        }
    }

    /// Takes everything at once.
    pub(crate) fn take_all(&self) {
        data_files(&self.dir).iter().for_each(|path| cut(path));
    }
}

impl Drop for Thief {
    fn drop(&mut self) {
        self.turn(Trade::Ends);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn work(dir: &Path, trade: &Mutex<Trade>, mut dice: Dice) {
    loop {
        {
            // Held while at work: whoever changes the trade waits for the end of what is being done.
            let trade = trade.lock().unwrap_or_else(PoisonError::into_inner);
            match *trade {
                Trade::Ends => return,
                Trade::Rests => {}
                Trade::Steals => {
                    let files = data_files(dir);
                    if !files.is_empty() {
                        let path: &PathBuf = dice.pick(&files);
                        cut(path);
                    }
                }
                Trade::Hoards => fill(dir),
            }
        }
        std::thread::sleep(PAUSE);
    }
}

fn hoard(dir: &Path) -> PathBuf {
    dir.join("hoard")
}

fn fill(dir: &Path) {
    let Ok(mut file) = File::options().create(true).append(true).open(hoard(dir)) else { return };
    let bytes = vec![0xa5; 64 << 10];
    // Until the disk is full: first in large steps, then in the smallest that there are.
    while file.write_all(&bytes).is_ok() {}
    while file.write_all(&bytes[..4096]).is_ok() {}
}
