//! What goes over a daemon's API socket, key by key as the program we replace writes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The state of a daemon as it reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum DaemonState {
    /// Started, serving the API, not mounted: waits for a takeover or a start.
    Init,
    /// Mounted, not serving.
    Ready,
    /// Serving.
    Running,
    /// About to end.
    Stopped,
    /// None of these.
    #[serde(other)]
    Unknown,
}

impl std::fmt::Display for DaemonState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Init => "INIT",
            Self::Ready => "READY",
            Self::Running => "RUNNING",
            Self::Stopped => "STOPPED",
            Self::Unknown => "UNKNOWN",
        })
    }
}

/// Which build of the program answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BuildInfo {
    /// Version, with the leading `v`.
    pub package_ver: String,
    /// Commit of the source.
    pub git_commit: String,
    /// When it was built.
    pub build_time: String,
    /// `release` or `debug`.
    pub profile: String,
    /// The compiler.
    pub rustc: String,
}

/// One mounted filesystem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MountInfo {
    /// `Rafs` or `PassthroughFs`.
    pub backend_type: String,
    /// Where it is in the daemon's tree.
    pub mountpoint: String,
    /// When it was mounted, `2026-07-20 10:00:00.0 +00:00:00`.
    pub mounted_time: String,
    /// Its configuration as a version 2 document without secrets.
    pub config: serde_json::Value,
}

/// The answer to `GET /api/v1/daemon`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DaemonInfo {
    /// The build.
    #[serde(default)]
    pub version: BuildInfo,
    /// `--id`.
    #[serde(default)]
    pub id: Option<String>,
    /// `--supervisor`.
    #[serde(default)]
    pub supervisor: Option<String>,
    /// The state.
    pub state: DaemonState,
    /// The mounts by mountpoint; `None` from the v2 route and from a daemon in INIT.
    #[serde(default)]
    pub backend_collection: Option<BTreeMap<String, MountInfo>>,
}

/// The kind of a filesystem in a mount request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsType {
    /// A RAFS image.
    Rafs,
    /// A directory of the host.
    Passthrough,
}

/// The body of `POST` and `PUT /api/v1/mount`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRequest {
    /// `rafs`, or one of the spellings of `passthrough_fs`.
    pub fs_type: String,
    /// Path of the bootstrap.
    pub source: String,
    /// The whole configuration document, as text.
    pub config: String,
    /// Paths that are fetched first.
    #[serde(default)]
    pub prefetch_files: Option<Vec<String>>,
}

impl MountRequest {
    /// Asks for a RAFS image.
    pub fn rafs(source: impl Into<String>, config: impl Into<String>) -> Self {
        Self { fs_type: "rafs".to_owned(), source: source.into(), config: config.into(), prefetch_files: None }
    }
}

/// The body of `PUT /api/v1/daemon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonChange {
    /// `off`, `error`, `warn`, `info`, `debug` or `trace`, in any case.
    pub log_level: String,
}

/// The body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// `UNDEFINED`.
    pub code: String,
    /// What went wrong.
    pub message: String,
}

/// Counters of one filesystem. The order of operations is Getattr, Readlink, Open, Release, Read, Statfs,
/// Getxattr, Listxattr, Opendir, Lookup, Readdir, Readdirplus, Access, Forget, BatchForget.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FsMetrics {
    /// Whether reads are counted per file.
    pub files_account_enabled: bool,
    /// Whether first accesses are recorded.
    pub access_pattern_enabled: bool,
    /// Whether recently read files are recorded.
    pub record_latest_read_files_enabled: bool,
    /// Whether latencies are measured.
    pub measure_latency: bool,
    /// The mountpoint.
    pub id: String,
    /// Files open now.
    pub nr_opens: u64,
    /// Bytes read.
    pub data_read: u64,
    /// Reads by size: <1K, 1K, 4K, 16K, 64K, 128K, 512K, >=1M.
    pub block_count_read: [u64; 8],
    /// Calls per operation.
    pub fop_hits: [u64; 15],
    /// Failed calls per operation.
    pub fop_errors: [u64; 15],
    /// Microseconds spent per operation.
    pub fop_cumulative_latency_total: [u64; 15],
    /// Reads by latency: <=200us, 1ms, 20ms, 50ms, 500ms, 1s, 2s, more.
    pub read_latency_dist: [u64; 8],
}

/// Counters of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FileMetrics {
    /// Calls of any kind.
    pub total_fops: u64,
    /// Bytes read.
    pub data_read: u64,
    /// Reads by size.
    pub block_count_read: [u64; 8],
    /// Calls per operation.
    pub fop_hits: [u64; 15],
    /// Failed calls per operation.
    pub fop_errors: [u64; 15],
}

/// First access to a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AccessPattern {
    /// Inode number in the image.
    pub ino: u64,
    /// Reads so far.
    pub nr_read: u64,
    /// Seconds since the epoch.
    pub first_access_time_secs: u64,
    /// Nanoseconds of that second.
    pub first_access_time_nanos: u32,
}

/// Counters of a backend.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackendMetrics {
    /// Kind of the backend.
    pub backend_type: String,
    /// Requests, every attempt.
    pub read_count: u64,
    /// Requests that failed.
    pub read_errors: u64,
    /// Bytes asked for, those of failed attempts included.
    pub read_amount_total: u64,
    /// Milliseconds spent.
    pub read_cumulative_latency_millis_total: u64,
    /// Milliseconds spent by size of the request.
    pub read_cumulative_latency_millis_dist: [u64; 8],
    /// Requests by size.
    pub read_count_block_size_dist: [u64; 8],
    /// Requests by latency and size.
    pub read_latency_sizes_dist: [[u64; 8]; 8],
}

/// Counters of the cache of chunks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheMetrics {
    /// Names of the cache files.
    pub underlying_files: Vec<String>,
    /// Their directory.
    pub store_path: String,
    /// Reads that needed some chunks from the backend.
    pub partial_hits: u64,
    /// Reads that needed none.
    pub whole_hits: u64,
    /// Reads.
    pub total: u64,
    /// Chunks that are ready.
    pub entries_count: u64,
    /// Bytes prefetched.
    pub prefetch_data_amount: u64,
    /// Requests of the prefetch.
    pub prefetch_requests_count: u64,
    /// Workers of the prefetch.
    pub prefetch_workers: u64,
    /// Chunks that were fetched one by one.
    pub prefetch_unmerged_chunks: u64,
    /// Milliseconds from first to last.
    pub prefetch_cumulative_time_millis: u64,
    /// When the prefetch began, seconds since the epoch.
    pub prefetch_begin_time_secs: u64,
    /// Milliseconds of that second.
    pub prefetch_begin_time_millis: u64,
    /// When it ended, seconds since the epoch.
    pub prefetch_end_time_secs: u64,
    /// Milliseconds of that second.
    pub prefetch_end_time_millis: u64,
    /// Bytes that wait to be written.
    pub buffered_backend_size: u64,
    /// Whether every chunk is there.
    pub data_all_ready: bool,
}

/// A request of the kernel that is being served.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inflight {
    /// Inode number on the mount.
    pub inode: u64,
    /// FUSE operation code.
    pub opcode: u32,
    /// Number of the request.
    pub unique: u64,
    /// When it came, seconds since the epoch.
    pub timestamp_secs: u64,
}

/// The last errors of backends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Events {
    /// How many are kept.
    pub max_errors: usize,
    /// How many there were.
    pub total_errors: usize,
    /// How many bytes are kept.
    pub max_size: usize,
    /// How many bytes there are.
    pub total_size: usize,
    /// The errors, oldest first.
    pub errors: Vec<String>,
}
