//! A daemon under test: the real program, with places of its own, ended and unmounted when dropped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nydusd::api::Client;
use serde_json::{Value, json};

/// Returns whether FUSE mounts can be made here; says why not.
pub(crate) fn can_mount() -> bool {
    able(nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists(), "root and /dev/fuse")
}

/// Returns whether all `programs` (or files, by their full paths) are here; says what is not.
pub(crate) fn has(programs: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs: Vec<PathBuf> = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).collect();
    programs.iter().all(|program| able(dirs.iter().any(|dir| dir.join(program).exists()), program))
}

/// Passes `able` on; says what is missing. In CI nothing may be missing: a skipped proof is none.
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn able(able: bool, need: &str) -> bool {
    if !able {
        assert!(std::env::var_os("CI").is_none(), "this test needs {need}, and in CI nothing may be skipped");
        println!("skipped: needs {need}");
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
        self.spawn_as(Command::new(env!("CARGO_BIN_EXE_nydusd")), more)
    }

    /// Starts a daemon by a command that ends in the program's path.
    pub(crate) fn spawn_as(&self, mut command: Command, more: &[&str]) -> Daemon<'_> {
        let child = command
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
        self.start_as(Command::new(env!("CARGO_BIN_EXE_nydusd")), bootstrap, config)
    }

    /// The same, by a command that ends in the program's path.
    pub(crate) fn start_as(&self, command: Command, bootstrap: &Path, config: &Value) -> Daemon<'_> {
        std::fs::write(self.path("config.json"), config.to_string()).unwrap();
        let (bootstrap, config) = (bootstrap.to_str().unwrap(), self.path("config.json"));
        let daemon = self.spawn_as(command, &["--bootstrap", bootstrap, "--config", config.to_str().unwrap()]);
        wait_for("the API socket", || std::os::unix::net::UnixStream::connect(self.path("api.sock")).is_ok());
        daemon
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

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
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
