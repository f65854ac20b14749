//! What the campaign is fought over: a private registry, a node with real containerd, and containers on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nydus_tests::bed::Bed;
use nydus_tests::cri::{Container, Cri};
use nydus_tests::node::{Node, Setup};
use nydus_tests::scratch::mounts_below;
use tokio::task::JoinHandle;

use crate::files;
use crate::ledger::Ledger;
use crate::readers::{Library, Place};
use crate::thief::Thief;

/// nydusd's `read_deadline`, in seconds. A page-cached read has half of it.
pub(crate) const READ_DEADLINE: u64 = 20;
/// Bytes that the mirror keeps: fewer than the image has, so that the registry is always asked for some.
const MIRROR_QUOTA: u64 = 16 << 20;
/// How long a token is good for.
pub(crate) const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// How long an address of the store is good for: the registry is asked all the time.
pub(crate) const ADDRESS_LIFE: Duration = Duration::from_secs(2);
/// What one call to containerd may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// All of it. Dropped in this order.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) thief: Thief,
    pub(crate) library: Arc<Library>,
    cri: Cri,
    container: Option<Container>,
    started: u64,
    /// Removals of containers that are not used any more.
    leaving: Vec<JoinHandle<()>>,
    pub(crate) node: Node,
    pub(crate) bed: Bed,
}

impl Site {
    /// Makes the image and starts everything.
    pub(crate) async fn new(ledger: Arc<Ledger>, seed: u64) -> Result<Self> {
        let work = tempfile::tempdir().context("making a folder for programs")?;
        let (layers, files) = files::layers(work.path())?;
        let bed = Bed::new("campaign", &layers).await?;
        let dir = bed.scratch.dir("n")?;
        let cache = bed.scratch.dir("n/cache")?;
        // A disk of its own, which can be full without harm to anybody.
        mount(Some("campaign"), &cache, Some("tmpfs"), MsFlags::empty(), Some("size=128m"))
            .context("mounting a disk for the cache")?;
        let setup = Setup { read_deadline: Some(READ_DEADLINE), mirror_quota: Some(MIRROR_QUOTA), ..bed.setup() };
        let node = Node::start(&dir, &setup)?;
        let cri = bed.pull(&node).await?;
        let mut site = Self {
            thief: Thief::start(&cache, seed),
            library: Arc::new(Library { files, place: Default::default(), ledger }),
            cri,
            container: None,
            started: 0,
            leaving: Vec::new(),
            node,
            bed,
        };
        site.bed.front.set_lives(TOKEN_LIFE, ADDRESS_LIFE);
        site.move_readers(Instant::now() + PATIENCE).await?;
        Ok(site)
    }

    /// Returns nydusd's cache directory.
    pub(crate) fn cache(&self) -> PathBuf {
        self.node.dir.join("cache")
    }

    /// Kills every nydusd.
    pub(crate) fn kill_nydusd(&self) -> Result<()> {
        let pids = self.node.nydusd_pids();
        ensure!(!pids.is_empty(), "no nydusd runs");
        for pid in pids {
            kill(pid, Signal::SIGKILL)?;
        }
        Ok(())
    }

    fn start(&mut self) -> impl Future<Output = Result<Container>> + Send + 'static {
        self.started += 1;
        let (cri, image, name) = (self.cri.clone(), self.bed.image(), format!("reader-{}", self.started));
        async move {
            let start = cri.start(&name, &image, &["/bin/sleep", "1000000"]);
            tokio::time::timeout(PATIENCE, start).await.context("containerd does not answer")?
        }
    }

    /// Begins to start a container that is in the way of what happens next.
    pub(crate) fn start_beside(&mut self) -> JoinHandle<Result<Container>> {
        tokio::spawn(self.start())
    }

    /// Removes what came of it, if anything did.
    pub(crate) fn expect_nothing_of(&mut self, start: JoinHandle<Result<Container>>) {
        let cri = self.cri.clone();
        self.leaving.push(tokio::spawn(async move {
            if let Ok(Ok(container)) = start.await {
                remove(&cri, container).await;
            }
        }));
    }

    /// Starts a container and lets the readers read in it. Tries until it works, or the deadline passes.
    pub(crate) async fn move_readers(&mut self, deadline: Instant) -> Result<()> {
        let container = loop {
            let error = match self.start().await {
                Ok(container) => break container,
                Err(error) => error,
            };
            self.library.ledger.note(&format!("no container yet: {error:#}"));
            if Instant::now() > deadline {
                return Err(error.context("no new container works"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let task = self.node.containerd.dir.join("state/io.containerd.runtime.v2.task/k8s.io").join(container.id());
        let place = Place { overlay: task.join("rootfs"), rafs: image_below(&self.node.dir.join("snap/mnt"))? };
        ensure!(mounts_below(&place.overlay).len() == 1, "{} is not mounted", place.overlay.display());
        *self.library.place.write().expect("no reader panics") = place;
        if let Some(old) = self.container.replace(container) {
            let cri = self.cri.clone();
            self.leaving.push(tokio::spawn(async move { remove(&cri, old).await }));
        }
        Ok(())
    }

    /// Removes all containers. What a killed containerd had half made may take several tries.
    pub(crate) async fn clean_up(&mut self) -> Result<()> {
        if let Some(container) = self.container.take() {
            remove(&self.cri, container).await;
        }
        for task in self.leaving.drain(..) {
            task.await?;
        }
        let begin = Instant::now();
        loop {
            match self.node.containerd.end_containers() {
                Ok(()) => return Ok(()),
                Err(error) if begin.elapsed() > PATIENCE => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    }

    /// Copies every log to `logs`.
    pub(crate) fn keep_logs(&self, logs: &Path) {
        let dir = &self.node.dir;
        let files = [
            (dir.join("p2p.log"), "nydus-p2p.log"),
            (dir.join("snapshotter.log"), "snapshotter.log"),
            (dir.join("ctd/containerd.log"), "containerd.log"),
            (self.bed.scratch.path().join("registry/registry.log"), "registry.log"),
        ];
        for (from, to) in files {
            drop(std::fs::copy(from, logs.join(to)));
        }
        drop(std::fs::write(logs.join("nydusd.log"), self.node.nydusd_log()));
    }
}

/// Removes a container; what cannot be removed now is removed with the node.
async fn remove(cri: &Cri, container: Container) {
    drop(tokio::time::timeout(PATIENCE, cri.remove(container)).await);
}

/// Finds the image's directory among those that nydusd serves.
fn image_below(mounts: &Path) -> Result<PathBuf> {
    let entries = std::fs::read_dir(mounts).with_context(|| format!("listing {}", mounts.display()))?;
    let found = entries.flatten().map(|entry| entry.path()).find(|path| path.join("cold").is_dir());
    found.with_context(|| format!("no image is mounted below {}", mounts.display()))
}
