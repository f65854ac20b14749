//! What happened, and whether it may.
//!
//! A fault has a *window*: from its beginning until all is well again after its end. All is well when every reader has read a
//! file rightly since the end, and every file that failed meanwhile too. The ledger turns red, for good, at
//!
//! * a wrong byte, whenever;
//! * an error outside a window, or within one of a fault that readers must not notice;
//! * a reader that hangs: longer than [`LIMIT`] in calm weather or after a fault, longer than any deadline during one;
//! * a fault after which not all is well within [`LIMIT`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::faults::Kind;
use crate::readers::{Flight, Readers, Way};

/// How long recovery may take, and a read in calm weather.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);
/// How long a read may take while a fault lasts: nydusd's deadline here, and time for the error to arrive.
const DEADLINE: Duration = Duration::from_secs(crate::site::READ_DEADLINE + 10);

/// How a read ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// With the right bytes.
    Right,
    /// With others.
    Wrong(String),
    /// With an error.
    Failed(String),
}

/// What happened so far.
#[derive(Debug)]
pub(crate) struct Ledger {
    birth: Instant,
    state: Mutex<State>,
    events: Mutex<File>,
}

#[derive(Debug, Default)]
struct State {
    flights: BTreeMap<usize, Flight>,
    window: Option<Window>,
    tallies: BTreeMap<Kind, Tally>,
    reads: u64,
    wrong: u64,
    hung: u64,
    reasons: Vec<String>,
}

#[derive(Debug)]
struct Window {
    kind: Kind,
    began: Instant,
    cleared: Option<Cleared>,
    errors: u64,
    right: u64,
    /// Files that failed and were not read since.
    broken: BTreeSet<usize>,
}

#[derive(Debug)]
struct Cleared {
    /// When the fault ended.
    at: Instant,
    /// Reads that begin from here on count.
    from: Instant,
    /// Readers that have not read rightly since.
    missing: BTreeSet<usize>,
}

/// One kind of fault.
#[derive(Debug, Default)]
struct Tally {
    injected: u64,
    met: u64,
    recovered: u64,
    errors: u64,
    longest: Duration,
}

impl Ledger {
    /// Opens a ledger that writes what happens to a file below `logs`.
    pub(crate) fn open(logs: &Path) -> Result<Self> {
        let path = logs.join("events.log");
        let events = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { birth: Instant::now(), state: Mutex::default(), events: Mutex::new(events) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the time since the beginning.
    pub(crate) fn age(&self) -> Duration {
        self.birth.elapsed()
    }

    /// Writes down what happened.
    pub(crate) fn note(&self, text: &str) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk under the log must not end the campaign.
        drop(writeln!(events, "{:9.3} {text}", self.age().as_secs_f64()));
    }

    /// Turns red.
    pub(crate) fn redden(&self, why: String) {
        self.note(&format!("RED {why}"));
        self.state().reasons.push(why);
    }

    /// Returns why it is red.
    pub(crate) fn reasons(&self) -> Vec<String> {
        self.state().reasons.clone()
    }

    pub(crate) fn is_red(&self) -> bool {
        !self.state().reasons.is_empty()
    }

    pub(crate) fn begin_read(&self, reader: usize, way: Way, file: usize) {
        self.state().flights.insert(reader, Flight { way, file, began: Instant::now() });
    }

    pub(crate) fn end_read(&self, reader: usize, ended: Ended) {
        let mut state = self.state();
        let Some(flight) = state.flights.remove(&reader) else { return };
        state.reads += 1;
        let took = flight.began.elapsed().as_secs_f64();
        let text = match (ended, &mut state.window) {
            (Ended::Right, None) => return,
            (Ended::Right, Some(window)) => {
                if flight.began >= window.began {
                    window.right += 1;
                }
                if let Some(cleared) = window.cleared.as_mut().filter(|cleared| flight.began >= cleared.from) {
                    cleared.missing.remove(&reader);
                    window.broken.remove(&flight.file);
                }
                return;
            }
            (Ended::Wrong(what), _) => {
                state.wrong += 1;
                let why = format!("wrong bytes: {what} ({:?}, after {took:.1} s)", flight.way);
                state.reasons.push(why.clone());
                format!("RED {why}")
            }
            (Ended::Failed(what), Some(window)) => {
                window.errors += 1;
                window.broken.insert(flight.file);
                let text =
                    format!("reader {reader} {:?} file {} failed after {took:.1} s: {what}", flight.way, flight.file);
                if window.kind.forgives() {
                    text
                } else {
                    let why = format!("readers must not notice \"{}\": {text}", window.kind.name());
                    state.reasons.push(why.clone());
                    format!("RED {why}")
                }
            }
            (Ended::Failed(what), None) => {
                let why = format!(
                    "an error outside of any fault's window: reader {reader} {:?} file {} failed after {took:.1} s: {what}",
                    flight.way, flight.file
                );
                state.reasons.push(why.clone());
                format!("RED {why}")
            }
        };
        drop(state);
        self.note(&text);
    }

    /// Returns the files that failed within this window and were not read since.
    pub(crate) fn broken(&self) -> Vec<usize> {
        let state = self.state();
        let cleared = state.window.as_ref().filter(|window| window.cleared.is_some());
        cleared.map(|window| window.broken.iter().copied().collect()).unwrap_or_default()
    }

    /// A fault begins.
    pub(crate) fn open_window(&self, kind: Kind) {
        let mut state = self.state();
        state.tallies.entry(kind).or_default().injected += 1;
        state.window =
            Some(Window { kind, began: Instant::now(), cleared: None, errors: 0, right: 0, broken: BTreeSet::new() });
    }

    /// Returns how many reads failed in the window, and how many that began in it were right.
    pub(crate) fn in_window(&self) -> (u64, u64) {
        self.state().window.as_ref().map_or((0, 0), |window| (window.errors, window.right))
    }

    /// The fault ended at `at`; reads that begin from now on tell whether all is well.
    pub(crate) fn clear(&self, at: Instant) {
        if let Some(window) = &mut self.state().window {
            window.cleared = Some(Cleared { at, from: Instant::now(), missing: (0..Readers::COUNT).collect() });
        }
    }

    /// Returns whether all is well again.
    pub(crate) fn is_well(&self) -> bool {
        let state = self.state();
        let Some(window) = &state.window else { return true };
        window.broken.is_empty() && window.cleared.as_ref().is_some_and(|cleared| cleared.missing.is_empty())
    }

    /// The window ends, with all well or without.
    pub(crate) fn close_window(&self, met: bool) {
        let well = self.is_well();
        let mut state = self.state();
        let Some(window) = state.window.take() else { return };
        let took = window.cleared.as_ref().map_or(Duration::ZERO, |cleared| cleared.at.elapsed());
        let tally = state.tallies.entry(window.kind).or_default();
        tally.met += u64::from(met);
        tally.errors += window.errors;
        if well {
            tally.recovered += 1;
            tally.longest = tally.longest.max(took);
        }
        let text = format!(
            "{} {} after {:.1} s; {} reads failed, {} were right",
            window.kind.name(),
            if well { "recovered" } else { "did not recover" },
            took.as_secs_f64(),
            window.errors,
            window.right
        );
        drop(state);
        self.note(&text);
        if took > LIMIT {
            self.redden(format!("{text}: the limit is {} s", LIMIT.as_secs()));
        }
    }

    /// Looks for readers that hang and for recoveries that take too long.
    pub(crate) fn look(&self) {
        let mut state = self.state();
        let State { flights, window, .. } = &*state;
        let cleared = window.as_ref().map(|window| window.cleared.as_ref());
        let mut found = Vec::new();
        let mut hung = 0;
        for (reader, flight) in flights {
            let (since, limit) = match cleared {
                None => (flight.began, LIMIT),
                Some(None) => (flight.began, DEADLINE),
                Some(Some(cleared)) => (flight.began.max(cleared.at), LIMIT),
            };
            if since.elapsed() > limit {
                hung += 1;
                found.push(format!(
                    "reader {reader} hangs: {:?} of file {} for {:.1} s",
                    flight.way,
                    flight.file,
                    flight.began.elapsed().as_secs_f64()
                ));
            }
        }
        if let (Some(window), Some(Some(cleared))) = (window, cleared)
            && cleared.at.elapsed() > LIMIT
        {
            found.push(format!(
                "no recovery from \"{}\" within {} s: readers {:?} have read nothing since, files {:?} failed and still do",
                window.kind.name(),
                LIMIT.as_secs(),
                cleared.missing,
                window.broken
            ));
        }
        state.hung += hung;
        drop(state);
        for why in found {
            self.redden(why);
        }
    }

    /// Turns red if one of `kinds` was never met.
    pub(crate) fn expect_met(&self, kinds: &[Kind]) {
        let missing: Vec<&str> = {
            let state = self.state();
            let met = |kind: &&Kind| state.tallies.get(*kind).is_some_and(|tally| tally.met > 0);
            kinds.iter().filter(|kind| !met(kind)).map(|kind| kind.name()).collect()
        };
        if !missing.is_empty() {
            self.redden(format!("no read met {missing:?}"));
        }
    }

    /// Returns the table.
    pub(crate) fn table(&self) -> String {
        let state = self.state();
        let mut text = format!(
            "{:<40} {:>8} {:>5} {:>9} {:>7} {:>16}\n",
            "fault", "injected", "met", "recovered", "errors", "longest recovery"
        );
        for (kind, tally) in &state.tallies {
            let Tally { injected, met, recovered, errors, longest } = tally;
            let longest = longest.as_secs_f64();
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{:<40} {injected:>8} {met:>5} {recovered:>9} {errors:>7} {longest:>14.1} s",
                kind.name()
            );
        }
        let _ = write!(
            text,
            "{} reads in {:.0} s; wrong {}, hung {}",
            state.reads,
            self.age().as_secs_f64(),
            state.wrong,
            state.hung
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kill whose readers all read rightly, as long after it was over as said.
    fn survived(ago: Duration) -> (Ledger, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a directory");
        let ledger = Ledger::open(dir.path()).expect("a ledger");
        ledger.open_window(Kind::SnapshotterKilled);
        ledger.clear(Instant::now().checked_sub(ago).expect("the machine runs for longer"));
        for reader in 0..Readers::COUNT {
            ledger.begin_read(reader, Way::Read, 0);
            ledger.end_read(reader, Ended::Right);
        }
        ledger.close_window(true);
        (ledger, dir)
    }

    #[test]
    fn a_recovery_over_the_limit_is_red_even_if_nobody_looked_meanwhile() {
        let (quick, _dir) = survived(LIMIT / 2);
        assert_eq!(quick.reasons(), [""; 0]);
        let (slow, _dir) = survived(LIMIT + Duration::from_secs(1));
        assert_eq!(slow.reasons().len(), 1, "{:?}", slow.reasons());
    }
}
