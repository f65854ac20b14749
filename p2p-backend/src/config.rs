//! The `backend` section of nydusd's configuration.
//!
//! The files are written by others for the program that we replace, so unknown keys are accepted here and
//! named by [`Config::unknown_keys`]; wrong types are refused. Everything that is read is also written back,
//! because a snapshotter reads a template, fills it in and hands it on. `Debug` shows no secrets.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// Types that the program we replace knows and we do not serve.
const UNSUPPORTED: [&str; 4] = ["oss", "s3", "localdisk", "http-proxy"];

/// Which kind of place holds the blobs, and how to reach it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", content = "config", rename_all = "lowercase")]
pub enum Config {
    /// Plain files in a directory.
    LocalFs(LocalFs),
    /// An OCI registry, behind mirrors or not.
    Registry(Box<Registry>),
}

/// A backend section that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The type is known, but not to us.
    #[error("backend type `{0}` is not supported yet: use `registry` or `localfs`")]
    Unsupported(String),
    /// The type is not known to anybody.
    #[error("backend type `{0}` is unknown: use `registry` or `localfs`")]
    Unknown(String),
    /// A key has the wrong type.
    #[error("backend `{kind}`: {source}")]
    Key {
        /// The type of the backend.
        kind: String,
        /// Which key, and what is wrong with it.
        source: serde_json::Error,
    },
}

impl Config {
    /// Reads the section of a backend from its type and its table.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the type is not served or a key has the wrong type.
    pub fn from_parts(kind: &str, table: Value) -> Result<Self, ConfigError> {
        fn read<T: DeserializeOwned>(kind: &str, table: Value) -> Result<T, ConfigError> {
            serde_json::from_value(table).map_err(|source| ConfigError::Key { kind: kind.to_owned(), source })
        }
        match kind {
            "localfs" => Ok(Self::LocalFs(read(kind, table)?)),
            "registry" => Ok(Self::Registry(read(kind, table)?)),
            known if UNSUPPORTED.contains(&known) => Err(ConfigError::Unsupported(known.to_owned())),
            other => Err(ConfigError::Unknown(other.to_owned())),
        }
    }

    /// Returns the type as it is written in files.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LocalFs(_) => "localfs",
            Self::Registry(_) => "registry",
        }
    }

    /// Returns the paths of all keys of `table`, from which this was read, that mean nothing to us.
    pub fn unknown_keys(&self, table: &Value) -> Vec<String> {
        let known = serde_json::to_value(self).unwrap_or_default();
        let mut found = Vec::new();
        compare("", table, &known["config"], &mut found);
        found
    }
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Tagged {
            #[serde(rename = "type")]
            kind: String,
            #[serde(default = "empty")]
            config: Value,
        }
        fn empty() -> Value {
            Value::Object(serde_json::Map::new())
        }
        let Tagged { kind, config } = Tagged::deserialize(deserializer)?;
        Self::from_parts(&kind, config).map_err(D::Error::custom)
    }
}

fn compare(at: &str, given: &Value, known: &Value, found: &mut Vec<String>) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (key, value) in given {
                let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                match known.get(key) {
                    Some(known) => compare(&path, value, known, found),
                    None => found.push(path),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (index, (value, known)) in given.iter().zip(known).enumerate() {
                compare(&format!("{at}[{index}]"), value, known, found);
            }
        }
        _ => {}
    }
}

/// Files in a directory, named by blob id.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LocalFs {
    /// The one file that every blob id maps to; empty: use `dir`.
    pub blob_file: String,
    /// The directory.
    pub dir: String,
    /// Further directories to look in.
    pub alt_dirs: Vec<String>,
}

/// A repository of a registry. Times are in seconds.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Registry {
    /// `http`; anything else, also nothing, is `https`.
    pub scheme: String,
    /// `host[:port]`. Empty in a template.
    pub host: String,
    /// `namespace/name`. Empty in a template.
    pub repo: String,
    /// Base64 of `user:password`.
    pub auth: Option<String>,
    /// An access token, used until it is refused.
    pub registry_token: Option<String>,
    /// Replaces the scheme of where blobs are redirected to.
    pub blob_url_scheme: String,
    /// Replaces host and port of where blobs are redirected to.
    pub blob_redirected_host: String,
    /// Believes every certificate.
    pub skip_verify: bool,
    /// PEM files with authorities to believe besides those of the system.
    pub ca_cert_files: Vec<String>,
    /// Lowers the time to the first byte; never caps a body that moves. 0: as by default.
    pub timeout: Option<u64>,
    /// Lowers the time to connect. 0: as by default.
    pub connect_timeout: Option<u64>,
    /// Read and kept, never used: the deadline of a read decides how often it is tried.
    pub retry_limit: Option<u64>,
    /// A proxy in front of the registry.
    pub proxy: Proxy,
    /// Mirrors, asked in order before the registry.
    pub mirrors: Vec<Mirror>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry")
            .field("scheme", &self.scheme)
            .field("host", &self.host)
            .field("repo", &self.repo)
            .field("auth", &self.auth.as_ref().map(|_| ".."))
            .field("registry_token", &self.registry_token.as_ref().map(|_| ".."))
            .field("skip_verify", &self.skip_verify)
            .field("proxy", &self.proxy)
            .field("mirrors", &self.mirrors)
            .finish_non_exhaustive()
    }
}

/// A proxy that knows about blobs (Dragonfly's, ours), in front of the registry. Times are in seconds.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Proxy {
    /// Its URL; empty: no proxy.
    pub url: String,
    /// Asked to find out whether it is well: 200 to 399 is. Empty: it is believed to be, until it fails.
    pub ping_url: String,
    /// Whether the registry is asked directly when the proxy fails.
    pub fallback: bool,
    /// Between two questions while it is not well.
    pub check_interval: u64,
    /// Without requests for so long, nothing is asked.
    pub check_pause_elapsed: u64,
    /// Asks the proxy for `http` URLs even of a registry with TLS, so that it can see the requests.
    pub use_http: bool,
    /// Read and kept, never used: it belongs to a library of Dragonfly.
    pub dragonfly_scheduler_endpoint: String,
}

impl Default for Proxy {
    fn default() -> Self {
        // The numbers of the program we replace.
        Self {
            url: String::new(),
            ping_url: String::new(),
            fallback: true,
            check_interval: 5,
            check_pause_elapsed: 300,
            use_http: false,
            dragonfly_scheduler_endpoint: String::new(),
        }
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL may hold a password.
        let url = url::Url::parse(&self.url).map(|url| crate::http::loggable(&url)).unwrap_or_default();
        f.debug_struct("Proxy").field("url", &url).field("fallback", &self.fallback).finish_non_exhaustive()
    }
}

/// A mirror of the registry. Times are in seconds.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mirror {
    /// `http://host:port` or `https://host:port`; a path is ignored.
    pub host: String,
    /// Asked while the mirror is not well; below 500 it is well again. Empty: `<host>/v2/`.
    pub ping_url: String,
    /// Sent with every request to this mirror.
    pub headers: BTreeMap<String, String>,
    /// Token services are asked directly in every case; requests for blobs go through the mirror in every case.
    pub auth_through: bool,
    /// Between two questions while the mirror is not well.
    pub health_check_interval: u64,
    /// Broken connections in a row after which the mirror is not well. One that is silent costs its readers
    /// seconds and is not well at once.
    pub failure_limit: u32,
    /// Without requests for so long, nothing is asked.
    pub health_check_pause_elapsed: u64,
}

impl Default for Mirror {
    fn default() -> Self {
        // The numbers of the program we replace.
        Self {
            host: String::new(),
            ping_url: String::new(),
            headers: BTreeMap::new(),
            auth_through: false,
            health_check_interval: 5,
            failure_limit: 5,
            health_check_pause_elapsed: 300,
        }
    }
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The values of headers may be secrets.
        f.debug_struct("Mirror")
            .field("host", &self.host)
            .field("ping_url", &self.ping_url)
            .field("headers", &self.headers.keys())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The table of Dragonfly's guide.
    fn guide() -> Value {
        json!({"mirrors":[{"host":"http://127.0.0.1:4001","auth_through":false,
            "headers":{"X-Dragonfly-Registry":"https://index.docker.io"},"ping_url":"http://127.0.0.1:4003/healthy"}],
            "scheme":"https","skip_verify":true,"timeout":10,"connect_timeout":10,"retry_limit":2})
    }

    #[test]
    fn the_table_of_the_guide_is_read_and_written_back() {
        let config: Config = serde_json::from_value(json!({"type":"registry","config":guide()})).unwrap();
        assert!(config.unknown_keys(&guide()).is_empty());
        let Config::Registry(registry) = &config else { panic!("{config:?}") };
        assert_eq!(registry.mirrors[0].host, "http://127.0.0.1:4001");
        assert_eq!((registry.timeout, registry.mirrors[0].failure_limit), (Some(10), 5));
        let again: Config = serde_json::from_value(serde_json::to_value(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn unknown_keys_are_named_with_their_path() {
        let table = json!({"host":"h","proxi":{},"proxy":{"url":"","pingurl":""},"mirrors":[{"host":"http://m","x":1}],"readahead":false});
        let config = Config::from_parts("registry", table.clone()).unwrap();
        let mut unknown = config.unknown_keys(&table);
        unknown.sort();
        assert_eq!(unknown, ["mirrors[0].x", "proxi", "proxy.pingurl", "readahead"]);
    }

    #[test]
    fn other_types_are_refused_by_name() {
        for (kind, part) in [("oss", "not supported yet"), ("http-proxy", "not supported yet"), ("ftp", "unknown")] {
            let error = serde_json::from_value::<Config>(json!({"type": kind, "config": {}})).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains(part), "{error}");
        }
        let error = Config::from_parts("registry", json!({"timeout":"10"})).unwrap_err().to_string();
        assert!(error.contains("registry") && error.contains("\"10\""), "{error}");
    }

    #[test]
    fn debug_never_prints_secrets() {
        let table = json!({"auth":"hidden","registry_token":"hidden","proxy":{"url":"http://u:hidden@p:1"},
            "mirrors":[{"host":"http://m","headers":{"Authorization":"hidden"}}]});
        let config = Config::from_parts("registry", table).unwrap();
        assert!(!format!("{config:?}").contains("hidden"), "{config:?}");
    }
}
