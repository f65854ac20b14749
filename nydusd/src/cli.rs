//! The command line, flag by flag that of the program we replace.
//!
//! Without a subcommand, and with `fuse`, a FUSE server is started. The other subcommands are known so that whoever
//! calls them gets a clear answer.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::backend_source::BackendSource;
use crate::build;

/// Nydus daemon: gives container images to the kernel, chunk by chunk as they are read.
#[derive(Debug, Clone, Parser)]
#[command(name = "nydusd", version = build::VERSION, max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(flatten)]
    fuse: Fuse,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What any kind of daemon takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Path to the daemon's administration API socket
    #[arg(short = 'A', long, value_name = "PATH", global = true)]
    pub apisock: Option<PathBuf>,

    /// Path to the configuration file (JSON version 1 or 2, or TOML version 2)
    #[arg(short = 'C', long, value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,

    /// Service instance identifier
    #[arg(long, value_name = "ID", global = true)]
    pub id: Option<String>,

    /// Path to the supervisor's socket, for live upgrade and failover
    #[arg(long, value_name = "PATH", global = true)]
    pub supervisor: Option<PathBuf>,

    /// Who is asked for the current pull credential when a registry refuses the one in use: the path of the
    /// snapshotter's socket, followed by /api/v1/daemons/ID/backend [env: NYDUSD_BACKEND_SOURCE]
    #[arg(long, value_name = "ADDRESS", global = true)]
    pub backend_source: Option<BackendSource>,

    /// Start without mounting and wait for a takeover
    #[arg(long, global = true)]
    pub upgrade: bool,

    /// Log level
    #[arg(short, long, value_name = "LEVEL", default_value = "info", global = true,
          value_parser = ["trace", "debug", "info", "warn", "error"])]
    pub log_level: String,

    /// Log messages to the file; `.log` is appended if the name has no extension
    #[arg(short = 'L', long, value_name = "PATH", global = true)]
    pub log_file: Option<PathBuf>,

    /// Size in MB at which a new log file is begun, 0 to never do so
    #[arg(long, value_name = "MB", default_value_t = 0, global = true)]
    pub log_rotation_size: u64,

    /// Number of files that may be open at once, 0 to leave the limit alone
    #[arg(long, value_name = "N", default_value_t = 1_000_000, global = true)]
    pub rlimit_nofile: u64,
}

/// What is done with pending requests of the kernel at a takeover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FailoverPolicy {
    /// Nothing.
    None,
    /// They are sent again.
    Resend,
    /// They fail.
    Flush,
}

/// What a FUSE server takes.
#[derive(Debug, Clone, Args)]
pub struct Fuse {
    /// Directory at which the kernel shows the images
    #[arg(short = 'M', long, value_name = "DIR")]
    pub mountpoint: Option<PathBuf>,

    /// Number of threads that serve the kernel when it is quiet; more are started as readers wait
    #[arg(long, alias = "thread-num", value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub fuse_threads: u32,

    /// What is done with the kernel's pending requests at a takeover
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = FailoverPolicy::Resend)]
    pub failover_policy: FailoverPolicy,

    /// Mount the filesystem writable
    #[arg(long)]
    pub writable: bool,

    /// Path to the bootstrap of an image to mount at once
    #[arg(short = 'B', long, value_name = "FILE")]
    pub bootstrap: Option<PathBuf>,

    /// Directory of blobs that is also the cache, instead of a configuration file
    #[arg(short = 'D', long, value_name = "DIR")]
    pub localfs_dir: Option<PathBuf>,

    /// Directory of the host to show instead of an image
    #[arg(short = 's', long, value_name = "DIR", conflicts_with = "bootstrap")]
    pub shared_dir: Option<PathBuf>,

    /// File with absolute paths, one a line, that are fetched first
    #[arg(long, value_name = "FILE", requires = "bootstrap")]
    pub prefetch_files: Option<PathBuf>,

    /// Path inside the mount at which the image appears
    #[arg(short = 'm', long, value_name = "PATH", default_value = "/")]
    pub virtual_mountpoint: String,

    /// Database of chunks that other images have
    #[arg(long, value_name = "FILE")]
    pub dedup_db: Option<PathBuf>,
}

#[derive(Debug, Clone, Subcommand)]
enum Command {
    /// Run as a FUSE server (the same as no subcommand)
    Fuse(Fuse),
    /// Not supported: virtio-fs server
    #[command(disable_help_flag = true)]
    Virtiofs(Rest),
    /// Not supported: host of blobcache and fscache services
    #[command(disable_help_flag = true)]
    Singleton(Rest),
    /// Not supported: image as a network block device
    #[command(disable_help_flag = true)]
    Nbd(Rest),
    /// Not supported: image as a block device through userfaultfd
    #[command(disable_help_flag = true)]
    Uffd(Rest),
}

#[derive(Debug, Clone, Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    rest: Vec<OsString>,
}

/// A command line that can be acted upon.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// What any kind of daemon takes.
    pub global: Global,
    /// What a FUSE server takes.
    pub fuse: Fuse,
    /// Where the kernel shows the images.
    pub mountpoint: PathBuf,
}

/// What a command line asks for.
#[derive(Debug, Clone)]
pub enum Asked {
    /// A FUSE server.
    Fuse(Box<Invocation>),
    /// A service that does not exist here.
    Unsupported(&'static str),
}

/// Returns the command, for documents and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Reads a command line, the program's name first.
pub fn parse(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Asked, clap::Error> {
    let mut command = Cli::command();
    let matches = command.try_get_matches_from_mut(args)?;
    let cli = Cli::from_arg_matches(&matches)?;
    let fuse = match cli.command {
        None => cli.fuse,
        Some(chosen) => {
            let name = matches.subcommand_name().unwrap_or_default();
            for argument in Fuse::augment_args(clap::Command::new("fuse")).get_arguments() {
                let id = argument.get_id().as_str();
                if matches.value_source(id) == Some(ValueSource::CommandLine) {
                    let flag = argument.get_long().unwrap_or(id);
                    let text = format!("the argument '--{flag}' must stand after the subcommand '{name}'\n");
                    return Err(command.error(ErrorKind::ArgumentConflict, text));
                }
            }
            match chosen {
                Command::Fuse(fuse) => fuse,
                Command::Virtiofs(_) => return Ok(Asked::Unsupported("virtiofs")),
                Command::Singleton(_) => return Ok(Asked::Unsupported("singleton")),
                Command::Nbd(_) => return Ok(Asked::Unsupported("nbd")),
                Command::Uffd(_) => return Ok(Asked::Unsupported("uffd")),
            }
        }
    };
    let mut refuse = |kind, text: &str| Err(command.error(kind, format!("{text}\n")));
    if cli.global.id.is_some() != cli.global.supervisor.is_some() {
        return refuse(ErrorKind::MissingRequiredArgument, "'--id' and '--supervisor' go together: give both or none");
    }
    if fuse.localfs_dir.is_some() && cli.global.config.is_some() {
        return refuse(ErrorKind::ArgumentConflict, "'--localfs-dir' cannot be used with '--config'");
    }
    let Some(mountpoint) = fuse.mountpoint.clone() else {
        return refuse(ErrorKind::MissingRequiredArgument, "the argument '--mountpoint <DIR>' is required");
    };
    Ok(Asked::Fuse(Box::new(Invocation { global: cli.global, fuse, mountpoint })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fuse(line: &str) -> Invocation {
        match parse(line.split_whitespace()).unwrap() {
            Asked::Fuse(invocation) => *invocation,
            Asked::Unsupported(name) => panic!("{name}"),
        }
    }

    #[test]
    fn the_command_is_well_formed() {
        command().debug_assert();
    }

    #[test]
    fn the_snapshotters_command_line_is_understood() {
        let line = "nydusd fuse --thread-num 8 --config /c.json --bootstrap /b --mountpoint /m --apisock /a.sock \
                    --log-level debug --log-rotation-size 100 --log-file /l.log --failover-policy flush \
                    --id one --supervisor /s.sock --prefetch-files /p";
        let got = fuse(line);
        assert_eq!(got.fuse.fuse_threads, 8);
        assert_eq!(got.mountpoint, PathBuf::from("/m"));
        assert_eq!(got.global.apisock, Some(PathBuf::from("/a.sock")));
        assert_eq!(got.fuse.failover_policy, FailoverPolicy::Flush);
        assert_eq!(got.global.id.as_deref(), Some("one"));
    }

    #[test]
    fn global_options_may_stand_on_either_side_and_no_subcommand_means_fuse() {
        for line in ["nydusd -A /a fuse -M /m", "nydusd fuse -M /m -A /a", "nydusd -M /m -A /a"] {
            let got = fuse(line);
            assert_eq!((got.global.apisock, got.mountpoint), (Some("/a".into()), "/m".into()), "{line}");
            assert_eq!(got.fuse.virtual_mountpoint, "/");
            assert_eq!(got.fuse.fuse_threads, 4);
        }
    }

    #[test]
    fn contradictions_are_usage_errors() {
        for line in [
            "nydusd",
            "nydusd fuse",
            "nydusd -M /m fuse",
            "nydusd -M /m -B /b -s /s",
            "nydusd -M /m -B /b -D /d -C /c",
            "nydusd -M /m --id one",
            "nydusd -M /m --supervisor /s",
            "nydusd -M /m --prefetch-files /p",
            "nydusd -M /m --fuse-threads 0",
            "nydusd -M /m --log-level loud",
            "nydusd -M /m --no-such-flag",
        ] {
            assert_eq!(parse(line.split_whitespace()).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn services_that_do_not_exist_here_are_named() {
        let asked = parse("nydusd singleton --fscache /dir --fscache-threads 4 -A /a".split_whitespace()).unwrap();
        assert!(matches!(asked, Asked::Unsupported("singleton")));
        let asked = parse("nydusd virtiofs --sock /s -B /b".split_whitespace()).unwrap();
        assert!(matches!(asked, Asked::Unsupported("virtiofs")));
    }

    #[test]
    fn help_stays_as_people_know_it() {
        insta::assert_snapshot!("help", command().term_width(100).render_long_help().to_string());
        let mut command = command().term_width(100);
        let fuse = command.find_subcommand_mut("fuse").unwrap();
        insta::assert_snapshot!("help_fuse", fuse.render_long_help().to_string());
    }

    #[test]
    fn the_version_block_has_the_line_that_tools_look_for() {
        assert!(build::VERSION.lines().any(|line| line.starts_with("Git Commit:")));
    }
}
