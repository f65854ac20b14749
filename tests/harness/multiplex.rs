//! A store that speaks HTTP/2 over TLS, in good temper or in a bad one.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::Response;
use futures::StreamExt as _;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::manner::Temper;

/// Decides about one request.
pub(crate) trait Host: Send + Sync + 'static {
    /// Returns how it is met.
    fn temper(&self) -> Temper;
    /// Answers it, if it is answered at all.
    fn answer(self: Arc<Self>, request: Request) -> impl Future<Output = Response<Body>> + Send;
}

/// Listens, until the runtime ends.
pub(crate) async fn listen<H: Host>(acceptor: TlsAcceptor, host: Arc<H>) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, host) = (acceptor.clone(), Arc::clone(&host));
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                let mut held = Vec::new();
                while let Some(Ok((request, mut answer))) = connection.accept().await {
                    match host.temper() {
                        Temper::Goes => connection.abrupt_shutdown(Reason::NO_ERROR),
                        Temper::Resets => answer.send_reset(Reason::INTERNAL_ERROR),
                        Temper::Silent => held.push(answer),
                        temper => drop(tokio::spawn(send(Arc::clone(&host), request, answer, temper))),
                    }
                }
            });
        }
    });
    Ok(address)
}

async fn send<H: Host>(
    host: Arc<H>,
    request: axum::http::Request<RecvStream>,
    mut to: SendResponse<Bytes>,
    temper: Temper,
) {
    // Readers of blobs send no body.
    let (head, mut body) = host.answer(request.map(|_| Body::empty())).await.map(Body::into_data_stream).into_parts();
    let Ok(mut stream) = to.send_response(Response::from_parts(head, ()), false) else { return };
    while let Some(Ok(mut piece)) = body.next().await {
        while !piece.is_empty() {
            stream.reserve_capacity(piece.len());
            let Some(Ok(room)) = std::future::poll_fn(|context| stream.poll_capacity(context)).await else { return };
            if stream.send_data(piece.split_to(room.min(piece.len())), false).is_err() {
                return;
            }
        }
        if temper == Temper::ResetsBodies {
            // After the bytes, not instead of them.
            tokio::time::sleep(Duration::from_millis(50)).await;
            stream.send_reset(Reason::INTERNAL_ERROR);
            return;
        }
    }
    // It fails where the reader is gone.
    drop(stream.send_data(Bytes::new(), true));
}
