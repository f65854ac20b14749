//! The configuration of `nydus-p2p`: one TOML file, then flags.
//!
//! The file is ours, so a key that is not known is an error: a misspelt quota must not be found when the disk is full.
//! [`Config::load`] gives a value that has been checked; nothing else in the mirror looks at text again.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use url::Url;

use crate::http::Reach;
use crate::node;
use crate::quantity::{size, span};

pub use crate::quantity::parse_size;

/// Where the daemon looks when no `--config` is given; a missing file there means the defaults.
pub const DEFAULT_PATH: &str = "/etc/nydus/nydus-p2p.toml";

/// Why a configuration was refused; completes "could not load the configuration".
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}; check the path given with --config and its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML, or a key is unknown or of the wrong type.
    #[error("{}: {error}correct or remove the key shown above; config/nydus-p2p.toml explains every key", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The place and the reason, several lines.
        error: Box<toml::de::Error>,
    },
    /// The value of a key makes no sense.
    #[error("`{key}`: {reason}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong and what would be right.
        reason: String,
    },
}

/// Everything the mirror is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where registry requests are answered.
    pub listen: SocketAddr,
    /// Where `/healthy` is answered.
    pub health_listen: SocketAddr,
    /// Where `/metrics` is answered.
    pub metrics_listen: SocketAddr,
    /// The directory of the piece cache; one daemon at a time.
    pub data_dir: PathBuf,
    /// Bytes of cached pieces before blobs are evicted.
    #[serde(deserialize_with = "size")]
    pub quota: u64,
    /// The registry of requests that name none; empty: such requests are refused.
    pub default_registry: String,
    /// Whether a ranged request makes the whole blob be fetched in the background.
    pub prefetch: bool,
    /// A `tracing` filter: `error`, `warn`, `info`, `debug`, `trace`.
    pub log_level: String,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Other mirrors, asked in order before the registry.
    #[serde(rename = "mirror")]
    pub mirrors: Vec<Mirror>,
    /// The registries that callers may name.
    #[serde(rename = "registry")]
    pub registries: Vec<Registry>,
    /// The other nodes; none: this node is by itself.
    pub swarm: Option<node::Config>,
}

/// How long things may take.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// Until a connection is there.
    #[serde(deserialize_with = "span")]
    pub connect: Duration,
    /// Until an upstream mirror's headers are there.
    #[serde(deserialize_with = "span")]
    pub first_byte_mirror: Duration,
    /// Until a registry's headers are there.
    #[serde(deserialize_with = "span")]
    pub first_byte_registry: Duration,
    /// Between two bytes of a body.
    #[serde(deserialize_with = "span")]
    pub stall: Duration,
    /// Until a caller gets our headers, if the first bytes are still on their way.
    #[serde(deserialize_with = "span")]
    pub headers: Duration,
    /// For requests that are being answered when the daemon is told to stop.
    #[serde(deserialize_with = "span")]
    pub drain: Duration,
}

/// Another `nydus-p2p`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// Its scheme, host and port.
    #[serde(deserialize_with = "url")]
    pub url: Url,
    /// Whether it is sent the callers' Authorization, and its answers about tags and rights count.
    #[serde(default)]
    pub trusted: bool,
    /// Whether its certificate goes unchecked.
    #[serde(default)]
    pub skip_verify: bool,
    /// PEM files with further roots.
    #[serde(default)]
    pub ca_files: Vec<PathBuf>,
}

/// A registry that callers may name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// `host[:port]` as callers say it.
    pub name: String,
    /// Where it is; empty: `https://` and the name.
    #[serde(default, deserialize_with = "some_url")]
    pub url: Option<Url>,
    /// Whether its certificate goes unchecked.
    #[serde(default)]
    pub skip_verify: bool,
    /// PEM files with further roots.
    #[serde(default)]
    pub ca_files: Vec<PathBuf>,
    /// An account that is lent to callers who bring no Authorization.
    #[serde(default)]
    pub lend: Option<Account>,
}

/// A user of a registry.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// The user's name.
    pub username: String,
    /// A file whose first line is the password or token.
    pub password_file: PathBuf,
}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Account").field("username", &self.username).finish_non_exhaustive()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            // The ports that users of Dragonfly know, on loopback: the caller's right is checked, but who may load us is not.
            listen: SocketAddr::from(([127, 0, 0, 1], 4001)),
            health_listen: SocketAddr::from(([127, 0, 0, 1], 4003)),
            metrics_listen: SocketAddr::from(([127, 0, 0, 1], 4002)),
            data_dir: PathBuf::from("/var/lib/nydus-p2p"),
            quota: 20 << 30,
            default_registry: String::new(),
            prefetch: false,
            log_level: "info".into(),
            timeouts: Timeouts::default(),
            mirrors: Vec::new(),
            registries: Vec::new(),
            swarm: None,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            first_byte_mirror: Duration::from_secs(5),
            first_byte_registry: Duration::from_secs(10),
            stall: Duration::from_secs(10),
            headers: Duration::from_secs(4),
            drain: Duration::from_secs(10),
        }
    }
}

impl Config {
    /// Reads `path` and checks it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Reads `text`, which came from `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError::Parse { path: path.to_owned(), error: Box::new(error) })
    }

    /// Checks what types cannot say, and adds Docker Hub where it is not configured.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        let value = |key: &str, reason: String| Err(ConfigError::Value { key: key.into(), reason });
        if self.data_dir.as_os_str().is_empty() || !self.data_dir.is_absolute() {
            return value("data_dir", format!("`{}` is not an absolute path", self.data_dir.display()));
        }
        if self.quota < 16 << 20 {
            return value("quota", format!("{} bytes is too little; give at least 16MiB", self.quota));
        }
        for (key, span) in [
            ("timeouts.connect", self.timeouts.connect),
            ("timeouts.first_byte_mirror", self.timeouts.first_byte_mirror),
            ("timeouts.first_byte_registry", self.timeouts.first_byte_registry),
            ("timeouts.stall", self.timeouts.stall),
            ("timeouts.headers", self.timeouts.headers),
        ] {
            if span < Duration::from_millis(10) || span > Duration::from_secs(600) {
                return value(key, format!("{span:?} is out of range; give 10ms to 600s"));
            }
        }
        for mirror in &self.mirrors {
            usable(&mirror.url, "mirror.url")?;
        }
        if !self.registries.iter().any(|registry| canonical(&registry.name) == "docker.io") {
            self.registries.push(Registry {
                name: "docker.io".into(),
                url: None,
                skip_verify: false,
                ca_files: Vec::new(),
                lend: None,
            });
        }
        let mut names = BTreeSet::new();
        for registry in &mut self.registries {
            registry.name = canonical(&registry.name);
            if registry.name.is_empty() || registry.name.contains(['/', '@', ' ', '?', '#']) {
                return value("registry.name", format!("`{}` is not host[:port]", registry.name));
            }
            if !names.insert(registry.name.clone()) {
                return value("registry.name", format!("`{}` is configured twice; remove one", registry.name));
            }
            if registry.url.is_none() {
                let host = if registry.name == "docker.io" { "registry-1.docker.io" } else { &registry.name };
                let url = Url::parse(&format!("https://{host}")).map_err(|source| ConfigError::Value {
                    key: "registry.name".into(),
                    reason: format!("`{}` is not host[:port]: {source}", registry.name),
                })?;
                registry.url = Some(url);
            }
            if let Some(url) = &registry.url {
                usable(url, "registry.url")?;
            }
        }
        self.default_registry = canonical(&self.default_registry);
        if !self.default_registry.is_empty() && !names.contains(&self.default_registry) {
            let reason = format!("`{}` has no [[registry]] entry; add one", self.default_registry);
            return value("default_registry", reason);
        }
        if let Some(Err((key, reason))) = self.swarm.as_ref().map(node::Config::check) {
            return value(key, reason);
        }
        tracing_subscriber::EnvFilter::try_new(&self.log_level).map_err(|source| ConfigError::Value {
            key: "log_level".into(),
            reason: format!("`{}`: {source}; give error, warn, info, debug or trace", self.log_level),
        })?;
        Ok(self)
    }
}

fn usable(url: &Url, key: &str) -> Result<(), ConfigError> {
    let value = |reason: String| Err(ConfigError::Value { key: key.into(), reason });
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return value(format!("`{url}` is not http://host[:port] or https://host[:port]"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return value("credentials do not belong into a URL; use [registry.lend]".into());
    }
    if !matches!(url.path(), "" | "/") || url.query().is_some() {
        return value(format!("`{url}` has a path; give scheme, host and port only"));
    }
    if !Reach::NotLinkLocal.covers_url(url) {
        return value(format!("`{url}` is a link-local address, which is never asked"));
    }
    Ok(())
}

/// Returns the one spelling of a registry's name: Docker Hub has three hosts, hosts have no case.
pub fn canonical(name: &str) -> String {
    let name = name.trim().to_ascii_lowercase();
    match name.as_str() {
        "index.docker.io" | "registry-1.docker.io" | "registry.hub.docker.com" => "docker.io".into(),
        _ => name,
    }
}

fn url<'de, D: Deserializer<'de>>(from: D) -> Result<Url, D::Error> {
    let text = String::deserialize(from)?;
    let wrong =
        |error| serde::de::Error::custom(format!("`{text}` is not http://host[:port] or https://host[:port]: {error}"));
    Url::parse(&text).map_err(wrong)
}

fn some_url<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Url>, D::Error> {
    url(from).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/x.toml"))?.checked()
    }

    #[test]
    fn the_sample_is_the_default_and_names_every_key() {
        let text = include_str!("../../../config/nydus-p2p.toml");
        let sample = parse(text).unwrap();
        assert_eq!(format!("{sample:?}"), format!("{:?}", Config::default().checked().unwrap()));
        // Commented examples must load as well: what a person uncomments has to be right.
        let all: String = text
            .lines()
            .map(|line| line.strip_prefix("#: ").unwrap_or(line))
            .fold(String::new(), |all, line| all + line + "\n");
        let all = parse(&all).unwrap();
        assert_eq!(all.mirrors.len(), 1);
        assert_eq!(all.registries.len(), 2);
        assert!(all.registries.iter().any(|registry| registry.lend.is_some()));
        assert_eq!(format!("{:?}", all.swarm.unwrap()), format!("{:?}", node::Config::default()));
        for key in [
            "listen",
            "health_listen",
            "metrics_listen",
            "data_dir",
            "quota",
            "default_registry",
            "prefetch",
            "log_level",
            "connect",
            "first_byte_mirror",
            "first_byte_registry",
            "stall",
            "headers",
            "drain",
            "url",
            "trusted",
            "skip_verify",
            "ca_files",
            "name",
            "username",
            "password_file",
            "advertise",
            "gossip_listen",
            "cluster_key_file",
            "seeds",
            "zone",
            "tls",
            "window",
            "node_window",
            "backlog",
            "uploads_per_piece",
            "waiters_per_piece",
            "uploads",
            "queue",
            "prefetch_window",
            "prefetch_reads",
            "prefetch_rate",
            "upload_rate",
            "download_rate",
            "source_rate",
            "trust",
            "hedge",
            "silence",
            "pending",
            "deadline",
            "lease",
            "report",
            "alone",
            "alone_spread",
            "dead",
            "quarantine",
            "withdrawn",
            "summary",
        ] {
            assert!(
                text.lines().any(|line| line.trim_start_matches("#: ").starts_with(&format!("{key} = "))),
                "{key} is not in the sample"
            );
        }
    }

    #[test]
    fn wrong_keys_and_values_name_the_file_the_key_and_the_fix() {
        let told = |text: &str| parse(text).unwrap_err().to_string();
        let unknown = told("quotta = \"1GiB\"");
        assert!(
            unknown.contains("/etc/x.toml") && unknown.contains("quotta") && unknown.contains("quota"),
            "{unknown}"
        );
        assert!(told("quota = \"much\"").contains("20GiB"));
        assert!(told("quota = \"1MiB\"").contains("16MiB"));
        assert!(told("quota = 5").contains("quota"));
        assert!(told("data_dir = \"x\"").contains("data_dir"));
        assert!(told("[timeouts]\nstall = \"1h\"").contains("500ms"));
        assert!(told("[timeouts]\nstall = \"0s\"").contains("timeouts.stall"));
        assert!(told("[[mirror]]\nurl = \"ftp://x\"").contains("mirror.url"));
        assert!(told("[[registry]]\nname = \"x\"\nurl = \"http://169.254.169.254\"").contains("link-local"));
        assert!(told("[[registry]]\nname = \"x\"\nurl = \"http://u:p@x\"").contains("registry.lend"));
        assert!(told("[[registry]]\nname = \"a/b\"").contains("host[:port]"));
        assert!(told("[[registry]]\nname = \"x\"\n[[registry]]\nname = \"X\"").contains("twice"));
        assert!(told("default_registry = \"quay.io\"").contains("[[registry]]"));
        assert!(told("log_level = \"nydus=loud\"").contains("log_level"));
        for (line, key) in [
            ("cluster_key_file = \"key\"", "swarm.cluster_key_file"),
            ("advertise = \"0.0.0.0:4011\"", "swarm.advertise"),
            ("advertise = \"node\"", "10.0.0.3:4011"),
            ("seeds = [\"http://x\"]", "swarm.seeds"),
            ("window = 0", "swarm.window"),
            ("hedge = \"2s\"", "swarm.hedge"),
            ("silence = \"11m\"", "swarm.silence"),
            ("pending = \"250ms\"", "swarm.silence"),
            ("lease = \"100ms\"", "swarm.pending"),
            ("deadline = \"20ms\"", "swarm.deadline"),
            ("report = \"0s\"", "swarm.report"),
            ("prefetch_reads = 0", "swarm.prefetch_reads"),
            ("queue = 100000", "swarm.queue"),
            ("quarantine = \"8\"", "quarantine"),
            ("zone = \"a b\"", "swarm.zone"),
            ("upload_rate = \"1KiB\"", "swarm.upload_rate"),
            ("trust = \"nobody\"", "proof"),
            ("hedgee = \"2s\"", "hedge"),
        ] {
            let text = told(&format!("[swarm]\n{line}"));
            assert!(text.contains(key), "{line}: {text}");
        }
    }

    #[test]
    fn docker_hub_is_known_without_a_word_and_has_one_name() {
        let config = parse("").unwrap();
        assert_eq!(config.registries.len(), 1);
        assert_eq!(config.registries[0].url.as_ref().unwrap().as_str(), "https://registry-1.docker.io/");
        for name in ["index.docker.io", "registry-1.docker.io", "Docker.IO"] {
            assert_eq!(canonical(name), "docker.io");
        }
    }
}
