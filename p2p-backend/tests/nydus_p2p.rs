//! The program `nydus-p2p` from outside: its flags, its signals, and what a kill leaves.
#![cfg(feature = "mirror")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::Digest as _;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_nydus-p2p"))
}

fn check(config: &Path, flags: &[&str]) -> Output {
    program().arg("--config").arg(config).arg("--check-config").args(flags).output().unwrap()
}

/// A registry of one blob on plain threads; counts the bytes of bodies.
fn registry(content: Arc<Vec<u8>>) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = listener.local_addr().unwrap().to_string();
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = sent.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (content, sent) = (content.clone(), counted.clone());
            std::thread::spawn(move || answer(&stream.unwrap(), &content, &sent));
        }
    });
    (name, sent)
}

fn answer(mut stream: &TcpStream, content: &[u8], sent: &AtomicUsize) {
    let (mut head, mut range) = (false, None);
    for (number, line) in BufReader::new(stream).lines().map_while(Result::ok).enumerate() {
        if number == 0 {
            head = line.starts_with("HEAD");
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            let (first, last) = value.split_once('-').unwrap();
            range = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap().min(content.len() - 1)));
        }
        if line.is_empty() {
            break;
        }
    }
    let size = content.len();
    let Some((first, last)) = range.filter(|_| !head) else {
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n").unwrap();
        return;
    };
    let length = last + 1 - first;
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {length}\r\nContent-Range: bytes {first}-{last}/{size}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    if stream.write_all(&content[first..=last]).is_ok() {
        sent.fetch_add(length, Ordering::SeqCst);
    }
}

struct Daemon {
    child: Child,
    address: String,
    log: BufReader<std::process::ChildStderr>,
}

impl Daemon {
    fn start(config: &Path) -> Self {
        let mut child = program().arg("--config").arg(config).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        log.read_line(&mut line).unwrap();
        assert!(line.contains("nydus-p2p is ready"), "{line}");
        let address = line.split_once("listen=\"").unwrap().1.split_once('"').unwrap().0.to_owned();
        Self { child, address, log }
    }

    fn get(&self, path: &str) -> Vec<u8> {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let body = answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..body]));
        answer.split_off(body)
    }

    fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        let mut log = String::new();
        self.log.read_to_string(&mut log).unwrap();
        (self.child.wait().unwrap().code(), log)
    }
}

fn config(dir: &Path, registry: &str) -> std::path::PathBuf {
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

#[test]
fn a_wrong_configuration_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), "localhost:5000");
    assert!(check(&good, &[]).status.success());
    let told = |output: Output| {
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(told(check(&good, &["--log-level", "a=b=c"])).contains("log_level"));
    let bad = dir.path().join("bad.toml");
    std::fs::write(&bad, "quota = \"20GiB\"\n[[mirrors]]\nurl = \"http://x\"\n").unwrap();
    let text = told(check(&bad, &[]));
    assert!(text.contains("bad.toml") && text.contains("mirrors") && text.contains("line 2"), "{text}");
    assert!(told(check(&dir.path().join("none.toml"), &[])).contains("none.toml"));
}

#[test]
fn it_ends_well_when_told_and_keeps_its_pieces_when_killed() {
    let dir = tempfile::tempdir().unwrap();
    let content: Arc<Vec<u8>> = Arc::new(
        (0..3_500_000_u32).flat_map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()).take(3_500_000).collect(),
    );
    let digest = hex::encode(sha2::Sha256::digest(&*content));
    let path = format!("/v2/some/repo/blobs/sha256:{digest}");
    let (name, sent) = registry(content.clone());
    let config = config(dir.path(), &name);

    let daemon = Daemon::start(&config);
    assert!(daemon.get(&path) == *content);
    let second = program().arg("--config").arg(&config).output().unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use by another nydus-p2p"));
    assert_eq!(daemon.end(Signal::SIGKILL).0, None);
    assert_eq!(sent.load(Ordering::SeqCst), content.len());

    let daemon = Daemon::start(&config);
    assert!(daemon.get(&path) == *content);
    assert_eq!(sent.load(Ordering::SeqCst), content.len(), "what was stored before the kill is used");
    let (code, log) = daemon.end(Signal::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
}
