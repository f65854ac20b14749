//! `nydusify`: makes RAFS images of container images in registries.

mod check;
mod convert;
mod copy;
mod mount;
mod side;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{ArgAction, Args, Parser, Subcommand};
use nydus_convert::nydusify::progress::Progress;

/// Makes RAFS images of container images in registries.
#[derive(Debug, Parser)]
#[command(name = "nydusify", version, disable_version_flag = true)]
struct Cli {
    /// Log more
    #[arg(short = 'D', long, env = "DEBUG_LOG_LEVEL")]
    debug: bool,
    /// Log level: trace, debug, info, warn, error
    #[arg(short = 'l', long, env = "LOG_LEVEL", default_value = "info")]
    log_level: String,
    /// Log to the end of this file instead of standard error
    #[arg(long, env = "LOG_FILE")]
    log_file: Option<PathBuf>,
    /// Print version
    #[arg(short = 'v', short_alias = 'V', long, action = ArgAction::Version)]
    version: (),
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert an image of a registry to a RAFS image in a registry
    Convert(Box<convert::Convert>),
    /// Check a RAFS image, and compare it with its original
    Check(Box<check::Check>),
    /// Mount a RAFS image until interrupted
    #[command(alias = "view")]
    Mount(Box<mount::Mount>),
    /// Copy an image as it is, between registries, archives and OCI layouts
    Copy(Box<copy::Copy>),
    /// Build a RAFS image from a directory (not supported yet)
    #[command(alias = "pack")]
    Build(Rest),
    /// Optimize a RAFS image for a start-up (not supported yet)
    Optimize(Rest),
    /// Commit a container to an image (not supported yet)
    Commit(Rest),
    /// Make a chunk dictionary (not supported yet)
    Chunkdict(Rest),
}

/// Flags of commands that do not exist yet.
#[derive(Debug, Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    rest: Vec<String>,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // The replaced program knows two exit codes.
            let failed = error.use_stderr();
            drop(error.print());
            return if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let progress = Progress::on_stderr();
    if let Err(error) = log_to(&cli, &progress) {
        // There is no log to write to.
        drop(writeln!(io::stderr(), "Error: {error:#}"));
        return ExitCode::FAILURE;
    }
    match run(cli, &progress) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli, progress: &Progress) -> anyhow::Result<()> {
    drop(rustls::crypto::ring::default_provider().install_default());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    match cli.command {
        Command::Convert(flags) => runtime.block_on(convert::run(&flags, progress)),
        Command::Check(flags) => runtime.block_on(check::run(&flags, progress)),
        Command::Mount(flags) => runtime.block_on(mount::run(&flags)),
        Command::Copy(flags) => runtime.block_on(copy::run(&flags, progress)),
        Command::Build(_) => not_yet("build"),
        Command::Optimize(_) => not_yet("optimize"),
        Command::Commit(_) => not_yet("commit"),
        Command::Chunkdict(_) => not_yet("chunkdict"),
    }
}

fn not_yet(command: &str) -> anyhow::Result<()> {
    bail!("`nydusify {command}` is not supported yet; use the original program for it")
}

fn log_to(cli: &Cli, progress: &Progress) -> anyhow::Result<()> {
    let level = if cli.debug { "debug" } else { cli.log_level.as_str() };
    let known = ["trace", "debug", "info", "warn", "error"].contains(&level);
    let filter = tracing_subscriber::EnvFilter::new(if known { level } else { "info" });
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match &cli.log_file {
        Some(path) => {
            let file = std::fs::File::options().create(true).append(true).open(path);
            let file = file.with_context(|| format!("opening the log file {}", path.display()))?;
            builder.with_ansi(false).with_writer(std::sync::Mutex::new(file)).init();
        }
        None => {
            let writer = progress.log_writer();
            builder.with_ansi(io::stderr().is_terminal()).with_writer(move || writer.clone()).init();
        }
    }
    if !known {
        tracing::warn!(level, "unknown log level, using info");
    }
    Ok(())
}
