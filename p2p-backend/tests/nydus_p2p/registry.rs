//! A registry of one blob, and the blob.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sha2::Digest as _;

/// What a private registry wants to see.
pub(crate) const TOKEN: &str = "Bearer only-the-callers-have-it";

/// How a registry behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Good,
    /// Accepts, and never answers.
    Wedged,
    /// Breaks every body off after so many bytes.
    Cut(usize),
    /// 503 for everything.
    Down,
    /// Gives to those who show [`TOKEN`], and a challenge to everybody else.
    Private,
    /// Sends so many bytes, and then waits for so many milliseconds.
    Slow(usize, u64),
    /// As [`Private`](Self::Private), but does not answer HEAD before it is in another mode.
    Thinking,
}

/// A request, as far as tests look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) head: bool,
    /// Its Authorization, or nothing.
    pub(crate) shown: String,
}

/// A registry of one blob on plain threads; counts the bytes of bodies.
pub(crate) struct Registry {
    pub(crate) name: String,
    pub(crate) sent: Arc<AtomicUsize>,
    requests: Arc<Mutex<Vec<Request>>>,
    mode: Arc<Mutex<Mode>>,
}

impl Registry {
    pub(crate) fn start(content: Arc<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = listener.local_addr().unwrap().to_string();
        let (sent, mode) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Mode::Good)));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (counted, wanted, seen) = (sent.clone(), mode.clone(), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (content, sent, mode, seen) = (content.clone(), counted.clone(), wanted.clone(), seen.clone());
                std::thread::spawn(move || {
                    // A daemon that was killed is no failure of the registry.
                    let _ = answer(&stream.unwrap(), &content, &sent, &mode, &seen);
                });
            }
        });
        Self { name, sent, requests, mode }
    }

    /// Returns the requests since it was last asked for them.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }

    pub(crate) fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
}

fn answer(
    mut stream: &TcpStream,
    content: &[u8],
    sent: &AtomicUsize,
    mode: &Mutex<Mode>,
    seen: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let (mut head, mut range, mut shown) = (false, None, String::new());
    for (number, line) in BufReader::new(stream).lines().map_while(Result::ok).enumerate() {
        if number == 0 {
            head = line.starts_with("HEAD");
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            let (first, last) = value.split_once('-').unwrap();
            range = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap().min(content.len() - 1)));
        }
        if let Some((name, value)) = line.split_once(": ")
            && name.eq_ignore_ascii_case("authorization")
        {
            shown = value.to_owned();
        }
        if line.is_empty() {
            break;
        }
    }
    seen.lock().unwrap().push(Request { head, shown: shown.clone() });
    while head && *mode.lock().unwrap() == Mode::Thinking {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let (size, mut cut, mut pause) = (content.len(), usize::MAX, None);
    match *mode.lock().unwrap() {
        Mode::Private | Mode::Thinking if shown != TOKEN => {
            return write!(
                stream,
                "HTTP/1.1 401 x\r\nWWW-Authenticate: Bearer realm=\"http://127.0.0.1:1/token\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        Mode::Private | Mode::Good | Mode::Thinking => {}
        Mode::Slow(bytes, milliseconds) => pause = Some((bytes, std::time::Duration::from_millis(milliseconds))),
        // Until the other side gives up.
        Mode::Wedged => return stream.read(&mut [0]).map(drop),
        Mode::Down => return write!(stream, "HTTP/1.1 503 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
        Mode::Cut(bytes) => cut = bytes,
    }
    let Some((first, last)) = range.filter(|_| !head) else {
        return write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n");
    };
    let length = last + 1 - first;
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {length}\r\nContent-Range: bytes {first}-{last}/{size}\r\nConnection: close\r\n\r\n"
    )?;
    let part = &content[first..first + length.min(cut)];
    let (bytes, pause) = pause.unwrap_or((part.len().max(1), std::time::Duration::ZERO));
    for part in part.chunks(bytes) {
        stream.write_all(part)?;
        sent.fetch_add(part.len(), Ordering::SeqCst);
        std::thread::sleep(pause);
    }
    Ok(())
}

/// Bytes without a period.
pub(crate) fn noise(size: u32) -> Arc<Vec<u8>> {
    Arc::new((0..size).flat_map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()).take(size as usize).collect())
}

pub(crate) fn blob(repository: &str, content: &[u8]) -> String {
    format!("/v2/{repository}/blobs/sha256:{}", hex::encode(sha2::Sha256::digest(content)))
}
