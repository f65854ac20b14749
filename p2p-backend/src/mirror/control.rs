//! What the operator may have done: requests on a socket in the data directory, which is for its owner only.
//!
//! | request | what it does |
//! | --- | --- |
//! | `POST /swarm/forget/sha256:…` | has a blob forgotten by all members, for a day |

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::extract::Path as Part;
use axum::routing::post;
use http::StatusCode;
use nydus_rafs::Digest;
use tokio::net::UnixListener;

use super::driver::Driver;

/// The socket's name.
const NAME: &str = "control.sock";

/// A socket that listens; it is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Control {
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl Control {
    /// Listens in `data_dir`, which no other daemon has.
    pub(super) fn bind(data_dir: &Path) -> io::Result<Self> {
        let (path, new) = (data_dir.join(NAME), data_dir.join("control.new"));
        // What an earlier process has left listens no more.
        for left in [&path, &new] {
            match std::fs::remove_file(left) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let listener = UnixListener::bind(&new)?;
        // Nobody finds it before it is for the owner only.
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&new, &path)?;
        Ok(Self { listener: Some(listener), path })
    }

    /// Answers until it is dropped.
    pub(super) async fn run(mut self, driver: Arc<Driver>) {
        let forget = move |Part(digest): Part<String>| {
            let driver = driver.clone();
            async move {
                let digest = digest.strip_prefix("sha256:").and_then(|hex| hex.parse::<Digest>().ok());
                match digest {
                    Some(digest) => {
                        driver.forget(digest);
                        (StatusCode::ACCEPTED, "")
                    }
                    None => (StatusCode::BAD_REQUEST, "give a digest: sha256: and 64 hex digits"),
                }
            }
        };
        let Some(listener) = self.listener.take() else { return };
        if let Err(error) = axum::serve(listener, Router::new().route("/swarm/forget/{digest}", post(forget))).await {
            tracing::error!(%error, "the operator's socket ended");
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "could not remove the operator's socket");
        }
    }
}
