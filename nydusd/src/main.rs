//! `nydusd`: reads the command line, starts a daemon and waits for its end.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use nydusd::api::server;
use nydusd::backend_source::{BACKEND_SOURCE, BackendSource};
use nydusd::cli::{self, Asked, Invocation};
use nydusd::config;
use nydusd::daemon::{Daemon, Ending, Settings};
use nydusd::fuse::filesystem::Mode;
use nydusd::fuse::session;
use nydusd::instance::Spec;
use nydusd::{crashed, limits, log};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let invocation = match cli::parse(std::env::args_os()) {
        Ok(Asked::Fuse(invocation)) => invocation,
        Ok(Asked::Unsupported(name)) => {
            say(&format!(
                "Error: `nydusd {name}` is not supported: this daemon serves images over FUSE (`nydusd fuse`)"
            ));
            return ExitCode::FAILURE;
        }
        Err(error) => error.exit(),
    };
    match start(&invocation) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if invocation.global.log_file.is_some() {
                tracing::error!("could not start: {}", told(&error));
            }
            say(&format!("Error: {}", told(&error)));
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "the last word of a program that could not start")]
fn say(text: &str) {
    eprintln!("{text}");
}

/// Tells an error with its causes, each once: some have said already what their cause says.
fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn start(invocation: &Invocation) -> anyhow::Result<()> {
    limits::hoard_less_memory();
    let global = &invocation.global;
    let log =
        log::init(&global.log_level, global.log_file.as_deref(), global.log_rotation_size).with_context(|| {
            let file = global.log_file.as_deref().unwrap_or(Path::new("stderr"));
            format!("could not open log file {}", log::with_extension(file).display())
        })?;
    limits::raise_open_files(global.rlimit_nofile);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("nydusd")
        .enable_all()
        .build()
        .context("could not start the async runtime")?;
    let result = runtime.block_on(serve(invocation, log));
    // The runtime is left to the end of the process. Threads that serve the kernel may still wait on it; shut down under
    // them it would make them panic, and waiting for them could take until their deadline.
    std::mem::forget(runtime);
    result
}

async fn serve(invocation: &Invocation, log: log::LevelControl) -> anyhow::Result<()> {
    let (global, fuse) = (&invocation.global, &invocation.fuse);
    if fuse.shared_dir.is_some() {
        bail!("--shared-dir is not supported: this daemon serves images (use --bootstrap)");
    }
    if fuse.writable {
        bail!("--writable is not supported: images are read-only (put overlayfs above the mount)");
    }
    if fuse.dedup_db.is_some() {
        tracing::warn!("--dedup-db is ignored: blobs are shared by their digests in the cache directory");
    }
    let crashed = crashed::detect(&invocation.mountpoint, global.apisock.as_deref());
    if crashed && global.supervisor.is_none() && !global.upgrade {
        tracing::warn!(mountpoint = %invocation.mountpoint.display(), "a dead mount was left here: detaching it");
        crashed::clear(&invocation.mountpoint);
    }
    let wait_for_takeover = global.upgrade || (crashed && global.supervisor.is_some());
    let mountpoint = if wait_for_takeover {
        invocation.mountpoint.clone()
    } else {
        let mountpoint = invocation.mountpoint.canonicalize();
        let mountpoint =
            mountpoint.with_context(|| format!("could not use mountpoint {}", invocation.mountpoint.display()))?;
        if !mountpoint.is_dir() {
            bail!("could not use mountpoint {}: it is not a directory", mountpoint.display());
        }
        mountpoint
    };
    let single = fuse.bootstrap.is_some() && fuse.virtual_mountpoint == "/";
    let daemon = Daemon::new(
        Settings {
            id: global.id.clone(),
            supervisor: global.supervisor.clone(),
            backend_source: backend_source(global)?,
            session: session::Options {
                mountpoint,
                threads: fuse.fuse_threads as usize,
                mode: if single { Mode::Single } else { Mode::Shared },
            },
            log,
        },
        tokio::runtime::Handle::current(),
    );
    let mut terminate = signal(SignalKind::terminate()).context("could not watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("could not watch for SIGINT")?;
    if !wait_for_takeover {
        if let Some(spec) = commanded(invocation)? {
            let daemon = daemon.clone();
            let mounted = tokio::task::spawn_blocking(move || daemon.mount(spec)).await?;
            mounted.with_context(|| match &global.config {
                Some(path) => format!("could not mount the image with configuration {}", path.display()),
                None => "could not mount the image".to_owned(),
            })?;
        }
        daemon.run()?;
        let tuned = daemon.clone();
        tokio::task::spawn_blocking(move || tuned.tune());
    }
    let api = match &global.apisock {
        Some(path) => Some(server::serve(path, daemon.clone())?),
        None => None,
    };
    tracing::info!(state = %daemon.info(false).state, mountpoint = %invocation.mountpoint.display(), "nydusd is up");
    let watched = daemon.clone();
    let signals = tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
        watched.end(Ending::Stop);
    });
    daemon.ended().await;
    signals.abort();
    if let Some(api) = api {
        api.close().await;
    }
    tracing::info!("nydusd ends");
    Ok(())
}

/// Returns who knows the current pull credential. A snapshotter names itself in the environment, which a daemon that does
/// not know the flag passes over.
fn backend_source(global: &cli::Global) -> anyhow::Result<Option<BackendSource>> {
    match std::env::var(BACKEND_SOURCE) {
        Ok(text) if global.backend_source.is_none() && !text.is_empty() => {
            text.parse().map(Some).with_context(|| format!("could not use the environment variable {BACKEND_SOURCE}"))
        }
        _ => Ok(global.backend_source.clone()),
    }
}

/// Returns what the command line says to mount.
fn commanded(invocation: &Invocation) -> anyhow::Result<Option<Spec>> {
    let (global, fuse) = (&invocation.global, &invocation.fuse);
    let Some(bootstrap) = &fuse.bootstrap else {
        return Ok(None);
    };
    let parsed = match (&global.config, &fuse.localfs_dir) {
        (Some(path), _) => {
            let mut template =
                config::Template::load(path).with_context(|| format!("could not use {}", path.display()))?;
            // A pull secret that must not be in a file.
            if let Ok(auth) = std::env::var("IMAGE_PULL_AUTH")
                && template.backend_kind() == "registry"
            {
                template.set_backend("auth", auth);
            }
            template.resolve().with_context(|| format!("could not use {}", path.display()))?
        }
        (None, Some(dir)) => config::Parsed { config: config::Config::localfs(dir)?, ignored: Vec::new() },
        (None, None) => bail!("both --config and --localfs-dir are missing"),
    };
    parsed.warn();
    let prefetch_files = match &fuse.prefetch_files {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("could not read --prefetch-files {}", path.display()))?;
            Some(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
        }
    };
    let mountpoint = fuse.virtual_mountpoint.clone();
    Ok(Some(Spec { mountpoint, source: bootstrap.clone(), config: parsed.config, prefetch_files }))
}
