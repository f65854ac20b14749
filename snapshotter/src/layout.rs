//! Where everything lies below the snapshotter's root.
//!
//! ```text
//! root/ metadata.redb                          the records
//!       snapshots/<id>/{fs,work}               upper and work directories
//!       mnt/ or mnt/<id>                       RAFS mounts
//!       config/<daemon>/<id>/config.json       what nydusd is told, credentials included (0600)
//!       socket/<daemon>/api.sock               nydusd's API
//!       socket/own.sock                        ours, on which nydusd asks for current credentials
//!       logs/<daemon>/nydusd.log
//!       index/                                 tables of contents while bootstraps are made of them
//!       cache/                                 blob caches, unless the template names another place
//! ```
//!
//! RAFS mounts lie outside `snapshots/` because containerd clones and id-maps the common parent of all lower directories
//! for user namespaces; a foreign mount below it would break plain containers too.

use std::path::{Path, PathBuf};

/// Bytes that a unix socket's address can hold, without the final zero.
const SOCKET_PATH_LIMIT: usize = 107;

/// The places below one root.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Places below `root`, which should be absolute.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The root itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The records.
    pub fn records(&self) -> PathBuf {
        self.root.join("metadata.redb")
    }

    /// The directory of all snapshots.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// The directory of one snapshot.
    pub fn snapshot(&self, id: u64) -> PathBuf {
        self.snapshots().join(id.to_string())
    }

    /// Where a snapshot's files are.
    pub fn upper(&self, id: u64) -> PathBuf {
        self.snapshot(id).join("fs")
    }

    /// Overlayfs's own directory of a snapshot.
    pub fn work(&self, id: u64) -> PathBuf {
        self.snapshot(id).join("work")
    }

    /// Where RAFS mounts are.
    pub fn mounts(&self) -> PathBuf {
        self.root.join("mnt")
    }

    /// Where the image of a bootstrap snapshot is mounted.
    pub fn rafs(&self, id: u64) -> PathBuf {
        self.mounts().join(id.to_string())
    }

    /// The configuration directory of a daemon.
    pub fn daemon_config(&self, daemon: &str) -> PathBuf {
        self.root.join("config").join(daemon)
    }

    /// The configuration of one image.
    pub fn image_config(&self, daemon: &str, id: u64) -> PathBuf {
        self.daemon_config(daemon).join(id.to_string()).join("config.json")
    }

    /// A daemon's API socket.
    pub fn api_socket(&self, daemon: &str) -> PathBuf {
        self.root.join("socket").join(daemon).join("api.sock")
    }

    /// The socket on which daemons ask us.
    pub fn own_socket(&self) -> PathBuf {
        self.root.join("socket/own.sock")
    }

    /// A daemon's log.
    pub fn daemon_log(&self, daemon: &str) -> PathBuf {
        self.logs().join(daemon).join("nydusd.log")
    }

    /// All logs.
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    /// Where bootstraps are made.
    pub fn index(&self) -> PathBuf {
        self.root.join("index")
    }

    /// Where blobs are cached by default.
    pub fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Whether sockets below this root can be bound at all.
    pub fn sockets_fit(&self) -> bool {
        // The longest daemon name is "image-" and a 64-bit number.
        let longest = self.api_socket("image-18446744073709551615");
        fits_socket(&longest)
    }
}

/// Whether a unix socket can be bound at `path`.
pub fn fits_socket(path: &Path) -> bool {
    path.as_os_str().len() <= SOCKET_PATH_LIMIT
}
