//! The flags of `nydus-image create`.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use nydus_convert::chunk_size::{BatchSize, ChunkSize};
use nydus_convert::image::create::{self, BlobPlace, BootstrapPlace, Source};
use nydus_convert::layer::Whiteouts;
use nydus_convert::pack::Recipe;
use nydus_rafs::{Algorithm, BlobId, Compressor, Version};

use crate::{PrefetchPolicy, dictionary, patterns, say};

/// Where the data of a layer may end at most: positions of stored chunks have 40 bits.
const LARGEST: u64 = 1 << 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Directory,
    DirRafs,
    EstargzRafs,
    EstargzRef,
    EstargztocRef,
    TarRafs,
    TarTarfs,
    TargzRafs,
    TargzRef,
    #[value(name = "stargz_index")]
    StargzIndex,
}

impl Kind {
    /// Its name, the usual one of those that it has.
    fn name(self) -> String {
        let kind = if self == Self::StargzIndex { Self::EstargztocRef } else { self };
        kind.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Compression {
    None,
    Lz4Block,
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Digester {
    Blake3,
    Sha256,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WhiteoutSpec {
    Oci,
    Overlayfs,
    None,
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// What to build the image from
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Kind of the source
    #[arg(short = 't', long = "type", alias = "source-type", default_value = "dir-rafs")]
    kind: Kind,
    /// File for the bootstrap
    #[arg(short = 'B', long, required_unless_present_any = ["blob_dir", "blob_inline_meta", "blob_cache_dir"], conflicts_with = "blob_inline_meta")]
    bootstrap: Option<PathBuf>,
    /// Directory for the blob, and for the bootstrap if it has no file
    #[arg(short = 'D', long)]
    blob_dir: Option<PathBuf>,
    /// File or pipe for the blob
    #[arg(short = 'b', long)]
    blob: Option<PathBuf>,
    /// File for a blob of external files (not supported yet)
    #[arg(long)]
    external_blob: Option<PathBuf>,
    /// Put bootstrap and chunk table into the blob
    #[arg(long, alias = "inline-bootstrap", conflicts_with = "blob_id")]
    blob_inline_meta: bool,
    /// Name of the blob [default: its digest]
    #[arg(long)]
    blob_id: Option<BlobId>,
    /// Where the data of an estargztoc-ref layer ends, in bytes, hexadecimal
    #[arg(long)]
    blob_data_size: Option<String>,
    #[arg(long, default_value = "0", hide = true)]
    blob_offset: String,
    /// Size of chunks, a power of two from 0x1000 to 0x1000000
    #[arg(long)]
    chunk_size: Option<String>,
    /// Size below which small files are packed together, a power of two from 0x1000 to the chunk size, or zero
    #[arg(long, default_value = "0")]
    batch_size: String,
    /// How chunks are compressed
    #[arg(long, default_value = "zstd")]
    compressor: Compression,
    /// How chunks are named
    #[arg(long, default_value = "blake3")]
    digester: Digester,
    /// Configuration of a storage backend
    #[arg(short = 'C', long)]
    config: Option<PathBuf>,
    /// RAFS version
    #[arg(short = 'v', long, default_value = "6", value_parser = ["5", "6"])]
    fs_version: String,
    /// Optional features
    #[arg(long, value_delimiter = ',', value_parser = ["blob-toc"])]
    features: Vec<String>,
    /// Bootstrap of an image whose chunks need not be stored again (`PATH` or `bootstrap=PATH`)
    #[arg(long)]
    chunk_dict: Option<String>,
    /// Bootstrap of a lower layer
    #[arg(long)]
    parent_bootstrap: Option<PathBuf>,
    /// Align chunks to 4 KiB; version 6 always does
    #[arg(long)]
    aligned_chunk: bool,
    /// Leave out what differs between machines
    #[arg(long)]
    repeatable: bool,
    #[arg(long, hide = true)]
    disable_check: bool,
    /// What the whiteouts of the source look like
    #[arg(long, default_value = "oci")]
    whiteout_spec: WhiteoutSpec,
    /// What is made of the prefetch patterns on standard input
    #[arg(long, default_value = "none")]
    prefetch_policy: PrefetchPolicy,
    /// File for the result, as JSON
    #[arg(short = 'J', long)]
    output_json: Option<PathBuf>,
    /// Encrypt chunks and chunk table (version 6)
    #[arg(short = 'E', long)]
    encrypt: bool,
    /// Directory for ready-made cache files
    #[arg(long, conflicts_with_all = ["blob_inline_meta", "blob", "blob_dir", "compressor"])]
    blob_cache_dir: Option<PathBuf>,
    /// File of attributes by path (not supported yet)
    #[arg(long)]
    attributes: Option<PathBuf>,
}

/// Returns the first flag that asks for what cannot be done yet.
fn first<'f>(flags: impl IntoIterator<Item = (&'f str, bool)>) -> anyhow::Result<()> {
    match flags.into_iter().find(|&(_, asked)| asked) {
        Some((flag, _)) => bail!("{flag} is not supported yet"),
        None => Ok(()),
    }
}

fn recipe(flags: &Create, source: Source) -> anyhow::Result<Recipe> {
    let chunk_size: ChunkSize = flags.chunk_size.as_deref().map_or(Ok(ChunkSize::DEFAULT), str::parse)?;
    let batch_size: BatchSize = flags.batch_size.parse()?;
    let mut recipe = Recipe {
        version: if flags.fs_version == "5" { Version::V5 } else { Version::V6 },
        compressor: match flags.compressor {
            Compression::None => Compressor::None,
            Compression::Lz4Block => Compressor::Lz4Block,
            Compression::Zstd => Compressor::Zstd,
        },
        algorithm: match flags.digester {
            Digester::Blake3 => Algorithm::Blake3,
            Digester::Sha256 => Algorithm::Sha256,
        },
        chunk_size: chunk_size.bytes(),
        aligned: flags.aligned_chunk,
        batch_size: batch_size.bytes(),
        encrypt: flags.encrypt,
    };
    if flags.blob_cache_dir.is_some() {
        recipe.compressor = Compressor::None;
    }
    let packed = matches!(source, Source::Directory(_) | Source::Tar);
    let toc = matches!(source, Source::Toc { .. });
    if !packed {
        // The layer is what it is; the flags that say so otherwise are taken and change nothing, as always.
        recipe.compressor = if source == Source::RawTar { Compressor::None } else { Compressor::Gzip };
        recipe.algorithm = Algorithm::Sha256;
    }
    let refused = [
        (
            !packed && !toc && recipe.version == Version::V5,
            "--fs-version 5 cannot describe an original layer: version 6 can",
        ),
        (!packed && recipe.encrypt, "--encrypt needs a blob of its own: the original layer stays as it is"),
        (
            recipe.batch_size.is_some() && !packed,
            "--batch-size needs a blob of its own: the original layer stays as it is",
        ),
        (recipe.batch_size.is_some() && recipe.version == Version::V5, "--batch-size needs --fs-version 6"),
        (recipe.encrypt && recipe.version == Version::V5, "--encrypt needs --fs-version 6"),
        (
            recipe.batch_size.is_some_and(|size| size > recipe.chunk_size),
            "--batch-size is larger than --chunk-size: at most that size is wanted",
        ),
        (
            (recipe.batch_size.is_some() || recipe.encrypt || source == Source::Reference)
                && recipe.chunk_size > 8 << 20,
            "--chunk-size has 0x800000 at most with --batch-size, --encrypt and original layers: their tables have no room for more",
        ),
        (!flags.features.is_empty() && recipe.version == Version::V5, "--features blob-toc needs --fs-version 6"),
        (
            flags.blob_cache_dir.is_some()
                && (recipe.encrypt || recipe.batch_size.is_some() || recipe.version == Version::V5),
            "--blob-cache-dir holds plain chunks of version 6: it does not go with --encrypt and --batch-size",
        ),
        (!packed && flags.prefetch_policy == PrefetchPolicy::Blob, "--prefetch-policy blob needs a blob of its own"),
        (
            !packed && !toc && (flags.chunk_dict.is_some() || flags.parent_bootstrap.is_some()),
            "--chunk-dict and --parent-bootstrap need a blob of its own: the original layer stays as it is",
        ),
        (!packed && !toc && flags.blob_id.is_some(), "--blob-id names no original layer: its digest does"),
        (
            (source == Source::RawTar || toc)
                && (flags.blob_inline_meta || !flags.features.is_empty() || flags.blob.is_some()),
            "--type tar-tarfs and estargztoc-ref make no blob: --blob, --blob-inline-meta and --features do not go with it",
        ),
    ];
    match refused.into_iter().find(|&(refused, _)| refused) {
        Some((_, why)) => bail!("{why}"),
        None => Ok(recipe),
    }
}

/// What the flags say of a table of contents.
fn toc(flags: &Create) -> anyhow::Result<Source> {
    let data_size = match flags.blob_data_size.as_deref() {
        None => LARGEST,
        Some(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16)
            .ok()
            .filter(|&size| size <= LARGEST)
            .with_context(|| format!("invalid value '{text}' for '--blob-data-size <blob-data-size>': hexadecimal digits are wanted, at most {LARGEST:x}"))?,
    };
    if flags.blob_id.is_none() {
        bail!("'--blob-id <id>' is missing for '--type estargztoc-ref'");
    }
    let chunk_size = flags.chunk_size.as_deref().map(str::parse).transpose()?.map(ChunkSize::bytes);
    Ok(Source::Toc { data_size, chunk_size, image: flags.whiteout_spec != WhiteoutSpec::None })
}

/// Runs the command.
pub(crate) fn run(flags: Create) -> anyhow::Result<()> {
    first([
        ("--external-blob", flags.external_blob.is_some()),
        ("--blob-offset", flags.blob_offset != "0"),
        ("--attributes", flags.attributes.is_some()),
    ])?;
    if flags.blob_cache_dir.is_some()
        && matches!(
            flags.kind,
            Kind::TarTarfs | Kind::EstargztocRef | Kind::StargzIndex | Kind::EstargzRafs | Kind::EstargzRef
        )
    {
        // In the words that callers of the established builder look for.
        bail!("conversion type `{}` conflicts with `--blob-cache-dir`", flags.kind.name());
    }
    let source = match flags.kind {
        Kind::Directory | Kind::DirRafs => Source::Directory(match flags.whiteout_spec {
            WhiteoutSpec::Oci => Whiteouts::Oci,
            WhiteoutSpec::Overlayfs => Whiteouts::Overlayfs,
            WhiteoutSpec::None => Whiteouts::None,
        }),
        Kind::TarRafs | Kind::TargzRafs | Kind::EstargzRafs => Source::Tar,
        Kind::TargzRef | Kind::EstargzRef => Source::Reference,
        Kind::TarTarfs => Source::RawTar,
        Kind::EstargztocRef | Kind::StargzIndex => toc(&flags)?,
    };
    let recipe = recipe(&flags, source)?;
    let prefetch = patterns(flags.prefetch_policy)?;
    let bootstrap = match (flags.bootstrap, flags.blob_inline_meta) {
        (_, true) => BootstrapPlace::Inline,
        (Some(path), false) => BootstrapPlace::File(path),
        (None, false) => BootstrapPlace::Directory,
    };
    let blob = match (flags.blob, flags.blob_dir, flags.blob_cache_dir) {
        (_, _, Some(dir)) => BlobPlace::Cache(dir),
        (Some(path), _, _) => BlobPlace::File(path),
        (None, Some(dir), _) => BlobPlace::Directory(dir),
        (None, None, _) if bootstrap == BootstrapPlace::Inline => {
            bail!("--blob or --blob-dir is needed with --blob-inline-meta")
        }
        (None, None, _) if matches!(source, Source::RawTar | Source::Toc { .. }) => BlobPlace::Nowhere,
        (None, None, _) => bail!("--blob or --blob-dir is needed"),
    };
    let request = create::Request {
        source,
        path: flags.source,
        blob,
        bootstrap,
        toc: !flags.features.is_empty(),
        blob_id: flags.blob_id,
        recipe,
        prefetch,
        prefetch_policy: match flags.prefetch_policy {
            PrefetchPolicy::Fs => create::PrefetchPolicy::Table,
            PrefetchPolicy::Blob => create::PrefetchPolicy::ReadAhead,
            PrefetchPolicy::None => create::PrefetchPolicy::None,
        },
        repeatable: flags.repeatable,
        parent: flags.parent_bootstrap,
        dictionary: dictionary(flags.chunk_dict)?,
    };
    let report = create::create(&request)?;
    report.save(flags.output_json.as_ref())?;
    say(&report);
    Ok(())
}
