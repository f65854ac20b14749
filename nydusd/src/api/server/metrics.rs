//! The calls that only look: counters, superblocks, and the values that can change while mounted.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::http::StatusCode;
use serde_json::json;

use super::{Answer, Refusal};
use crate::api::types::{BackendMetrics, CacheMetrics};
use crate::daemon::Daemon;
use crate::instance::Instance;

/// What a request of each latency class took at most, in milliseconds.
const BOUNDS: [u64; 8] = [1, 20, 50, 100, 500, 1_000, 2_000, 5_000];

/// Finds the one image that is meant: by `id`, or the only one there is.
fn one(daemon: &Daemon, kind: &str, key: impl Fn(&Instance) -> bool, id: bool) -> Result<Arc<Instance>, Refusal> {
    let all = daemon.namespace().all();
    let found = match (id, all.as_slice()) {
        (true, _) => all.iter().find(|instance| key(instance)),
        (false, [only]) => Some(only),
        (false, _) => None,
    };
    found.cloned().ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, format!("{kind}(Metrics(Stats(NoCounter)))")))
}

fn mounted_at(daemon: &Daemon, kind: &str, id: Option<&str>) -> Result<Arc<Instance>, Refusal> {
    one(daemon, kind, |instance| Some(instance.mountpoint()) == id, id.is_some())
}

pub(super) fn filesystem(daemon: &Daemon, id: Option<&str>) -> Result<Answer, Refusal> {
    let instance = mounted_at(daemon, "GlobalMetrics", id)?;
    Answer::json(&instance.counters().snapshot(instance.mountpoint()))
}

pub(super) fn files(daemon: &Daemon, id: Option<&str>, latest: bool) -> Result<Answer, Refusal> {
    let instance = mounted_at(daemon, "FsFilesMetrics", id)?;
    if latest {
        return Answer::json(&instance.counters().take_latest());
    }
    let files = instance.counters().files().unwrap_or_default();
    Answer::json(&files.into_iter().map(|(ino, file)| (ino.to_string(), file)).collect::<BTreeMap<_, _>>())
}

pub(super) fn pattern(daemon: &Daemon, id: Option<&str>) -> Result<Answer, Refusal> {
    let instance = mounted_at(daemon, "Pattern", id)?;
    Answer::json(&instance.counters().pattern())
}

pub(super) fn backend(daemon: &Daemon, id: Option<&str>) -> Result<Answer, Refusal> {
    let instance = mounted_at(daemon, "BackendMetrics", id)?;
    let counted = instance.route().counters().snapshot();
    let mut by_size = [0; 8];
    for (sizes, bound) in counted.latency_sizes.iter().zip(BOUNDS) {
        // Only the classes are kept, not each time: their upper bounds stand for it.
        by_size.iter_mut().zip(sizes).for_each(|(sum, count)| *sum += count * bound);
    }
    Answer::json(&BackendMetrics {
        backend_type: instance.route().kind().to_owned(),
        read_count: counted.reads,
        read_errors: counted.errors,
        read_amount_total: counted.asked,
        read_cumulative_latency_millis_total: counted.latency_total,
        read_cumulative_latency_millis_dist: by_size,
        read_count_block_size_dist: counted.sizes,
        read_latency_sizes_dist: counted.latency_sizes,
    })
}

pub(super) fn cache(daemon: &Daemon, id: Option<&str>) -> Result<Answer, Refusal> {
    let by_id = |instance: &Instance| {
        // Upstream's key is the id of the configuration; a snapshotter may ask with the mountpoint as well.
        Some(instance.spec().config.id.as_str()) == id || Some(instance.mountpoint()) == id
    };
    let instance = one(daemon, "BlobcacheMetrics", by_id, id.is_some())?;
    let store = instance.store();
    let counters = store.counters();
    let (began, ended) = (counters.prefetch_began.get(), counters.prefetch_ended.get());
    let blobs = instance.blobs();
    let prefetch = instance.spec().config.rafs.prefetch;
    Answer::json(&CacheMetrics {
        underlying_files: blobs.iter().flat_map(|blob| blob.file_names()).collect(),
        store_path: store.dir().to_string_lossy().into_owned(),
        partial_hits: counters.partial_hits.get(),
        whole_hits: counters.whole_hits.get(),
        total: counters.reads.get(),
        entries_count: counters.chunks.get(),
        prefetch_data_amount: counters.prefetch_bytes.get(),
        prefetch_requests_count: counters.prefetch_requests.get(),
        prefetch_workers: if prefetch.enable { prefetch.threads as u64 } else { 0 },
        prefetch_unmerged_chunks: 0,
        prefetch_cumulative_time_millis: counters.prefetch_millis.get(),
        prefetch_begin_time_secs: began / 1_000,
        prefetch_begin_time_millis: began % 1_000,
        prefetch_end_time_secs: ended / 1_000,
        prefetch_end_time_millis: ended % 1_000,
        buffered_backend_size: 0,
        data_all_ready: false,
    })
}

/// Summarises the superblock of a mounted image.
pub(super) fn superblock(daemon: &Daemon, mountpoint: &str) -> Result<Answer, Refusal> {
    let Some(instance) = daemon.namespace().get(mountpoint) else {
        let message = "BackendInfo(MountFilesystem(Other(\"object or filesystem doesn't exist\")))";
        return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message));
    };
    let bootstrap = instance.bootstrap();
    let six = bootstrap.version() == 6;
    let forever = json!({"secs": 1u64 << 32, "nanos": 0});
    let prefetch = bootstrap.prefetch().map(|list| list.len()).unwrap_or_default();
    Answer::json(&json!({
        "magic": if six { 0xe0f5_e1e2_u32 } else { 0x5241_4653 },
        "version": if six { 0x600 } else { 0x500 },
        "sb_size": if six { 128 } else { 8192 },
        "root_inode": bootstrap.root().0,
        "chunk_size": bootstrap.chunk_size(),
        "batch_size": 0,
        "inodes_count": bootstrap.inode_count(),
        "flags": {"bits": 0},
        "inode_table_entries": 0,
        "inode_table_offset": 0,
        "blob_table_size": 0,
        "blob_table_offset": 0,
        "extended_blob_table_offset": 0,
        "extended_blob_table_entries": bootstrap.blobs().len(),
        "blob_device_table_count": bootstrap.blobs().len(),
        "blob_device_table_offset": 0,
        "prefetch_table_offset": 0,
        "prefetch_table_entries": prefetch,
        "attr_timeout": forever,
        "entry_timeout": forever,
        "is_chunk_dict": false,
        "meta_blkaddr": 0,
        "root_nid": if six { bootstrap.root().0 } else { 0 },
        "chunk_table_offset": 0,
        "chunk_table_size": 0,
    }))
}

/// Returns the values that can change while mounted.
pub(super) fn config(daemon: &Daemon, id: Option<&str>) -> Result<Answer, Refusal> {
    let values = daemon.dynamic(id);
    Answer::json(&values)
}

/// Changes values while mounted.
pub(super) fn set_config(
    daemon: &Daemon,
    id: Option<&str>,
    values: &BTreeMap<String, String>,
) -> Result<Answer, Refusal> {
    let refused = || Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "Configure(ResponsePayloadType)");
    if daemon.set_dynamic(id, values) { Ok(Answer::Nothing) } else { Err(refused()) }
}
