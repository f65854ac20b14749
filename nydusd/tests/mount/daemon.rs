//! A daemon under test: the real program, with places of its own, ended and unmounted when dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nydusd::api::Client;
use serde_json::{Value, json};

/// Returns whether FUSE mounts can be made here; says why not.
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
pub(crate) fn can_mount() -> bool {
    let able = nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists();
    if !able {
        println!("skipped: mounting needs root and /dev/fuse");
    }
    able
}

/// Waits for something to become true.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "waited 20 s for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The folder of one daemon: mountpoint, cache, socket, log.
pub(crate) struct Place(pub(crate) tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["mnt", "cache"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self(dir)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn mnt(&self) -> PathBuf {
        self.path("mnt")
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("nydusd.log")).unwrap_or_default()
    }

    /// Returns a version 1 document with this place's cache.
    pub(crate) fn config(&self, backend: Value) -> Value {
        json!({
            "device": {
                "id": "test",
                "backend": backend,
                "cache": {"type": "blobcache", "config": {"work_dir": self.path("cache")}},
            },
            "mode": "direct", "enable_xattr": true,
        })
    }

    pub(crate) fn localfs(&self, dir: &Path) -> Value {
        self.config(json!({"type": "localfs", "config": {"dir": dir}}))
    }

    /// Starts a daemon with nothing but its places on the command line, and `more`.
    pub(crate) fn start(&self, more: &[&str]) -> Daemon<'_> {
        let daemon = self.spawn(more);
        wait_for("the API socket", || std::os::unix::net::UnixStream::connect(self.path("api.sock")).is_ok());
        daemon
    }

    pub(crate) fn spawn(&self, more: &[&str]) -> Daemon<'_> {
        let child = Command::new(env!("CARGO_BIN_EXE_nydusd"))
            .args(["fuse", "--mountpoint"])
            .arg(self.mnt())
            .arg("--apisock")
            .arg(self.path("api.sock"))
            .arg("--log-file")
            .arg(self.path("nydusd.log"))
            .args(more)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Daemon { place: self, child }
    }

    /// Starts a daemon that mounts one image from the command line.
    pub(crate) fn start_with(&self, bootstrap: &Path, config: &Value) -> Daemon<'_> {
        std::fs::write(self.path("config.json"), config.to_string()).unwrap();
        let (bootstrap, config) = (bootstrap.to_str().unwrap(), self.path("config.json"));
        self.start(&["--bootstrap", bootstrap, "--config", config.to_str().unwrap()])
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.mnt(), nix::mount::MntFlags::MNT_DETACH);
    }
}

pub(crate) struct Daemon<'a> {
    place: &'a Place,
    child: Child,
}

impl Daemon<'_> {
    pub(crate) fn client(&self) -> Client {
        Client::new(self.place.path("api.sock"))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for the end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the end of nydusd", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub(crate) fn stderr(&mut self) -> String {
        let mut text = String::new();
        std::io::Read::read_to_string(self.child.stderr.as_mut().unwrap(), &mut text).unwrap();
        text
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = nix::mount::umount2(&self.place.mnt(), nix::mount::MntFlags::MNT_DETACH);
    }
}
