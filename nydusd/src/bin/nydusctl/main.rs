//! `nydusctl`: asks a running daemon, and tells it what to do.

mod swarm;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};
use nydusd::api::types::{BackendMetrics, CacheMetrics, DaemonInfo, FsMetrics, MountRequest};
use nydusd::api::{Client, ClientError};
use nydusd::build;
use serde::Serialize;

/// A client to query and configure the nydusd daemon
#[derive(Debug, Parser)]
#[command(name = "nydusctl", version = build::VERSION, max_term_width = 120)]
struct Cli {
    /// Path to the daemon's API socket
    #[arg(short = 'S', long, value_name = "PATH")]
    sock: Option<PathBuf>,

    /// Print JSON as the daemon sends it
    #[arg(short, long, global = true)]
    raw: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows the daemon and what it has mounted
    Info,
    /// Changes the daemon
    Set {
        /// What to change
        #[arg(value_name = "KIND")]
        kind: Kind,
        /// The new value: trace, debug, info, warn, error
        value: String,
    },
    /// Shows counters
    Metrics {
        /// Which
        category: Category,
        /// Show the backend's bandwidth every so many seconds
        #[arg(short = 'I', long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
        interval: Option<u64>,
        /// Mountpoint inside the daemon; without it, all
        #[arg(long, value_name = "MOUNTPOINT")]
        id: Option<String>,
    },
    /// Mounts an image in a running daemon
    Mount {
        /// Path of the bootstrap
        #[arg(short, long)]
        source: String,
        /// Configuration file of the image
        #[arg(short, long)]
        config: PathBuf,
        /// Mountpoint inside the daemon
        #[arg(short, long)]
        mountpoint: String,
        /// Kind of filesystem
        #[arg(short = 't', long = "type", value_parser = ["rafs", "passthrough_fs"])]
        kind: String,
    },
    /// Shows the swarm that a node's nydus-p2p is a member of, or has it forget something
    Swarm {
        /// Where nydus-p2p answers /metrics (`metrics_listen`)
        #[arg(long, global = true, value_name = "ADDRESS", default_value = "127.0.0.1:4002")]
        address: String,
        #[command(subcommand)]
        what: swarm::What,
    },
    /// Unmounts an image
    Umount {
        /// Mountpoint inside the daemon
        #[arg(short, long)]
        mountpoint: String,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    LogLevel,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Category {
    Backend,
    Cache,
    Fsstats,
}

impl Cli {
    /// The daemon's socket: whatever asks a daemon cannot do without.
    fn socket(&self) -> Result<&Path, clap::Error> {
        let missing = "the following required arguments were not provided:\n  --sock <PATH>";
        self.sock.as_deref().ok_or_else(|| Cli::command().error(ErrorKind::MissingRequiredArgument, missing))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "the last word of a program that failed")]
fn complain(error: &anyhow::Error) {
    eprintln!("Error: {error:#}");
}

async fn run(cli: Cli) -> anyhow::Result<()> {
    if let Command::Swarm { address, what } = &cli.command {
        return say(&swarm::run(address, what, cli.raw).await?);
    }
    let client = Client::new(cli.socket().unwrap_or_else(|missing| missing.exit()));
    match cli.command {
        Command::Swarm { .. } => Ok(()),
        Command::Info => {
            let info = client.info().await?;
            say(&if cli.raw { json(&info)? } else { describe(&info) })
        }
        Command::Set { kind: Kind::LogLevel, value } => Ok(client.set_log_level(&value).await?),
        Command::Metrics { category: Category::Backend, interval: Some(seconds), id } => {
            watch(&client, id.as_deref(), Duration::from_secs(seconds)).await
        }
        Command::Metrics { category, interval: None, id } => {
            let ids = match id {
                Some(id) => vec![id],
                None => mountpoints(&client).await?,
            };
            for id in &ids {
                let heading = if ids.len() > 1 && !cli.raw { format!("== {id}\n") } else { String::new() };
                let text = metrics(&client, category, id, cli.raw).await?;
                say(&format!("{heading}{text}"))?;
            }
            Ok(())
        }
        Command::Metrics { .. } => bail!("--interval is for `metrics backend`"),
        Command::Mount { source, config, mountpoint, kind } => {
            let text = std::fs::read_to_string(&config)
                .with_context(|| format!("could not read configuration {}", config.display()))?;
            let request = MountRequest { fs_type: kind, source, config: text, prefetch_files: None };
            client.mount(&mountpoint, &request).await.with_context(|| format!("could not mount at {mountpoint}"))
        }
        Command::Umount { mountpoint } => {
            client.umount(&mountpoint).await.with_context(|| format!("could not unmount {mountpoint}"))
        }
    }
}

/// Prints, and ends quietly if nobody reads.
fn say(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

fn json<T: Serialize>(value: &T) -> anyhow::Result<String> {
    Ok(serde_json::to_string(value)?)
}

async fn mountpoints(client: &Client) -> anyhow::Result<Vec<String>> {
    let all: Vec<String> = client.info().await?.backend_collection.unwrap_or_default().into_keys().collect();
    if all.is_empty() {
        bail!("nothing is mounted in this daemon");
    }
    Ok(all)
}

async fn metrics(client: &Client, category: Category, id: &str, raw: bool) -> anyhow::Result<String> {
    Ok(match category {
        Category::Backend => {
            let metrics = client.backend_metrics(Some(id)).await?;
            if raw { json(&metrics)? } else { backend(&metrics) }
        }
        Category::Cache => {
            let metrics = cache_metrics(client, id).await?;
            if raw { json(&metrics)? } else { cache(&metrics) }
        }
        Category::Fsstats => {
            let metrics = client.fs_metrics(Some(id)).await?;
            if raw { json(&metrics)? } else { filesystem(&metrics) }
        }
    })
}

/// The caches of the program we replace are known by the id of the configuration, ours by the mountpoint as well.
async fn cache_metrics(client: &Client, mountpoint: &str) -> Result<CacheMetrics, ClientError> {
    match client.cache_metrics(Some(mountpoint)).await {
        Err(ClientError::Refused { .. }) => {
            let mounts = client.info().await?.backend_collection.unwrap_or_default();
            let id = mounts.get(mountpoint).and_then(|mount| mount.config["id"].as_str()).map(str::to_owned);
            client.cache_metrics(id.as_deref()).await
        }
        other => other,
    }
}

async fn watch(client: &Client, id: Option<&str>, every: Duration) -> anyhow::Result<()> {
    let id = match id {
        Some(id) => id.to_owned(),
        None => match mountpoints(client).await?.as_slice() {
            [only] => only.clone(),
            several => bail!("several images are mounted: choose one with --id ({})", several.join(", ")),
        },
    };
    let mut last = client.backend_metrics(Some(&id)).await?;
    loop {
        tokio::time::sleep(every).await;
        let now = client.backend_metrics(Some(&id)).await?;
        let bytes = now.read_amount_total.saturating_sub(last.read_amount_total);
        let requests = now.read_count.saturating_sub(last.read_count);
        let errors = now.read_errors.saturating_sub(last.read_errors);
        let rate = bytes / 1024 / every.as_secs().max(1);
        say(&format!("Backend Read Bandwidth: {rate} KB/S   Requests: {requests}   Errors: {errors}"))?;
        last = now;
    }
}

fn describe(info: &DaemonInfo) -> String {
    let mut out = String::new();
    let version = &info.version;
    let _ = writeln!(out, "Version:                {}", version.package_ver);
    let _ = writeln!(out, "Status:                 {}", info.state);
    let _ = writeln!(out, "Profile:                {}", version.profile);
    let _ = write!(out, "Git Commit:             {}", version.git_commit);
    for (mountpoint, mount) in info.backend_collection.iter().flatten() {
        let prefetch = &mount.config["rafs"]["prefetch"];
        let _ = write!(
            out,
            "\n\nInstance Mountpoint:    {mountpoint}\nType:                   {}\nMounted Time:           {}\n\
             Backend:                {}\nPrefetch:               {}",
            mount.backend_type,
            mount.mounted_time,
            mount.config["backend"]["type"].as_str().unwrap_or("-"),
            prefetch["enable"],
        );
    }
    out
}

fn backend(metrics: &BackendMetrics) -> String {
    const SIZES: [&str; 8] = ["<1K", "1K~", "4K~", "16K~", "64K~", "128K~", "512K~", "1M~"];
    let mut out = String::new();
    let _ = writeln!(out, "Backend Type:       {}", metrics.backend_type);
    let megabytes = metrics.read_amount_total / 1024 / 1024;
    let _ = writeln!(out, "Read Amount:        {} Bytes ({megabytes} MB)", metrics.read_amount_total);
    let _ = writeln!(out, "Read Count:         {}", metrics.read_count);
    let _ = writeln!(out, "Read Errors:        {}\n", metrics.read_errors);
    let counts = &metrics.read_count_block_size_dist;
    let average: Vec<u64> = metrics
        .read_cumulative_latency_millis_dist
        .iter()
        .zip(counts)
        .map(|(millis, count)| millis.checked_div(*count).unwrap_or(0))
        .collect();
    row(&mut out, "Block Sizes:", SIZES);
    row(&mut out, "Average Latency(millis):", average);
    row(&mut out, "Request Count:", counts);
    out.truncate(out.trim_end().len());
    out
}

fn cache(metrics: &CacheMetrics) -> String {
    format!(
        "Partial Hits:               {}\nWhole Hits:                 {}\nTotal Read:                 {}\n\
         Directory:                  {}\nFiles:                      {}\nChunks Cached:              {}\n\
         Prefetch Workers:           {}\nPrefetch Amount:            {} KB\nPrefetch Requests:          {}",
        metrics.partial_hits,
        metrics.whole_hits,
        metrics.total,
        metrics.store_path,
        metrics.underlying_files.join(" "),
        metrics.entries_count,
        metrics.prefetch_workers,
        metrics.prefetch_data_amount / 1024,
        metrics.prefetch_requests_count,
    )
}

fn filesystem(metrics: &FsMetrics) -> String {
    const PERIODS: [&str; 8] = ["<200us", "~1ms", "~20ms", "~50ms", "~500ms", "~1s", "~2s", "2s~"];
    const OPERATIONS: [&str; 15] = [
        "Getattr",
        "Readlink",
        "Open",
        "Release",
        "Read",
        "Statfs",
        "Getxattr",
        "Listxattr",
        "Opendir",
        "Lookup",
        "Readdir",
        "Readdirplus",
        "Access",
        "Forget",
        "BatchForget",
    ];
    let mut out = String::new();
    row(&mut out, "Read Latency:", PERIODS);
    row(&mut out, "Reads Count:", metrics.read_latency_dist);
    let _ = writeln!(out, "\nRead Errors: {}", metrics.fop_errors[4]);
    let _ =
        writeln!(out, "Read Data: {}Bytes ({}MB)\n\nFOP Counters:", metrics.data_read, metrics.data_read / 1024 / 1024);
    let counters: Vec<String> =
        OPERATIONS.iter().zip(metrics.fop_hits).map(|(name, hits)| format!("{name}({hits})")).collect();
    let _ = write!(out, "{}", counters.join(" "));
    out
}

fn row<T: std::fmt::Display>(out: &mut String, name: &str, cells: impl IntoIterator<Item = T>) {
    let _ = write!(out, "{name:<25}");
    for cell in cells {
        let _ = write!(out, "{cell:<8}");
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_the_known_one() {
        Cli::command().debug_assert();
        for line in [
            "nydusctl -S /s info",
            "nydusctl --sock /s -r info",
            "nydusctl -S /s info --raw",
            "nydusctl -S /s set log-level debug",
            "nydusctl -S /s metrics backend -I 2",
            "nydusctl -S /s metrics fsstats --id /1",
            "nydusctl -S /s mount -s /b -c /c -m /m -t rafs",
            "nydusctl -S /s umount -m /m",
        ] {
            Cli::try_parse_from(line.split_whitespace()).unwrap().socket().unwrap();
        }
        let without = Cli::try_parse_from(["nydusctl", "info"]).unwrap();
        assert!(without.socket().is_err(), "the socket is required");
        Cli::try_parse_from(["nydusctl", "swarm", "status"]).unwrap();
    }
}
