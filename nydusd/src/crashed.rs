//! What a daemon that was killed leaves behind: a mount that answers nothing, and a socket that nobody listens on.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;

use crate::sys::mount;

/// How long a mount may take to say that it lives.
const PATIENCE: Duration = Duration::from_secs(2);

/// Returns whether an earlier daemon with the same places was killed: its mount is there, its socket file, too, and nobody
/// answers. A mount whose server died is noticed without a socket as well.
pub fn detect(mountpoint: &Path, apisock: Option<&Path>) -> bool {
    let fuse = matches!(mount::mounted(mountpoint), Ok(Some(mounted)) if mounted.fstype.starts_with("fuse"));
    if !fuse {
        return false;
    }
    let stale = apisock.is_some_and(|socket| socket.exists() && UnixStream::connect(socket).is_err());
    stale || dead(mountpoint)
}

/// Returns whether a mount has lost its server: the kernel then answers with ENOTCONN. Attributes may still come from its
/// cache, so the question must be one that it always passes on. If there is a server that does not answer, the thread that
/// asks is left waiting: such a mount is not ours to take away.
fn dead(mountpoint: &Path) -> bool {
    let mountpoint = mountpoint.to_owned();
    let (sender, answer) = mpsc::channel();
    std::thread::spawn(move || sender.send(nix::sys::statvfs::statvfs(&mountpoint).err()));
    matches!(answer.recv_timeout(PATIENCE), Ok(Some(Errno::ENOTCONN)))
}

/// Takes dead mounts out of the tree, so that a new one is not put above them.
pub fn clear(mountpoint: &Path) {
    // Several, if a daemon was killed several times.
    for _ in 0..64 {
        if !dead(mountpoint) {
            return;
        }
        if let Err(error) = mount::detach(mountpoint) {
            tracing::warn!(mountpoint = %mountpoint.display(), %error, "could not detach the dead mount");
            return;
        }
    }
}
