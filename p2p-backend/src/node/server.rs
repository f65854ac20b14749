//! What members ask of this node: the requests, who may make how many, and where they lead.
//!
//! | path | body | answer |
//! | --- | --- | --- |
//! | `/swarm/1/ask` | a `swarm::Ask` | [records](super::records) |
//! | `/swarm/1/report` | a `swarm::Report` | nothing |
//! | `/swarm/1/members` | nothing | where the asker was seen, and the list of members |
//! | `/swarm/1/reach` | an address | nothing, once the asker was reached there |

use std::collections::HashMap;
use std::convert::Infallible;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Body, Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::link::{LinkError, Linker};
use super::members::Members;
use super::peer::Peer;
use super::proof::ProofError;
use super::seldom::Seldom;
use crate::http::Reach;

/// Connections that members may have to us, and each of them.
const CONNECTIONS: usize = 256;
const PER_MEMBER: usize = 16;
/// Connections whose other end has not proved yet that it is a member, and those from one address: strangers shall not take
/// the places of members. Each proves itself within some seconds or is left.
const STRANGERS: usize = 128;
const PER_ADDRESS: usize = 32;
/// After so long without a request a connection is closed.
const IDLE: Duration = Duration::from_secs(10);
/// How long the body of a request may take.
const BODY: Duration = Duration::from_secs(5);
/// Bytes of a request's body at most: an ask about the largest object tells what the asker has of it.
const MOST_BODY: usize = 192 << 10;

pub(super) const ASK: &str = "/swarm/1/ask";
pub(super) const REPORT: &str = "/swarm/1/report";
pub(super) const MEMBERS: &str = "/swarm/1/members";
pub(super) const REACH: &str = "/swarm/1/reach";

/// That an answer breaks off in the middle, and its connection with it.
#[derive(Debug, thiserror::Error)]
#[error("the answer is broken off")]
pub struct BrokenOff;

/// The parts of an answer as they come; the sender's end sees when the asker is gone.
pub type Parts = mpsc::Receiver<Result<Bytes, BrokenOff>>;

/// Who listens to what members say.
pub trait Ear: Send + Sync {
    /// A member asks; returns the answer as it comes, or what is wrong with the question.
    fn asked(&self, from: Peer, ask: &[u8]) -> Result<Parts, String>;
    /// A member reports.
    fn reported(&self, from: Peer, report: &[u8]) -> Result<(), String>;
    /// A member tells everybody something; `from` wrote it.
    fn gossiped(&self, from: Peer, summary: &[u8]);
}

/// Answers members.
pub(super) struct Server {
    pub(super) linker: Linker,
    pub(super) members: Members,
    pub(super) ear: Arc<dyn Ear>,
    pub(super) troubles: Mutex<Troubles>,
    /// How many connections each member has.
    pub(super) guests: Mutex<HashMap<Peer, usize>>,
    /// How many connections each address has that are not proved yet.
    pub(super) strangers: Mutex<HashMap<IpAddr, usize>>,
}

/// A connection of somebody, counted.
struct Guest<'s, K: Eq + Hash> {
    guests: &'s Mutex<HashMap<K, usize>>,
    who: K,
}

impl<'s, K: Eq + Hash + Copy> Guest<'s, K> {
    /// Counts one more connection of `who`; none if it has so many already.
    fn enter(guests: &'s Mutex<HashMap<K, usize>>, who: K, most: usize) -> Option<Self> {
        let mut all = guests.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(who).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        drop(all);
        Some(Self { guests, who })
    }
}

impl<K: Eq + Hash> Drop for Guest<'_, K> {
    fn drop(&mut self) {
        let mut all = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.who) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.who);
            }
        }
    }
}

/// What is worth a line in the log from time to time.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    proof: Seldom,
    copy: Seldom,
    other: Seldom,
    crowd: Seldom,
}

impl Troubles {
    /// Tells of a connection that did not come about.
    pub(super) fn tell(&mut self, with: SocketAddr, error: &LinkError) {
        match error {
            LinkError::Proof(ProofError::SamePeer(_)) if self.copy.now() => {
                tracing::error!(%with, "could not connect to a member: {error}");
            }
            LinkError::Proof(ProofError::SamePeer(_)) => {}
            LinkError::Proof(_) if self.proof.now() => tracing::warn!(%with, "could not connect to a member: {error}"),
            LinkError::Tls(_) if self.other.now() => tracing::warn!(%with, "could not connect to a member: {error}"),
            _ => tracing::debug!(%with, "could not connect to a member: {error}"),
        }
    }
}

impl Server {
    /// Answers until `quit`; then lets what is under way end.
    pub(super) async fn run(self: Arc<Self>, listener: TcpListener, quit: CancellationToken) {
        let (places, entrance) = (Arc::new(Semaphore::new(CONNECTIONS)), Arc::new(Semaphore::new(STRANGERS)));
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = quit.cancelled() => break,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "the swarm's listener");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(waiting) = entrance.clone().try_acquire_owned() else {
                if self.troubles().crowd.now() {
                    tracing::warn!(%from, "{STRANGERS} connections have not proved that they are members'; further ones are refused; see who connects to the port of swarm.listen");
                }
                continue;
            };
            let (server, quit) = (self.clone(), quit.clone());
            tasks.spawn(server.serve(stream, from, waiting, places.clone(), quit));
        }
        tasks.close();
        tasks.wait().await;
    }

    fn troubles(&self) -> std::sync::MutexGuard<'_, Troubles> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(
        self: Arc<Self>,
        stream: TcpStream,
        from: SocketAddr,
        waiting: OwnedSemaphorePermit,
        places: Arc<Semaphore>,
        quit: CancellationToken,
    ) {
        let Some(stranger) = Guest::enter(&self.strangers, from.ip(), PER_ADDRESS) else {
            if self.troubles().crowd.now() {
                tracing::warn!(%from, "{PER_ADDRESS} connections from there have not proved that they are members'; further ones are refused");
            }
            return;
        };
        let link = match self.linker.accept(stream).await {
            Ok(link) => link,
            // One that changed its mind, or whom its own end tells.
            Err(LinkError::Proof(ProofError::Io(error))) => return tracing::debug!(%from, %error, "a member went away"),
            Err(error) => return self.troubles().tell(from, &error),
        };
        drop((stranger, waiting));
        let Ok(_place) = places.try_acquire_owned() else {
            if self.troubles().crowd.now() {
                tracing::warn!(%from, "members have {CONNECTIONS} connections to us; further ones are refused");
            }
            return;
        };
        let peer = link.peer;
        let Some(_guest) = Guest::enter(&self.guests, peer, PER_MEMBER) else {
            if self.troubles().crowd.now() {
                tracing::warn!(%peer, %from, "a member has {PER_MEMBER} connections to us; further ones are refused");
            }
            return;
        };
        let answering = self.clone();
        let service = service_fn(move |request| {
            let server = answering.clone();
            async move { Ok::<_, Infallible>(server.answer(peer, from.ip(), request).await) }
        });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(64 << 10);
        let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(link.stream), service));
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = quit.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::trace!(%from, %error, "a member's connection ended");
        }
    }

    async fn answer(&self, from: Peer, seen: IpAddr, request: Request<Incoming>) -> Response<Reply> {
        if request.method() != Method::POST {
            return status(StatusCode::METHOD_NOT_ALLOWED, "only POST");
        }
        let path = request.uri().path().to_owned();
        let body = tokio::time::timeout(BODY, Limited::new(request.into_body(), MOST_BODY).collect()).await;
        let Ok(Ok(body)) = body else {
            return status(StatusCode::BAD_REQUEST, "the body is too long, too slow or broken");
        };
        let body = body.to_bytes();
        match path.as_str() {
            ASK => match self.ear.asked(from, &body) {
                Ok(parts) => Response::new(Reply::Parts(parts)),
                Err(reason) => status(StatusCode::BAD_REQUEST, &reason),
            },
            REPORT => match self.ear.reported(from, &body) {
                Ok(()) => status(StatusCode::OK, ""),
                Err(reason) => status(StatusCode::BAD_REQUEST, &reason),
            },
            MEMBERS => match (postcard::to_allocvec(&seen), self.members.list().await) {
                (Ok(seen), Some(list)) => Response::new(Reply::whole([&seen[..], &list].concat())),
                _ => status(StatusCode::SERVICE_UNAVAILABLE, "this node is leaving"),
            },
            REACH => self.reach(from, &body).await,
            _ => status(StatusCode::NOT_FOUND, "no such request in this version"),
        }
    }

    /// Connects back to a member that says where it is.
    async fn reach(&self, from: Peer, body: &[u8]) -> Response<Reply> {
        let address = std::str::from_utf8(body).ok().and_then(|text| text.parse().ok());
        // What no member can be is not asked for one.
        let address = address.filter(|address: &SocketAddr| Reach::NotLinkLocal.covers(address.ip()));
        let Some(address) = address else {
            return status(StatusCode::BAD_REQUEST, "not an address");
        };
        match self.linker.connect(address, Some(from)).await {
            Ok(_) => status(StatusCode::OK, ""),
            Err(error) => status(StatusCode::FAILED_DEPENDENCY, &error.to_string()),
        }
    }
}

fn status(status: StatusCode, text: &str) -> Response<Reply> {
    let mut answer = Response::new(Reply::whole(text.as_bytes().to_vec()));
    *answer.status_mut() = status;
    answer
}

/// The body of an answer.
enum Reply {
    Whole(Full<Bytes>),
    Parts(Parts),
}

impl Reply {
    fn whole(bytes: Vec<u8>) -> Self {
        Self::Whole(Full::new(bytes.into()))
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        match self.get_mut() {
            Self::Whole(whole) => Pin::new(whole)
                .poll_frame(context)
                .map(|frame| frame.map(|frame| frame.map_err(|never| match never {}))),
            Self::Parts(parts) => parts.poll_recv(context).map(|part| part.map(|part| part.map(Frame::data))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_has_so_many_connections_and_gets_back_what_it_gives_up() {
        let guests = Mutex::default();
        let enter = |number| Guest::enter(&guests, Peer([number; 32]), PER_MEMBER);
        let mut held: Vec<_> = (0..PER_MEMBER).map(|_| enter(1).expect("one of the first")).collect();
        assert!(enter(1).is_none());
        assert!(enter(2).is_some(), "others are not concerned");
        held.pop();
        assert!(enter(1).is_some());
        held.clear();
        assert!(guests.lock().unwrap().is_empty());
    }
}
