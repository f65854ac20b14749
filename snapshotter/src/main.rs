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
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

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
    // Libraries tell every frame at debug level; what they warn of may matter.
    let ours = ["nydus_snapshotter", "containerd_nydus_grpc", "nydus_backend", "nydusd"];
    let filter = Targets::new()
        .with_default(LevelFilter::from_level(config.log_level).min(LevelFilter::WARN))
        .with_targets(ours.map(|target| (target, config.log_level)));
    let log = tracing_subscriber::fmt::layer().with_ansi(false);
    let registry = tracing_subscriber::registry();
    match &config.log_to {
        LogTo::Stdout => registry.with(log.with_filter(filter)).init(),
        LogTo::Directory(directory) => {
            let path = directory.join("nydus-snapshotter.log");
            let opened = std::fs::create_dir_all(directory)
                .and_then(|()| OpenOptions::new().create(true).append(true).mode(0o640).open(&path));
            let file = opened.with_context(|| format!("opening the log {}", path.display()))?;
            registry.with(log.with_writer(std::sync::Mutex::new(file)).with_filter(filter)).init();
        }
    }
    Ok(())
}
