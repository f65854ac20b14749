//! What of an image is fetched before anybody asks, and in which order.
//!
//! First what the mount names, or else what the image's own table names; then, if the configuration wants it or the root
//! is named, everything. Directories stand for all files in them; a file with several names is taken once.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::ops::Range;
use std::sync::Arc;

use nydus_rafs::{FormatError, Ino, Kind};
use tokio::runtime::Handle;

use super::Instance;
use crate::store::{Hint, PrefetchOptions, prefetch};

/// Deepest directory that is followed: no path is longer than 4,096 bytes.
const DEEPEST: usize = 2048;

/// Begins to prefetch in the background, if the configuration wants it.
pub(super) fn start(instance: &Arc<Instance>, runtime: &Handle) {
    let wanted = instance.spec.config.rafs.prefetch;
    if !wanted.enable || instance.blobs.is_empty() {
        return;
    }
    let options = PrefetchOptions {
        threads: wanted.threads,
        merging_size: wanted.batch_size,
        bandwidth_rate: wanted.bandwidth_limit,
    };
    let stop = instance.stop.clone();
    let instance = instance.clone();
    runtime.spawn(async move {
        // Walking a large tree takes a while: not on a thread that serves others.
        let planned = tokio::task::spawn_blocking(move || hints(&instance)).await;
        match planned {
            Ok(Ok(hints)) if !hints.is_empty() => prefetch(hints, options, stop).await,
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "prefetch: could not read the image's tree"),
            Err(_) => {}
        }
    });
}

/// Lists what is fetched, in order.
fn hints(instance: &Instance) -> Result<Vec<Hint>, FormatError> {
    let bootstrap = &instance.bootstrap;
    let root = bootstrap.root();
    let named: Vec<Ino> = match &instance.spec.prefetch_files {
        Some(paths) => paths.iter().filter_map(|path| resolve(instance, path).transpose()).collect::<Result<_, _>>()?,
        None => bootstrap.prefetch()?,
    };
    let everything = named == [root];
    let also = instance.spec.config.rafs.prefetch.prefetch_all && !named.contains(&root);
    let mut plan = Plan { instance, seen: HashSet::new(), hints: Vec::new() };
    for ino in named.iter().filter(|&&ino| everything || ino != root) {
        plan.add(*ino, 0)?;
    }
    if everything || also {
        plan.rest();
    }
    Ok(plan.hints)
}

/// Finds an absolute path; `None` if the image has no such file.
fn resolve(instance: &Instance, path: &str) -> Result<Option<Ino>, FormatError> {
    let mut ino = instance.bootstrap.root();
    for name in path.split('/').filter(|name| !name.is_empty()) {
        if instance.bootstrap.attr(ino)?.kind != Kind::Directory {
            return Ok(None);
        }
        match instance.bootstrap.lookup(ino, OsStr::new(name))? {
            Some(child) => ino = child,
            None => return Ok(None),
        }
    }
    Ok(Some(ino))
}

struct Plan<'a> {
    instance: &'a Instance,
    seen: HashSet<Ino>,
    hints: Vec<Hint>,
}

impl Plan<'_> {
    fn add(&mut self, ino: Ino, depth: usize) -> Result<(), FormatError> {
        if self.instance.stop.is_cancelled() || depth > DEEPEST || !self.seen.insert(ino) {
            return Ok(());
        }
        let bootstrap = &self.instance.bootstrap;
        let attr = bootstrap.attr(ino)?;
        match attr.kind {
            Kind::Regular => {
                for extent in bootstrap.extents(ino, 0..attr.size)? {
                    let extent = extent?;
                    self.hint(extent.blob, extent.plain);
                }
                Ok(())
            }
            Kind::Directory => {
                for entry in bootstrap.entries(ino, 0)? {
                    let entry = entry?;
                    if !matches!(entry.name.as_encoded_bytes(), b"." | b"..") {
                        self.add(entry.ino, depth + 1)?;
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Adds every blob from its beginning to its end.
    fn rest(&mut self) {
        for (index, info) in (0u16..).zip(self.instance.bootstrap.blobs()) {
            // What the bootstrap does not refer to need not be here: only chunks of this image are fetched.
            if let Ok(chunks) = self.instance.bootstrap.chunks(index) {
                for chunk in chunks.all() {
                    self.hint(index, chunk.plain.clone());
                }
            }
            let _ = info;
        }
    }

    fn hint(&mut self, blob: u16, plain: Range<u64>) {
        let Some(blob) = self.instance.blob(blob) else { return };
        match self.hints.last_mut() {
            Some(last) if Arc::ptr_eq(&last.blob, blob) && last.plain.end == plain.start => last.plain.end = plain.end,
            _ => self.hints.push(Hint { blob: blob.clone(), plain }),
        }
    }
}
