//! An HTTP proxy as companies have one: it is asked to connect somewhere, and notes where.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

/// A proxy that leads every tunnel to one place, whatever name was asked for; it ends with the process.
#[derive(Debug)]
pub struct Proxy {
    /// `host:port`.
    pub host: String,
    asked: Arc<Mutex<Vec<String>>>,
    state: Arc<Mutex<State>>,
}

/// What it does with those who come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// Lets them through.
    #[default]
    Works,
    /// Answers that it does not.
    Refuses,
    /// Ends the connection without a word.
    Dead,
}

impl Proxy {
    /// Starts to listen; all tunnels lead to `target` (`host:port`).
    pub fn start(target: &str) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let host = listener.local_addr()?.to_string();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let state = Arc::<Mutex<State>>::default();
        let (target, noting, obeyed) = (target.to_owned(), Arc::clone(&asked), Arc::clone(&state));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (target, asked) = (target.clone(), Arc::clone(&noting));
                let state = *obeyed.lock().unwrap_or_else(PoisonError::into_inner);
                std::thread::spawn(move || drop(tunnel(client, &target, &asked, state)));
            }
        });
        Ok(Self { host, asked, state })
    }

    /// Changes what it does with those who come from now on.
    pub fn set(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Returns the hosts that were asked for, in order.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn tunnel(mut client: TcpStream, target: &str, asked: &Mutex<Vec<String>>, state: State) -> io::Result<()> {
    let mut head = BufReader::new(client.try_clone()?);
    let mut line = String::new();
    head.read_line(&mut line)?;
    let place = line.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next());
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(place.unwrap_or(&line).to_owned());
    while line.trim_end() != "" {
        line.clear();
        head.read_line(&mut line)?;
    }
    match state {
        State::Works => {}
        State::Refuses => return client.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"),
        State::Dead => return client.shutdown(Shutdown::Both),
    }
    // A client that wants a tunnel sends nothing before it has one, so nothing is left in the buffer.
    client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    let server = TcpStream::connect(target)?;
    let (mut up_from, mut up_to) = (client.try_clone()?, server.try_clone()?);
    let up = std::thread::spawn(move || {
        drop(io::copy(&mut up_from, &mut up_to));
        drop(up_to.shutdown(Shutdown::Write));
    });
    let mut server = server;
    drop(io::copy(&mut server, &mut client));
    drop(client.shutdown(Shutdown::Both));
    drop(up.join());
    Ok(())
}
