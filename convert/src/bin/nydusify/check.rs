//! `nydusify check`: its flags, and the request that they make.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use nydus_backend::registry::Reference;
use nydus_convert::nydusify::check::{self, Request, Verdict};
use nydus_convert::nydusify::fetch::Wanted;
use nydus_convert::nydusify::progress::Progress;
use nydus_convert::oci::Platform;

use crate::side::{Side, WorkDir, explained};

#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Image to check
    #[arg(long, env = "TARGET")]
    target: Reference,
    /// Original image to compare it with
    #[arg(long, env = "SOURCE")]
    source: Option<Reference>,
    /// Do not check the certificate of the target's registry; plain HTTP is tried as well
    #[arg(long, env = "TARGET_INSECURE")]
    target_insecure: bool,
    /// Do not check the certificate of the source's registry; plain HTTP is tried as well
    #[arg(long, env = "SOURCE_INSECURE")]
    source_insecure: bool,
    /// Check the image of an index for this platform [default: this machine's]
    #[arg(long)]
    platform: Vec<Platform>,
    #[arg(long, hide = true)]
    multi_platform: bool,
    /// Directory for temporary files; made and removed again if it does not exist
    #[arg(long, env = "WORK_DIR", default_value = "./output")]
    work_dir: PathBuf,
    #[arg(long, env = "NYDUS_IMAGE", hide = true)]
    nydus_image: Option<PathBuf>,
    #[arg(long, env = "NYDUSD", hide = true)]
    nydusd: Option<PathBuf>,
    #[arg(long, hide = true)]
    source_backend_type: Option<String>,
    #[arg(long, hide = true)]
    source_backend_config: Option<String>,
    #[arg(long, hide = true)]
    target_backend_type: Option<String>,
    #[arg(long, hide = true)]
    target_backend_config: Option<String>,
}

pub(crate) async fn run(flags: &Check, progress: &Progress) -> anyhow::Result<()> {
    let backends = [
        &flags.source_backend_type,
        &flags.source_backend_config,
        &flags.target_backend_type,
        &flags.target_backend_config,
    ];
    if backends.into_iter().any(Option::is_some) {
        bail!("storage backends are not supported yet: check images whose blobs are in the registry");
    }
    let side = |name: &Reference, insecure| Side { name: name.clone(), archive: None, insecure, plain_http: false };
    let target = side(&flags.target, flags.target_insecure);
    let source = flags.source.as_ref().map(|name| side(name, flags.source_insecure));
    let work_dir = WorkDir::make(&flags.work_dir).context("--work-dir")?;
    let request = Request {
        place: target.target().await.context("--target")?,
        target: target.name.clone(),
        source: match &source {
            Some(source) => Some((source.target().await.context("--source")?, source.name.clone())),
            None => None,
        },
        wanted: Wanted::of(false, &flags.platform),
        work_dir: work_dir.path.clone(),
    };
    let checked = check::check(&request, progress).await;
    let sides: Vec<&Side> = [Some(&target), source.as_ref()].into_iter().flatten().collect();
    match checked.map_err(|error| explained(error, &sides)).with_context(|| format!("checking {}", flags.target))? {
        Verdict::Plain => {
            tracing::info!(image = %flags.target, "it is a plain image: nothing is to be checked");
        }
        Verdict::Sound => {
            tracing::info!(image = %flags.target, "verified image: manifest and bootstrap");
        }
        Verdict::Same(entries) => {
            tracing::info!(image = %flags.target, entries, "verified image: it equals the source");
        }
    }
    Ok(())
}
