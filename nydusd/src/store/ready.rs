//! Which chunks of a cache file were verified, on disk: `<blob id>.chunk_map`.
//!
//! ```text
//!   0   header, 128 bytes
//!       0    8  "SHOALRDY"
//!       8    4  version, 1
//!      12    4  oldest believed session       sealed from here on ...
//!      16    4  newest sealed session         ... to here; 0: never sealed
//!      20    4  nanoseconds of the seal
//!      24    8  seconds of the seal           modification time given to the data file when it was sealed
//!      32    8  inode number of the data file
//!      40    8  size of the data file
//!      48    8  size of the blob's plain address space when sealed
//!      56   64  zeros
//!     120    8  checksum of the 120 bytes before
//! 128   records, 64 bytes each, appended in the order in which chunks became ready
//!       0    8  first plain byte
//!       8    4  plain bytes
//!      12    4  session that wrote it
//!      16   32  digest of the plain bytes
//!      48    1  digest algorithm: 1 BLAKE3, 2 SHA-256, 0 none (the image has no digests)
//!      49    1  1 if the bytes were checked against the digest
//!      50    6  zeros
//!      56    8  checksum of the 56 bytes before
//! ```
//!
//! Integers are little-endian. A checksum is the first 8 bytes of the BLAKE3 of the blob's name, a zero byte and the
//! bytes covered, so that records of another blob's map are not records here.
//!
//! *Why a log and not a bitmap*: a bit says that "chunk 7" was verified, not against what. Two images may tell different
//! tales about one blob; a record is believed only by an image that wants exactly these bytes with exactly
//! this digest. It needs no agreed number of chunks, a torn or flipped record is one chunk, and a truncated map is a
//! shorter map.
//!
//! *Why sessions and a seal*: a record is written after its data, but the kernel brings both to the disk in any order,
//! and others may touch the data file while nobody looks. So data is synced, then the data file gets a modification
//! time that no clock would give it, then the header says: records of sessions up to now are true as long as the data
//! file is this inode, of this size, with this time. Any write, hole or truncation breaks the seal by itself, and so does
//! the first chunk that we add; nothing has to be unset. Records outside a seal are *unsure*: their chunks are
//! checked against the digest once, on first use, from the cache file. That is the price of a kill -9
//! or of a power cut; it is a hash, not a fetch.
//!
//! The map is never memory-mapped: a file that can shrink must not be able to kill us.

use std::collections::BTreeMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nydus_rafs::{Algorithm, BlobId, Chunk, Digest};

const MAGIC: [u8; 8] = *b"SHOALRDY";
const VERSION: u32 = 1;
const HEADER: usize = 128;
const RECORD: usize = 64;
/// A blob has at most 2^24 chunks; a map longer than four lives of such a blob is not ours.
const MAX_RECORDS: u64 = 4 << 24;
/// Dead records that do not matter.
const SLACK: u64 = 1024;
/// Records read at once.
const BATCH: usize = 4096;

/// The map of one cache file.
#[derive(Debug)]
pub(super) struct ReadyMap {
    file: File,
    blob: BlobId,
    /// Where the next record goes.
    end: AtomicU64,
    /// The session whose records are written now.
    session: AtomicU32,
    /// Records of sessions from this on are true.
    believed: AtomicU32,
    /// One seal at a time.
    sealing: Mutex<()>,
}

/// A chunk that the map knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Known {
    /// Its plain bytes.
    pub(super) plain: Range<u64>,
    digest: Option<(Algorithm, Digest)>,
    /// Whether its bytes were checked when they came.
    pub(super) verified: bool,
    /// Whether its bytes are in the cache file for certain.
    pub(super) sure: bool,
    at: u64,
}

impl Known {
    /// Returns whether this is what an image means by `chunk`.
    pub(super) fn is(&self, chunk: &Chunk) -> bool {
        self.plain == chunk.plain && self.digest == chunk.digest.map(|digest| (chunk.algorithm, digest))
    }
}

fn checksum(blob: &BlobId, bytes: &[u8]) -> [u8; 8] {
    let named = [blob.as_str().as_bytes(), &[0], bytes].concat();
    let [a, b, c, d, e, f, g, h, ..] = Algorithm::Blake3.digest(&named).0;
    [a, b, c, d, e, f, g, h]
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes are four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes are eight bytes"))
}

/// What the header says.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    from: u32,
    to: u32,
    seal: SystemTime,
    inode: u64,
    size: u64,
    plain_size: u64,
}

impl Header {
    fn parse(blob: &BlobId, bytes: &[u8; HEADER]) -> Option<Self> {
        let whole = bytes[..8] == MAGIC && u32_at(bytes, 8) == VERSION && bytes[120..] == checksum(blob, &bytes[..120]);
        let nanos = u32_at(bytes, 20);
        if !whole || nanos >= 1_000_000_000 {
            return None;
        }
        Some(Self {
            from: u32_at(bytes, 12),
            to: u32_at(bytes, 16),
            seal: UNIX_EPOCH.checked_add(Duration::new(u64_at(bytes, 24), nanos))?,
            inode: u64_at(bytes, 32),
            size: u64_at(bytes, 40),
            plain_size: u64_at(bytes, 48),
        })
    }

    fn bytes(&self, blob: &BlobId) -> [u8; HEADER] {
        let seal = self.seal.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.from.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.to.to_le_bytes());
        bytes[20..24].copy_from_slice(&seal.subsec_nanos().to_le_bytes());
        bytes[24..32].copy_from_slice(&seal.as_secs().to_le_bytes());
        bytes[32..40].copy_from_slice(&self.inode.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.size.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.plain_size.to_le_bytes());
        let sum = checksum(blob, &bytes[..120]);
        bytes[120..].copy_from_slice(&sum);
        bytes
    }

    /// Returns whether the data file is as it was when sealed.
    fn fits(&self, data: &Metadata) -> bool {
        self.to != 0
            && self.inode == data.ino()
            && self.size == data.len()
            && data.modified().is_ok_and(|time| time == self.seal)
    }
}

fn encode(blob: &BlobId, chunk: &Chunk, verified: bool, session: u32) -> [u8; RECORD] {
    let mut bytes = [0; RECORD];
    let len = u32::try_from(chunk.plain.end - chunk.plain.start).unwrap_or(u32::MAX);
    bytes[..8].copy_from_slice(&chunk.plain.start.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..16].copy_from_slice(&session.to_le_bytes());
    if let Some(digest) = chunk.digest {
        bytes[16..48].copy_from_slice(&digest.0);
        bytes[48] = match chunk.algorithm {
            Algorithm::Blake3 => 1,
            Algorithm::Sha256 => 2,
        };
    }
    bytes[49] = u8::from(verified);
    let sum = checksum(blob, &bytes[..56]);
    bytes[56..].copy_from_slice(&sum);
    bytes
}

/// Returns the chunk of a record and its session; `None` if it is no record of this blob.
fn decode(blob: &BlobId, bytes: &[u8], at: u64) -> Option<(Known, u32)> {
    // Zeros are the commonest non-record: an erased one.
    if bytes[56..64] == [0; 8] || bytes[56..64] != checksum(blob, &bytes[..56]) {
        return None;
    }
    let (start, len) = (u64_at(bytes, 0), u64::from(u32_at(bytes, 8)));
    let digest = Digest(bytes[16..48].try_into().expect("32 bytes are 32 bytes"));
    let digest = match bytes[48] {
        0 => None,
        1 => Some((Algorithm::Blake3, digest)),
        2 => Some((Algorithm::Sha256, digest)),
        _ => return None,
    };
    let plain = start..start.checked_add(len)?;
    Some((Known { plain, digest, verified: bytes[49] == 1, sure: false, at }, u32_at(bytes, 12)))
}

impl ReadyMap {
    /// Opens or makes the map at `path` for the data file `data`. Whatever lies there is judged, never trusted.
    pub(super) fn open(path: &Path, blob: &BlobId, data: &File) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(path)?;
        let mut len = file.metadata()?.len();
        let mut head = [0; HEADER];
        let read = read_full(&file, &mut head, 0)?;
        let foreign = read >= 8 && head[..8] != MAGIC;
        let other_version = !foreign && read >= 12 && u32_at(&head, 8) != VERSION;
        // A data file that was just made holds nothing, whatever its predecessor held.
        let fresh = data.metadata()?.len() == 0;
        if fresh || foreign || other_version || (len.saturating_sub(HEADER as u64)) / RECORD as u64 > MAX_RECORDS {
            file.set_len(0)?;
            (len, head) = (0, [0; HEADER]);
        }
        let header = Header::parse(blob, &head);
        if header.is_none() {
            // Without a header the records would count as somebody else's next time.
            let none = Header { from: 0, to: 0, seal: UNIX_EPOCH, inode: 0, size: 0, plain_size: 0 };
            file.write_all_at(&none.bytes(blob), 0)?;
            len = len.max(HEADER as u64);
        }
        let map = Self {
            file,
            blob: blob.clone(),
            end: AtomicU64::new(after(len)),
            session: AtomicU32::new(1),
            believed: AtomicU32::new(1),
            sealing: Mutex::new(()),
        };
        let sealed = header.as_ref().map_or(0, |header| header.to);
        let mut newest = sealed;
        let mut records = 0;
        map.scan(|_, session| {
            newest = newest.max(session);
            records += 1;
        })?;
        let session = newest.checked_add(1).unwrap_or_else(|| {
            // 2^32 sessions do not happen: somebody wrote this.
            let _ = map.file.set_len(0);
            map.end.store(HEADER as u64, Ordering::Relaxed);
            1
        });
        let metadata = data.metadata()?;
        let believed = match header {
            // Records after the seal would make the seal's interval one with a hole: all is checked once instead.
            Some(header) if newest == sealed && header.fits(&metadata) => header.from,
            _ => session,
        };
        map.session.store(session, Ordering::Relaxed);
        map.believed.store(believed, Ordering::Relaxed);
        if records > SLACK {
            let live = map.known()?;
            if live.len() as u64 * 2 < records {
                return map.compacted(path, &live);
            }
        }
        Ok(map)
    }

    /// Writes the map anew with `live` records only. If that fails the long map serves.
    fn compacted(self, path: &Path, live: &BTreeMap<u64, Known>) -> io::Result<Self> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let short = self.write_compacted(Path::new(&new), path, live);
        match short {
            Ok((file, end)) => Ok(Self { file, end: AtomicU64::new(end), ..self }),
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "ready map not shortened");
                Ok(self)
            }
        }
    }

    fn write_compacted(&self, new: &Path, path: &Path, live: &BTreeMap<u64, Known>) -> io::Result<(File, u64)> {
        let mut bytes = vec![0; HEADER];
        self.file.read_exact_at(&mut bytes, 0)?;
        let mut record = [0; RECORD];
        for known in live.values() {
            self.file.read_exact_at(&mut record, known.at)?;
            bytes.extend_from_slice(&record);
        }
        match std::fs::remove_file(new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(new)?;
        file.write_all_at(&bytes, 0)?;
        file.sync_data()?;
        std::fs::rename(new, path)?;
        Ok((file, bytes.len() as u64))
    }

    /// Calls `each` with every record in the order of writing.
    fn scan(&self, mut each: impl FnMut(Known, u32)) -> io::Result<()> {
        let end = self.end.load(Ordering::Acquire);
        let mut at = HEADER as u64;
        let mut buffer = vec![0; RECORD * BATCH];
        while at < end {
            let read = read_full(&self.file, &mut buffer, at)?;
            for (n, record) in buffer[..read].chunks_exact(RECORD).enumerate() {
                if let Some((known, session)) = decode(&self.blob, record, at + (n * RECORD) as u64) {
                    each(known, session);
                }
            }
            if read < buffer.len() {
                break;
            }
            at += read as u64;
        }
        Ok(())
    }

    /// Returns what the map knows, by first plain byte. Where records contradict each other the latest holds.
    pub(super) fn known(&self) -> io::Result<BTreeMap<u64, Known>> {
        let believed = self.believed.load(Ordering::Acquire);
        let mut all: BTreeMap<u64, Known> = BTreeMap::new();
        self.scan(|known, session| {
            if known.plain.is_empty() {
                return;
            }
            for key in overlapping(&all, &known.plain) {
                all.remove(&key);
            }
            all.insert(known.plain.start, Known { sure: session >= believed, ..known });
        })?;
        Ok(all)
    }

    /// Records that the data file holds `chunk`. Its data was written before.
    pub(super) fn append(&self, chunk: &Chunk, verified: bool) -> io::Result<()> {
        // Read after the data was written: a seal that covers this session syncs the data (see `seal`).
        let session = self.session.load(Ordering::SeqCst);
        let at = self.end.fetch_add(RECORD as u64, Ordering::AcqRel);
        self.file.write_all_at(&encode(&self.blob, chunk, verified, session), at)
    }

    /// Forgets records for good, because other bytes will take their place.
    pub(super) fn erase<'k>(&self, known: impl Iterator<Item = &'k Known>) -> io::Result<()> {
        let mut any = false;
        for known in known {
            self.file.write_all_at(&[0; RECORD], known.at)?;
            any = true;
        }
        if any { self.file.sync_data() } else { Ok(()) }
    }

    /// Believes nothing that was written so far: the data file was changed under us.
    pub(super) fn distrust(&self) {
        let next = self.session.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        self.believed.store(next, Ordering::Release);
    }

    /// Brings the data to the disk and says so. Chunks may be added meanwhile; they are not covered.
    /// `stamp` gives the data file its modification time.
    pub(super) fn seal(
        &self,
        data: &File,
        plain_size: u64,
        stamp: impl FnOnce(SystemTime) -> io::Result<Metadata>,
    ) -> io::Result<()> {
        let _one = self.sealing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let to = self.session.fetch_add(1, Ordering::SeqCst);
        let from = self.believed.load(Ordering::Acquire);
        data.sync_data()?;
        self.file.sync_data()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let entropy = Algorithm::Blake3.digest(&[&now.as_nanos().to_le_bytes()[..], &to.to_le_bytes()[..]].concat());
        // Odd, and with a digit that the clock's tick of a write would hit once in 10^9.
        let nanos = (u32_at(&entropy.0, 0) % 1_000_000_000) | 1;
        let seal = UNIX_EPOCH + Duration::new(now.as_secs(), nanos);
        let metadata = stamp(seal)?;
        let header = Header { from, to, seal, inode: metadata.ino(), size: metadata.len(), plain_size };
        // File systems with coarser times keep no seal; then there is none, and the next process checks.
        if from <= to && header.fits(&metadata) {
            self.file.write_all_at(&header.bytes(&self.blob), 0)?;
            self.file.sync_data()?;
        }
        Ok(())
    }
}

/// Returns the keys in `all` whose bytes overlap `plain`.
pub(super) fn overlapping(all: &BTreeMap<u64, Known>, plain: &Range<u64>) -> Vec<u64> {
    let before = all.range(..plain.start).next_back().filter(|(_, known)| known.plain.end > plain.start);
    before.into_iter().chain(all.range(plain.clone())).map(|(&key, _)| key).collect()
}

/// Returns where records go on in a map of `len` bytes; a torn last record is written over.
fn after(len: u64) -> u64 {
    let records = len.saturating_sub(HEADER as u64) / RECORD as u64;
    HEADER as u64 + records * RECORD as u64
}

/// Reads until `buffer` is full or the file ends.
fn read_full(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
