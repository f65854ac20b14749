//! The two shapes of a configuration document.
//!
//! Each is a plain serde structure. Version 1 is read as what version 2 would have said.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Version 1.
#[derive(Serialize, Deserialize)]
pub(super) struct V1 {
    pub(super) device: V1Device,
    #[serde(default = "direct")]
    pub(super) mode: String,
    #[serde(default)]
    pub(super) digest_validate: bool,
    #[serde(default)]
    pub(super) iostats_files: bool,
    #[serde(default)]
    pub(super) enable_xattr: bool,
    #[serde(default)]
    pub(super) access_pattern: bool,
    #[serde(default)]
    pub(super) latest_read_files: bool,
    #[serde(default = "one_mebibyte")]
    pub(super) amplify_io: u64,
    #[serde(default)]
    pub(super) fs_prefetch: Option<V1Prefetch>,
    #[serde(default)]
    pub(super) read_deadline: Option<u64>,
    /// Written by snapshotters, never used by a daemon.
    #[serde(default)]
    pub(super) warmup: Option<Value>,
    #[serde(default)]
    pub(super) id_mapping: Option<Value>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct V1Device {
    #[serde(default)]
    pub(super) id: String,
    pub(super) backend: V1Backend,
    #[serde(default)]
    pub(super) external_backends: Vec<Value>,
    #[serde(default)]
    pub(super) cache: V1Cache,
}

#[derive(Serialize, Deserialize)]
pub(super) struct V1Backend {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) config: Value,
}

#[derive(Default, Serialize, Deserialize)]
pub(super) struct V1Cache {
    #[serde(default, rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) compressed: bool,
    #[serde(default)]
    pub(super) validate: bool,
    #[serde(default)]
    pub(super) skip_verification: bool,
    #[serde(default)]
    pub(super) config: Option<FileCache>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct V1Prefetch {
    #[serde(default)]
    pub(super) enable: bool,
    #[serde(default = "eight")]
    pub(super) threads_count: usize,
    #[serde(default = "one_mebibyte")]
    pub(super) merging_size: u64,
    #[serde(default)]
    pub(super) bandwidth_rate: u32,
    // True here and false in version 2: so it is in the program we replace.
    #[serde(default = "yes")]
    pub(super) prefetch_all: bool,
    #[serde(default)]
    pub(super) stream_prefetch: bool,
}

/// Version 2.
#[derive(Serialize, Deserialize)]
pub(super) struct V2 {
    pub(super) version: u32,
    #[serde(default)]
    pub(super) id: String,
    #[serde(default)]
    pub(super) backend: Option<V2Backend>,
    #[serde(default)]
    pub(super) external_backends: Vec<Value>,
    #[serde(default)]
    pub(super) cache: Option<V2Cache>,
    #[serde(default)]
    pub(super) rafs: Option<V2Rafs>,
    #[serde(default)]
    pub(super) overlay: Option<Value>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct V2Backend {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(flatten)]
    pub(super) tables: Map<String, Value>,
}

#[derive(Default, Serialize, Deserialize)]
pub(super) struct V2Cache {
    #[serde(default, rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) compressed: bool,
    #[serde(default)]
    pub(super) validate: bool,
    #[serde(default)]
    pub(super) skip_verification: bool,
    #[serde(default)]
    pub(super) prefetch: Option<V2Prefetch>,
    #[serde(default)]
    pub(super) filecache: Option<FileCache>,
    #[serde(default)]
    pub(super) fscache: Option<Value>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct FileCache {
    #[serde(default = "here")]
    pub(super) work_dir: String,
    #[serde(default)]
    pub(super) disable_indexed_map: bool,
    #[serde(default)]
    pub(super) enable_encryption: bool,
    #[serde(default)]
    pub(super) enable_convergent_encryption: bool,
    #[serde(default)]
    pub(super) encryption_key: String,
}

#[derive(Serialize, Deserialize)]
pub(super) struct V2Rafs {
    #[serde(default = "direct")]
    pub(super) mode: String,
    #[serde(default = "one_mebibyte")]
    pub(super) batch_size: u64,
    #[serde(default)]
    pub(super) validate: bool,
    #[serde(default)]
    pub(super) enable_xattr: bool,
    #[serde(default)]
    pub(super) iostats_files: bool,
    #[serde(default)]
    pub(super) access_pattern: bool,
    #[serde(default)]
    pub(super) latest_read_files: bool,
    #[serde(default)]
    pub(super) prefetch: Option<V2Prefetch>,
    #[serde(default)]
    pub(super) read_deadline: Option<u64>,
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct V2Prefetch {
    pub(super) enable: bool,
    #[serde(default = "eight")]
    pub(super) threads: usize,
    #[serde(default = "one_mebibyte")]
    pub(super) batch_size: u64,
    #[serde(default)]
    pub(super) bandwidth_limit: u32,
    #[serde(default)]
    pub(super) prefetch_all: bool,
    #[serde(default)]
    pub(super) stream_prefetch: bool,
}

fn direct() -> String {
    "direct".to_owned()
}

fn here() -> String {
    ".".to_owned()
}

fn one_mebibyte() -> u64 {
    1 << 20
}

fn eight() -> usize {
    8
}

fn yes() -> bool {
    true
}

impl From<V1> for V2 {
    fn from(v1: V1) -> Self {
        let V1Device { id, backend, external_backends, cache } = v1.device;
        let prefetch = v1.fs_prefetch.map(|given| V2Prefetch {
            enable: given.enable,
            threads: given.threads_count,
            batch_size: given.merging_size,
            bandwidth_limit: given.bandwidth_rate,
            prefetch_all: given.prefetch_all,
            stream_prefetch: given.stream_prefetch,
        });
        Self {
            version: 2,
            id,
            backend: Some(V2Backend {
                tables: Map::from_iter([(backend.kind.clone(), backend.config)]),
                kind: backend.kind,
            }),
            external_backends,
            cache: Some(V2Cache {
                kind: cache.kind,
                compressed: cache.compressed,
                validate: cache.validate,
                skip_verification: cache.skip_verification,
                prefetch: None,
                filecache: cache.config,
                fscache: None,
            }),
            rafs: Some(V2Rafs {
                mode: v1.mode,
                batch_size: v1.amplify_io,
                validate: v1.digest_validate,
                enable_xattr: v1.enable_xattr,
                iostats_files: v1.iostats_files,
                access_pattern: v1.access_pattern,
                latest_read_files: v1.latest_read_files,
                prefetch,
                read_deadline: v1.read_deadline,
            }),
            overlay: None,
        }
    }
}
