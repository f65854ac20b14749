//! A gate in front of a registry: it counts what passes, slows it to a link's pace, and breaks it on demand.
//!
//! One thread accepts, one more per connection copies bytes both ways. Requests are counted by the lines
//! that begin them, so the gate needs no HTTP server of its own and changes nothing on the way.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{SockFilter, SockRef};

/// The pace of a link.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pace {
    /// Bits per second in each direction, shared by all connections; 0 is unlimited.
    pub bits_per_second: u64,
    /// Time that passes before the first byte of an answer.
    pub round_trip: Duration,
}

/// What passed the gate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// Requests.
    pub requests: u64,
    /// Bytes from the registry, headers included.
    pub bytes: u64,
}

impl std::ops::Sub for Passed {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { requests: self.requests - before.requests, bytes: self.bytes - before.bytes }
    }
}

/// How open connections are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// With an orderly end.
    Ended,
    /// With a reset.
    Reset,
    /// Without a word: what is sent into them arrives nowhere, as when something in between has forgotten them.
    Silent,
}

#[derive(Debug)]
struct Inner {
    target: String,
    pace: Pace,
    requests: AtomicU64,
    bytes: AtomicU64,
    turned_away: AtomicU64,
    shut: AtomicBool,
    /// How often connections were cut.
    cuts: AtomicU64,
    /// Whether that is told by a reset.
    resets: AtomicBool,
    closed: AtomicBool,
    clients: Mutex<Vec<Weak<TcpStream>>>,
    /// When the link up and the link down are free again.
    free_at: [Mutex<Instant>; 2],
}

/// A listening gate; it ends when dropped.
#[derive(Debug)]
pub struct Gate {
    /// `host:port` that clients use.
    pub host: String,
    inner: Arc<Inner>,
}

impl Gate {
    /// Opens a gate to `target` (`host:port`).
    pub fn open(target: &str, pace: Pace) -> io::Result<Self> {
        Self::open_at("127.0.0.1:0", target, pace)
    }

    /// Opens a gate at a given address.
    pub fn open_at(address: &str, target: &str, pace: Pace) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        let host = listener.local_addr()?.to_string();
        let inner = Arc::new(Inner {
            target: target.to_owned(),
            pace,
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
            shut: AtomicBool::new(false),
            cuts: AtomicU64::new(0),
            resets: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            clients: Mutex::default(),
            free_at: [Mutex::new(Instant::now()), Mutex::new(Instant::now())],
        });
        let accepting = Arc::clone(&inner);
        std::thread::spawn(move || accept(&listener, &accepting));
        Ok(Self { host, inner })
    }

    /// Returns what has passed so far.
    pub fn passed(&self) -> Passed {
        Passed {
            requests: self.inner.requests.load(Ordering::Relaxed),
            bytes: self.inner.bytes.load(Ordering::Relaxed),
        }
    }

    /// Returns how many connections were refused while it was shut.
    pub fn turned_away(&self) -> u64 {
        self.inner.turned_away.load(Ordering::Relaxed)
    }

    /// Refuses connections, and cuts those that are open, until [`Gate::reopen`].
    pub fn shut(&self) {
        self.inner.shut.store(true, Ordering::Relaxed);
    }

    /// Loses the connections that are open, and lets new ones through.
    ///
    /// # Errors
    ///
    /// From the system, for [`Loss::Silent`].
    pub fn cut(&self, loss: Loss) -> io::Result<()> {
        if loss == Loss::Silent {
            // BPF_RET | BPF_K: of every packet nothing is taken in, so none is acknowledged either.
            const NOTHING: &[SockFilter] = &[SockFilter::new(0x06, 0, 0, 0)];
            let open: Vec<_> = lock(&self.inner.clients).drain(..).filter_map(|client| client.upgrade()).collect();
            return open.iter().try_for_each(|client| SockRef::from(&**client).attach_filter(NOTHING));
        }
        self.inner.resets.store(loss == Loss::Reset, Ordering::Relaxed);
        self.inner.cuts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Lets connections through again.
    pub fn reopen(&self) {
        self.inner.shut.store(false, Ordering::Relaxed);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.inner.closed.store(true, Ordering::Relaxed);
        self.inner.shut.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts; that nobody listens any more is just as well.
        drop(TcpStream::connect(&self.host));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn accept(listener: &TcpListener, inner: &Arc<Inner>) {
    for client in listener.incoming().flatten() {
        if inner.closed.load(Ordering::Relaxed) {
            return;
        }
        if inner.shut.load(Ordering::Relaxed) {
            inner.turned_away.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let inner = Arc::clone(inner);
        std::thread::spawn(move || {
            // A connection that ends early is what a gate sees all day.
            drop(relay(&Arc::new(client), &inner));
        });
    }
}

fn relay(client: &Arc<TcpStream>, inner: &Arc<Inner>) -> io::Result<()> {
    {
        let mut clients = lock(&inner.clients);
        clients.retain(|client| client.strong_count() > 0);
        clients.push(Arc::downgrade(client));
    }
    let server = TcpStream::connect(&inner.target)?;
    for stream in [&**client, &server] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    }
    // Set by a request, taken by the first byte of its answer.
    let asked = Arc::new(AtomicBool::new(false));
    let upward = {
        let (client, server, inner, asked) =
            (client.try_clone()?, server.try_clone()?, Arc::clone(inner), Arc::clone(&asked));
        std::thread::spawn(move || {
            drop(copy(&client, &server, &inner, |bytes| {
                let begun = requests_in(bytes);
                if begun > 0 {
                    inner.requests.fetch_add(begun, Ordering::Relaxed);
                    asked.store(true, Ordering::Relaxed);
                }
                inner.take_turn(&inner.free_at[0], bytes.len());
            }));
        })
    };
    let result = copy(&server, client, inner, |bytes| {
        if asked.swap(false, Ordering::Relaxed) {
            std::thread::sleep(inner.pace.round_trip);
        }
        inner.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        inner.take_turn(&inner.free_at[1], bytes.len());
    });
    drop(upward.join());
    result
}

fn copy(mut from: &TcpStream, mut to: &TcpStream, inner: &Inner, mut on_bytes: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; 32 << 10];
    let cuts = inner.cuts.load(Ordering::Relaxed);
    let result = loop {
        if inner.cuts.load(Ordering::Relaxed) != cuts {
            if inner.resets.load(Ordering::Relaxed) {
                let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                for stream in [from, to] {
                    setsockopt(stream, sockopt::Linger, &at_once)?;
                }
                // Both directions see it and let go of the streams, whose last end resets them.
                return Ok(());
            }
            break Err(io::ErrorKind::ConnectionAborted.into());
        }
        if inner.shut.load(Ordering::Relaxed) {
            break Err(io::ErrorKind::ConnectionReset.into());
        }
        match from.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(count) => {
                on_bytes(&buffer[..count]);
                if let Err(error) = to.write_all(&buffer[..count]) {
                    break Err(error);
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(error) => break Err(error),
        }
    };
    drop(to.shutdown(Shutdown::Write));
    if result.is_err() {
        drop(from.shutdown(Shutdown::Both));
        drop(to.shutdown(Shutdown::Both));
    }
    result
}

impl Inner {
    /// Waits until `bytes` have gone over the link.
    fn take_turn(&self, free_at: &Mutex<Instant>, bytes: usize) {
        if self.pace.bits_per_second == 0 {
            return;
        }
        let time = Duration::from_secs_f64(bytes as f64 * 8.0 / self.pace.bits_per_second as f64);
        let done = {
            let mut free_at = lock(free_at);
            *free_at = (*free_at).max(Instant::now()) + time;
            *free_at
        };
        std::thread::sleep(done.saturating_duration_since(Instant::now()));
    }
}

/// Counts the request lines in what a client sent. A request's head is one write of every client here.
fn requests_in(bytes: &[u8]) -> u64 {
    let verbs: [&[u8]; 6] = [b"GET /", b"HEAD /", b"POST /", b"PUT /", b"PATCH /", b"DELETE /"];
    u64::from(verbs.iter().any(|verb| bytes.starts_with(verb)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_counts_requests_and_bytes_and_can_be_shut() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let gate = Gate::open(&server.local_addr().unwrap().to_string(), Pace::default()).unwrap();
        std::thread::spawn(move || {
            for mut stream in server.incoming().flatten() {
                let mut head = [0; 64];
                let _ = stream.read(&mut head).unwrap();
                stream.write_all(b"hello").unwrap();
            }
        });
        let ask = || -> io::Result<String> {
            let mut client = TcpStream::connect(&gate.host)?;
            client.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
            let mut answer = String::new();
            client.read_to_string(&mut answer)?;
            Ok(answer)
        };
        assert_eq!(ask().unwrap(), "hello");
        assert_eq!(gate.passed(), Passed { requests: 1, bytes: 5 });
        gate.shut();
        assert_ne!(ask().unwrap_or_default(), "hello");
        gate.reopen();
        assert_eq!(ask().unwrap(), "hello");
    }

    #[test]
    fn a_silent_connection_takes_nothing_and_tells_nothing_while_new_ones_work() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let gate = Gate::open(&server.local_addr().unwrap().to_string(), Pace::default()).unwrap();
        std::thread::spawn(move || {
            for stream in server.incoming().flatten() {
                std::thread::spawn(move || io::copy(&mut &stream, &mut &stream));
            }
        });
        let echo = |mut client: &TcpStream| -> io::Result<()> {
            client.write_all(b"GET / HTTP/1.1\r\n")?;
            client.read_exact(&mut [0; 16])
        };
        let old = TcpStream::connect(&gate.host).unwrap();
        SockRef::from(&old).set_tcp_user_timeout(Some(Duration::from_millis(300))).unwrap();
        echo(&old).unwrap();
        gate.cut(Loss::Silent).unwrap();
        // Only its own system ends it, which waits for an acknowledgement in vain.
        assert_eq!(echo(&old).unwrap_err().kind(), io::ErrorKind::TimedOut);
        echo(&TcpStream::connect(&gate.host).unwrap()).unwrap();
    }
}
