//! A server that speaks just enough HTTP/1.1 to be wrong in every way.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use nydus_backend::http::Timeouts;
use nydus_backend::registry::{Client, ClientOptions, Scheme};
use sha2::Digest as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// Path and query, or a whole URL from a client that takes us for a proxy.
    pub(crate) target: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Seen {
    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or("")
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Parameters of the query.
    pub(crate) fn query(&self) -> HashMap<String, String> {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        url::form_urlencoded::parse(query.as_bytes()).into_owned().collect()
    }

    /// Parameters of the body.
    pub(crate) fn form(&self) -> HashMap<String, String> {
        url::form_urlencoded::parse(&self.body).into_owned().collect()
    }
}

/// How an answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// With `Content-Length`.
    Whole,
    /// In chunks.
    Chunked,
    /// Without a length, until the connection closes.
    UntilClose,
    /// With `Content-Length`, but only so many bytes of it; then the connection closes.
    Cut(usize),
    /// With `Content-Length`, but only so many bytes of it; then nothing.
    Stall(usize),
    /// The body again and again, in chunks, without end.
    Endless,
    /// Not at all.
    Never,
    /// The connection closes without an answer.
    Slam,
}

/// An answer.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Bytes,
    how: How,
}

impl Reply {
    pub(crate) fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Bytes::new(), how: How::Whole }
    }

    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    pub(crate) fn how(mut self, how: How) -> Self {
        self.how = how;
        self
    }

    /// What a good host answers: the range that was asked for.
    pub(crate) fn ranged(seen: &Seen, all: &Bytes) -> Self {
        let range = seen.header("range").strip_prefix("bytes=").and_then(|text| text.split_once('-'));
        let Some((first, last)) = range else {
            return Self::new(200).body(all.clone());
        };
        let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
        if first >= all.len() {
            return Self::new(416);
        }
        let end = (last + 1).min(all.len());
        Self::new(206)
            .header("Content-Range", format!("bytes {first}-{}/{}", end - 1, all.len()))
            .body(all.slice(first..end))
    }
}

type Handler = dyn Fn(&Seen) -> Reply + Send + Sync;

/// A server on a loopback port; it stops, and drops its connections, when it is dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    pub(crate) async fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), handler).await
    }

    pub(crate) async fn start_at(
        address: SocketAddr,
        handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, handler): (_, Arc<Handler>) = (Arc::clone(&seen), Arc::new(handler));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (log, handler) = (Arc::clone(&log), Arc::clone(&handler));
                connections.spawn(async move {
                    drop(serve(BufStream::new(stream), &log, &*handler).await);
                });
            }
        });
        Self { address, seen, task }
    }

    /// A port where nobody listens (any more).
    pub(crate) async fn nobody() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Requests whose path contains `part`.
    pub(crate) fn count(&self, part: &str) -> usize {
        self.seen().iter().filter(|seen| seen.path().contains(part)).count()
    }

    /// Stops it and waits until the port is free.
    pub(crate) async fn stop(mut self) -> SocketAddr {
        self.task.abort();
        drop((&mut self.task).await);
        self.address
    }

    pub(crate) fn client(&self) -> Client {
        client(&self.host(), ClientOptions::default())
    }
}

/// Short limits: what does not come on loopback within this will not come.
pub(crate) fn hasty() -> Timeouts {
    let short = Duration::from_millis(400);
    Timeouts { connect: short, first_byte: short, stall: short }
}

pub(crate) fn client(host: &str, options: ClientOptions) -> Client {
    Client::new(host, ClientOptions { scheme: Scheme::Http, timeouts: hasty(), ..options }).unwrap()
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes)))
}

/// Some bytes in which every place is different from its neighbours.
pub(crate) fn sample(length: usize) -> Bytes {
    (0..length).map(|at| u8::try_from((at * 31 + at / 251) % 256).unwrap()).collect()
}

/// Says why a proof was left out; in CI nothing may be.
#[expect(clippy::print_stdout, reason = "a skipped test says why")]
pub(crate) fn skipped(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{why}, and in CI nothing may be skipped");
    println!("skipped: {why}");
}

async fn serve(mut stream: BufStream<TcpStream>, log: &Mutex<Vec<Seen>>, handler: &Handler) -> std::io::Result<()> {
    loop {
        let Some(seen) = receive(&mut stream).await? else { return Ok(()) };
        log.lock().unwrap().push(seen.clone());
        let reply = handler(&seen);
        let keep = send(&mut stream, &reply, seen.method == "HEAD").await?;
        if !keep {
            stream.flush().await?;
            return Ok(());
        }
    }
}

async fn line(stream: &mut BufStream<TcpStream>) -> std::io::Result<String> {
    let mut text = Vec::new();
    loop {
        match stream.read_u8().await {
            Ok(b'\n') => break,
            Ok(byte) => text.push(byte),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
    }
    Ok(String::from_utf8_lossy(&text).trim_end().to_owned())
}

async fn receive(stream: &mut BufStream<TcpStream>) -> std::io::Result<Option<Seen>> {
    let first = line(stream).await?;
    let mut words = first.split(' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(None) };
    let mut headers = HashMap::new();
    loop {
        let text = line(stream).await?;
        let Some((name, value)) = text.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_some_and(|value| value == "chunked") {
        loop {
            let size = usize::from_str_radix(&line(stream).await?, 16).unwrap_or(0);
            let mut chunk = vec![0; size + 2];
            stream.read_exact(&mut chunk).await?;
            if size == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else if let Some(length) = headers.get("content-length") {
        body = vec![0; length.parse().unwrap_or(0)];
        stream.read_exact(&mut body).await?;
    }
    Ok(Some(Seen { method: method.to_owned(), target: target.to_owned(), headers, body }))
}

/// Returns whether the connection may be used again.
async fn send(stream: &mut BufStream<TcpStream>, reply: &Reply, head_only: bool) -> std::io::Result<bool> {
    match reply.how {
        How::Never => std::future::pending().await,
        How::Slam => return Ok(false),
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {} Whatever\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    match reply.how {
        How::Chunked | How::Endless => head += "Transfer-Encoding: chunked\r\n",
        How::UntilClose => head += "Connection: close\r\n",
        _ if reply.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length")) => {}
        _ => head += &format!("Content-Length: {}\r\n", reply.body.len()),
    }
    stream.write_all((head + "\r\n").as_bytes()).await?;
    if head_only {
        stream.flush().await?;
        return Ok(true);
    }
    let chunk = |bytes: &[u8]| [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat();
    let keep = match reply.how {
        How::Whole => {
            stream.write_all(&reply.body).await?;
            true
        }
        How::UntilClose => {
            stream.write_all(&reply.body).await?;
            false
        }
        How::Cut(bytes) => {
            stream.write_all(&reply.body[..bytes]).await?;
            false
        }
        How::Stall(bytes) => {
            stream.write_all(&reply.body[..bytes]).await?;
            stream.flush().await?;
            std::future::pending().await
        }
        How::Chunked => {
            for piece in reply.body.chunks(7) {
                stream.write_all(&chunk(piece)).await?;
            }
            stream.write_all(b"0\r\n\r\n").await?;
            true
        }
        How::Endless => loop {
            stream.write_all(&chunk(&reply.body)).await?;
            stream.flush().await?;
        },
        How::Never | How::Slam => unreachable!("returned above"),
    };
    stream.flush().await?;
    Ok(keep)
}
