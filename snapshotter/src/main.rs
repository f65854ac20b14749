//! `containerd-nydus-grpc`: the snapshotter as a process.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use nydus_snapshotter::cli::{self, Cli};
use nydus_snapshotter::config::{Config, LogTo};
use nydus_snapshotter::run;

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the version and a failed start are for whoever typed the command"
)]
fn main() -> ExitCode {
    let (args, warnings) = cli::without_retired(std::env::args_os());
    let cli = Cli::parse_from(args);
    if cli.version {
        // Tools look for these two lines.
        println!("Version:     v{}", env!("CARGO_PKG_VERSION"));
        println!("Git Commit:  {}", option_env!("SHOAL_COMMIT").unwrap_or("unknown"));
        return ExitCode::SUCCESS;
    }
    match start(&cli, warnings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            eprintln!("containerd-nydus-grpc: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: &Cli, mut warnings: Vec<String>) -> Result<()> {
    let (config, more) = Config::load(cli).with_context(|| match &cli.config {
        Some(path) => format!("loading {}", path.display()),
        None => "reading the flags".to_owned(),
    })?;
    warnings.extend(more);
    open_log(&config)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    let ended = runtime.block_on(run::serve(config));
    // A blocked file system must not keep us from ending.
    runtime.shutdown_background();
    ended
}

fn open_log(config: &Config) -> Result<()> {
    let log = tracing_subscriber::fmt().with_max_level(config.log_level).with_ansi(false);
    match &config.log_to {
        LogTo::Stdout => log.init(),
        LogTo::Directory(directory) => {
            let path = directory.join("nydus-snapshotter.log");
            let opened = std::fs::create_dir_all(directory)
                .and_then(|()| OpenOptions::new().create(true).append(true).mode(0o640).open(&path));
            let file = opened.with_context(|| format!("opening the log {}", path.display()))?;
            log.with_writer(std::sync::Mutex::new(file)).init();
        }
    }
    Ok(())
}
