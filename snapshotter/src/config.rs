//! What the snapshotter is told: flags, then config.toml, then defaults.
//!
//! The file is the one of the program we replace, so keys that we do not know are named and passed over; a wrong type or a
//! value that cannot be followed stops the start.

use std::path::{Path, PathBuf};

use toml::Table;

use crate::cli::Cli;
use crate::daemons::{Mode, Recovery};
use crate::layout::{Layout, fits_socket};
use crate::server::SocketOwner;

mod keys;

use keys::Keys;

/// Chosen by the replaced program because CRI before 2.0 reports the image file system from there.
const ROOT: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.nydus";
const ADDRESS: &str = "/run/containerd-nydus/containerd-nydus-grpc.sock";
const SYSTEM_ADDRESS: &str = "/run/containerd-nydus/system.sock";
const NYDUSD_CONFIG: &str = "/etc/nydus/nydusd-config.json";
/// containerd's own socket.
const IMAGE_SERVICE: &str = "/run/containerd/containerd.sock";
/// As the replaced program: in MB.
const LOG_ROTATION: u64 = 100;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML.
    #[error("{} is not valid TOML", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key holds the wrong kind of value.
    #[error("key {key} must be {wanted}, and is {got}")]
    Type {
        /// The key.
        key: String,
        /// What it must be.
        wanted: &'static str,
        /// What it is.
        got: &'static str,
    },
    /// A key or flag holds a value that cannot be followed.
    #[error("{key}: {why}")]
    Value {
        /// The key or flag.
        key: String,
        /// What to do about it.
        why: String,
    },
}

/// Where the log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTo {
    /// Standard output.
    Stdout,
    /// A file in this directory.
    Directory(PathBuf),
}

/// The configuration, resolved.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of all state.
    pub root: PathBuf,
    /// Socket for containerd.
    pub address: PathBuf,
    /// Owner of that socket.
    pub owner: SocketOwner,
    /// Where the log goes.
    pub log_to: LogTo,
    /// `trace` to `error`.
    pub log_level: tracing::Level,
    /// Template of nydusd's configuration.
    pub template: PathBuf,
    /// The nydusd program, as named; `None`: to be looked for.
    pub nydusd: Option<PathBuf>,
    /// The nydus-image program, as named; `None`: to be looked for.
    pub nydus_image: Option<PathBuf>,
    /// Whether eStargz layers are read lazily.
    pub estargz: bool,
    /// How images are spread over daemons.
    pub mode: Mode,
    /// What happens after a daemon's death.
    pub recovery: Recovery,
    /// nydusd's threads.
    pub threads: Option<u32>,
    /// nydusd's log rotation, MB.
    pub log_rotation: u64,
    /// Whether daemons end with us.
    pub end_on_close: bool,
    /// Where metrics are served, `host:port`.
    pub metrics: Option<String>,
    /// Where the system API is served.
    pub system: Option<(PathBuf, SocketOwner)>,
    /// Whether every overlay is mounted `volatile`.
    pub volatile: bool,
    /// Where blobs are cached; `None`: where the template says.
    pub cache: Option<PathBuf>,
    /// Whether registries' certificates go unchecked.
    pub skip_verify: bool,
    /// containerd's socket, if kubelet's image service is served.
    pub image_service: Option<PathBuf>,
}

impl Config {
    /// Reads the file that `cli` names, if any, and lets flags override it; returns warnings for a log that is not open yet.
    ///
    /// # Errors
    /// When a key or flag cannot be followed.
    pub fn load(cli: &Cli) -> Result<(Self, Vec<String>), ConfigError> {
        let Some(path) = &cli.config else { return Self::resolve(cli, Table::new()) };
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        Self::parse(&text, path, cli)
    }

    /// As [`Config::load`], of a file's text; `path` is for messages.
    ///
    /// # Errors
    /// When a key or flag cannot be followed.
    pub fn parse(text: &str, path: &Path, cli: &Cli) -> Result<(Self, Vec<String>), ConfigError> {
        let table: Table =
            text.parse().map_err(|source| ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) })?;
        match table.get("version").map(toml::Value::as_integer) {
            Some(Some(1)) => Self::resolve(cli, table),
            _ => Err(value("version", "must be 1: add the line `version = 1` at the top of the file")),
        }
    }

    fn resolve(cli: &Cli, table: Table) -> Result<(Self, Vec<String>), ConfigError> {
        let (keys, mut warnings) = Keys::check(table)?;
        if cli.nydus_overlayfs_path.is_some() {
            warnings.push("flag --nydus-overlayfs-path has no effect yet".into());
        }
        let path = |flag: &Option<PathBuf>, key: &str, default: &str| {
            flag.clone().unwrap_or_else(|| keys.text(key).unwrap_or(default).into())
        };
        let root = path(&cli.root, "root", ROOT);
        check_root(&root)?;
        let address = path(&cli.address, "address", ADDRESS);
        check_socket("address", &address)?;
        let fs_driver = cli.fs_driver.as_deref().or(keys.text("daemon.fs_driver")).unwrap_or("fusedev");
        match fs_driver {
            "fusedev" => {}
            "fscache" | "blockdev" | "nodev" | "proxy" => {
                return Err(value("fs_driver", format!("{fs_driver:?} is not supported yet: use \"fusedev\"")));
            }
            other => return Err(value("fs_driver", format!("{other:?} is not known: use \"fusedev\""))),
        }
        let mode = match cli.daemon_mode.as_deref().or(keys.text("daemon_mode")) {
            None | Some("shared") => Mode::Shared,
            Some("dedicated" | "multiple") => Mode::Dedicated,
            Some("none") => {
                return Err(value("daemon_mode", "\"none\" is not supported yet: use \"shared\" or \"dedicated\""));
            }
            Some(other) => {
                return Err(value("daemon_mode", format!("{other:?} is not known: use \"shared\" or \"dedicated\"")));
            }
        };
        let recovery = match keys.text("daemon.recover_policy") {
            None | Some("restart") => Recovery::Restart,
            Some("none") => Recovery::None,
            Some("failover") => {
                warnings.push(
                    "key daemon.recover_policy: \"failover\" is not supported yet, a dead nydusd is restarted, and containers on it must be too".into(),
                );
                Recovery::Restart
            }
            Some(other) => {
                return Err(value(
                    "daemon.recover_policy",
                    format!("{other:?} is not known: use \"restart\" or \"none\""),
                ));
            }
        };
        let threads = match keys.number("daemon.threads_number") {
            None | Some(0) => None,
            Some(count @ 1..=1024) => Some(u32::try_from(count).expect("at most 1024")),
            Some(other) => return Err(value("daemon.threads_number", format!("{other} is not between 1 and 1024"))),
        };
        let log_rotation = match keys.number("daemon.log_rotation_size") {
            // Zero is "not given" to the replaced program.
            None | Some(0) => LOG_ROTATION,
            Some(size) => u64::try_from(size).map_err(|_| value("daemon.log_rotation_size", "must not be negative"))?,
        };
        let level = cli.log_level.as_deref().or(keys.text("log.level")).unwrap_or("info");
        let log_level = parse_level(level).ok_or_else(|| {
            value(
                "log level",
                format!("{level:?} is not known: use \"trace\", \"debug\", \"info\", \"warn\" or \"error\""),
            )
        })?;
        let log_to = if cli.log_to_stdout.or(keys.flag("log.log_to_stdout")).unwrap_or(false) {
            LogTo::Stdout
        } else {
            LogTo::Directory(keys.text("log.dir").map_or_else(|| Layout::new(&root).logs(), PathBuf::from))
        };
        let system = match keys.flag("system.enable") {
            Some(true) => {
                let address = PathBuf::from(keys.text("system.address").unwrap_or(SYSTEM_ADDRESS));
                check_socket("system.address", &address)?;
                Some((address, owner(&keys, "system.uid", "system.gid")?))
            }
            _ => None,
        };
        let image_service = keys
            .flag("remote.auth.enable_cri_keychain")
            .unwrap_or(false)
            .then(|| keys.text("remote.auth.image_service_address").unwrap_or(IMAGE_SERVICE).into());
        let config = Self {
            address,
            owner: owner(&keys, "uid", "gid")?,
            log_to,
            log_level,
            template: path(&cli.nydusd_config, "daemon.nydusd_config", NYDUSD_CONFIG),
            nydusd: cli.nydusd.clone().or_else(|| keys.text("daemon.nydusd_path").map(PathBuf::from)),
            nydus_image: cli.nydus_image.clone().or_else(|| keys.text("daemon.nydusimage_path").map(PathBuf::from)),
            estargz: keys.flag("experimental.enable_stargz").unwrap_or(true),
            mode,
            recovery,
            threads,
            log_rotation,
            end_on_close: keys.flag("cleanup_on_close").unwrap_or(false),
            metrics: keys.text("metrics.address").map(str::to_owned),
            system,
            volatile: keys.flag("snapshot.enable_overlayfs_volatile").unwrap_or(false),
            cache: keys.text("cache_manager.cache_dir").map(PathBuf::from),
            skip_verify: keys.flag("remote.skip_ssl_verify").unwrap_or(false),
            image_service,
            root,
        };
        Ok((config, warnings))
    }
}

fn check_root(root: &Path) -> Result<(), ConfigError> {
    let bad = |why: &str| Err(value("root", format!("{} {why}", root.display())));
    if !root.is_absolute() {
        return bad("is not an absolute path");
    }
    if root.to_str().is_none_or(|text| text.contains([':', ',', '\\'])) {
        // Lower directories are a list with colons among options with commas.
        return bad("holds a character that mount options cannot: use a path without ':', ',' and '\\'");
    }
    if !Layout::new(root).sockets_fit() {
        return bad("is too long for the sockets below it: use at most 70 bytes");
    }
    Ok(())
}

fn check_socket(key: &str, path: &Path) -> Result<(), ConfigError> {
    if !fits_socket(path) {
        return Err(value(key, format!("{} is too long for a socket: use at most 107 bytes", path.display())));
    }
    Ok(())
}

fn owner(keys: &Keys, user: &str, group: &str) -> Result<SocketOwner, ConfigError> {
    let id = |key: &str| match keys.number(key) {
        // Zero is "not given" to the replaced program, and root is who we are.
        None | Some(0) => Ok(None),
        Some(id) => u32::try_from(id).map(Some).map_err(|_| value(key, format!("{id} is not a user or group id"))),
    };
    Ok(SocketOwner { user: id(user)?, group: id(group)? })
}

fn parse_level(text: &str) -> Option<tracing::Level> {
    match text.to_ascii_lowercase().as_str() {
        // The levels of the replaced program's logger that ours does not have.
        "warning" => Some(tracing::Level::WARN),
        "fatal" | "panic" => Some(tracing::Level::ERROR),
        other => other.parse().ok(),
    }
}

fn value(key: impl Into<String>, why: impl Into<String>) -> ConfigError {
    ConfigError::Value { key: key.into(), why: why.into() }
}

/// Finds a program: as named if that is a path, else beside our own executable, else on `PATH`.
pub fn find_program(name: &Path, own: Option<&Path>, search: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    if name.components().count() > 1 {
        return is_program(name).then(|| name.to_path_buf());
    }
    let beside = own.and_then(Path::parent).map(|directory| directory.join(name));
    let on_path = search.map(std::env::split_paths).into_iter().flatten().map(|directory| directory.join(name));
    beside.into_iter().chain(on_path).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests;
