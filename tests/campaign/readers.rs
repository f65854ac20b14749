//! Readers that never stop: each a process of its own, driven by a thread that compares what comes back.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nydus_tests::needs::program;

use crate::dice::Dice;
use crate::files::File;
use crate::ledger::{Ended, Ledger};

/// How a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// `read(2)` on overlayfs above our mount.
    Read,
    /// `mmap(2)` there.
    Map,
    /// Run from there.
    Exec,
    /// `O_DIRECT` on our mount itself.
    Direct,
}

/// Readers of the same way have files in common often enough that they wait for each other's chunks.
const WAYS: [Way; 6] = [Way::Read, Way::Read, Way::Map, Way::Exec, Way::Direct, Way::Direct];

/// Between two reads of one reader: the machine has other things to do.
const PAUSE: Duration = Duration::from_millis(15);

impl Way {
    fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Map => "mmap",
            Self::Exec => "exec",
            Self::Direct => "direct",
        }
    }
}

/// Where readers find the image; it moves when the mount below dies.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place {
    /// The root file system of a container: overlayfs.
    pub(crate) overlay: PathBuf,
    /// Our mount of its image.
    pub(crate) rafs: PathBuf,
}

/// The readers' shared knowledge.
#[derive(Debug)]
pub(crate) struct Library {
    pub(crate) files: Vec<File>,
    pub(crate) place: RwLock<Place>,
    pub(crate) ledger: Arc<Ledger>,
}

/// Running readers; they end when dropped.
#[derive(Debug)]
pub(crate) struct Readers {
    stop: Arc<AtomicBool>,
    /// Those of the processes, to end those that hang.
    pids: Vec<Arc<RwLock<Option<Pid>>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    /// How many there are.
    pub(crate) const COUNT: usize = WAYS.len();

    /// Starts them. `dir` holds their program.
    pub(crate) fn start(library: &Arc<Library>, dir: &Path, seed: u64) -> Result<Self> {
        let script = dir.join("reader.py");
        std::fs::write(&script, include_str!("reader.py"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut readers = Self { stop: Arc::clone(&stop), pids: Vec::new(), threads: Vec::new() };
        for (number, way) in WAYS.into_iter().enumerate() {
            let pid = Arc::new(RwLock::new(None));
            readers.pids.push(Arc::clone(&pid));
            let reader = Reader {
                number,
                way,
                library: Arc::clone(library),
                dice: Dice::new(seed ^ (number as u64 + 1)),
                script: script.clone(),
                worker: None,
                pid,
            };
            let stop = Arc::clone(&stop);
            readers.threads.push(std::thread::spawn(move || reader.read_on(&stop)));
        }
        Ok(readers)
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(500));
        for pid in self.pids.iter().filter_map(|pid| *pid.read().ok()?) {
            // One that is gone already is as good as ended.
            let _ = kill(pid, Signal::SIGKILL);
        }
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

struct Reader {
    number: usize,
    way: Way,
    library: Arc<Library>,
    dice: Dice,
    script: PathBuf,
    worker: Option<Worker>,
    pid: Arc<RwLock<Option<Pid>>>,
}

struct Worker {
    child: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Reader {
    fn read_on(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let at = self.choose();
            self.library.ledger.begin_read(self.number, self.way, at);
            let ended = match self.read(at) {
                Ok(ended) => ended,
                Err(error) => Ended::Failed(format!("{error:#}")),
            };
            if !stop.load(Ordering::Relaxed) {
                self.library.ledger.end_read(self.number, ended);
            }
            std::thread::sleep(PAUSE);
        }
        if let Some(mut worker) = self.worker.take() {
            drop(worker.child.kill());
            drop(worker.child.wait());
        }
    }

    /// Picks a file: one that failed and was not read again since, else often one that others read now.
    fn choose(&mut self) -> usize {
        let files = &self.library.files;
        let fits = |at: &usize| self.way != Way::Exec || files[*at].prints.is_some();
        let broken: Vec<usize> = self.library.ledger.broken().into_iter().filter(fits).collect();
        if !broken.is_empty() {
            return *self.dice.pick(&broken);
        }
        let all: Vec<usize> = (0..files.len()).filter(fits).collect();
        if self.dice.below(2) == 0 {
            let tick = self.library.ledger.age().as_millis() / 150;
            return all[usize::try_from(Dice::new(tick as u64).below(all.len() as u64)).unwrap_or(0)];
        }
        *self.dice.pick(&all)
    }

    fn read(&mut self, at: usize) -> Result<Ended> {
        let file = &self.library.files[at];
        let path = {
            let place = self.library.place.read().expect("no writer panics");
            if self.way == Way::Direct { &place.rafs } else { &place.overlay }.join(&file.path)
        };
        let mut worker = match self.worker.take() {
            Some(worker) => worker,
            None => Worker::start(&self.script)?,
        };
        *self.pid.write().expect("no reader panics") = Some(worker.pid());
        let answer = worker.ask(self.way, &path);
        let Ok(answer) = answer else {
            // SIGBUS is how a mapped page says that it cannot be read.
            drop(worker.child.kill());
            let status = worker.child.wait()?;
            *self.pid.write().expect("no reader panics") = None;
            return Ok(Ended::Failed(format!("the reader ended with {status}")));
        };
        self.worker = Some(worker);
        let wanted = if self.way == Way::Exec { file.prints.as_deref().unwrap_or_default() } else { &file.sum };
        Ok(match answer.split_at_checked(2) {
            Some(("= ", sum)) if sum == wanted => Ended::Right,
            Some(("= ", sum)) => Ended::Wrong(format!("{} gave {sum:?}, not {wanted:?}", path.display())),
            Some(("! ", error)) => Ended::Failed(error.to_owned()),
            _ => Ended::Failed(format!("the reader said {answer:?}")),
        })
    }
}

impl Worker {
    fn start(script: &Path) -> Result<Self> {
        let mut command = Command::new(program("python3").context("python3 is not installed")?);
        command.arg("-I").arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("starting a reader")?;
        let asks = child.stdin.take().context("a reader has an input")?;
        let answers = BufReader::new(child.stdout.take().context("a reader has an output")?);
        Ok(Self { child, asks, answers })
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("process ids fit an i32"))
    }

    /// Returns the answer; an error if the reader is dead.
    fn ask(&mut self, way: Way, path: &Path) -> Result<String> {
        writeln!(self.asks, "{} {}", way.word(), path.display())?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        anyhow::ensure!(answer.ends_with('\n'), "it ended");
        Ok(answer.trim_end().to_owned())
    }
}

/// When a read began, by whom, of what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flight {
    pub(crate) way: Way,
    pub(crate) file: usize,
    pub(crate) began: Instant,
}
