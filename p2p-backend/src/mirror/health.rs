//! Whether the mirror itself works: its listener and its disk, not the registries behind it.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::StatusCode;

/// A listener or disk that takes longer does not work.
const LIMIT: Duration = Duration::from_secs(2);

/// What is checked.
#[derive(Debug, Clone)]
pub(super) struct Health {
    /// Where the mirror listens.
    pub(super) listen: SocketAddr,
    /// Where it keeps its files.
    pub(super) data_dir: PathBuf,
}

impl Health {
    /// Checks both, and says what does not work.
    pub(super) async fn check(&self) -> (StatusCode, String) {
        let mut to = self.listen;
        if to.ip().is_unspecified() {
            to.set_ip(if to.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
        }
        let listener = match tokio::time::timeout(LIMIT, tokio::net::TcpStream::connect(to)).await {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(format!("the listener at {to} does not accept: {error}")),
            Err(_) => Some(format!("the listener at {to} does not accept")),
        };
        let dir = self.data_dir.clone();
        let disk = match tokio::time::timeout(LIMIT, tokio::task::spawn_blocking(move || touch(&dir))).await {
            Ok(Ok(Ok(()))) => None,
            // A full disk is met by passing bytes on without keeping them.
            Ok(Ok(Err(error))) if error.kind() == std::io::ErrorKind::StorageFull => None,
            Ok(Ok(Err(error))) => Some(format!("{} cannot be written: {error}", self.data_dir.display())),
            Ok(Err(_)) | Err(_) => Some(format!("{} does not answer", self.data_dir.display())),
        };
        match listener.or(disk) {
            None => (StatusCode::OK, "ok\n".into()),
            Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
        }
    }
}

fn touch(dir: &Path) -> std::io::Result<()> {
    let mut file = std::fs::File::create(dir.join("healthy"))?;
    file.write_all(b"ok")
}
