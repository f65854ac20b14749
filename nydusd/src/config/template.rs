//! A configuration document with blanks, as a snapshotter holds it: read once, filled in per image.
//!
//! The document stays a document. Only the keys that a `set_` method names are touched; everything else,
//! including keys that this version knows nothing about, comes out as it went in.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Config, ConfigError, Dialect, Parsed, document, read, to_value};

/// A document of either dialect that is being filled in. Cheap enough to clone per image.
#[derive(Debug, Clone, PartialEq)]
pub struct Template {
    dialect: Dialect,
    document: Value,
}

impl Template {
    /// Takes a document, JSON or TOML; fails if a mount would fail for another reason than a blank.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let document = to_value(text)?;
        let dialect = document::resolve(&document)?.config.dialect;
        Ok(Self { dialect, document })
    }

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&read(path)?)
    }

    /// Returns the configuration that the document now stands for, and the keys that mean nothing to us.
    pub fn resolve(&self) -> Result<Parsed, ConfigError> {
        document::resolve(&self.document)
    }

    /// Returns the configuration that the document now stands for, provided that it has no blanks left.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let config = self.resolve()?.config;
        config.ready_to_mount()?;
        Ok(config)
    }

    /// Returns the document.
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// Returns the document as JSON text: what goes into a file or into the body of a mount request.
    pub fn to_json(&self) -> String {
        self.document.to_string()
    }

    /// Returns the kind of the backend: `registry`, `localfs`, ...
    pub fn backend_kind(&self) -> &str {
        let backend = match self.dialect {
            Dialect::V1 => &self.document["device"]["backend"],
            Dialect::V2 => &self.document["backend"],
        };
        backend["type"].as_str().unwrap_or_default()
    }

    /// Returns a key of the backend's own table.
    pub fn backend(&self, key: &str) -> Option<&Value> {
        self.backend_table()?.get(key)
    }

    /// Returns the backend's own table.
    pub fn backend_table(&self) -> Option<&Value> {
        match self.dialect {
            Dialect::V1 => self.document.get("device")?.get("backend")?.get("config"),
            Dialect::V2 => self.document.get("backend")?.get(self.backend_kind()),
        }
    }

    /// Sets a key of the backend's own table (`host`, `repo`, `auth`, `registry_token`, `scheme`, `mirrors`, ...).
    pub fn set_backend(&mut self, key: &str, value: impl Into<Value>) {
        let kind = self.backend_kind().to_owned();
        let table = match self.dialect {
            Dialect::V1 => descend(&mut self.document, &["device", "backend", "config"]),
            Dialect::V2 => descend(&mut self.document, &["backend", &kind]),
        };
        table.insert(key.to_owned(), value.into());
    }

    /// Removes a key of the backend's own table.
    pub fn remove_backend(&mut self, key: &str) {
        let kind = self.backend_kind().to_owned();
        let table = match self.dialect {
            Dialect::V1 => descend(&mut self.document, &["device", "backend", "config"]),
            Dialect::V2 => descend(&mut self.document, &["backend", &kind]),
        };
        table.remove(key);
    }

    /// Sets the instance id.
    pub fn set_id(&mut self, id: &str) {
        let parent = match self.dialect {
            Dialect::V1 => descend(&mut self.document, &["device"]),
            Dialect::V2 => descend(&mut self.document, &[]),
        };
        parent.insert("id".to_owned(), json!(id));
    }

    /// Sets the directory of the cache files.
    pub fn set_work_dir(&mut self, dir: &Path) {
        let cache = match self.dialect {
            Dialect::V1 => descend(&mut self.document, &["device", "cache", "config"]),
            Dialect::V2 => descend(&mut self.document, &["cache", "filecache"]),
        };
        cache.insert("work_dir".to_owned(), json!(dir.to_string_lossy()));
        let cache = match self.dialect {
            Dialect::V1 => descend(&mut self.document, &["device", "cache"]),
            Dialect::V2 => descend(&mut self.document, &["cache"]),
        };
        let blank = cache.get("type").and_then(Value::as_str).is_none_or(str::is_empty);
        if blank {
            cache.insert("type".to_owned(), json!("blobcache"));
        }
    }

    /// Returns the directory of the cache files, as written.
    pub fn work_dir(&self) -> Option<&str> {
        match self.dialect {
            Dialect::V1 => self.document["device"]["cache"]["config"]["work_dir"].as_str(),
            Dialect::V2 => self.document["cache"]["filecache"]["work_dir"].as_str(),
        }
    }

    /// Sets a header that every mirror is sent; a template that names one registry for all images would
    /// send them all there, so the one who knows the image sets `X-Dragonfly-Registry`. With `only_present`, a mirror
    /// that does not have the header yet is left alone.
    pub fn set_mirror_header(&mut self, name: &str, value: &str, only_present: bool) {
        let kind = self.backend_kind().to_owned();
        let table = match self.dialect {
            Dialect::V1 => descend(&mut self.document, &["device", "backend", "config"]),
            Dialect::V2 => descend(&mut self.document, &["backend", &kind]),
        };
        let Some(mirrors) = table.get_mut("mirrors").and_then(Value::as_array_mut) else {
            return;
        };
        for mirror in mirrors {
            let headers = descend(mirror, &["headers"]);
            let present = headers.keys().find(|key| key.eq_ignore_ascii_case(name)).cloned();
            match present {
                Some(key) => drop(headers.insert(key, json!(value))),
                None if only_present => {}
                None => drop(headers.insert(name.to_owned(), json!(value))),
            }
        }
    }

    /// Writes `prefetch_all: false` where prefetch is configured and nothing is said about it, as the
    /// snapshotter that we replace does.
    pub fn default_prefetch_all(&mut self, all: bool) {
        if self.dialect == Dialect::V1
            && let Some(Value::Object(prefetch)) = self.document.get_mut("fs_prefetch")
        {
            prefetch.entry("prefetch_all").or_insert(json!(all));
        }
    }
}

/// Returns the table at `path`, made on the way where it is missing or not a table.
fn descend<'a>(value: &'a mut Value, path: &[&str]) -> &'a mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let Value::Object(map) = value else { unreachable!("made an object above") };
    match path {
        [] => map,
        [first, rest @ ..] => descend(map.entry(*first).or_insert(Value::Null), rest),
    }
}
