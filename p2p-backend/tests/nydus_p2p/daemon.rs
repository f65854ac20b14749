//! The program, started, asked and ended.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub(crate) fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_nydus-p2p"))
}

/// Asks for a part; returns the status and what came of the body.
pub(crate) fn part(address: &str, path: &str, range: Range<usize>) -> std::io::Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect(address)?;
    let (first, last) = (range.start, range.end - 1);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes={first}-{last}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
    Ok((status, answer.split_off(head + 4)))
}

pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) address: String,
    log: BufReader<std::process::ChildStderr>,
}

impl Daemon {
    pub(crate) fn start(config: &Path) -> Self {
        let mut child = program().arg("--config").arg(config).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        log.read_line(&mut line).unwrap();
        assert!(line.contains("nydus-p2p is ready"), "{line}");
        let address = line.split_once("listen=\"").unwrap().1.split_once('"').unwrap().0.to_owned();
        Self { child, address, log }
    }

    pub(crate) fn get(&self, path: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let body = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..body]));
        answer.split_off(body)
    }

    pub(crate) fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        let mut log = String::new();
        self.log.read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code(), log)
    }
}

pub(crate) fn config(dir: &Path, registry: &str) -> std::path::PathBuf {
    let path = dir.join("config.toml");
    let text = format!(
        "listen = \"127.0.0.1:0\"\nhealth_listen = \"127.0.0.1:0\"\nmetrics_listen = \"127.0.0.1:0\"\n\
         data_dir = \"{}/data\"\ndefault_registry = \"{registry}\"\n\
         [[registry]]\nname = \"{registry}\"\nurl = \"http://{registry}\"\n",
        dir.display()
    );
    std::fs::write(&path, text).unwrap();
    path
}
