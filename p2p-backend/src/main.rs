//! The daemon `nydus-p2p`: the mirror of a node.
#![forbid(unsafe_code)]

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use nydus_backend::mirror::config::{DEFAULT_PATH, parse_size};
use nydus_backend::mirror::{Config, Mirror};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Serves blobs and manifests of registries to this node from a cache of pieces, each fetched once.
#[derive(Debug, Parser)]
#[command(name = "nydus-p2p", version)]
struct Flags {
    /// TOML file with the configuration [default: /etc/nydus/nydus-p2p.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address for registry requests
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Address for /healthy
    #[arg(long, value_name = "ADDRESS")]
    health_listen: Option<SocketAddr>,
    /// Address for /metrics
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Directory of the cache
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Bytes of the cache, such as 20GiB
    #[arg(long, value_name = "SIZE", value_parser = quota)]
    quota: Option<u64>,
    /// error, warn, info, debug, trace, or a filter
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Check the configuration and exit
    #[arg(long)]
    check_config: bool,
}

fn quota(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "give a size such as 512MiB or 20GiB".into())
}

impl Flags {
    fn resolve(&self) -> anyhow::Result<Config> {
        let config = match &self.config {
            Some(path) => Config::load(path),
            None if Path::new(DEFAULT_PATH).exists() => Config::load(Path::new(DEFAULT_PATH)),
            None => Ok(Config::default()),
        };
        let mut config = config.context("loading the configuration")?;
        let own = |slot: &mut SocketAddr, flag: Option<SocketAddr>| *slot = flag.unwrap_or(*slot);
        own(&mut config.listen, self.listen);
        own(&mut config.health_listen, self.health_listen);
        own(&mut config.metrics_listen, self.metrics_listen);
        config.quota = self.quota.unwrap_or(config.quota);
        if let Some(dir) = &self.data_dir {
            config.data_dir = std::path::absolute(dir).context("--data-dir")?;
        }
        if let Some(level) = &self.log_level {
            config.log_level.clone_from(level);
        }
        config.checked().context("checking the configuration")
    }
}

#[expect(clippy::print_stderr, reason = "the last word of a program that could not start")]
fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nydus-p2p: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let config = flags.resolve()?;
    if flags.check_config {
        writeln!(std::io::stdout(), "the configuration is good")?;
        return Ok(());
    }
    // That a certificate is wrong is told by us, with the name of whose it is.
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log_level)?;
    tracing_subscriber::fmt()
        .with_env_filter(
            filter.add_directive("rustls_platform_verifier=off".parse()?).add_directive("libp2p_swarm=warn".parse()?),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    raise_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(serve(config)).context("could not run the mirror")
}

/// Two files per cached blob and one per connection outgrow the usual soft limit.
fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "could not raise the limit of open files");
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let registries: Vec<String> = config.registries.iter().map(|registry| registry.name.clone()).collect();
    let mirrors: Vec<String> = config.mirrors.iter().map(|mirror| mirror.url.to_string()).collect();
    let data_dir = config.data_dir.display().to_string();
    let mirror = Mirror::open(config).await?;
    let [listen, health, metrics] =
        mirror.addresses().map(|address| address.map_or_else(String::new, |address| address.to_string()));
    let swarm = mirror.swarm_address().map_or_else(String::new, |address| address.to_string());
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        ?listen,
        ?health,
        ?metrics,
        ?swarm,
        data_dir,
        registries = registries.join(","),
        mirrors = mirrors.join(","),
        "nydus-p2p is ready"
    );
    let quit = CancellationToken::new();
    let running = tokio::spawn(mirror.run(quit.clone()));
    let name = tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    };
    tracing::info!(signal = name, "stopping");
    quit.cancel();
    running.await?;
    Ok(())
}
