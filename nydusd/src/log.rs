//! The log: one line per event, in the format that log scrapers of the program we replace expect.
//!
//! `[2026-07-20 10:00:00.123456 +00:00] INFO message field=value`; all levels but INFO name file and line. The level can
//! be changed while the daemon runs, and a log file can be kept below a size.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

use crate::clock::Moment;

/// Rotated files that are kept.
const KEPT: usize = 10;

/// Changes the level while the program runs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LevelControl(Option<reload::Handle<Targets, Registry>>);

impl LevelControl {
    /// A control that controls nothing, where no log was set up.
    pub fn none() -> Self {
        Self(None)
    }

    /// Sets the level; false if `level` is none of off, error, warn, info, debug, trace (in any case).
    pub fn set(&self, level: &str) -> bool {
        let Some(level) = parse(level) else { return false };
        if let Some(handle) = &self.0 {
            // Fails only if the subscriber is gone, and then nobody listens anyway.
            let _ = handle.reload(targets(level));
        }
        true
    }
}

fn parse(level: &str) -> Option<LevelFilter> {
    match level.to_ascii_lowercase().as_str() {
        "off" => Some(LevelFilter::OFF),
        "error" => Some(LevelFilter::ERROR),
        "warn" => Some(LevelFilter::WARN),
        "info" => Some(LevelFilter::INFO),
        "debug" => Some(LevelFilter::DEBUG),
        "trace" => Some(LevelFilter::TRACE),
        _ => None,
    }
}

fn targets(level: LevelFilter) -> Targets {
    // The FUSE crate prints whole replies when a reader was killed; the HTTP crates narrate every frame.
    let quiet = level.min(LevelFilter::WARN);
    Targets::new()
        .with_default(level)
        .with_target("fuse_backend_rs", LevelFilter::OFF)
        // That a certificate is wrong is told by us, with the name of whose it is.
        .with_target("rustls_platform_verifier", LevelFilter::OFF)
        .with_targets(["h2", "hyper", "hyper_util", "reqwest", "rustls", "mio", "tower"].map(|name| (name, quiet)))
}

/// Returns the file that `path` means: `.log` is appended where there is no extension.
pub fn with_extension(path: &Path) -> PathBuf {
    match path.extension() {
        Some(_) => path.to_owned(),
        None => path.with_extension("log"),
    }
}

/// Sets up the log of this process: to `file`, or to stderr. `rotation` is the size in MB at which a new file is begun; 0
/// for never.
pub fn init(level: &str, file: Option<&Path>, rotation: u64) -> io::Result<LevelControl> {
    let sink = match file {
        Some(path) => Sink::File(Arc::new(Mutex::new(LogFile::open(with_extension(path), rotation << 20)?))),
        None => Sink::Stderr,
    };
    let level = parse(level).unwrap_or(LevelFilter::INFO);
    let (filter, handle) = reload::Layer::new(targets(level));
    let lines = tracing_subscriber::fmt::layer().with_ansi(false).event_format(Line).with_writer(sink);
    tracing_subscriber::registry().with(filter).with(lines).try_init().map_err(io::Error::other)?;
    std::panic::set_hook(Box::new(|info| {
        let trace = std::backtrace::Backtrace::force_capture();
        tracing::error!("{info}\n{trace}");
    }));
    Ok(LevelControl(Some(handle)))
}

/// The format of a line.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let meta = event.metadata();
        write!(writer, "[{}] {} ", Moment::now().log(), meta.level())?;
        if *meta.level() != Level::INFO
            && let (Some(file), Some(line)) = (meta.file(), meta.line())
        {
            write!(writer, "[{file}:{line}] ")?;
        }
        ctx.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

#[derive(Clone)]
enum Sink {
    Stderr,
    File(Arc<Mutex<LogFile>>),
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stderr => io::stderr().write(line),
            Self::File(file) => file.lock().unwrap_or_else(PoisonError::into_inner).write(line),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is renamed away when it has grown too long.
struct LogFile {
    path: PathBuf,
    file: File,
    limit: u64,
    written: u64,
}

impl LogFile {
    fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let written = file.metadata()?.len();
        Ok(Self { path, file, limit, written })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.limit > 0 && self.written > 0 && self.written + line.len() as u64 > self.limit {
            // Where rotation fails the log goes on in the old file: a long log is better than none.
            let _ = self.rotate();
        }
        let len = self.file.write(line)?;
        self.written += len as u64;
        Ok(len)
    }

    fn rotate(&mut self) -> io::Result<()> {
        let mut old = self.path.clone().into_os_string();
        old.push(format!(".{}", Moment::now().file()));
        std::fs::rename(&self.path, &old)?;
        self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.written = 0;
        let (Some(dir), Some(name)) = (self.path.parent(), self.path.file_name().and_then(|name| name.to_str())) else {
            return Ok(());
        };
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let prefix = format!("{name}.");
        let mut old: Vec<PathBuf> = std::fs::read_dir(dir)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&prefix))
            })
            .collect();
        // The names sort by time.
        old.sort();
        for path in old.iter().rev().skip(KEPT) {
            std::fs::remove_file(path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_extension_gets_one() {
        for (given, want) in [("/a/nydusd", "/a/nydusd.log"), ("/a/x.txt", "/a/x.txt"), ("/a.d/y", "/a.d/y.log")] {
            assert_eq!(with_extension(Path::new(given)), Path::new(want));
        }
    }

    #[test]
    fn a_full_log_file_is_put_aside_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nydusd.log");
        let mut log = LogFile::open(path.clone(), 20).unwrap();
        log.write(b"first line of it\n").unwrap();
        log.write(b"second line\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second line\n");
        let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        let old = files.iter().find(|file| **file != path).unwrap();
        assert_eq!(std::fs::read(old).unwrap(), b"first line of it\n");
    }

    #[test]
    fn levels_are_known_in_any_case() {
        assert!(LevelControl::none().set("DEBUG") && LevelControl::none().set("Off"));
        assert!(!LevelControl::none().set("loud"));
    }
}
