//! `nydusify copy`: its flags, and the request that they make.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use nydus_backend::registry::Reference;
use nydus_convert::nydusify::copy::{self, Request};
use nydus_convert::nydusify::fetch::Wanted;
use nydus_convert::nydusify::progress::Progress;
use nydus_convert::oci::Platform;

use crate::side::{Side, WorkDir, explained};

#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// Source image, or an archive or OCI layout directory as `file:///PATH`
    #[arg(long, env = "SOURCE")]
    source: String,
    /// Target image, or an archive or OCI layout directory as `file:///PATH`
    #[arg(long, env = "TARGET")]
    target: String,
    /// Do not check the certificate of the source's registry; plain HTTP is tried as well
    #[arg(long, env = "SOURCE_INSECURE")]
    source_insecure: bool,
    /// Do not check the certificate of the target's registry; plain HTTP is tried as well
    #[arg(long, env = "TARGET_INSECURE")]
    target_insecure: bool,
    /// Copy these platforms of an index, for example linux/amd64,linux/arm64 [default: this machine's]
    #[arg(long, value_delimiter = ',', conflicts_with = "all_platforms")]
    platform: Vec<Platform>,
    /// Copy all platforms of an index
    #[arg(long)]
    all_platforms: bool,
    /// Directory for temporary files; made and removed again if it does not exist
    #[arg(long, env = "WORK_DIR", default_value = "./tmp")]
    work_dir: PathBuf,
    #[arg(long, env = "NYDUS_IMAGE", hide = true)]
    nydus_image: Option<PathBuf>,
    #[arg(long, hide = true)]
    push_chunk_size: Option<String>,
}

/// Reads `file:///PATH` or an image's name; a file's image is called as the other side's.
fn side(text: &str, other: &str, insecure: bool) -> anyhow::Result<Side> {
    let (name, archive) = match text.strip_prefix("file://") {
        Some(path) => (other.strip_prefix("file://").map_or(other, |_| "image"), Some(PathBuf::from(path))),
        None => (text, None),
    };
    let name: Reference = name.parse()?;
    Ok(Side { name, archive, insecure, plain_http: false })
}

pub(crate) async fn run(flags: &Copy, progress: &Progress) -> anyhow::Result<()> {
    for (flag, given) in
        [("--nydus-image", flags.nydus_image.is_some()), ("--push-chunk-size", flags.push_chunk_size.is_some())]
    {
        if given {
            tracing::warn!(
                "{flag} has no effect: nothing is built, and blobs go in parts where a registry wants them so"
            );
        }
    }
    let source = side(&flags.source, &flags.target, flags.source_insecure).context("--source")?;
    let target = side(&flags.target, &flags.source, flags.target_insecure).context("--target")?;
    let work_dir = WorkDir::make(&flags.work_dir).context("--work-dir")?;
    let request = Request {
        origin: source.source(&work_dir.path).await.context("--source")?,
        destination: target.target().await.context("--target")?,
        source: source.name.clone(),
        target: target.name.clone(),
        wanted: Wanted::of(flags.all_platforms, &flags.platform),
        work_dir: work_dir.path.clone(),
    };
    let copied = copy::copy(&request, progress).await;
    let digest = copied
        .map_err(|error| explained(error, &[&source, &target]))
        .with_context(|| format!("copying {} to {}", flags.source, flags.target))?;
    tracing::info!(target_image = %flags.target, digest, "copied");
    Ok(())
}
