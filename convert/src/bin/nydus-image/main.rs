//! `nydus-image`: makes, merges, checks and unpacks RAFS images in files.

mod backend;
mod create;
mod merge;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use backend::Backend;
use clap::{ArgAction, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use nydus_convert::image::inspect::{HELP, Inspector, Unclear};
use nydus_convert::image::merge::Incompatible;
use nydus_convert::image::report::Report;
use nydus_convert::image::{self, check, report, unpack};
use nydus_convert::prefetch;

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
    Create(Box<create::Create>),
    /// Merge the bootstraps of layers, lowest first, into one
    Merge(Box<merge::Merge>),
    /// Check a bootstrap and list its blobs
    Check(Check),
    /// Look around in a bootstrap
    Inspect(Inspect),
    /// Print how many files and chunks bootstraps have
    Stat(Stat),
    /// Write the files of an image into a tar
    Unpack(Unpack),
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
enum PrefetchPolicy {
    Fs,
    Blob,
    None,
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

#[derive(Debug, Args)]
struct Inspect {
    /// Bootstrap, or blob with a bootstrap inside
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap_flag")]
    bootstrap: Option<PathBuf>,
    /// The same
    #[arg(short = 'B', long = "bootstrap", id = "bootstrap_flag", conflicts_with = "bootstrap")]
    bootstrap_flag: Option<PathBuf>,
    /// Directory of the blobs; taken and not needed
    #[arg(short = 'D', long, conflicts_with = "config")]
    blob_dir: Option<PathBuf>,
    /// Configuration of a storage backend; taken and not needed
    #[arg(short = 'C', long)]
    config: Option<PathBuf>,
    /// Answer one question and leave
    #[arg(short = 'R', long)]
    request: Option<String>,
}

#[derive(Debug, Args)]
struct Stat {
    /// Bootstrap
    #[arg(short = 'B', long, required_unless_present = "blob_dir")]
    bootstrap: Option<PathBuf>,
    /// Directory all of whose files without extension are bootstraps
    #[arg(short = 'D', long, conflicts_with = "bootstrap")]
    blob_dir: Option<PathBuf>,
    /// Bootstrap of an image to compare with the others
    #[arg(short = 'T', long)]
    target: Option<PathBuf>,
    /// Taken and not needed: bootstraps say how their chunks are named
    #[arg(long)]
    digester: Option<String>,
    /// Configuration of a storage backend; taken and not needed
    #[arg(short = 'C', long)]
    config: Option<PathBuf>,
    /// File for the result, as JSON
    #[arg(short = 'J', long)]
    output_json: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Unpack {
    /// Bootstrap, or blob with a bootstrap inside
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap_flag")]
    bootstrap: Option<PathBuf>,
    /// The same
    #[arg(short = 'B', long = "bootstrap", id = "bootstrap_flag", conflicts_with = "bootstrap")]
    bootstrap_flag: Option<PathBuf>,
    /// File or pipe for the tar
    #[arg(short = 'o', long)]
    output: PathBuf,
    #[command(flatten)]
    backend: Backend,
}

/// The command line. Values are named like their flags, for callers read complaints about them.
fn command() -> clap::Command {
    Cli::command().mut_subcommands(|command| {
        command.mut_args(|arg| match arg.get_long().map(str::to_owned) {
            // As many bytes as there are names of flags, once.
            Some(long) if arg.get_action().takes_values() => arg.value_name(&*long.leak()),
            _ => arg,
        })
    })
}

fn main() -> ExitCode {
    let cli = Cli::from_arg_matches(&command().get_matches()).unwrap_or_else(|error| error.exit());
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
        write!(out, "{}", command().render_help())?;
        return Ok(());
    };
    log_to(cli.log_file.as_deref(), &cli.log_level)?;
    match command {
        Command::Create(flags) => create::run(*flags),
        Command::Merge(flags) => merge::run(*flags),
        Command::Check(flags) => {
            let path = flags.bootstrap.or(flags.bootstrap_flag).context("a bootstrap is needed")?;
            check::check(&path, flags.verbose, &mut out, flags.output_json.as_ref())
        }
        Command::Inspect(flags) => inspect(flags, &mut out),
        Command::Stat(flags) => stat(flags, &mut out),
        Command::Unpack(flags) => {
            let path = flags.bootstrap.or(flags.bootstrap_flag).context("a bootstrap is needed")?;
            unpack::unpack(image::open(&path)?, &flags.backend.config(&path)?, &flags.output)
        }
        Command::Export(_) => not_yet("export"),
        Command::Compact(_) => not_yet("compact"),
        Command::Optimize(_) => not_yet("optimize"),
        Command::Chunkdict(_) => not_yet("chunkdict"),
    }
}

fn inspect(flags: Inspect, out: &mut impl io::Write) -> anyhow::Result<()> {
    let path = flags.bootstrap.or(flags.bootstrap_flag).context("a bootstrap is needed")?;
    let mut inspector = Inspector::new(image::open(&path)?);
    let Some(request) = flags.request else {
        return Ok(inspector.converse(io::stdin().lock(), out)?);
    };
    match inspector.request(&request) {
        Ok(answer) => Ok(write!(out, "{answer}")?),
        Err(error) => {
            if error.downcast_ref::<Unclear>().is_some() {
                write!(out, "{HELP}")?;
            }
            Err(error)
        }
    }
}

fn stat(flags: Stat, out: &mut impl io::Write) -> anyhow::Result<()> {
    let base = match (flags.bootstrap, &flags.blob_dir) {
        (Some(path), _) => vec![path],
        (None, Some(dir)) => {
            let context = || format!("reading {}", dir.display());
            let files = std::fs::read_dir(dir).with_context(context)?;
            let paths = files.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>();
            let mut paths = paths.with_context(context)?;
            paths.retain(|path| path.is_file() && path.extension().is_none());
            paths.sort();
            paths
        }
        (None, None) => bail!("--bootstrap or --blob-dir is needed"),
    };
    let statistics = image::stat::stat(&base, flags.target.as_deref())?;
    match flags.output_json {
        Some(path) => std::fs::write(&path, serde_json::to_vec(&statistics)?)
            .with_context(|| format!("writing {}", path.display())),
        None => Ok(statistics.print(out)?),
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

/// Returns the file that `--chunk-dict` names.
fn dictionary(flag: Option<String>) -> anyhow::Result<Option<PathBuf>> {
    match flag.as_deref().map(|flag| flag.split_once('=').unwrap_or(("bootstrap", flag))) {
        None => Ok(None),
        Some(("bootstrap", path)) => Ok(Some(path.into())),
        Some((kind, _)) => bail!("invalid chunk dictionary type: {kind} (bootstrap=PATH is wanted)"),
    }
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
        let mut cli = command();
        let help = cli.find_subcommand_mut("create").expect("the command is declared above").render_help().to_string();
        for wanted in ["--batch-size", "--encrypt", "--type", "tar-rafs"] {
            assert!(help.contains(wanted), "{wanted} is not in\n{help}");
        }
    }

    #[test]
    fn flags_that_exclude_each_other_are_named_as_callers_expect() {
        let conflicts = [
            ("--blob-dir d", "'--blob-dir <blob-dir>'"),
            ("--blob b", "'--blob <blob>'"),
            ("--blob-inline-meta", "'--blob-inline-meta'"),
            ("--compressor zstd", "'--compressor <compressor>'"),
        ];
        for (flag, name) in conflicts {
            let line = format!("nydus-image create -t targz-ref {flag} --blob-cache-dir c in");
            let error =
                command().try_get_matches_from(line.split(' ')).expect_err("they exclude each other").to_string();
            let wanted = format!("argument {name} cannot be used with '--blob-cache-dir <blob-cache-dir>'");
            assert!(error.contains(&wanted), "{error}");
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
