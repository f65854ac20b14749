//! Cached blobs that nobody wants any more.
//!
//! nydusd keeps what it fetched in files named `<blob id>` plus an ending. A blob is wanted by images that are mounted and by
//! data layers that are recorded. In a directory below our root everything else goes; a directory that the operator named may
//! serve other programs too, so there only blobs go that we ourselves once wanted.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::labels;
use crate::meta::{Frozen, Meta};
use crate::status::SnapshotError;
use crate::usage::Usage;

/// A directory of cached blobs.
#[derive(Debug)]
pub struct Cache {
    directory: PathBuf,
    ours: bool,
    deleted: AtomicU64,
    failed: AtomicU64,
}

impl Cache {
    /// The blobs in `directory`; `ours` if nobody else puts files there.
    pub fn new(directory: PathBuf, ours: bool) -> Self {
        Self { directory, ours, deleted: AtomicU64::new(0), failed: AtomicU64::new(0) }
    }

    /// How many files were deleted, and how many could not be, since the start.
    pub fn counts(&self) -> (u64, u64) {
        (self.deleted.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }

    /// The space that all files of one blob take.
    pub fn usage(&self, blob: &str) -> Usage {
        let mut usage = Usage::default();
        for (name, entry) in self.files() {
            if blob_of(&name) == Some(blob)
                && let Ok(found) = entry.metadata()
            {
                usage += Usage { size: found.blocks() * 512, inodes: 1 };
            }
        }
        usage
    }

    /// The space that all files take, in bytes.
    pub fn total(&self) -> u64 {
        self.files().filter_map(|(_, entry)| entry.metadata().ok()).map(|found| found.blocks() * 512).sum()
    }

    /// Deletes the files of blobs that nobody wants.
    ///
    /// # Errors
    /// When the records cannot be read. A file that cannot be deleted is tried again next time.
    pub fn reclaim(&self, meta: &Meta) -> Result<(), SnapshotError> {
        // Under the lock of the records: an image that is about to be mounted has either recorded its blobs or will find
        // its files gone before it opens them.
        meta.frozen(|frozen| {
            let Some(wanted) = wanted(frozen) else {
                tracing::warn!("cached blobs are kept: the blobs of a mounted image are not known");
                return Vec::new();
            };
            let garbage: HashSet<&str> = frozen.garbage.iter().map(String::as_str).collect();
            if !self.ours && garbage.is_empty() {
                return Vec::new();
            }
            let mut failed = HashSet::new();
            for (name, entry) in self.files() {
                let Some(blob) = blob_of(&name) else { continue };
                if wanted.contains(blob) || !(self.ours || garbage.contains(blob)) {
                    continue;
                }
                match fs::remove_file(entry.path()) {
                    Ok(()) => {
                        self.deleted.fetch_add(1, Ordering::Relaxed);
                        tracing::debug!(file = name, "an unused cache file is deleted");
                    }
                    Err(error) => {
                        self.failed.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(file = name, %error, "an unused cache file is still there");
                        failed.insert(blob.to_owned());
                    }
                }
            }
            frozen.garbage.iter().filter(|blob| !failed.contains(*blob)).cloned().collect()
        })
    }

    fn files(&self) -> impl Iterator<Item = (String, fs::DirEntry)> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry)))
    }
}

/// Ids of the blobs that something wants; `None` when that cannot be known.
fn wanted(frozen: &Frozen) -> Option<HashSet<String>> {
    let mut wanted: HashSet<String> =
        frozen.records.iter().filter_map(|record| labels::data_blob(&record.labels)).collect();
    for instance in &frozen.instances {
        wanted.extend(instance.blobs.clone()?);
    }
    Some(wanted)
}

/// The blob that a cache file belongs to: 64 hexadecimal digits, then nothing or an ending.
fn blob_of(name: &str) -> Option<&str> {
    let id = name.get(..64)?;
    let hex = id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (hex && (name.len() == 64 || name[64..].starts_with('.'))).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::labels::Labels;
    use crate::meta::{Instance, Kind, Stage};

    fn id(letter: char) -> String {
        letter.to_string().repeat(64)
    }

    fn touch(directory: &std::path::Path, names: &[String]) {
        for name in names {
            fs::write(directory.join(name), "x").expect("written");
        }
    }

    fn names(directory: &std::path::Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .expect("read")
            .map(|e| e.expect("entry").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names
    }

    fn data(letter: char) -> Labels {
        [
            (labels::NYDUS_BLOB.to_owned(), "true".to_owned()),
            (labels::LAYER_DIGEST.to_owned(), format!("sha256:{}", id(letter))),
        ]
        .into()
    }

    #[test]
    fn only_blobs_that_nobody_wants_are_deleted() {
        let root = tempfile::tempdir().expect("a directory");
        let meta = Meta::open(&root.path().join("m.redb")).expect("opened");
        let dir = root.path().join("cache");
        fs::create_dir(&dir).expect("made");
        meta.supply("sha256:a", "k", "", &data('a'), |_| Ok(())).expect("supplied");
        let boot = meta.create("b", "", Kind::Active, &Labels::new(), |_| Ok(())).expect("created");
        let instance = Instance {
            id: boot.id,
            daemon: "shared".into(),
            image: None,
            blobs: Some(vec![id('b')]),
            stage: Stage::Intended,
        };
        meta.set_instance(&instance).expect("recorded");
        let kept = [
            format!("{}.blob.data", id('a')),
            format!("{}.blob.meta", id('b')),
            "other".to_owned(),
            format!("{}x", id('c')),
        ];
        touch(&dir, &kept);
        touch(&dir, &[format!("{}.blob.data", id('c')), format!("{}.blob.data.chunk_map", id('c')), id('d')]);

        let foreign = Cache::new(dir.clone(), false);
        foreign.reclaim(&meta).expect("reclaimed");
        assert_eq!(names(&dir).len(), 7, "what others may have put there stays");

        let ours = Cache::new(dir.clone(), true);
        ours.reclaim(&meta).expect("reclaimed");
        let mut want = kept.to_vec();
        want.sort();
        assert_eq!(names(&dir), want);
        assert_eq!(ours.counts(), (3, 0));
    }

    #[test]
    fn in_a_shared_directory_only_what_we_wanted_once_goes() {
        let root = tempfile::tempdir().expect("a directory");
        let meta = Meta::open(&root.path().join("m.redb")).expect("opened");
        let dir = root.path().join("cache");
        fs::create_dir(&dir).expect("made");
        touch(&dir, &[format!("{}.blob.data", id('a')), format!("{}.blob.data", id('b'))]);
        meta.supply("sha256:a", "k", "", &data('a'), |_| Ok(())).expect("supplied");
        let cache = Cache::new(dir.clone(), false);
        assert_eq!(cache.usage(&id('a')).inodes, 1);
        meta.remove("sha256:a").expect("removed");
        cache.reclaim(&meta).expect("reclaimed");
        assert_eq!(names(&dir), [format!("{}.blob.data", id('b'))]);
    }

    #[test]
    fn an_image_with_unknown_blobs_keeps_everything() {
        let root = tempfile::tempdir().expect("a directory");
        let meta = Meta::open(&root.path().join("m.redb")).expect("opened");
        touch(root.path(), &[id('c')]);
        let boot = meta.create("b", "", Kind::Active, &Labels::new(), |_| Ok(())).expect("created");
        let instance = Instance { id: boot.id, daemon: "shared".into(), image: None, blobs: None, stage: Stage::Live };
        meta.set_instance(&instance).expect("recorded");
        Cache::new(root.path().to_path_buf(), true).reclaim(&meta).expect("reclaimed");
        assert!(root.path().join(id('c')).exists());
    }
}
