//! `nydusctl swarm`: what a node's nydus-p2p tells about its swarm, and what it is told to do.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Subcommand;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::handshake;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use nydus_backend::overview::{Blob, Peer, Status};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes of an answer at most.
const MOST: usize = 64 << 20;

/// What is to be done.
#[derive(Debug, Subcommand)]
pub(crate) enum What {
    /// The node itself: its peer id, and bytes by where they came from
    Status,
    /// The members
    Peers,
    /// What is in its cache
    Blobs,
    /// Has a blob forgotten by all members, and not kept again for a day
    Forget {
        /// The blob: sha256: and 64 hex digits
        digest: String,
        /// nydus-p2p's socket for operators, in its data_dir
        #[arg(long, value_name = "PATH", default_value = "/var/lib/nydus-p2p/control.sock")]
        socket: PathBuf,
    },
}

/// Does it, with the nydus-p2p at `address` or at the socket, and returns what is to be printed.
pub(crate) async fn run(address: &str, what: &What, raw: bool) -> anyhow::Result<String> {
    let path = match what {
        What::Status => "/swarm/status",
        What::Peers => "/swarm/peers",
        What::Blobs => "/swarm/blobs",
        What::Forget { digest, socket } => return forget(digest, socket).await,
    };
    let asking = async { ask(TcpStream::connect(address).await?, Method::GET, path, address).await };
    let text = tokio::time::timeout(LIMIT, asking).await.unwrap_or_else(|_| bail!("no answer within {LIMIT:?}"));
    let text = text.with_context(|| {
        format!("could not ask nydus-p2p at {address}; check that it runs and that this is its metrics_listen")
    })?;
    if raw {
        return Ok(String::from_utf8_lossy(&text).into_owned());
    }
    Ok(match what {
        What::Peers => peers(&read::<Vec<Peer>>(&text)?),
        What::Blobs => blobs(&read::<Vec<Blob>>(&text)?),
        _ => status(read::<Option<Status>>(&text)?.as_ref()),
    })
}

async fn forget(digest: &str, socket: &Path) -> anyhow::Result<String> {
    let path = format!("/swarm/forget/{digest}");
    let asking = async { ask(UnixStream::connect(socket).await?, Method::POST, &path, "nydus-p2p").await };
    let told = tokio::time::timeout(LIMIT, asking).await.unwrap_or_else(|_| bail!("no answer within {LIMIT:?}"));
    told.with_context(|| {
        format!(
            "could not have {digest} forgotten through {}; check that nydus-p2p runs with a [swarm] section, that this is control.sock in its data_dir, and that you are its user",
            socket.display()
        )
    })?;
    Ok(format!("{digest} is being forgotten: members serve it for up to 10 s more, and do not keep it again for 24 h"))
}

fn read<T: DeserializeOwned>(text: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(text)
        .context("nydus-p2p answers in a form that this nydusctl does not know; update the older one")
}

async fn ask(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    method: Method,
    path: &str,
    host: &str,
) -> anyhow::Result<Bytes> {
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    // It ends with the answer, or with this program.
    tokio::spawn(connection);
    let request = Request::builder().method(method).uri(path).header("host", host).body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = match Limited::new(answer.into_body(), MOST).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => bail!("its answer broke off: {error}"),
    };
    match status {
        StatusCode::OK | StatusCode::ACCEPTED => Ok(body),
        StatusCode::NOT_FOUND => bail!("it is a member of no swarm: its configuration has no [swarm] section"),
        status => bail!("it answers {status}: {}", String::from_utf8_lossy(&body)),
    }
}

fn status(status: Option<&Status>) -> String {
    let Some(status) = status else { return "The node is starting.".into() };
    let mut out = String::new();
    let _ = writeln!(out, "Peer:                   {}", status.peer);
    let _ = writeln!(out, "Address:                {}", status.address);
    let _ = writeln!(out, "Zone:                   {}", if status.zone.is_empty() { "-" } else { &status.zone });
    let _ = writeln!(out, "Standing:               {}", status.standing);
    let _ = writeln!(out, "Members ready:          {}", status.members);
    let _ = writeln!(out, "Stored:                 {}", megabytes(status.stored_bytes));
    let _ = writeln!(out, "From registries:        {}", megabytes(status.registry_bytes));
    let _ = writeln!(out, "From members:           {}", megabytes(status.peer_bytes));
    let _ = writeln!(out, "To members:             {}", megabytes(status.sent_bytes));
    let ratio = status.egress_ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}"));
    let _ = writeln!(out, "Registry's part:        {ratio}");
    let _ = write!(out, "Quarantines:            {}", status.quarantines);
    out
}

fn peers(peers: &[Peer]) -> String {
    let mut out = format!("{:<54} {:<24} {:<9} {:>5} ZONE", "PEER", "ADDRESS", "STANDING", "BOOT");
    for peer in peers {
        let (own, zone) =
            (if peer.own { " (this node)" } else { "" }, if peer.zone.is_empty() { "-" } else { &peer.zone });
        let _ =
            write!(out, "\n{:<54} {:<24} {:<9} {:>5} {zone}{own}", peer.peer, peer.address, peer.standing, peer.boot);
    }
    out
}

fn blobs(blobs: &[Blob]) -> String {
    let mut out = format!("{:<71} {:>12} {:>12} PROVED", "DIGEST", "STORED", "SIZE");
    for blob in blobs {
        let (stored, size) = (megabytes(blob.stored_bytes), megabytes(blob.size));
        let _ = write!(out, "\n{:<71} {stored:>12} {size:>12} {}", blob.digest, if blob.proved { "yes" } else { "no" });
    }
    out
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
