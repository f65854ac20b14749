//! `nydus-image`: makes, merges and checks RAFS images in files.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use nydus_convert::chunk_size::{BatchSize, ChunkSize};
use nydus_convert::image::create::{self, BlobPlace, BootstrapPlace, Source};
use nydus_convert::image::merge::{self, Incompatible};
use nydus_convert::image::report::Report;
use nydus_convert::image::{check, report};
use nydus_convert::pack::Recipe;
use nydus_convert::prefetch;
use nydus_convert::source::directory::Whiteouts;
use nydus_rafs::{Algorithm, BlobId, Compressor, Version};

/// Build, merge and check RAFS images
#[derive(Debug, Parser)]
#[command(name = "nydus-image", disable_version_flag = true)]
struct Cli {
    /// Write the log to the end of this file
    #[arg(short = 'L', long, global = true)]
    log_file: Option<PathBuf>,
    /// Log level
    #[arg(short = 'l', long, global = true, default_value = "info", value_parser = ["trace", "debug", "info", "warn", "error"])]
    log_level: String,
    /// Print version
    #[arg(short = 'V', long)]
    version: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build an image from a directory or a tar
    Create(Box<Create>),
    /// Merge the bootstraps of layers, lowest first, into one
    Merge(Box<Merge>),
    /// Check a bootstrap and list its blobs
    Check(Check),
    /// Inspect a bootstrap (not supported yet)
    Inspect(Rest),
    /// Print statistics of a bootstrap (not supported yet)
    Stat(Rest),
    /// Write the files of an image into a tar (not supported yet)
    Unpack(Rest),
    /// Export an image as a block device (not supported yet)
    Export(Rest),
    /// Drop unused chunks (not supported yet)
    Compact(Rest),
    /// Move chunks that are needed first into a blob of their own (not supported yet)
    Optimize(Rest),
    /// Make a chunk dictionary (not supported yet)
    Chunkdict(Rest),
}

/// Flags of commands that do not exist yet.
#[derive(Debug, Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    rest: Vec<String>,
}

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrefetchPolicy {
    Fs,
    Blob,
    None,
}

#[derive(Debug, Args)]
struct Create {
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
    /// Size of the data of an estargztoc-ref blob (not supported yet)
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
    #[arg(long, conflicts_with_all = ["blob_inline_meta", "blob", "blob_dir"])]
    blob_cache_dir: Option<PathBuf>,
    /// File of attributes by path (not supported yet)
    #[arg(long)]
    attributes: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Merge {
    /// Bootstraps, lowest layer first
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<PathBuf>,
    /// Bootstrap of a lower image
    #[arg(long)]
    parent_bootstrap: Option<PathBuf>,
    /// File for the merged bootstrap
    #[arg(short = 'B', long)]
    bootstrap: Option<PathBuf>,
    /// Directory for the merged bootstrap if it has no file
    #[arg(short = 'D', long)]
    blob_dir: Option<PathBuf>,
    /// Bootstrap of an image whose chunks need not be stored again (`PATH` or `bootstrap=PATH`)
    #[arg(long)]
    chunk_dict: Option<String>,
    /// What is made of the prefetch patterns on standard input
    #[arg(long, default_value = "none")]
    prefetch_policy: PrefetchPolicy,
    /// File for the result, as JSON
    #[arg(short = 'J', long)]
    output_json: Option<PathBuf>,
    /// Digests of the layers' blobs
    #[arg(long, value_delimiter = ',')]
    blob_digests: Vec<String>,
    /// Names of the layers' blobs
    #[arg(long, value_delimiter = ',')]
    original_blob_ids: Vec<String>,
    /// Sizes of the layers' blobs
    #[arg(long, value_delimiter = ',')]
    blob_sizes: Vec<u64>,
    /// Digests of the tables of contents
    #[arg(long, value_delimiter = ',')]
    blob_toc_digests: Vec<String>,
    /// Sizes of the tables of contents
    #[arg(long, value_delimiter = ',')]
    blob_toc_sizes: Vec<u32>,
    /// Configuration of a storage backend
    #[arg(short = 'C', long)]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Check {
    /// Bootstrap, or blob with a bootstrap inside
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap_flag")]
    bootstrap: Option<PathBuf>,
    /// The same
    #[arg(short = 'B', long = "bootstrap", id = "bootstrap_flag", conflicts_with = "bootstrap")]
    bootstrap_flag: Option<PathBuf>,
    /// Directory of the blobs
    #[arg(short = 'D', long, conflicts_with = "config")]
    blob_dir: Option<PathBuf>,
    /// Configuration of a storage backend
    #[arg(short = 'C', long)]
    config: Option<PathBuf>,
    /// Print every inode
    #[arg(short = 'v', long, action = ArgAction::SetTrue)]
    verbose: bool,
    /// File for the result, as JSON
    #[arg(short = 'J', long)]
    output_json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(incompatible) = error.downcast_ref::<Incompatible>() {
                tracing::error!("message:{incompatible}");
                return ExitCode::from(2);
            }
            let mut text = format!("Error: {error}\n");
            if error.chain().len() > 1 {
                text.push_str("\nCaused by:\n");
                for (number, cause) in error.chain().skip(1).enumerate() {
                    text.push_str(&format!("    {number}: {cause}\n"));
                }
            }
            drop(io::stderr().write_all(text.as_bytes()));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if cli.version {
        // Callers look for the line `Version: v…`.
        writeln!(out, "Version: \t{}", report::version())?;
        return Ok(());
    }
    let Some(command) = cli.command else {
        write!(out, "{}", Cli::command().render_help())?;
        return Ok(());
    };
    log_to(cli.log_file.as_deref(), &cli.log_level)?;
    match command {
        Command::Create(flags) => create(*flags),
        Command::Merge(flags) => merge(*flags),
        Command::Check(flags) => {
            let path = flags.bootstrap.or(flags.bootstrap_flag).context("a bootstrap is needed")?;
            check::check(&path, flags.verbose, &mut out, flags.output_json.as_ref())
        }
        Command::Inspect(_) => not_yet("inspect"),
        Command::Stat(_) => not_yet("stat"),
        Command::Unpack(_) => not_yet("unpack"),
        Command::Export(_) => not_yet("export"),
        Command::Compact(_) => not_yet("compact"),
        Command::Optimize(_) => not_yet("optimize"),
        Command::Chunkdict(_) => not_yet("chunkdict"),
    }
}

fn not_yet(command: &str) -> anyhow::Result<()> {
    bail!("`nydus-image {command}` is not supported yet")
}

fn log_to(file: Option<&std::path::Path>, level: &str) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::new(level);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_ansi(false);
    match file {
        Some(path) => {
            let file = std::fs::File::options().create(true).append(true).open(path);
            let file = file.with_context(|| format!("opening the log file {}", path.display()))?;
            builder.with_writer(std::sync::Mutex::new(file)).init();
        }
        None => builder.with_writer(io::stderr).init(),
    }
    Ok(())
}

fn patterns(policy: PrefetchPolicy) -> anyhow::Result<Vec<PathBuf>> {
    match policy {
        PrefetchPolicy::None => Ok(Vec::new()),
        PrefetchPolicy::Fs | PrefetchPolicy::Blob => {
            let patterns =
                prefetch::read(io::stdin().lock()).context("reading prefetch patterns from standard input")?;
            // Nothing on standard input means everything.
            Ok(if patterns.is_empty() { vec![PathBuf::from("/")] } else { patterns })
        }
    }
}

/// Returns the first flag that asks for what cannot be done yet.
fn first<'f>(flags: impl IntoIterator<Item = (&'f str, bool)>) -> anyhow::Result<()> {
    match flags.into_iter().find(|&(_, asked)| asked) {
        Some((flag, _)) => bail!("{flag} is not supported yet"),
        None => Ok(()),
    }
}

/// Returns the file that `--chunk-dict` names.
fn dictionary(flag: Option<String>) -> anyhow::Result<Option<PathBuf>> {
    match flag.as_deref().map(|flag| flag.split_once('=').unwrap_or(("bootstrap", flag))) {
        None => Ok(None),
        Some(("bootstrap", path)) => Ok(Some(path.into())),
        Some((kind, _)) => bail!("invalid chunk dictionary type: {kind} (bootstrap=PATH is wanted)"),
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
    if !packed {
        // The layer is what it is; the flags that say so otherwise are taken and change nothing, as always.
        recipe.compressor = if source == Source::Reference { Compressor::Gzip } else { Compressor::None };
        recipe.algorithm = Algorithm::Sha256;
    }
    let refused = [
        (!packed && recipe.version == Version::V5, "--fs-version 5 cannot describe an original layer: version 6 can"),
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
                && (recipe.encrypt || recipe.batch_size.is_some() || !packed || recipe.version == Version::V5),
            "--blob-cache-dir holds plain chunks of version 6: it does not go with --encrypt, --batch-size or original layers",
        ),
        (!packed && flags.prefetch_policy == PrefetchPolicy::Blob, "--prefetch-policy blob needs a blob of its own"),
        (
            !packed && (flags.chunk_dict.is_some() || flags.parent_bootstrap.is_some()),
            "--chunk-dict and --parent-bootstrap need a blob of its own: the original layer stays as it is",
        ),
        (!packed && flags.blob_id.is_some(), "--blob-id names no original layer: its digest does"),
        (
            source == Source::RawTar && (flags.blob_inline_meta || !flags.features.is_empty() || flags.blob.is_some()),
            "--type tar-tarfs makes no blob: --blob, --blob-inline-meta and --features do not go with it",
        ),
    ];
    match refused.into_iter().find(|&(refused, _)| refused) {
        Some((_, why)) => bail!("{why}"),
        None => Ok(recipe),
    }
}

fn create(flags: Create) -> anyhow::Result<()> {
    first([
        ("--external-blob", flags.external_blob.is_some()),
        ("--blob-data-size", flags.blob_data_size.is_some()),
        ("--blob-offset", flags.blob_offset != "0"),
        ("--attributes", flags.attributes.is_some()),
    ])?;
    let source = match flags.kind {
        Kind::Directory | Kind::DirRafs => Source::Directory(match flags.whiteout_spec {
            WhiteoutSpec::Oci => Whiteouts::Oci,
            WhiteoutSpec::Overlayfs => Whiteouts::Overlayfs,
            WhiteoutSpec::None => Whiteouts::None,
        }),
        Kind::TarRafs | Kind::TargzRafs | Kind::EstargzRafs => Source::Tar,
        Kind::TargzRef | Kind::EstargzRef => Source::Reference,
        Kind::TarTarfs => Source::RawTar,
        Kind::EstargztocRef | Kind::StargzIndex => {
            let kind = flags.kind.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
            bail!("--type {kind} is not supported yet")
        }
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
        (None, None, _) if source == Source::RawTar => BlobPlace::Nowhere,
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

fn merge(flags: Merge) -> anyhow::Result<()> {
    let prefetch = patterns(flags.prefetch_policy)?;
    let report = merge::merge(&merge::Request {
        sources: flags.sources,
        bootstrap: flags.bootstrap,
        blob_dir: flags.blob_dir,
        prefetch,
        blob_digests: flags.blob_digests,
        original_blob_ids: flags.original_blob_ids,
        blob_sizes: flags.blob_sizes,
        toc_digests: flags.blob_toc_digests,
        toc_sizes: flags.blob_toc_sizes,
        parent: flags.parent_bootstrap,
        dictionary: dictionary(flags.chunk_dict)?,
    })?;
    report.save(flags.output_json.as_ref())?;
    say(&report);
    Ok(())
}

fn say(report: &Report) {
    tracing::info!(
        "successfully built RAFS filesystem: \nmeta blob path: {}\ndata blobs: {:?}",
        report.bootstrap,
        report.blobs
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_find_what_they_look_for_in_the_help_of_create() {
        let mut cli = Cli::command();
        let help = cli.find_subcommand_mut("create").expect("the command is declared above").render_help().to_string();
        for wanted in ["--batch-size", "--encrypt", "--type", "tar-rafs"] {
            assert!(help.contains(wanted), "{wanted} is not in\n{help}");
        }
    }

    #[test]
    fn the_command_lines_of_the_go_converter_are_taken() {
        let lines = [
            "nydus-image create --log-level warn --prefetch-policy fs --blob out --whiteout-spec none --fs-version 6 --type tar-rafs --blob-inline-meta --features blob-toc --compressor zstd --chunk-size 0x100000 --batch-size 0 in",
            "nydus-image create --log-level warn --type targz-ref --blob-inline-meta --features blob-toc --blob out in",
            "nydus-image merge --log-level warn --prefetch-policy fs --output-json j --bootstrap b l1 l2 --blob-digests d1,d2 --blob-toc-digests t1,t2 --blob-sizes 1,2",
            "nydus-image check --log-level warn --output-json j --bootstrap b",
            "nydus-image create --source-type directory --inline-bootstrap --blob out in",
        ];
        for line in lines {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }
}
