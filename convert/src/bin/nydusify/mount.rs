//! `nydusify mount`: its flags, and the request that they make.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use nydus_backend::Credential;
use nydus_backend::registry::Reference;
use nydus_convert::nydusify::fetch::Wanted;
use nydus_convert::nydusify::mount::{self, Request};
use nydus_convert::oci::Platform;
use tokio::signal::unix::{SignalKind, signal};

use crate::side::{Side, WorkDir, explained};

#[derive(Debug, Args)]
pub(crate) struct Mount {
    /// Image to mount
    #[arg(long, env = "TARGET")]
    target: Reference,
    /// Do not check the certificate of the registry; plain HTTP is tried as well
    #[arg(long, env = "TARGET_INSECURE")]
    target_insecure: bool,
    /// Fetch what is not read yet in the background
    #[arg(long, env = "PREFETCH")]
    prefetch: bool,
    /// Where the files shall appear
    #[arg(long, env = "MOUNT_PATH", default_value = "./image-fs")]
    mount_path: PathBuf,
    /// Mount the image of an index for this platform [default: this machine's]
    #[arg(long)]
    platform: Vec<Platform>,
    /// Directory for metadata and cache; what is made in it goes at the end
    #[arg(long, env = "WORK_DIR", default_value = "./tmp")]
    work_dir: PathBuf,
    /// The nydusd program [default: beside this program, else on PATH]
    #[arg(long, env = "NYDUSD")]
    nydusd: Option<PathBuf>,
    #[arg(long, hide = true)]
    backend_type: Option<String>,
    #[arg(long, hide = true)]
    backend_config: Option<String>,
    #[arg(long, hide = true)]
    backend_config_file: Option<String>,
}

pub(crate) async fn run(flags: &Mount) -> anyhow::Result<()> {
    if [&flags.backend_type, &flags.backend_config, &flags.backend_config_file].into_iter().any(|flag| flag.is_some()) {
        bail!("storage backends are not supported yet: mount images whose blobs are in the registry");
    }
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join("nydusd")));
    let nydusd =
        flags.nydusd.clone().or_else(|| beside.filter(|path| path.is_file())).unwrap_or_else(|| "nydusd".into());
    let target = Side { name: flags.target.clone(), archive: None, insecure: flags.target_insecure, plain_http: false };
    let registry = flags.target.registry().to_owned();
    let credential = tokio::task::spawn_blocking(move || Credential::from_docker_config(&registry));
    let work_dir = WorkDir::make(&flags.work_dir).context("--work-dir")?;
    let own = tempfile::Builder::new().prefix("nydusify-mount-").tempdir_in(&work_dir.path).context("--work-dir")?;
    let request = Request {
        place: target.target().await.context("--target")?,
        target: target.name.clone(),
        wanted: Wanted::of(false, &flags.platform),
        mount_path: flags.mount_path.clone(),
        prefetch: flags.prefetch,
        insecure: flags.target_insecure,
        credential: credential.await.context("reading the docker configuration stopped")??,
        work_dir: std::path::absolute(own.path()).context("--work-dir")?,
        nydusd,
    };
    let mut terminate = signal(SignalKind::terminate()).context("catching SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("catching SIGINT")?;
    let enough = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let mounted = mount::mount(&request, enough).await;
    mounted.map_err(|error| explained(error, &[&target])).with_context(|| format!("mounting {}", flags.target))
}
