//! Puts the parts together and serves until told to stop.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nydusd::config::Template;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;

use crate::authority::Connection;
use crate::cache::Cache;
use crate::config::{Config, find_program};
use crate::daemons::{self, Daemons};
use crate::estargz::Indexer;
use crate::grpc::Service;
use crate::image_service::ImageService;
use crate::keychain::Keychain;
use crate::layout::Layout;
use crate::meta::Meta;
use crate::metrics::Metrics;
use crate::overlay;
use crate::server::{self, SocketOwner};
use crate::snapshots::Snapshots;
use crate::system_api::{self, Sources};

/// How long calls under way may take after we were told to stop. systemd kills after 90 s.
const FINISH_LIMIT: Duration = Duration::from_secs(25);

/// Serves with this configuration until SIGTERM or SIGINT.
///
/// # Errors
/// When something is missing or in the way; nothing is half started then.
pub async fn serve(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("catching SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catching SIGINT")?;

    let layout = Layout::new(&config.root);
    refuse_foreign_root(&config.root)?;
    for directory in [config.root.clone(), layout.snapshots()] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .with_context(|| format!("creating {}", directory.display()))?;
    }
    let template = Template::load(&config.template).with_context(|| {
        format!("loading the template for nydusd, {} (name another with --nydusd-config)", config.template.display())
    })?;
    for key in template.resolve().context("reading the template for nydusd")?.ignored {
        tracing::warn!(key, file = %config.template.display(), "the template has a key that nydusd does not know");
    }
    let nydusd = nydusd(&config)?;
    let meta = Arc::new(Meta::open(&layout.records()).context("opening the snapshot records")?);

    let (work_dir, ours) = work_dir(&config, &template, &layout);
    let keychain = Keychain::default();
    let settings = daemons::Settings {
        nydusd,
        mode: config.mode,
        recovery: config.recovery,
        threads: config.threads,
        log_level: config.log_level.to_string().to_lowercase(),
        log_rotation: config.log_rotation,
        end_on_close: config.end_on_close,
        work_dir: work_dir.clone(),
        skip_verify: config.skip_verify,
        keychain: keychain.clone(),
    };
    let indexer = indexer(&config, &template, &layout, &work_dir, &keychain)?;
    let daemons = Daemons::new(layout.clone(), settings, template, meta.clone());
    // Everything that may be in the way is found before a nydusd is started or touched.
    let metrics_listener = match &config.metrics {
        Some(address) => Some(
            tokio::net::TcpListener::bind(address)
                .await
                .with_context(|| format!("listening on {address:?}, the value of metrics.address (host:port)"))?,
        ),
        None => None,
    };
    let system_listener = match &config.system {
        Some((address, owner)) => Some(server::bind(address, *owner).await.context("serving system.address")?),
        None => None,
    };
    // Before any nydusd starts: its first read may be refused.
    let own = server::bind(&layout.own_socket(), SocketOwner::default()).await?;
    tokio::spawn(axum::serve(own, system_api::private(daemons.clone())).into_future());
    daemons.recover().await;

    let cache = Arc::new(Cache::new(work_dir, ours));
    let metrics = Arc::new(Metrics::default());
    let snapshots = Snapshots::new(
        meta.clone(),
        layout.clone(),
        overlay::probe(),
        config.volatile,
        daemons.clone(),
        cache.clone(),
        indexer,
    );
    if let Err(error) = snapshots.cleanup().await {
        tracing::warn!(error = error.full_text(), "what the last run left was not cleaned up");
    }

    let sources = Sources { daemons: daemons.clone(), meta, layout, metrics: metrics.clone(), cache };
    if let Some(listener) = metrics_listener {
        tokio::spawn(axum::serve(listener, system_api::metrics(sources.clone())).into_future());
    }
    if let Some(listener) = system_listener {
        tokio::spawn(axum::serve(listener, system_api::system(sources)).into_future());
    }

    let listener = server::bind(&config.address, config.owner).await?;
    let service = containerd_snapshots::server(Arc::new(Service::new(snapshots, metrics)));
    tracing::info!(address = %config.address.display(), root = %config.root.display(), "serving");
    if let Some(address) = std::env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())
        && let Err(error) = crate::notify::send(&address, "READY=1")
    {
        // Containers are worth more than a tidy start: the service manager will say that it waits in vain.
        tracing::warn!(%error, "the service manager was not told that we are ready");
    }

    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let v1 = config.image_service.clone().map(|socket| ImageService::<false>::new(socket, keychain.clone()));
    let alpha = config.image_service.clone().map(|socket| ImageService::<true>::new(socket, keychain));
    let router = tonic::transport::Server::builder().add_service(service);
    let server = router.add_optional_service(v1).add_optional_service(alpha).serve_with_incoming_shutdown(
        UnixListenerStream::new(listener).map(|accepted| accepted.map(Connection::new)),
        async {
            // A sender that is gone means stop as well.
            drop(stopped.await);
        },
    );
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => {
            ended.context("serving containerd")?;
            bail!("the server ended without being told to");
        }
        _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
        _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
    }
    drop(stop);
    // containerd keeps its connection, so only calls under way are waited for.
    if tokio::time::timeout(FINISH_LIMIT, server).await.is_err() {
        tracing::warn!("calls under way did not end in time");
    }
    daemons.close().await;
    if let Err(error) = fs::remove_file(&config.address) {
        tracing::debug!(%error, "the socket is still there");
    }
    tracing::info!("stopped");
    Ok(())
}

/// The replaced program keeps its records in another form, and its snapshots have the same places as ours.
fn refuse_foreign_root(root: &Path) -> Result<()> {
    for file in ["metadata.db", "nydus.db"] {
        let path = root.join(file);
        if path.exists() {
            bail!(
                "{} belongs to the Go nydus-snapshotter, whose records cannot be taken over: choose an empty directory with --root, or remove the images of that snapshotter, stop it and move {} away",
                path.display(),
                root.display()
            );
        }
    }
    Ok(())
}

fn nydusd(config: &Config) -> Result<PathBuf> {
    let name = config.nydusd.clone().unwrap_or_else(|| PathBuf::from("nydusd"));
    let own = std::env::current_exe().ok();
    let search = std::env::var_os("PATH");
    find_program(&name, own.as_deref(), search.as_deref()).with_context(|| {
        format!("finding the program {} beside this one or on PATH (name it with --nydusd)", name.display())
    })
}

/// What reads eStargz layers lazily, unless the operator does not want that.
fn indexer(
    config: &Config,
    template: &Template,
    layout: &Layout,
    work_dir: &Path,
    keychain: &Keychain,
) -> Result<Option<Indexer>> {
    if !config.estargz {
        return Ok(None);
    }
    let scratch = layout.index();
    if let Err(error) = fs::remove_dir_all(&scratch)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error).with_context(|| format!("clearing {}", scratch.display()));
    }
    let name = config.nydus_image.clone().unwrap_or_else(|| PathBuf::from("nydus-image"));
    let own = std::env::current_exe().ok();
    let builder = find_program(&name, own.as_deref(), std::env::var_os("PATH").as_deref());
    if builder.is_none() && config.nydus_image.is_some() {
        tracing::warn!(program = %name.display(), "not found: eStargz layers will be unpacked");
    }
    Ok(Some(Indexer {
        builder,
        template: template.clone(),
        work_dir: work_dir.to_owned(),
        skip_verify: config.skip_verify,
        keychain: keychain.clone(),
        scratch,
    }))
}

/// Where blobs are cached, and whether nobody else caches there.
fn work_dir(config: &Config, template: &Template, layout: &Layout) -> (PathBuf, bool) {
    let named = config.cache.clone().or_else(|| {
        let named = template.work_dir().filter(|dir| !dir.is_empty() && *dir != ".");
        named.map(PathBuf::from)
    });
    let directory = named.unwrap_or_else(|| layout.cache());
    let ours = directory.starts_with(layout.root());
    (directory, ours)
}
