//! Starting and stopping one nydusd.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nydusd::api::types::DaemonState;
use nydusd::backend_source::BACKEND_SOURCE;
use tokio::process::Command;

use super::{Daemon, Inner, Process, ServeError, Serves};
use crate::bootstrap;

/// How long a daemon may take until it serves.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How often it is asked meanwhile.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// How long a daemon may take to end when told to.
const STOP_LIMIT: Duration = Duration::from_secs(5);

impl Inner {
    /// Starts a daemon whose process is gone, removing what its predecessor left. The caller has the daemon's turn.
    pub(super) async fn start(self: &Arc<Self>, daemon: &Arc<Daemon>) -> Result<(), ServeError> {
        {
            let mut state = daemon.lock();
            state.process = None;
            state.mounted.clear();
        }
        clear(daemon)?;
        let log = self.layout.daemon_log(&daemon.name);
        private_directory(&daemon.mountpoint, 0o755)?;
        for file in [&log, &daemon.socket] {
            private_directory(file.parent().expect("a file of ours has a directory"), 0o700)?;
        }
        private_directory(&self.settings.work_dir, 0o755)?;
        let output =
            fs::OpenOptions::new().create(true).append(true).open(&log).map_err(ServeError::io("opening", &log))?;
        let errors = output.try_clone().map_err(ServeError::io("opening", &log))?;

        let mut command = Command::new(&self.settings.nydusd);
        command.arg("fuse");
        if let Some(threads) = self.settings.threads {
            command.arg("--thread-num").arg(threads.to_string());
        }
        command.arg("--mountpoint").arg(&daemon.mountpoint).arg("--apisock").arg(&daemon.socket);
        command.arg("--log-level").arg(&self.settings.log_level).arg("--log-file").arg(&log);
        if self.settings.log_rotation > 0 {
            command.arg("--log-rotation-size").arg(self.settings.log_rotation.to_string());
        }
        if let Serves::One(image) = daemon.serves {
            let found = bootstrap::find(&self.layout.upper(image))?;
            command.arg("--bootstrap").arg(found.path);
            command.arg("--config").arg(self.layout.image_config(&daemon.name, image));
        }
        let source = format!("{}/api/v1/daemons/{}/backend", self.layout.own_socket().display(), daemon.name);
        command.env(BACKEND_SOURCE, source);
        // A group of its own: a terminal's interrupt is for us, and containers must outlive us.
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        let failed = |why: String| ServeError::Start { program: self.settings.nydusd.clone(), why };
        let mut child = command.spawn().map_err(|error| failed(error.to_string()))?;
        let pid =
            child.id().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(|| failed("it ended at once".into()))?;

        let begun = tokio::time::Instant::now();
        let client = daemon.client().with_timeout(Duration::from_secs(1));
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(failed(format!("it ended with {status}; {}", last_line(&log))));
            }
            match client.info().await {
                Ok(info) if info.state == DaemonState::Running => break,
                _ if begun.elapsed() < START_LIMIT => tokio::time::sleep(ASK_EVERY).await,
                _ => {
                    let ended = child.kill().await;
                    tracing::debug!(?ended, pid, "a daemon that does not serve is ended");
                    return Err(failed(format!(
                        "it does not serve after {} s; {}",
                        START_LIMIT.as_secs(),
                        last_line(&log)
                    )));
                }
            }
        }
        daemon.lock().process = Process::find(pid);
        tracing::info!(daemon = daemon.name, pid, "nydusd started");
        // Somebody must wait for it, or it stays a zombie.
        tokio::spawn(async move {
            let ended = child.wait().await;
            tracing::debug!(pid, ?ended, "nydusd ended");
        });
        self.watch(daemon);
        Ok(())
    }
}

/// Ends a daemon that nobody needs any more, with its mount. The caller has the daemon's turn.
pub(super) async fn stop(daemon: &Daemon) {
    let process = {
        let mut state = daemon.lock();
        state.mounted.clear();
        state.process.take()
    };
    if let Some(process) = process.filter(Process::alive) {
        let told = kill(Pid::from_raw(process.pid()), Signal::SIGTERM);
        tracing::info!(daemon = daemon.name, pid = process.pid(), ?told, "nydusd is told to end");
        let begun = tokio::time::Instant::now();
        while process.alive() && begun.elapsed() < STOP_LIMIT {
            tokio::time::sleep(ASK_EVERY).await;
        }
        if process.alive() {
            let killed = kill(Pid::from_raw(process.pid()), Signal::SIGKILL);
            tracing::warn!(daemon = daemon.name, ?killed, "nydusd did not end in time and was killed");
        }
    }
    if let Err(error) = clear(daemon) {
        tracing::warn!(daemon = daemon.name, %error, "something of an ended daemon is still there");
    }
}

/// Removes a dead daemon's mount and socket. Containers keep what they have open, which fails from now on.
pub(super) fn clear(daemon: &Daemon) -> Result<(), ServeError> {
    // A mount may lie on a mount, after a start that was killed halfway.
    while is_mounted(&daemon.mountpoint).map_err(ServeError::io("reading the mounts for", &daemon.mountpoint))? {
        umount2(&daemon.mountpoint, MntFlags::MNT_DETACH)
            .map_err(|error| ServeError::io("unmounting", &daemon.mountpoint)(error.into()))?;
        tracing::info!(path = %daemon.mountpoint.display(), "a dead mount is detached");
    }
    match fs::remove_file(&daemon.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ServeError::io("removing", &daemon.socket)(error)),
        _ => Ok(()),
    }
}

/// Whether something is mounted exactly there. A dead FUSE mount cannot be asked by `stat`, so the table is read.
pub(super) fn is_mounted(path: &Path) -> io::Result<bool> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let path = path.to_string_lossy();
    Ok(mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|mounted| unescape(mounted) == path))
}

/// Undoes the octal escapes of the mount table.
fn unescape(text: &str) -> String {
    let mut plain = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let Some((&byte, rest)) = bytes.split_first() {
        bytes = rest;
        let code = (byte == b'\\').then(|| rest.get(..3)).flatten();
        match code
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok())
        {
            Some(code) => {
                plain.push(code);
                bytes = &rest[3..];
            }
            None => plain.push(byte),
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

fn private_directory(path: &Path, mode: u32) -> Result<(), ServeError> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(ServeError::io("creating", path))
}

/// What a log ends with, to go into an error.
fn last_line(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let end = &text[text.len().saturating_sub(2048)..];
    let end = String::from_utf8_lossy(end);
    match end.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => format!("its log {} ends with: {}", log.display(), line.trim()),
        None => format!("its log {} is empty", log.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_read_with_its_escapes() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape(r"/a\9"), r"/a\9");
        assert!(is_mounted(Path::new("/proc")).expect("readable"));
        assert!(!is_mounted(Path::new("/proc/self")).expect("readable"));
    }
}
