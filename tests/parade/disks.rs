//! What disks and clocks do under the programs of a node.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nydus_tests::bed::Bed;
use nydus_tests::cache;
use nydus_tests::disk::Disk;
use nydus_tests::node::Setup;
use nydus_tests::process::{Process, run};

use crate::post::{Post, expect_right};

/// Tells a program another time than it is.
pub(crate) const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";
/// Of each disk, in MiB.
const SIZE: u64 = 96;

/// A node whose cache and whose snapshotter have a disk each, and whose clock can be set.
#[derive(Debug)]
pub(crate) struct Frail {
    pub(crate) post: Post,
    cache: Disk,
    root: Disk,
    clock: PathBuf,
}

impl Frail {
    pub(crate) async fn start(bed: &Bed) -> Result<Self> {
        let dir = bed.scratch.dir("n")?;
        let (cache, root) = (Disk::mount(&dir.join("cache"), SIZE)?, Disk::mount(&dir.join("snap"), SIZE)?);
        let clock = dir.join("clock");
        std::fs::write(&clock, "+0")?;
        // A clock that is set moves neither the monotonic one nor the times of files.
        let environment = [
            ("LD_PRELOAD", LIBRARY),
            ("FAKETIME_TIMESTAMP_FILE", clock.to_str().context("a path is text")?),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("NO_FAKE_STAT", "1"),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        let post = Post::start(bed, "n", &Setup { environment, ..Post::setup(bed) }).await?;
        Ok(Self { post, cache, root, clock })
    }

    /// Reads three files that the node does not have.
    async fn read_cold(&mut self, fault: &str) -> Result<()> {
        for _ in 0..3 {
            let file = self.post.next();
            let read = self.post.read_cold(file).await?;
            expect_right(read, &self.post).with_context(|| format!("during {fault:?}"))?;
        }
        println!("{fault}: right");
        Ok(())
    }

    fn warned(&self, fault: &str, word: &str) -> Result<()> {
        let page = self.post.page();
        let told = page.lines().any(|line| line.contains("WARN") && line.contains(word));
        ensure!(told, "{fault:?} was not met: no warning of {word:?} in\n{page}");
        Ok(())
    }

    /// The cache's disk is full, and has room again.
    pub(crate) async fn full_cache(&mut self) -> Result<()> {
        self.post.turn_page();
        cache::data_files(&self.post.cache()).iter().for_each(|path| cache::cut(path));
        let filler = self.cache.fill()?;
        for _ in 0..3 {
            let file = self.post.next();
            // What is cut makes room.
            let read = self.post.read(file).await?;
            expect_right(read, &self.post)?;
            self.cache.fill()?;
        }
        self.warned("cache disk full", "No space left on device")?;
        std::fs::remove_file(filler)?;
        println!("cache disk full: right");
        self.read_cold("cache disk with room again").await
    }

    /// System calls of the running nydusd fail.
    pub(crate) async fn failing_calls(&mut self) -> Result<()> {
        for call in ["pwrite64", "fdatasync"] {
            let daemons = self.post.node.nydusd_pids();
            ensure!(daemons.len() == 1, "{daemons:?}");
            let mut failing = Failing::calls(daemons[0], call, &self.post.node.dir)?;
            self.read_cold(&format!("{call} of nydusd fails")).await?;
            let ends = call == "fdatasync";
            if ends {
                // It syncs when it ends.
                kill(daemons[0], Signal::SIGTERM)?;
            }
            failing.met().await?;
            failing.end()?;
            if ends {
                self.new_container("synced").await?;
            }
            self.read_cold(&format!("{call} works again")).await?;
        }
        Ok(())
    }

    /// A new container is refused, and told why; those that run read on.
    async fn refused(&mut self, fault: &str, words: &[&str]) -> Result<()> {
        let name = fault.replace([' ', '\''], "-");
        let started = tokio::time::timeout(Duration::from_secs(40), self.post.start_container(&name)).await?;
        let refusal = started.err().with_context(|| format!("{fault}: a container was started"))?;
        let refusal = format!("{refusal:#}");
        ensure!(words.iter().any(|word| refusal.contains(word)), "{fault}: {refusal}");
        println!("{fault}: a new container is refused by name");
        Ok(())
    }

    /// The snapshotter's disk is full, or takes no writes or syncs, and is well again; nothing is restarted.
    pub(crate) async fn refusing_root(&mut self) -> Result<()> {
        let filler = self.root.fill()?;
        self.refused("snapshotter's disk full", &["No space left on device"]).await?;
        self.read_cold("snapshotter's disk full").await?;
        std::fs::remove_file(filler)?;
        self.new_container("room").await?;
        for call in ["pwrite64", "fdatasync"] {
            let fault = format!("{call} of the snapshotter fails");
            let mut failing = Failing::calls(self.post.node.snapshotter.pid(), call, &self.post.node.dir)?;
            self.refused(&fault, &["Input/output error"]).await?;
            failing.met().await?;
            failing.end()?;
            self.new_container(call).await?;
        }
        self.read_cold("snapshotter's disk well").await
    }

    /// The clock jumps by a day, forth and back.
    pub(crate) async fn clock(&mut self) -> Result<()> {
        for jump in ["+1d", "-1d", "+0"] {
            self.post.turn_page();
            std::fs::write(&self.clock, jump)?;
            self.read_cold(&format!("clock at {jump}")).await?;
            self.post.start_container(&format!("clock{jump}")).await.with_context(|| format!("at {jump}"))?;
        }
        // The programs have really believed it.
        let log = self.post.node.nydusd_log();
        let days: std::collections::BTreeSet<&str> =
            log.lines().filter(|line| line.starts_with('[')).filter_map(|line| line.get(1..11)).collect();
        ensure!(days.len() >= 2, "nydusd never saw another day: {days:?}");
        Ok(())
    }

    /// The cache's disk turns read-only, then cannot be read, then is gone, and is replaced.
    pub(crate) async fn dying_cache(&mut self) -> Result<()> {
        let warm = self.post.next();
        self.post.recovers(warm).await?;
        self.post.turn_page();
        self.cache.find_error()?;
        std::fs::write(self.post.cache().join("probe"), "x").expect_err("the disk is read-only");
        self.read_cold("cache disk read-only").await?;
        self.cache.lose_all_behind(2)?;
        for path in cache::data_files(&self.post.cache()) {
            drop_pages(&path)?;
        }
        expect_right(self.post.read(warm).await?, &self.post)?;
        self.read_cold("cache disk unreadable").await?;
        self.cache.cut_power()?;
        expect_right(self.post.read(warm).await?, &self.post)?;
        self.read_cold("cache disk gone").await?;
        ensure!(self.post.page().contains("WARN"), "nobody was told:\n{}", self.post.page());

        self.kill_nydusd()?;
        self.cache.replace(SIZE)?;
        self.new_container("replaced").await?;
        self.read_cold("cache disk replaced").await
    }

    /// The snapshotter's disk turns read-only, cannot be read, or loses its power, and comes back with the machine.
    pub(crate) async fn dying_root(&mut self) -> Result<()> {
        self.sync_root()?;
        self.root.find_error()?;
        self.read_cold("snapshotter's disk read-only").await?;
        self.refused("snapshotter's disk read-only", &["Read-only file system"]).await?;
        self.start_machine_again("read-only").await?;

        self.sync_root()?;
        self.root.lose_all_behind(2)?;
        let snapshots = std::fs::read_dir(self.post.node.dir.join("snap/snapshots"))?.flatten();
        let images = snapshots.map(|snapshot| snapshot.path().join("fs/image/image.boot")).filter(|path| path.exists());
        for path in images.chain([self.post.node.dir.join("snap/metadata.redb")]) {
            drop_pages(&path)?;
        }
        self.read_cold("snapshotter's disk unreadable").await?;
        self.post.node.snapshotter.crash()?;
        let refusal = format!("{:#}", self.post.node.restart_snapshotter().expect_err("nothing can be read"));
        ensure!(refusal.contains("Input/output error") && refusal.contains("metadata.redb"), "{refusal}");
        println!("snapshotter's disk unreadable: it does not start, by name");
        self.start_machine_again("unreadable").await?;

        self.sync_root()?;
        self.root.cut_power()?;
        self.refused("snapshotter's disk without power", &["Input/output error"]).await?;
        self.start_machine_again("powerless").await
    }

    /// What containerd unpacked and did not sync is on the disk when the kernel likes: here, by now.
    fn sync_root(&self) -> Result<()> {
        run(Command::new("sync").arg("-f").arg(self.post.node.dir.join("snap"))).map(drop)
    }

    /// All that holds the snapshotter's disk ends, and starts again once the disk is back.
    async fn start_machine_again(&mut self, name: &str) -> Result<()> {
        let begin = Instant::now();
        // A process may end in the moment in which it is to be ended, which is told as an error.
        while let Err(error) = self.post.node.containerd.end_containers() {
            ensure!(begin.elapsed() < Duration::from_secs(20), "{error:#}");
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.post.node.snapshotter.crash()?;
        self.kill_nydusd()?;
        for point in nydus_tests::scratch::mounts_below(&self.post.node.dir.join("snap")) {
            if point != self.post.node.dir.join("snap") {
                nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH)?;
            }
        }
        self.root.start_again()?;
        self.post.node.restart_snapshotter()?;
        self.new_container(name).await?;
        self.read_cold(&format!("snapshotter's disk back, was {name}")).await
    }

    fn kill_nydusd(&self) -> Result<()> {
        for pid in self.post.node.nydusd_pids() {
            kill(pid, Signal::SIGKILL)?;
        }
        Ok(())
    }

    /// Starts a container as soon as one can be started.
    async fn new_container(&mut self, name: &str) -> Result<()> {
        let mut last = Ok(());
        for number in 0..40 {
            last = self.post.start_container(&format!("{name}-{number}")).await;
            if last.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        last
    }
}

/// System calls of a program fail until this is ended.
struct Failing {
    strace: Process,
    call: &'static str,
    log: PathBuf,
}

impl Failing {
    fn calls(program: Pid, call: &'static str, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{call}-{program}.log"));
        let mut strace = Command::new("strace");
        strace.args(["-f", "-p", &program.to_string(), "-e", &format!("trace={call}")]);
        strace.args(["-e", &format!("inject={call}:error=EIO")]);
        let mut strace = Process::start("strace", strace, &log)?;
        strace.wait_until(Duration::from_secs(10), || {
            std::fs::read_to_string(&log).is_ok_and(|text| text.contains("attached"))
        })?;
        Ok(Self { strace, call, log })
    }

    /// Waits until one has failed.
    async fn met(&self) -> Result<()> {
        let begin = Instant::now();
        while !std::fs::read_to_string(&self.log).is_ok_and(|text| text.contains("INJECTED")) {
            ensure!(begin.elapsed() < Duration::from_secs(10), "{} was never called", self.call);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// A signal ends it as it would have ended anything else; what matters is that it lets go.
    fn end(&mut self) -> Result<()> {
        self.strace.stop(Duration::from_secs(5))?;
        Ok(())
    }
}

fn drop_pages(path: &Path) -> Result<()> {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    Ok(posix_fadvise(&std::fs::File::open(path)?, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

/// Converts in a work directory that is full, and then with room in it.
pub(crate) fn full_work(bed: &Bed) -> Result<()> {
    let work = bed.scratch.dir("small")?;
    let disk = Disk::mount(&work, SIZE)?;
    let filler = disk.fill()?;
    let refused = run(&mut bed.convert("docker", &work)?).expect_err("there is no room").to_string();
    ensure!(refused.contains("No space left on device") && refused.contains("/small"), "{refused}");
    println!("nydusify's work directory full: told by name");
    std::fs::remove_file(filler)?;
    run(&mut bed.convert("docker", &work)?)?;
    println!("nydusify's work directory with room: converts");
    Ok(())
}
