//! A post on the way: a node whose container stays, while fault after fault passes by.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nydus_tests::bed::Bed;
use nydus_tests::cache;
use nydus_tests::cri::Cri;
use nydus_tests::node::{Node, Setup};

use crate::image;

/// nydusd's `read_deadline`, in seconds. A page-cached read has half of it, twice.
pub(crate) const READ_DEADLINE: u64 = 16;
/// What a read may take at most: its deadline, and what a busy machine adds.
const LIMIT: Duration = Duration::from_secs(READ_DEADLINE + 6);
/// Within this all is well after the end of a fault.
const RECOVERY: Duration = Duration::from_secs(10);
/// Bytes that the mirror keeps: fewer than the image has.
const MIRROR_QUOTA: u64 = 16 << 20;

/// How a read ended.
#[derive(Debug)]
pub(crate) enum Read {
    /// With the right bytes.
    Right,
    /// With an error.
    Failed(std::io::Error),
}

/// A node with one container.
#[derive(Debug)]
pub(crate) struct Post {
    pub(crate) name: &'static str,
    pub(crate) node: Node,
    cri: Cri,
    image: String,
    root: PathBuf,
    next: usize,
    log: usize,
}

impl Post {
    /// How a node of the parade is set up.
    pub(crate) fn setup(bed: &Bed) -> Setup {
        Setup { read_deadline: Some(READ_DEADLINE), mirror_quota: Some(MIRROR_QUOTA), ..bed.setup() }
    }

    /// Starts the node in the folder `name` and a container on it.
    pub(crate) async fn start(bed: &Bed, name: &'static str, setup: &Setup) -> Result<Self> {
        let node = Node::start(&bed.scratch.dir(name)?, setup)?;
        let cri = bed.pull(&node).await?;
        let mut post = Self { name, node, cri, image: bed.image(), root: PathBuf::new(), next: 0, log: 0 };
        post.start_container("first").await?;
        Ok(post)
    }

    /// Starts a container, from which files are read from now on.
    pub(crate) async fn start_container(&mut self, name: &str) -> Result<()> {
        let container = self.cri.start(name, &self.image, &["/bin/sleep", "1000000"]).await?;
        let tasks = self.node.containerd.dir.join("state/io.containerd.runtime.v2.task/k8s.io");
        self.root = tasks.join(container.id()).join("rootfs");
        Ok(())
    }

    /// Returns the next file's number: the one that was not read for longest.
    pub(crate) fn next(&mut self) -> usize {
        self.next = (self.next + 1) % image::FILES;
        self.next
    }

    /// Returns nydusd's cache directory.
    pub(crate) fn cache(&self) -> PathBuf {
        self.node.dir.join("cache")
    }

    /// Reads a file in the container, from nydusd.
    pub(crate) async fn read(&self, number: usize) -> Result<Read> {
        self.read_within(number, LIMIT).await
    }

    async fn read_within(&self, number: usize, limit: Duration) -> Result<Read> {
        let path = self.root.join(image::name(number));
        let reading = tokio::task::spawn_blocking(move || fresh(&path));
        match tokio::time::timeout(limit, reading).await {
            Err(_) => bail!("{}: a read of file {number} hangs", self.name),
            Ok(found) => match found? {
                Ok(bytes) if image::is_right(number, &bytes) => Ok(Read::Right),
                Ok(_) => bail!("{}: file {number} has other bytes", self.name),
                Err(error) => Ok(Read::Failed(error)),
            },
        }
    }

    /// Reads a file whose bytes the node does not have.
    pub(crate) async fn read_cold(&self, number: usize) -> Result<Read> {
        cache::data_files(&self.cache()).iter().for_each(|path| cache::cut(path));
        self.read(number).await
    }

    /// Reads a file until that goes well, which it does soon.
    pub(crate) async fn recovers(&self, number: usize) -> Result<Duration> {
        let begin = Instant::now();
        while let Read::Failed(error) = self.read_cold(number).await? {
            ensure!(begin.elapsed() < RECOVERY, "{}: file {number} is an error for ever: {error}", self.name);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(begin.elapsed())
    }

    /// Begins a new page of the log.
    pub(crate) fn turn_page(&mut self) {
        self.log = self.node.nydusd_log().len();
    }

    /// Returns what nydusd logged on this page.
    pub(crate) fn page(&self) -> String {
        self.node.nydusd_log().get(self.log..).unwrap_or_default().to_owned()
    }

    /// Fails unless one warning or error of this page has all of `words`, and the digest of one of `blobs`.
    pub(crate) fn told(&self, words: &[&str], blobs: &[String]) -> Result<()> {
        let page = self.page();
        let told = page.lines().any(|line| {
            let names_blob = blobs.iter().any(|blob| line.contains(blob.trim_start_matches("sha256:")));
            [" WARN ", " ERROR "].iter().any(|level| line.contains(level))
                && names_blob
                && words.iter().all(|word| line.contains(word))
        });
        ensure!(told, "{}: no warning has {words:?}:\n{page}", self.name);
        Ok(())
    }
}

/// Reads a file, not from the kernel's memory.
fn fresh(path: &Path) -> std::io::Result<Vec<u8>> {
    posix_fadvise(&File::open(path)?, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    std::fs::read(path)
}

/// Says which file could not be read where that is not expected.
pub(crate) fn expect_right(read: Read, post: &Post) -> Result<()> {
    match read {
        Read::Right => Ok(()),
        Read::Failed(error) => Err(error).with_context(|| format!("{}: an error:\n{}", post.name, post.page())),
    }
}
