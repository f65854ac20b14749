//! What a daemon that was killed leaves behind: a mount that answers nothing, and a socket that nobody listens on.

use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::sys::mount;

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

/// Returns whether a mount has lost its server: the kernel then answers with ENOTCONN.
fn dead(mountpoint: &Path) -> bool {
    matches!(std::fs::metadata(mountpoint), Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOTCONN as i32))
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
