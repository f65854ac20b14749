//! Connections to members, kept for the next request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::link::{LinkError, Linker};
use super::peer::Peer;
use super::server::ASK;

/// Connections for asks to one member. One is taken by every ask that is not answered to its end; news have one more.
const PER_PEER: usize = 4;
/// The other end closes what is idle after 10 s; what is nearly that old is not tried.
const IDLE: Duration = Duration::from_secs(8);

/// Why a member gave no answer; completes "could not ask …".
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Http(#[from] hyper::Error),
    /// It does not want to.
    #[error("it answered {status}: {text}")]
    Status {
        /// The status.
        status: StatusCode,
        /// What it said.
        text: String,
    },
    /// Its answer is longer than it may be.
    #[error("its answer is longer than {0} bytes")]
    Long(usize),
}

type Sender = SendRequest<Full<Bytes>>;

#[derive(Debug)]
struct Slot {
    idle: Vec<(Sender, Instant)>,
    places: Arc<Semaphore>,
    /// For what is short and must not wait behind asks that do.
    errands: Arc<Semaphore>,
}

impl Default for Slot {
    fn default() -> Self {
        Self { idle: Vec::new(), places: Arc::new(Semaphore::new(PER_PEER)), errands: Arc::new(Semaphore::new(1)) }
    }
}

/// Connections to all members.
#[derive(Debug)]
pub(super) struct Pool {
    linker: Linker,
    slots: Mutex<HashMap<Peer, Slot>>,
}

/// An answer; its body is read by [`Answer::next`].
#[derive(Debug)]
pub struct Answer {
    body: Incoming,
    lease: Option<Lease>,
}

/// A connection that is in use.
#[derive(Debug)]
struct Lease {
    pool: Arc<Pool>,
    peer: Peer,
    sender: Sender,
    _place: OwnedSemaphorePermit,
}

impl Answer {
    /// Returns the next bytes of the body, or none at its end. Dropped before, it takes the connection with it.
    pub async fn next(&mut self) -> Result<Option<Bytes>, AskError> {
        while let Some(frame) = self.body.frame().await {
            if let Ok(bytes) = frame?.into_data() {
                return Ok(Some(bytes));
            }
        }
        if let Some(Lease { pool, peer, sender, _place }) = self.lease.take() {
            let mut slots = pool.slots();
            let slot = slots.entry(peer).or_default();
            slot.idle.retain(|(_, since)| since.elapsed() < IDLE);
            slot.idle.push((sender, Instant::now()));
        }
        Ok(None)
    }

    /// Returns the whole body, of at most `most` bytes.
    pub(super) async fn whole(&mut self, most: usize) -> Result<Bytes, AskError> {
        let mut all = bytes::BytesMut::new();
        while let Some(bytes) = self.next().await? {
            if all.len() + bytes.len() > most {
                return Err(AskError::Long(most));
            }
            all.extend_from_slice(&bytes);
        }
        Ok(all.freeze())
    }
}

impl Pool {
    pub(super) fn new(linker: Linker) -> Arc<Self> {
        Arc::new(Self { linker, slots: Mutex::default() })
    }

    pub(super) fn linker(&self) -> &Linker {
        &self.linker
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<Peer, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets who is no member any more.
    pub(super) fn forget(&self, is_member: impl Fn(&Peer) -> bool) {
        self.slots().retain(|peer, slot| is_member(peer) || slot.places.available_permits() < PER_PEER);
    }

    /// Sends a request to the member `peer` at `address`, on a kept connection or a new one.
    pub(super) async fn send(
        self: &Arc<Self>,
        peer: Peer,
        address: SocketAddr,
        path: &'static str,
        body: Bytes,
    ) -> Result<Answer, AskError> {
        let places = {
            let mut slots = self.slots();
            let slot = slots.entry(peer).or_default();
            if path == ASK { slot.places.clone() } else { slot.errands.clone() }
        };
        let place = places.acquire_owned().await.expect("the places are never closed");
        let kept = || {
            let mut slots = self.slots();
            let idle = &mut slots.get_mut(&peer)?.idle;
            std::iter::from_fn(|| idle.pop()).find(|(_, since)| since.elapsed() < IDLE).map(|(sender, _)| sender)
        };
        // A kept connection may have been closed meanwhile, and then nothing was done there.
        while let Some(mut sender) = kept() {
            if sender.ready().await.is_err() {
                continue;
            }
            // What is asked twice is answered twice, which costs nothing that counts.
            if let Ok(answer) = sender.send_request(request(address, path, body.clone())).await {
                return self.answer(peer, sender, place, answer).await;
            }
        }
        let begun = Instant::now();
        let link = self.linker.connect(address, Some(peer)).await?;
        tracing::debug!(%peer, took = ?begun.elapsed(), "connected");
        let mut sender = begin(link.stream).await?;
        let answer = sender.send_request(request(address, path, body)).await?;
        self.answer(peer, sender, place, answer).await
    }

    /// Asks whoever is at `address`; returns who that is, too. The connection is not kept.
    pub(super) async fn send_unknown(
        self: &Arc<Self>,
        address: SocketAddr,
        path: &'static str,
        body: Bytes,
    ) -> Result<(Peer, Answer), AskError> {
        let link = self.linker.connect(address, None).await?;
        let mut sender = begin(link.stream).await?;
        let answer = sender.send_request(request(address, path, body)).await?;
        let (head, body) = answer.into_parts();
        Ok((link.peer, good(Answer { body, lease: None }, head.status).await?))
    }

    async fn answer(
        self: &Arc<Self>,
        peer: Peer,
        sender: Sender,
        place: OwnedSemaphorePermit,
        answer: http::Response<Incoming>,
    ) -> Result<Answer, AskError> {
        let (head, body) = answer.into_parts();
        let lease = Lease { pool: self.clone(), peer, sender, _place: place };
        good(Answer { body, lease: Some(lease) }, head.status).await
    }
}

async fn good(mut answer: Answer, status: StatusCode) -> Result<Answer, AskError> {
    if status.is_success() {
        return Ok(answer);
    }
    let text = answer.whole(4096).await.unwrap_or_default();
    Err(AskError::Status { status, text: String::from_utf8_lossy(&text).trim().to_owned() })
}

async fn begin(stream: Box<dyn super::link::Duplex>) -> Result<Sender, AskError> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::trace!(%error, "a connection to a member broke");
        }
    });
    Ok(sender)
}

fn request(address: SocketAddr, path: &'static str, body: Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = http::Uri::from_static(path);
    let host = HeaderValue::try_from(address.to_string()).expect("addresses are visible ASCII");
    request.headers_mut().insert(HOST, host);
    request
}
