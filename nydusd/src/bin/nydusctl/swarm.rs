//! `nydusctl swarm`: what a node's nydus-p2p tells about its swarm.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::ValueEnum;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1::handshake;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use nydus_backend::overview::{Blob, Peer, Status};
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes of an answer at most.
const MOST: usize = 64 << 20;

/// What to show.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum View {
    /// The node itself: its peer id, and bytes by where they came from
    Status,
    /// The members
    Peers,
    /// What is in its cache
    Blobs,
}

/// Asks the nydus-p2p at `address` and returns what is to be printed.
pub(crate) async fn show(address: &str, view: View, raw: bool) -> anyhow::Result<String> {
    let path = match view {
        View::Status => "/swarm/status",
        View::Peers => "/swarm/peers",
        View::Blobs => "/swarm/blobs",
    };
    let asking = tokio::time::timeout(LIMIT, ask(address, path));
    let text = asking.await.unwrap_or_else(|_| bail!("no answer within {LIMIT:?}"));
    let text = text.with_context(|| {
        format!("could not ask nydus-p2p at {address}; check that it runs and that this is its metrics_listen")
    })?;
    if raw {
        return Ok(String::from_utf8_lossy(&text).into_owned());
    }
    Ok(match view {
        View::Status => status(read::<Option<Status>>(&text)?.as_ref()),
        View::Peers => peers(&read::<Vec<Peer>>(&text)?),
        View::Blobs => blobs(&read::<Vec<Blob>>(&text)?),
    })
}

fn read<T: DeserializeOwned>(text: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(text)
        .context("nydus-p2p answers in a form that this nydusctl does not know; update the older one")
}

async fn ask(address: &str, path: &str) -> anyhow::Result<Bytes> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    // It ends with the answer, or with this program.
    tokio::spawn(connection);
    let request = Request::get(path).header("host", address).body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    match answer.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => bail!("it is a member of no swarm: its configuration has no [swarm] section"),
        status => bail!("it answers {status}"),
    }
    match Limited::new(answer.into_body(), MOST).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => bail!("its answer broke off: {error}"),
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
