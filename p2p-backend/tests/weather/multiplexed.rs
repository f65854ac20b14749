//! HTTP/2: many requests on one connection, which goes away, resets them, or falls silent.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use h2::server::{Connection, SendResponse};
use h2::{Reason, RecvStream};
use http::{Request, Response};
use nydus_backend::http::Timeouts;
use nydus_backend::registry::{Client, ClientOptions, RegistryError, Scheme};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use crate::authority::Authority;
use crate::server::{digest, sample};

/// Long enough for a handshake on a busy machine.
fn limits() -> Timeouts {
    let second = Duration::from_secs(1);
    Timeouts { connect: second, first_byte: second, stall: second }
}

type Http2 = Connection<TlsStream<TcpStream>, Bytes>;

/// What a connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Temper {
    /// Answers.
    Good,
    /// Answers one request, says that it goes, and ends.
    GoesAfterOne,
    /// Says that it goes as soon as a request comes, without having looked at it.
    Goes,
    /// Resets every stream before the head of an answer.
    Resets(Reason),
    /// Resets every stream in the middle of a body.
    ResetsBodies,
    /// Answers pings, and no request.
    OnlyPings,
    /// Sends a part of each body, and answers pings.
    StallsBodies,
    /// Reads nothing and says nothing after the handshake.
    Dead,
}

/// A server whose connections have the given tempers, one after another, and are good after that.
struct Server {
    host: String,
    connections: Arc<AtomicUsize>,
    authority: Authority,
}

impl Server {
    async fn start(tempers: &'static [Temper]) -> Option<Self> {
        let authority = Authority::new()?;
        let acceptor = authority.acceptor(&[b"h2"]);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let temper = tempers.get(count.fetch_add(1, SeqCst)).copied().unwrap_or(Temper::Good);
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    if temper == Temper::Dead {
                        let _stream = stream;
                        std::future::pending::<()>().await;
                        return;
                    }
                    let Ok(connection) = h2::server::handshake(stream).await else { return };
                    talk(connection, temper).await;
                });
            }
        });
        Some(Self { host, connections, authority })
    }

    fn client(&self) -> Client {
        let options = ClientOptions {
            scheme: Scheme::Https,
            tls: self.authority.trusted(),
            timeouts: limits(),
            ..ClientOptions::default()
        };
        Client::new(&self.host, options).unwrap()
    }

    fn connections(&self) -> usize {
        self.connections.load(SeqCst)
    }
}

async fn talk(mut connection: Http2, temper: Temper) {
    let mut held = Vec::new();
    while let Some(Ok((request, mut answer))) = connection.accept().await {
        match temper {
            Temper::Good | Temper::GoesAfterOne => drop(send(&request, &mut answer, usize::MAX)),
            Temper::Goes => {
                connection.abrupt_shutdown(Reason::NO_ERROR);
                continue;
            }
            Temper::Resets(reason) => answer.send_reset(reason),
            Temper::ResetsBodies => {
                let mut body = send(&request, &mut answer, 5);
                // After the bytes, not instead of them.
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    if let Some(body) = &mut body {
                        body.send_reset(Reason::INTERNAL_ERROR);
                    }
                });
                continue;
            }
            Temper::StallsBodies => {
                held.push((None, send(&request, &mut answer, 5)));
                continue;
            }
            Temper::OnlyPings => {
                held.push((Some(answer), None));
                continue;
            }
            Temper::Dead => unreachable!("it has no HTTP/2"),
        };
        if temper == Temper::GoesAfterOne {
            connection.graceful_shutdown();
        }
    }
}

/// Sends at most `most` bytes of what was asked for; returns the stream if more should follow.
fn send(request: &Request<RecvStream>, answer: &mut SendResponse<Bytes>, most: usize) -> Option<h2::SendStream<Bytes>> {
    let range = request.headers()["range"].to_str().unwrap().strip_prefix("bytes=").unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let part = sample(1000).slice(first.parse().unwrap()..last.parse::<usize>().unwrap() + 1);
    let head = Response::builder()
        .status(206)
        .header("content-range", format!("bytes {range}/1000"))
        .header("content-length", part.len());
    let mut body = answer.send_response(head.body(()).unwrap(), false).ok()?;
    let whole = most >= part.len();
    body.send_data(part.slice(..part.len().min(most)), whole).ok()?;
    (!whole).then_some(body)
}

async fn read(client: &Client) -> Result<Bytes, RegistryError> {
    client.blob_range("r", &digest(b"x"), 10..30).await
}

fn expected() -> Bytes {
    sample(1000).slice(10..30)
}

#[tokio::test]
async fn many_readers_share_one_connection() {
    let Some(server) = Server::start(&[]).await else { return };
    let client = server.client();
    read(&client).await.unwrap();
    for outcome in futures::future::join_all((0..50).map(|_| read(&client))).await {
        assert_eq!(outcome.unwrap(), expected());
    }
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn a_connection_that_goes_away_costs_no_failure() {
    for tempers in
        [&[Temper::GoesAfterOne, Temper::GoesAfterOne][..], &[Temper::Goes], &[Temper::Resets(Reason::REFUSED_STREAM)]]
    {
        let tempers: &'static [Temper] = tempers;
        let Some(server) = Server::start(tempers).await else { return };
        let client = server.client();
        for _ in 0..4 {
            assert_eq!(read(&client).await.unwrap(), expected(), "{tempers:?}");
        }
        assert!(server.connections() >= 2, "{tempers:?}");
    }
}

#[tokio::test]
async fn a_stream_that_is_reset_before_its_answer_is_asked_for_again() {
    let Some(server) = Server::start(&[Temper::Resets(Reason::INTERNAL_ERROR)]).await else { return };
    assert_eq!(read(&server.client()).await.unwrap(), expected());
    assert_eq!(server.connections(), 2);
}

#[tokio::test]
async fn a_body_that_is_reset_is_an_error_that_passes() {
    let Some(server) = Server::start(&[Temper::ResetsBodies]).await else { return };
    let error = read(&server.client()).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("broke"), "{error}");
}

#[tokio::test]
async fn a_silent_connection_is_left_after_one_reader_waited_for_it() {
    for temper in [&[Temper::OnlyPings][..], &[Temper::StallsBodies], &[Temper::Dead]] {
        let temper: &'static [Temper] = temper;
        let Some(server) = Server::start(temper).await else { return };
        let client = server.client();
        let error = read(&client).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert_eq!(read(&client).await.unwrap(), expected(), "{temper:?}: the next reader gets a new connection");
        assert_eq!(server.connections(), 2, "{temper:?}");
    }
}

#[tokio::test]
async fn a_silent_connection_is_left_although_its_reader_went_before_the_limit() {
    let Some(server) = Server::start(&[Temper::OnlyPings]).await else { return };
    let client = server.client();
    // The limit is longer than this reader's patience, as that of a route's deadline may be.
    let patient = Timeouts { first_byte: Duration::from_secs(60), ..limits() };
    let options = ClientOptions { tls: server.authority.trusted(), timeouts: patient, ..ClientOptions::default() };
    let other = Client::new(&server.host, options).unwrap();
    drop(client);
    assert!(tokio::time::timeout(Duration::from_millis(3200), read(&other)).await.is_err());
    assert_eq!(read(&other).await.unwrap(), expected());
}
