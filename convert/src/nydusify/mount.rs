//! `nydusify mount`: an image's files, served by a nydusd of its own until somebody has seen enough.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use nydus_backend::Credential;
use nydus_backend::registry::Reference;
use serde_json::json;

use super::check;
use super::fetch::{self, Wanted};
use super::place::Place;
use super::readback;

/// How long nydusd may take to end after it was asked to.
const END_LIMIT: Duration = Duration::from_secs(10);

/// What to mount, and how.
#[derive(Debug)]
pub struct Request {
    /// Where the image lies: a repository.
    pub place: Place,
    /// Its name there.
    pub target: Reference,
    /// Which image of an index.
    pub wanted: Wanted,
    /// Where its files shall appear.
    pub mount_path: PathBuf,
    /// Whether nydusd fetches what is not asked for yet.
    pub prefetch: bool,
    /// Whether certificates go unchecked.
    pub insecure: bool,
    /// Who we are there.
    pub credential: Credential,
    /// A directory for the bootstrap and the cache.
    pub work_dir: PathBuf,
    /// The program.
    pub nydusd: PathBuf,
}

/// Mounts, and waits until `enough`.
///
/// # Errors
///
/// If the image cannot be read or mounted, or nydusd ends by itself.
pub async fn mount(request: &Request, enough: impl Future<Output = ()>) -> anyhow::Result<()> {
    let Place::Repository { client, name } = &request.place else { bail!("an image is mounted from a registry") };
    let (found, _) = fetch::manifests(&request.place, request.target.target(), &request.wanted, true)
        .await
        .with_context(|| format!("reading {}", request.target))?;
    let bootstrap = found.iter().find_map(check::nydus);
    let bootstrap = bootstrap.with_context(|| format!("{} is not a nydus image", request.target))?;
    let bytes = readback::bootstrap_bytes(&request.place, bootstrap).await.context("the bootstrap cannot be read")?;
    let (boot, config) = (request.work_dir.join("image.boot"), request.work_dir.join("nydusd.json"));
    let plain = client.is_plain().await.with_context(|| format!("asking {}", client.host()))?;
    let auth = request.credential.basic_header();
    let backend = json!({
        "scheme": if plain { "http" } else { "https" }, "host": client.host(), "repo": name,
        "skip_verify": request.insecure, "auth": auth.as_deref().map(|header| header.trim_start_matches("Basic ")),
    });
    let document = json!({
        "device": {
            "backend": {"type": "registry", "config": backend},
            "cache": {"type": "blobcache", "config": {"work_dir": request.work_dir.join("cache")}},
        },
        "mode": "direct", "digest_validate": true, "enable_xattr": true,
        "fs_prefetch": {"enable": request.prefetch, "threads_count": 10},
    });
    private(&config, document.to_string().as_bytes())?;
    private(&boot, &bytes)?;
    std::fs::create_dir_all(&request.mount_path)
        .with_context(|| format!("making the directory {}", request.mount_path.display()))?;

    let mut nydusd = tokio::process::Command::new(&request.nydusd);
    nydusd.arg("fuse").arg("--config").arg(&config).arg("--bootstrap").arg(&boot);
    nydusd.arg("--mountpoint").arg(&request.mount_path).arg("--log-level").arg("warn").stdin(Stdio::null());
    // What ends this program from the terminal would end nydusd at the same time, before it is waited for.
    let mut nydusd = nydusd
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting {}", request.nydusd.display()))?;
    tracing::info!(image = %request.target, path = %request.mount_path.display(), "mounting until interrupted");
    tokio::select! {
        ended = nydusd.wait() => {
            bail!("nydusd ended with {}: what it says is above", ended.context("waiting for nydusd")?);
        }
        () = enough => {}
    }
    if let Some(pid) = nydusd.id().and_then(|pid| i32::try_from(pid).ok()) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)
            .context("ending nydusd")?;
    }
    let ended = tokio::time::timeout(END_LIMIT, nydusd.wait()).await;
    ended.context("nydusd does not end: somebody uses the mount")?.context("waiting for nydusd")?;
    Ok(())
}

/// Writes a file for our eyes only: the configuration holds the credential.
fn private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(bytes)).with_context(|| format!("writing {}", path.display()))
}
