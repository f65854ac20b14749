//! One blob as one image sees it, and the verb that the whole data path is made of: [`Blob::ensure`].
//!
//! ```text
//!   ensure / read_at -- all ready? -------------------------------> cache file (atomics and one pread)
//!        | no
//!        +-- claim what is missing, join what others fetch -------> fill.rs
//!        +-- tell ahead.rs, which may have the next chunks fetched
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nydus_backend::Urgency;
use nydus_rafs::{BlobId, BlobInfo};
use tokio::sync::{OnceCell, Semaphore};

use super::ahead::Ahead;
use super::cache::Cache;
use super::claim::State;
use super::counters::Counters;
use super::error::ReadError;
use super::fill::{Got, left_behind};
use super::layout::Layout;
use super::source::Source;
use super::{Inner, Options, Table, cache_file, layout};

/// How often a read begins again when the cache file fails under it; the second time it is served from memory.
const TRIES: usize = 4;

/// Stored bytes of one request to a source that sends all that comes before as well.
const WHOLE: u64 = 64 << 20;

/// One blob, as one image sees it.
#[derive(Debug)]
pub struct Blob {
    /// For fetches that outlive the read that began them.
    me: Weak<Self>,
    info: BlobInfo,
    store: Arc<Inner>,
    options: Options,
    counters: Arc<Counters>,
    source: Source,
    table: Table,
    bound: OnceCell<Bound>,
    ahead: Mutex<Ahead>,
    /// All of it is being fetched, because parts cost as much as the whole.
    whole: AtomicBool,
}

/// The image's chunks and the cache that it shares.
#[derive(Debug, Clone)]
pub(super) struct Bound {
    pub(super) cache: Arc<Cache>,
    pub(super) layout: Arc<Layout>,
}

impl Bound {
    /// Returns whether nobody needs to fetch the chunk at position `at`, or somebody does.
    pub(super) fn readable_or_claimed(&self, at: usize) -> bool {
        matches!(self.layout.slot(at).state(), State::Ready | State::Claimed)
    }

    /// Fills `buf` from the cache file if all of `plain` is there; returns whether it did.
    fn serve(&self, buf: &mut [u8], plain: &Range<u64>) -> bool {
        let losses = self.cache.losses();
        self.layout.ready(plain)
            && self.copy(buf, plain, self.layout.covering(plain), &Got::new()).is_ok()
            && self.believed(losses)
            && self.doubtful(buf, plain, self.layout.covering(plain), &Got::new()).is_empty()
    }

    /// Returns the chunks of which the cache file gave zeros that it should not have given. A device that fails need
    /// not say so: a loop device whose file was cut gives zeros where others give errors. So zeros are only believed
    /// of a chunk that matches its digest with them.
    fn doubtful(&self, buf: &mut [u8], plain: &Range<u64>, at: Range<usize>, got: &Got) -> Vec<usize> {
        let zeros = |at: &usize| {
            let chunk = self.layout.chunk(*at);
            let (start, end) = (chunk.plain.start.max(plain.start), chunk.plain.end.min(plain.end));
            !got.contains_key(at)
                && chunk.digest.is_some()
                && has_empty_block(part(buf, plain, start..end), start)
                && left_behind(&self.cache, chunk).is_none()
        };
        at.filter(zeros).collect()
    }

    /// Returns whether what was read from the cache file since it had seen `losses` is what we wrote there.
    fn believed(&self, losses: u64) -> bool {
        self.cache.intact() && self.cache.losses() == losses
    }

    /// Fills `buf` with `plain` from `got` and from the cache file; the error names the chunk that could not be read.
    /// Bytes in no chunk are zeros, whatever the file holds there.
    fn copy(&self, buf: &mut [u8], plain: &Range<u64>, at: Range<usize>, got: &Got) -> Result<(), (usize, io::Error)> {
        let mut done = plain.start;
        let mut at = at.peekable();
        // Bytes that follow each other in the file are read at once.
        while let Some(first) = at.next() {
            let chunk = self.layout.chunk(first);
            let (start, mut end) = (chunk.plain.start.max(plain.start), chunk.plain.end.min(plain.end));
            part(buf, plain, done..start).fill(0);
            if let Some(bytes) = got.get(&first) {
                let from = place(start - chunk.plain.start);
                let into = part(buf, plain, start..end);
                into.copy_from_slice(&bytes[from..from + into.len()]);
            } else {
                while let Some(next) =
                    at.next_if(|&next| self.layout.chunk(next).plain.start == end && !got.contains_key(&next))
                {
                    end = self.layout.chunk(next).plain.end.min(plain.end);
                }
                let file = self.cache.file().ok_or_else(|| (first, io::ErrorKind::NotFound.into()))?;
                file.read(part(buf, plain, start..end), start).map_err(|error| (first, error))?;
            }
            done = end;
        }
        part(buf, plain, done..plain.end).fill(0);
        Ok(())
    }
}

/// Returns whether `bytes`, which lie at `start`, hold a whole block of zeros; where they hold no whole block, whether they
/// are nothing but zeros.
fn has_empty_block(bytes: &[u8], start: u64) -> bool {
    let first = place(start.next_multiple_of(layout::BLOCK) - start);
    let empty = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    match bytes.get(first..) {
        Some(blocks) if blocks.len() >= place(layout::BLOCK) => blocks.chunks_exact(place(layout::BLOCK)).any(empty),
        _ => empty(bytes),
    }
}

fn place(at: u64) -> usize {
    // Differences within one buffer or one chunk fit.
    usize::try_from(at).unwrap_or(usize::MAX)
}

/// Returns the part of `buf`, which holds `plain`, that holds `wanted`.
fn part<'b>(buf: &'b mut [u8], plain: &Range<u64>, wanted: Range<u64>) -> &'b mut [u8] {
    &mut buf[place(wanted.start - plain.start)..place(wanted.end - plain.start)]
}

impl Blob {
    pub(super) fn new(
        info: &BlobInfo,
        table: Table,
        bound: Option<Bound>,
        source: Source,
        store: Arc<Inner>,
        options: Options,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        let ahead = Mutex::new(Ahead::new(options.readahead, options.amplify));
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            info: info.clone(),
            ahead,
            store,
            options,
            counters,
            source,
            table,
            bound: OnceCell::new_with(bound),
            whole: AtomicBool::new(false),
        })
    }

    /// Returns its name.
    pub fn id(&self) -> &BlobId {
        &self.info.id
    }

    /// Returns what the image says of it.
    pub fn info(&self) -> &BlobInfo {
        &self.info
    }

    /// Returns the counters that its reads are counted in.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub(super) fn store(&self) -> &Inner {
        &self.store
    }

    pub(super) fn options(&self) -> &Options {
        &self.options
    }

    pub(super) fn source(&self) -> &Source {
        &self.source
    }

    /// Returns whether `plain` can be read without asking anybody. Never blocks.
    pub fn ready(&self, plain: Range<u64>) -> bool {
        self.bound.get().is_some_and(|bound| {
            let ready = |at: usize| bound.layout.slot(at).state() == State::Ready;
            bound.layout.covering(&plain).all(ready) && bound.layout.outside(&plain).is_none()
        })
    }

    /// Returns how many chunks the image has in this blob and how many of them are ready; `None` before the table
    /// is known.
    pub fn progress(&self) -> Option<(usize, usize)> {
        let slots = self.bound.get()?.layout.slots();
        Some((slots.len(), slots.iter().filter(|slot| slot.state() == State::Ready).count()))
    }

    /// Makes `plain` readable from [`Blob::file`]; returns at once if it already is.
    ///
    /// For threads outside the runtime: they wait here until the bytes came, failed, or the deadline passed.
    pub fn ensure(&self, plain: Range<u64>) -> Result<(), ReadError> {
        if self.bound.get().is_some_and(|bound| bound.layout.ready(&plain)) {
            self.counters.reads.add(1);
            self.counters.whole_hits.add(1);
            return Ok(());
        }
        self.store.runtime().block_on(self.fill(plain, Urgency::Demand))
    }

    /// Fills `buf` with the plain bytes from `offset` on if all of them are here; returns whether it did. Waits for
    /// nobody.
    pub fn serve(&self, buf: &mut [u8], offset: u64) -> bool {
        let Ok(plain) = self.range(offset, buf.len()) else { return false };
        let served = self.bound.get().is_some_and(|bound| bound.serve(buf, &plain));
        if served {
            self.counters.reads.add(1);
            self.counters.whole_hits.add(1);
        }
        served
    }

    /// Fills `buf` with the plain bytes from `offset` on; the same waiting as [`Blob::ensure`], but served also
    /// when the cache file cannot be written. Returns `buf.len()`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, ReadError> {
        if self.serve(buf, offset) { Ok(buf.len()) } else { self.store.runtime().block_on(self.read(buf, offset)) }
    }

    /// Like [`Blob::read_at`], for async callers and for readers that can be interrupted: dropping the future
    /// gives back what it claimed. It decodes on the thread that polls it.
    pub async fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize, ReadError> {
        let plain = self.range(offset, buf.len())?;
        let read = async {
            let bound = self.bound(&plain).await?;
            let wanted = bound.layout.covering(&plain);
            // Verified for this reader: whatever becomes of the file meanwhile.
            let mut got = Got::new();
            for _ in 0..TRIES {
                let losses = bound.cache.losses();
                got.extend(self.demand(bound, wanted.clone()).await?);
                match bound.copy(buf, &plain, wanted.clone(), &got) {
                    Ok(()) if got.len() == wanted.len() => return Ok(()),
                    Ok(()) if bound.believed(losses) => {
                        let doubtful = bound.doubtful(buf, &plain, wanted.clone(), &got);
                        if doubtful.is_empty() {
                            return Ok(());
                        }
                        let zeros = io::Error::other("it holds zeros in the place of a chunk");
                        doubtful.into_iter().for_each(|at| bound.cache.unreadable(bound.layout.slot(at), &zeros));
                    }
                    Ok(()) => {}
                    Err((at, error)) => bound.cache.unreadable(bound.layout.slot(at), &error),
                }
            }
            Err(ReadError::Uncached { blob: self.id().clone(), plain: plain.clone() })
        };
        self.within_deadline(plain.clone(), read).await.map(|()| buf.len())
    }

    /// Makes `plain` readable from the cache file. With [`Urgency::Prefetch`], chunks that somebody else fetches are
    /// left to them.
    pub async fn fill(&self, plain: Range<u64>, urgency: Urgency) -> Result<(), ReadError> {
        if urgency == Urgency::Prefetch {
            let bound = self.bound(&plain).await?;
            let wanted = bound.layout.covering(&plain);
            return self.ahead(bound, wanted, self.options.amplify, self.store.windows()).await;
        }
        let read = async {
            let bound = self.bound(&plain).await?;
            let wanted = bound.layout.covering(&plain);
            self.demand(bound, wanted.clone()).await?;
            match wanted.into_iter().all(|at| bound.layout.slot(at).state() == State::Ready) {
                true => Ok(()),
                false => Err(ReadError::Uncached { blob: self.id().clone(), plain: plain.clone() }),
            }
        };
        self.within_deadline(plain.clone(), read).await
    }

    /// Returns the cache file: the blob's plain address space, sparse. `None` while its chunk table is still to
    /// be fetched, and where the cache directory does not take it.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bound.get()?.cache.file()?.data().as_fd())
    }

    /// Returns the names of its files in the cache directory.
    pub fn file_names(&self) -> Vec<String> {
        let path = self.bound.get().and_then(|bound| bound.cache.file()).map(|file| file.path().to_owned());
        let path = path.unwrap_or_else(|| cache_file::data_path(self.store.dir(), self.id(), 0));
        let name = |path: &std::path::Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        [name(&path), name(&cache_file::map_path(&path))].into_iter().flatten().collect()
    }

    fn range(&self, offset: u64, len: usize) -> Result<Range<u64>, ReadError> {
        match offset.checked_add(len as u64) {
            Some(end) => Ok(offset..end),
            None => Err(ReadError::Outside { blob: self.id().clone(), plain: offset..u64::MAX }),
        }
    }

    /// Returns the image's chunks if they are known.
    pub(super) fn bound_now(&self) -> Option<&Bound> {
        self.bound.get()
    }

    /// Returns the image's chunks, which the first read may have to fetch, and checks that `plain` is among them.
    pub(super) async fn bound(&self, plain: &Range<u64>) -> Result<&Bound, ReadError> {
        let bind = async || {
            let fetched;
            let table = match &self.table {
                Table::Known(table) => table,
                Table::Lazy(fetch) => {
                    fetched = fetch().await?;
                    &fetched
                }
            };
            self.store.bind(&self.info, table).map_err(ReadError::Table)
        };
        let bound = self.bound.get_or_try_init(bind).await?;
        match bound.layout.outside(plain) {
            Some(plain) => Err(ReadError::Outside { blob: self.id().clone(), plain }),
            None => Ok(bound),
        }
    }

    /// Brings chunks for a reader, counts what the reader found, and looks ahead.
    async fn demand(&self, bound: &Bound, wanted: Range<usize>) -> Result<Got, ReadError> {
        let slots = &bound.layout.slots()[wanted.clone()];
        let missed = slots.iter().filter(|slot| slot.state() != State::Ready).count();
        let marked = slots.iter().filter(|slot| slot.unmark()).count() > 0;
        match missed {
            0 => self.counters.whole_hits.add(1),
            some if some < slots.len() => self.counters.partial_hits.add(1),
            _ => {}
        }
        if marked && missed == 0 {
            self.look_ahead(bound, wanted);
            return Ok(Got::new());
        }
        let got = self.obtain(bound, wanted.clone()).await;
        // After the reader's own bytes: what is fetched ahead does not compete with them.
        if got.is_ok() && missed > 0 {
            self.look_ahead(bound, wanted);
        }
        got
    }

    fn look_ahead(&self, bound: &Bound, read: Range<usize>) {
        let stored = |at: usize| bound.layout.chunks().get(at).map(|chunk| chunk.stored.end - chunk.stored.start);
        let window = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).after(read, stored);
        let (Some(window), Some(me)) = (window, self.me.upgrade()) else { return };
        if window.mark {
            bound.layout.slot(window.chunks.start).mark();
        }
        let bound = bound.clone();
        self.store.runtime().spawn(async move {
            if let Err(error) = me.ahead(&bound, window.chunks, me.options.amplify, me.store.windows()).await {
                // The reader who comes there asks again, and hears of it then.
                tracing::debug!(blob = %me.id(), %error, "not fetched ahead");
            }
        });
    }

    /// The source sends the blob from its first byte on, whatever part is asked for: has all of it fetched, once,
    /// in as few requests as memory allows.
    pub(super) fn fetch_whole(&self, bound: &Bound) {
        let Some(me) = self.me.upgrade() else { return };
        if self.whole.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::warn!(blob = %self.id(), "the source ignores ranges: the whole blob is fetched");
        let bound = bound.clone();
        self.store.runtime().spawn(async move {
            let all = 0..bound.layout.chunks().len();
            if let Err(error) = me.ahead(&bound, all, WHOLE, &Semaphore::new(1)).await {
                tracing::debug!(blob = %me.id(), %error, "not fetched as a whole");
                me.whole.store(false, Ordering::Relaxed);
            }
        });
    }

    async fn within_deadline<T>(
        &self,
        plain: Range<u64>,
        read: impl Future<Output = Result<T, ReadError>>,
    ) -> Result<T, ReadError> {
        self.counters.reads.add(1);
        let deadline = self.options.deadline;
        // The route has the same deadline, and its error says who was asked and what to do: it gets the last word.
        let grace = (deadline / 50).min(Duration::from_millis(500));
        let done = match tokio::time::timeout(deadline + grace, read).await {
            Ok(done) => done,
            Err(_) => Err(ReadError::Deadline { blob: self.id().clone(), plain, after: deadline }),
        };
        if done.is_err() {
            self.counters.failed_reads.add(1);
        }
        done
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        // An image leaves: what it brought is made fast, beside whoever is dropping it.
        if let Some(bound) = self.bound.take() {
            self.store.runtime().spawn_blocking(move || bound.cache.seal());
        }
    }
}
