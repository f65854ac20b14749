//! Unix sockets to be served on.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::net::UnixListener;

/// How long a predecessor that is on its way out may keep a socket.
const WAIT_FOR_SOCKET: Duration = Duration::from_secs(4);

/// Why a socket cannot be served on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Something else has the path.
    #[error("{} exists and is not a socket: remove it or choose another address", .0.display())]
    NotASocket(PathBuf),
    /// Somebody serves there.
    #[error("another process serves on {}: stop it or choose another address", .0.display())]
    Taken(PathBuf),
    /// The system refused.
    #[error("could not listen on {}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// Who may connect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SocketOwner {
    /// Owner of the socket file; ours if absent.
    pub user: Option<u32>,
    /// Group of the socket file; ours if absent.
    pub group: Option<u32>,
}

/// Listens on `path`, making its directory and removing a socket that nobody serves.
///
/// # Errors
/// See [`BindError`].
pub async fn bind(path: &Path, owner: SocketOwner) -> Result<UnixListener, BindError> {
    let failed = |source| BindError::Io { path: path.to_path_buf(), source };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    let begun = Instant::now();
    loop {
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(failed(error)),
            Ok(found) if !found.file_type().is_socket() => return Err(BindError::NotASocket(path.to_path_buf())),
            Ok(_) => {}
        }
        if std::os::unix::net::UnixStream::connect(path).is_err() {
            fs::remove_file(path).map_err(failed)?;
            break;
        }
        if begun.elapsed() > WAIT_FOR_SOCKET {
            return Err(BindError::Taken(path.to_path_buf()));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    // Whoever may connect may have directories mounted as root: nobody but the owner, whatever the umask.
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(failed)?;
    if owner != SocketOwner::default() {
        fs::set_permissions(path, fs::Permissions::from_mode(0o770)).map_err(failed)?;
        std::os::unix::fs::chown(path, owner.user, owner.group).map_err(failed)?;
    }
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_anything_else_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("deep/er/s.sock");
        drop(bind(&path, SocketOwner::default()).await.expect("bound"));
        assert!(path.exists(), "a dropped listener leaves its file");
        let living = bind(&path, SocketOwner::default()).await.expect("bound again");
        assert!(matches!(bind(&path, SocketOwner::default()).await, Err(BindError::Taken(_))));
        drop(living);
        let file = dir.path().join("file");
        fs::write(&file, "precious").expect("written");
        assert!(matches!(bind(&file, SocketOwner::default()).await, Err(BindError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&file).expect("still there"), "precious");
    }
}
