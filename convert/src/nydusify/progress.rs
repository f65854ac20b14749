//! What a person sees while layers are on their way: a bar per layer on a terminal, a line per layer elsewhere.

use std::io::{self, IsTerminal as _, Write};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The bars of a run.
#[derive(Debug, Clone)]
pub struct Progress {
    bars: MultiProgress,
    terminal: bool,
}

impl Progress {
    /// Draws bars on standard error if it is a terminal.
    pub fn on_stderr() -> Self {
        let terminal = io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        Self { bars: MultiProgress::with_draw_target(target), terminal }
    }

    /// Draws nothing.
    pub fn hidden() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), terminal: false }
    }

    /// Returns the bar of one layer.
    pub(super) fn layer(&self, name: &str, size: u64) -> LayerBar {
        let style = ProgressStyle::with_template("{prefix} [{bar:32}] {bytes:>10}/{total_bytes:<10} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.bars.add(ProgressBar::new(size).with_style(style.progress_chars("=> ")));
        bar.set_prefix(name.to_owned());
        LayerBar { bar, name: name.to_owned(), lines: !self.terminal }
    }

    /// Returns a writer for log lines that does not tear the bars.
    pub fn log_writer(&self) -> LogWriter {
        LogWriter(self.bars.clone())
    }
}

/// The bar of one layer.
#[derive(Debug, Clone)]
pub(super) struct LayerBar {
    bar: ProgressBar,
    name: String,
    lines: bool,
}

impl LayerBar {
    /// A bar that nobody sees.
    pub(super) fn hidden() -> Self {
        Self { bar: ProgressBar::hidden(), name: String::new(), lines: false }
    }

    pub(super) fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    pub(super) fn say(&self, what: &'static str) {
        self.bar.set_message(what);
        if self.lines {
            tracing::info!(layer = self.name, "{what}");
        }
    }

    pub(super) fn done(&self) {
        self.say("converted");
    }

    pub(super) fn end(&self, what: &'static str) {
        self.say(what);
        self.bar.finish();
    }
}

/// Writes log lines above the bars.
#[derive(Debug, Clone)]
pub struct LogWriter(MultiProgress);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
