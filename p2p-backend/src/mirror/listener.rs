//! Connections whose callers must take what they asked for.
//!
//! A caller that neither reads nor closes would hold its blob in the cache, and its place among the callers, for ever:
//! what it does not read is not asked for upstream, so nothing else ever times out. A connection that takes no byte for
//! the stall time is cut.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep, sleep};

/// A listener whose connections are cut if they take nothing for `stall`.
#[derive(Debug)]
pub(super) struct Impatient {
    pub(super) listener: TcpListener,
    pub(super) stall: Duration,
}

impl Listener for Impatient {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let (stream, from) = Listener::accept(&mut self.listener).await;
        (Connection { stream, stall: self.stall, full: Box::pin(sleep(self.stall)), is_full: false }, from)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that may not stay full.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    stall: Duration,
    /// Ends when it has been full for too long.
    full: Pin<Box<Sleep>>,
    is_full: bool,
}

impl Connection {
    /// Passes on what became of a write, or cuts the connection if it has waited for too long.
    fn moved<T>(&mut self, wrote: Poll<io::Result<T>>, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if wrote.is_ready() {
            self.is_full = false;
            return wrote;
        }
        if !self.is_full {
            self.is_full = true;
            self.full.as_mut().reset(Instant::now() + self.stall);
        }
        ready!(self.full.as_mut().poll(context));
        tracing::debug!(stall = ?self.stall, "cutting a caller off that takes no bytes");
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let own = self.get_mut();
        let wrote = Pin::new(&mut own.stream).poll_write(context, bytes);
        own.moved(wrote, context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let own = self.get_mut();
        let wrote = Pin::new(&mut own.stream).poll_write_vectored(context, parts);
        own.moved(wrote, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
