//! `nydusify convert`: its flags, and the request that they make.

use std::fs::Permissions;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use nydus_backend::registry::Reference;
use nydus_convert::chunk_size::{BatchSize, ChunkSize};
use nydus_convert::nydusify::convert::{self, Metrics, Request};
use nydus_convert::nydusify::fetch::Wanted;
use nydus_convert::nydusify::known::{Known, Named};
use nydus_convert::nydusify::progress::Progress;
use nydus_convert::oci::Platform;
use nydus_convert::pack::Recipe;
use nydus_convert::prefetch;
use nydus_rafs::{Algorithm, Compressor, Version};
use tempfile::NamedTempFile;

use crate::side::{Side, WorkDir, explained};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Compression {
    None,
    Lz4Block,
    Zstd,
}

#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// Source image
    #[arg(long, env = "SOURCE")]
    source: String,
    /// Target image
    #[arg(long, env = "TARGET", conflicts_with = "target_suffix", required_unless_present = "target_suffix")]
    target: Option<String>,
    /// Name the target like the source, with this added to the tag
    #[arg(long, env = "TARGET_SUFFIX", allow_hyphen_values = true)]
    target_suffix: Option<String>,
    /// Read the source image from this archive or OCI layout directory; --source says which, and what to call it
    #[arg(long, env = "SOURCE_ARCHIVE")]
    source_archive: Option<PathBuf>,
    /// Write the target image to this archive, or to this OCI layout directory (one that exists, or ends in `/`)
    #[arg(long, env = "TARGET_ARCHIVE")]
    target_archive: Option<PathBuf>,
    /// Do not check the certificate of the source's registry; plain HTTP is tried as well
    #[arg(long, env = "SOURCE_INSECURE")]
    source_insecure: bool,
    /// Do not check the certificate of the target's registry; plain HTTP is tried as well
    #[arg(long, env = "TARGET_INSECURE")]
    target_insecure: bool,
    /// Speak plain HTTP to both registries
    #[arg(long, env = "PLAIN_HTTP")]
    plain_http: bool,
    /// Convert these platforms of an index, for example linux/amd64,linux/arm64 [default: this machine's]
    #[arg(long, value_delimiter = ',', conflicts_with = "all_platforms")]
    platform: Vec<Platform>,
    /// Convert all platforms of an index
    #[arg(long)]
    all_platforms: bool,
    /// Directory for temporary files; made and removed again if it does not exist
    #[arg(long, env = "WORK_DIR", default_value = "./tmp")]
    work_dir: PathBuf,
    /// RAFS version
    #[arg(long, env = "FS_VERSION", default_value = "6", value_parser = ["5", "6"])]
    fs_version: String,
    /// How chunks are compressed
    #[arg(long, env = "COMPRESSOR", default_value = "zstd")]
    compressor: Compression,
    /// Size of chunks, a power of two from 0x1000 to 0x1000000
    #[arg(long, env = "FS_CHUNK_SIZE", alias = "chunk-size", default_value = "0x100000")]
    fs_chunk_size: ChunkSize,
    /// Prefetch this directory when the image is mounted
    #[arg(long, env = "PREFETCH_DIR", conflicts_with = "prefetch_patterns")]
    prefetch_dir: Option<PathBuf>,
    /// Read paths to prefetch from standard input, one a line [default: prefetch nothing]
    #[arg(long, env = "PREFETCH_PATTERNS")]
    prefetch_patterns: bool,
    /// Convert docker media types to OCI ones
    #[arg(long, env = "OCI")]
    oci: bool,
    /// Write what the conversion cost to this file, as JSON
    #[arg(long, env = "OUTPUT_JSON")]
    output_json: Option<PathBuf>,
    /// Do not read the pushed image back to compare it with the source
    #[arg(long, env = "NO_VERIFY")]
    no_verify: bool,
    #[command(flatten)]
    retired: Retired,
    /// Align chunks of RAFS version 5 to 4 KiB; those of version 6 always are
    #[arg(long, env = "FS_ALIGN_CHUNK", alias = "backend-aligned-chunk")]
    fs_align_chunk: bool,
    /// Do not store chunks that this nydus image holds: bootstrap:registry:IMAGE or bootstrap:local:PATH
    #[arg(long, env = "CHUNK_DICT", conflicts_with = "oci_ref")]
    chunk_dict: Option<Named>,
    /// Do not check the certificate of the chunk dictionary's registry; plain HTTP is tried as well
    #[arg(long, env = "CHUNK_DICT_INSECURE")]
    chunk_dict_insecure: bool,
    /// Make an index of the original images and the converted ones
    #[arg(long, env = "MERGE_PLATFORM", alias = "multi-platform")]
    merge_platform: bool,
    /// Name the source manifest as the subject of the converted one, so that it can be found from there
    #[arg(long, env = "WITH_REFERRER")]
    with_referrer: bool,
    /// Below which number of bytes small files are packed together: 0, or a power of two from 0x1000 to 0x1000000
    #[arg(long, env = "BATCH_SIZE", default_value = "0")]
    batch_size: BatchSize,
    /// Refer to the original gzip layers rather than pack them anew; they are brought to the target as they are
    #[arg(long, env = "OCI_REF")]
    oci_ref: bool,
    #[command(flatten)]
    later: Later,
}

/// What scripts of the replaced program give and what means nothing here: taken, and named in a warning.
#[derive(Debug, Args)]
struct Retired {
    #[arg(long, env = "DOCKER_V2_FORMAT", hide = true)]
    docker_v2_format: bool,
    #[arg(long, env = "NYDUS_IMAGE", hide = true)]
    nydus_image: Option<PathBuf>,
    #[arg(long, env = "PUSH_RETRY_COUNT", hide = true)]
    push_retry_count: Option<u32>,
    #[arg(long, env = "PUSH_RETRY_DELAY", hide = true)]
    push_retry_delay: Option<String>,
}

impl Retired {
    fn warn(&self) {
        let given = [
            (self.docker_v2_format, "--docker-v2-format", "docker media types stay docker's unless --oci is given"),
            (self.nydus_image.is_some(), "--nydus-image", "images are built by this program itself"),
            (self.push_retry_count.is_some(), "--push-retry-count", "every transfer is tried five times"),
            (self.push_retry_delay.is_some(), "--push-retry-delay", "pauses grow, or are as long as the registry asks"),
        ];
        for (_, flag, why) in given.into_iter().filter(|(given, ..)| *given) {
            tracing::warn!("{flag} has no effect: {why}");
        }
    }
}

/// What the replaced program can do and this one cannot yet: taken, and refused by name.
#[derive(Debug, Args)]
struct Later {
    #[arg(long, hide = true)]
    source_backend_type: Option<String>,
    #[arg(long, hide = true)]
    source_backend_config: Option<String>,
    #[arg(long, env = "BACKEND_TYPE", hide = true)]
    backend_type: Option<String>,
    #[arg(long, env = "BACKEND_CONFIG", hide = true)]
    backend_config: Option<String>,
    #[arg(long, env = "BACKEND_CONFIG_FILE", hide = true)]
    backend_config_file: Option<PathBuf>,
    #[arg(long, env = "BACKEND_FORCE_PUSH", hide = true)]
    backend_force_push: bool,
    #[arg(long, env = "BUILD_CACHE", hide = true)]
    build_cache: Option<String>,
    #[arg(long, env = "BUILD_CACHE_TAG", hide = true)]
    build_cache_tag: Option<String>,
    #[arg(long, env = "BUILD_CACHE_VERSION", default_value = "v1", hide = true)]
    build_cache_version: String,
    #[arg(long, env = "BUILD_CACHE_INSECURE", hide = true)]
    build_cache_insecure: bool,
    #[arg(long, env = "BUILD_CACHE_MAX_RECORDS", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=200), hide = true)]
    build_cache_max_records: u32,
    #[arg(long, env = "REVERSE", hide = true)]
    reverse: bool,
}

impl Later {
    /// Returns the first flag that asks for what cannot be done yet.
    fn first(&self) -> Option<&'static str> {
        let asked = [
            ("--source-backend-type", self.source_backend_type.is_some()),
            ("--source-backend-config", self.source_backend_config.is_some()),
            ("--backend-type", self.backend_type.is_some()),
            ("--backend-config", self.backend_config.is_some()),
            ("--backend-config-file", self.backend_config_file.is_some()),
            ("--backend-force-push", self.backend_force_push),
            ("--build-cache", self.build_cache.is_some()),
            ("--build-cache-tag", self.build_cache_tag.is_some()),
            ("--reverse", self.reverse),
        ];
        asked.into_iter().find_map(|(flag, asked)| asked.then_some(flag))
    }
}

pub(crate) async fn run(flags: &Convert, progress: &Progress) -> anyhow::Result<()> {
    if let Some(flag) = flags.later.first() {
        bail!("{flag} is not supported yet; leave it out, or use the original nydusify for this image");
    }
    let source: Reference = flags.source.parse().context("--source")?;
    let target = target(flags, &source)?;
    let prefetch = match (&flags.prefetch_dir, flags.prefetch_patterns) {
        (Some(dir), _) => prefetch::directory(dir).context("--prefetch-dir")?,
        (None, true) => prefetch::read(io::stdin().lock()).context("reading prefetch patterns from standard input")?,
        (None, false) => Vec::new(),
    };
    flags.retired.warn();
    let report = flags.output_json.as_deref().map(Report::begin).transpose().context("--output-json")?;
    let work_dir = WorkDir::make(&flags.work_dir).context("--work-dir")?;
    let plain_http = flags.plain_http;
    let from = Side {
        name: source.clone(),
        archive: flags.source_archive.clone(),
        insecure: flags.source_insecure,
        plain_http,
    };
    let to = Side {
        name: target.clone(),
        archive: flags.target_archive.clone(),
        insecure: flags.target_insecure,
        plain_http,
    };
    let request = Request {
        origin: from.source(&work_dir.path).await.context(from.flag("--source"))?,
        destination: to.target().await.context(to.flag("--target"))?,
        source,
        target,
        wanted: Wanted::of(flags.all_platforms, &flags.platform),
        recipe: flags.recipe()?,
        dictionary: match &flags.chunk_dict {
            None => None,
            Some(named @ Named::File(_)) => Some(Known { named: named.clone(), place: None }),
            Some(named @ Named::Image(name)) => {
                let side = Side { name: name.clone(), archive: None, insecure: flags.chunk_dict_insecure, plain_http };
                let place = side.source(&work_dir.path).await.context("--chunk-dict")?;
                Some(Known { named: named.clone(), place: Some(place) })
            }
        },
        refer: flags.oci_ref,
        work_dir: work_dir.path.clone(),
        merge_platform: flags.merge_platform,
        referrer: flags.with_referrer,
        oci: flags.oci_ref || flags.with_referrer || flags.oci && !flags.retired.docker_v2_format,
        prefetch,
        verify: !flags.no_verify,
    };
    let mut metrics = Metrics::default();
    let outcome = convert::convert(&request, progress, &mut metrics).await;
    let saved = report.map(|report| report.save(outcome.is_ok().then_some(&metrics))).transpose();
    let outcome = outcome.map_err(|error| explained(error, &[&from, &to]));
    let digest = outcome.with_context(|| format!("converting {} to {}", request.source, request.target))?;
    saved.context("--output-json")?;
    tracing::info!(
        target_image = %request.target,
        digest,
        source_mb = metrics.source_image_size / 1_000_000,
        target_mb = metrics.target_image_size / 1_000_000,
        verify_s = Duration::from_nanos(metrics.verify_elapsed).as_secs_f32(),
        verify_cpu_s = Duration::from_nanos(metrics.verify_cpu).as_secs_f32(),
        "converted"
    );
    Ok(())
}

impl Convert {
    /// Checks the flags that go together, and returns how chunks are made.
    fn recipe(&self) -> anyhow::Result<Recipe> {
        let version = if self.fs_version == "5" { Version::V5 } else { Version::V6 };
        let chunk_size = self.fs_chunk_size.bytes();
        let batch_size = self.batch_size.bytes();
        let refused = [
            (self.oci_ref && version == Version::V5, "--fs-version 5 cannot refer to layers with --oci-ref; 6 can"),
            (
                self.oci_ref && batch_size.is_some(),
                "--batch-size needs blobs of its own, which --oci-ref does not make",
            ),
            (batch_size.is_some() && version == Version::V5, "--batch-size needs --fs-version 6"),
            (batch_size.is_some_and(|size| size > chunk_size), "--batch-size is larger than --fs-chunk-size"),
            (
                (batch_size.is_some() || self.oci_ref) && chunk_size > 8 << 20,
                "--fs-chunk-size has 0x800000 at most with --batch-size and --oci-ref: their tables have no room for more",
            ),
        ];
        if let Some((_, why)) = refused.into_iter().find(|(refused, _)| *refused) {
            bail!("{why}");
        }
        let (compressor, algorithm) = match self.compressor {
            // The layers are what they are.
            _ if self.oci_ref => (Compressor::Gzip, Algorithm::Sha256),
            Compression::None => (Compressor::None, Algorithm::Blake3),
            Compression::Lz4Block => (Compressor::Lz4Block, Algorithm::Blake3),
            Compression::Zstd => (Compressor::Zstd, Algorithm::Blake3),
        };
        let aligned = self.fs_align_chunk;
        Ok(Recipe { version, compressor, algorithm, chunk_size, aligned, batch_size, ..Recipe::default() })
    }
}

fn target(flags: &Convert, source: &Reference) -> anyhow::Result<Reference> {
    match (&flags.target, &flags.target_suffix) {
        (Some(target), _) => target.parse().context("--target"),
        (None, Some(suffix)) => {
            if source.digest().is_some() {
                bail!("--target-suffix is added to a tag, and {source} names a digest; use --target");
            }
            let tag = source.tag().unwrap_or("latest");
            let name = format!("{}/{}:{tag}{suffix}", source.registry(), source.repository());
            name.parse().context("--target-suffix")
        }
        (None, None) => bail!("--target or --target-suffix is needed"),
    }
}

/// The file for what a conversion cost; it gets its name when it is whole.
struct Report {
    file: NamedTempFile,
    path: PathBuf,
}

impl Report {
    /// Finds out now, not after the conversion, whether it can be written.
    fn begin(path: &Path) -> anyhow::Result<Self> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = NamedTempFile::new_in(dir).with_context(|| format!("making a file in {}", dir.display()))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Writes the costs; `null` if there was no conversion.
    fn save(mut self, metrics: Option<&Metrics>) -> anyhow::Result<()> {
        let json = serde_json::to_vec(&metrics).context("writing the costs")?;
        self.file.write_all(&json).with_context(|| format!("writing {}", self.path.display()))?;
        self.file.as_file().set_permissions(Permissions::from_mode(0o644))?;
        self.file.persist(&self.path).with_context(|| format!("writing {}", self.path.display()))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(arguments: &[&str]) -> Convert {
        let given = ["convert", "--source", "registry/group/name:1"];
        #[derive(clap::Parser)]
        struct Alone {
            #[command(flatten)]
            flags: Convert,
        }
        <Alone as clap::Parser>::try_parse_from(given.iter().chain(arguments)).unwrap().flags
    }

    #[test]
    fn a_suffix_is_added_to_the_tag_though_it_looks_like_a_flag() {
        let flags = flags(&["--target-suffix", "-nydus"]);
        let target = target(&flags, &flags.source.parse().unwrap()).unwrap();
        assert_eq!(target.tag(), Some("1-nydus"));
        let named = "registry/name@sha256:0000000000000000000000000000000000000000000000000000000000000000";
        assert!(super::target(&flags, &named.parse().unwrap()).is_err());
    }

    #[test]
    fn the_command_line_of_the_guide_is_taken() {
        let flags = flags(&["--target", "registry/name:nydus", "--nydus-image", "/usr/bin/nydus-image"]);
        assert_eq!(flags.later.first(), None);
        assert_eq!((flags.compressor, flags.fs_chunk_size), (Compression::Zstd, ChunkSize::DEFAULT));
        assert!(!flags.prefetch_patterns && flags.prefetch_dir.is_none(), "nothing is prefetched unless asked");
    }

    #[test]
    fn what_cannot_be_done_yet_is_named() {
        assert_eq!(flags(&["--target", "t", "--reverse"]).later.first(), Some("--reverse"));
        let two = ["--backend-type", "--build-cache"];
        for flag in two {
            assert_eq!(flags(&["--target", "t", flag, "0x1000"]).later.first(), Some(flag));
        }
    }
}
