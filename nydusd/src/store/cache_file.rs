//! The files of one blob in the cache directory: `<blob id>.blob.data` (its plain address space, sparse) and, beside it,
//! the map of what was verified ([`ReadyMap`]).
//!
//! *Sharing a directory.* Upstream starts one daemon per image and lets all of them use one directory, so a directory
//! cannot belong to one process. A blob's files can: whoever holds the lock (flock) on the data file writes it. Whoever
//! comes second, another process or an image that tells another tale about the blob, takes `<blob id>.blob.data.1`
//! and so on: it costs bytes, and nobody can harm anybody. Locks die with their process, and the next one takes
//! up the first copy that is free. A process that is killed takes a moment to die, and so does a child that it had just
//! forked: the first time a lock is found taken it is worth waiting for, else a restarted daemon would fetch all again.
//!
//! A file that another program left here is never shortened: it may still be serving from it. Its bytes count for nothing
//! until they match a digest.
//!
//! *Others who write while we serve.* Locks do not stop a program that knows nothing of them: one that punches holes, copies
//! over the file, cuts it. All of that moves the modification time, and so do we: the time after our own last change is
//! kept, writers compare before they write and readers after they have read. When it is another, nothing in the file is
//! believed until it was checked against its digest again. What comes to pass between a writer's look and the end of its
//! write is not noticed.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError as Contended};
use std::time::{Duration, Instant, SystemTime};

use nydus_rafs::{Algorithm, BlobId, Chunk};

use super::ready::ReadyMap;

/// Copies of one blob that a directory holds at most; whoever comes later works without a cache.
pub(super) const COPIES: u32 = 16;
/// What the log says of a file that is not as we left it.
pub(super) const TOUCHED: &str = "another program changed it";
/// Names longer than this leave no room for what is appended to them.
const MAX_NAME: usize = 200;

/// The data file and the map, locked.
#[derive(Debug)]
pub(super) struct CacheFile {
    data: File,
    map: Option<ReadyMap>,
    path: PathBuf,
    /// It is the one copy that bears the blob's plain name.
    first: bool,
    /// What the data file measures; less means that somebody shortened it.
    size: u64,
    plain_size: u64,
    /// The data file's modification time after the last change that we made.
    ours: Mutex<SystemTime>,
    /// Chunks were added since the last seal.
    unsealed: AtomicBool,
}

/// What became of writing a chunk.
#[derive(Debug)]
pub(super) enum Written {
    /// It is there.
    Yes,
    /// The file was changed by somebody else: whatever was in it may be gone.
    Touched,
}

/// What the name of a data file says after the blob's.
const DATA: &str = ".blob.data";

/// Returns the name of a blob's data file.
pub(super) fn data_name(blob: &BlobId) -> String {
    let name = blob.as_str();
    if name.len() <= MAX_NAME {
        format!("{name}{DATA}")
    } else {
        format!("{}{DATA}", Algorithm::Blake3.digest(name.as_bytes()))
    }
}

/// Returns the path of the `n`th copy of a blob's data file.
pub(super) fn data_path(dir: &Path, blob: &BlobId, n: u32) -> PathBuf {
    let name = data_name(blob);
    dir.join(if n == 0 { name } else { format!("{name}.{n}") })
}

/// Returns the path of the map of a data file: `.chunk_map` in the place of `.blob.data`.
///
/// The name is one that the established snapshotter deletes together with the data file, and that the nydusd which
/// we replace has not used since 2.1: its own map is `<id>.blob.data.chunk_map`, and it refuses other formats there.
pub(super) fn map_path(data: &Path) -> PathBuf {
    let name = data.file_name().unwrap_or_default().to_string_lossy();
    // Names of data files are made above: they are text and hold the word.
    let (id, copy) = name.rsplit_once(DATA).unwrap_or((&name, ""));
    data.with_file_name(format!("{id}.chunk_map{copy}"))
}

/// Opens and locks `path`; `None` if somebody else holds it.
pub(super) fn lock(path: &Path, create: bool) -> io::Result<Option<File>> {
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)?;
        let opened = file.metadata()?;
        if !opened.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // A collector may have deleted it between the two steps; a lock on a file without a name locks nothing.
        match std::fs::symlink_metadata(path) {
            Ok(named) if (named.dev(), named.ino()) == (opened.dev(), opened.ino()) => return Ok(Some(file)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && create => {}
            Err(error) => return Err(error),
        }
    }
}

impl CacheFile {
    /// Opens the first copy that nobody holds, after waiting for so long for the very first. `None`: all are held.
    pub(super) fn open(dir: &Path, blob: &BlobId, plain_size: u64, patience: Duration) -> io::Result<Option<Self>> {
        let began = Instant::now();
        for n in 0..COPIES {
            let path = data_path(dir, blob, n);
            let mut locked = lock(&path, true)?;
            while locked.is_none() && n == 0 && began.elapsed() < patience {
                std::thread::sleep(Duration::from_millis(5));
                locked = lock(&path, true)?;
            }
            let Some(data) = locked else { continue };
            // Opened before the file grows: a seal on the shorter file is no seal on the longer one.
            let map = match ReadyMap::open(&map_path(&path), blob, &data) {
                Ok(map) => Some(map),
                Err(error) => {
                    tracing::warn!(blob = %blob, path = %map_path(&path).display(), %error,
                        "no ready map: this blob's cache lasts as long as this process");
                    None
                }
            };
            let mut size = data.metadata()?.len();
            if size < plain_size {
                data.set_len(plain_size)?;
                size = plain_size;
            }
            let unsealed = AtomicBool::new(false);
            let ours = Mutex::new(data.metadata()?.modified()?);
            return Ok(Some(Self { data, map, path, first: n == 0, size, plain_size, ours, unsealed }));
        }
        Ok(None)
    }

    /// Returns the data file.
    pub(super) fn data(&self) -> &File {
        &self.data
    }

    /// Returns the map, if there is one.
    pub(super) fn map(&self) -> Option<&ReadyMap> {
        self.map.as_ref()
    }

    /// Returns whether nobody else had the blob open.
    pub(super) fn is_first(&self) -> bool {
        self.first
    }

    /// Returns the path of the data file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes the plain bytes of a chunk and records it.
    pub(super) fn write(&self, chunk: &Chunk, bytes: &[u8], verified: bool) -> io::Result<Written> {
        // One writer at a time: so it is in the kernel as well.
        let mut ours = self.ours();
        // Writing past a new end would make a hole of everything before: look on both sides of the write.
        if self.touched(&ours)? {
            return Ok(Written::Touched);
        }
        let written = self.data.write_all_at(bytes, chunk.plain.start);
        let after = self.data.metadata()?;
        *ours = after.modified()?;
        drop(ours);
        written?;
        if after.len() < self.size {
            return Ok(Written::Touched);
        }
        self.record(chunk, verified);
        Ok(Written::Yes)
    }

    /// Records that the data file holds a chunk.
    pub(super) fn record(&self, chunk: &Chunk, verified: bool) {
        self.unsealed.store(true, Ordering::Release);
        if let Some(map) = &self.map
            && let Err(error) = map.append(chunk, verified)
        {
            // The chunk is there for this process; the next one will fetch it again.
            tracing::debug!(path = %self.path.display(), chunk = chunk.index.0, %error, "ready map not written");
        }
    }

    fn ours(&self) -> MutexGuard<'_, SystemTime> {
        self.ours.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether somebody else changed the data file since `ours`.
    fn touched(&self, ours: &SystemTime) -> io::Result<bool> {
        let now = self.data.metadata()?;
        Ok(now.len() < self.size || now.modified()? != *ours)
    }

    /// Returns whether the data file is as we left it; if nobody can tell, it is not. Never waits: while one of us writes
    /// the answer is yes, for that one looks, too.
    pub(super) fn intact(&self) -> bool {
        match self.ours.try_lock() {
            Ok(ours) => !self.touched(&ours).unwrap_or(true),
            Err(Contended::Poisoned(ours)) => !self.touched(&ours.into_inner()).unwrap_or(true),
            Err(Contended::WouldBlock) => true,
        }
    }

    /// Takes the file as it is now after somebody else changed it, with its size given back, and believes nothing of what
    /// was in it.
    pub(super) fn restore(&self) -> io::Result<()> {
        if let Some(map) = &self.map {
            map.distrust();
        }
        let mut ours = self.ours();
        if self.data.metadata()?.len() < self.size {
            self.data.set_len(self.size)?;
        }
        *ours = self.data.metadata()?.modified()?;
        Ok(())
    }

    /// Fills `buf` from `offset` on; fails if the file does not reach that far.
    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.data.read_exact_at(buf, offset)
    }

    /// Brings all to the disk, so that the next process need not check it.
    pub(super) fn seal(&self) -> io::Result<()> {
        let Some(map) = &self.map else { return Ok(()) };
        if !self.unsealed.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let sealed = map.seal(&self.data, self.plain_size, |time| self.stamp(time));
        sealed.inspect_err(|_| self.unsealed.store(true, Ordering::Release))
    }

    /// Deletes a copy that is not the first, whose next user would be nobody: programs that clean up by blob do not know it.
    pub(super) fn discard_copy(&self) {
        if self.first {
            return;
        }
        // As long as we hold the lock of the file with this name, nobody else can have taken it.
        let named = std::fs::symlink_metadata(&self.path).map(|named| (named.dev(), named.ino()));
        let own = self.data.metadata().map(|own| (own.dev(), own.ino()));
        if !matches!((named, own), (Ok(named), Ok(own)) if named == own) {
            return;
        }
        for path in [map_path(&self.path), self.path.clone()] {
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "a second copy of a blob's cache stays behind");
            }
        }
    }

    /// Gives the data file a modification time, unless somebody else changed it.
    fn stamp(&self, time: SystemTime) -> io::Result<Metadata> {
        let mut ours = self.ours();
        if self.touched(&ours)? {
            return Err(io::Error::other(TOUCHED));
        }
        self.data.set_modified(time)?;
        let metadata = self.data.metadata()?;
        *ours = metadata.modified()?;
        Ok(metadata)
    }
}

impl Drop for CacheFile {
    fn drop(&mut self) {
        self.discard_copy();
    }
}
