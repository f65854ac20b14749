//! The program `nydus-p2p` from outside: its flags, its signals, and what a kill leaves.
#![cfg(feature = "mirror")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::Digest as _;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_nydus-p2p"))
}

fn check(config: &Path, flags: &[&str]) -> Output {
    program().arg("--config").arg(config).arg("--check-config").args(flags).output().unwrap()
}

/// How a registry behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Good,
    /// Accepts, and never answers.
    Wedged,
    /// Breaks every body off after so many bytes.
    Cut(usize),
    /// 503 for everything.
    Down,
}

/// A registry of one blob on plain threads; counts the bytes of bodies.
struct Registry {
    name: String,
    sent: Arc<AtomicUsize>,
    mode: Arc<Mutex<Mode>>,
}

impl Registry {
    fn start(content: Arc<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let name = listener.local_addr().unwrap().to_string();
        let (sent, mode) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Mode::Good)));
        let (counted, wanted) = (sent.clone(), mode.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (content, sent, mode) = (content.clone(), counted.clone(), wanted.clone());
                std::thread::spawn(move || {
                    let mode = *mode.lock().unwrap();
                    // A daemon that was killed is no failure of the registry.
                    let _ = answer(&stream.unwrap(), &content, &sent, mode);
                });
            }
        });
        Self { name, sent, mode }
    }

    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
}

fn answer(mut stream: &TcpStream, content: &[u8], sent: &AtomicUsize, mode: Mode) -> std::io::Result<()> {
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
    let (size, mut cut) = (content.len(), usize::MAX);
    match mode {
        Mode::Good => {}
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
    stream.write_all(part)?;
    sent.fetch_add(part.len(), Ordering::SeqCst);
    Ok(())
}

/// Bytes without a period.
fn noise(size: u32) -> Arc<Vec<u8>> {
    Arc::new((0..size).flat_map(|at| at.wrapping_mul(2_654_435_761).to_be_bytes()).take(size as usize).collect())
}

fn blob(repository: &str, content: &[u8]) -> String {
    format!("/v2/{repository}/blobs/sha256:{}", hex::encode(sha2::Sha256::digest(content)))
}

/// Asks for a part; returns the status and what came of the body.
fn part(address: &str, path: &str, range: Range<usize>) -> std::io::Result<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect(address)?;
    let (first, last) = (range.start, range.end - 1);
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nRange: bytes={first}-{last}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.windows(4).position(|window| window == b"\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
    let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
    Ok((status, answer.split_off(head + 4)))
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
    let content = noise(3_500_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let (config, sent) = (config(dir.path(), &registry.name), &registry.sent);

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

#[test]
fn it_answers_in_time_and_says_who_failed_whatever_the_registry_does() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(9_000_000);
    let registry = Registry::start(content.clone());
    let daemon = Daemon::start(&config(dir.path(), &registry.name));
    let (path, other) = (blob("some/repo", &content), blob("other/repo", &content));
    assert_eq!(part(&daemon.address, &path, 0..10).unwrap(), (206, content[..10].to_vec()));

    for mode in [Mode::Wedged, Mode::Down] {
        registry.set(mode);
        let begin = Instant::now();
        let (status, body) = part(&daemon.address, &other, 0..10).unwrap();
        let (took, body) = (begin.elapsed(), String::from_utf8(body).unwrap());
        assert!(status == 503 && body.contains(&registry.name), "{mode:?}: {status} {body}");
        assert!(took < Duration::from_secs(5), "{mode:?}: headers took {took:?}");
        assert_eq!(part(&daemon.address, &path, 0..10).unwrap().1, content[..10], "{mode:?}: what is here is served");
    }
    registry.set(Mode::Cut(300_000));
    let (status, body) = part(&daemon.address, &path, 8_400_000..8_900_000).unwrap();
    assert!(status == 206 && content[8_400_000..8_900_000].starts_with(&body), "{status}, {} bytes", body.len());
    registry.set(Mode::Good);
    assert!(daemon.get(&path) == *content, "nothing of it is remembered");
    let name = registry.name.clone();
    let (code, log) = daemon.end(Signal::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
    let told = |line: &str| line.contains("WARN") && line.contains(&name) && line.contains("/v2/other/repo/blobs/");
    assert!(log.lines().any(told), "no warning names registry and blob:\n{log}");
}

#[test]
fn kills_under_load_cost_no_byte_and_leave_what_was_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let content = noise(12_000_000);
    let registry = Registry::start(content.clone());
    let config = config(dir.path(), &registry.name);
    let path = blob("some/repo", &content);
    let address = Arc::new(Mutex::new(String::new()));
    let stop = Arc::new(AtomicBool::new(false));
    let right = Arc::new(AtomicUsize::new(0));
    let readers: Vec<_> = (0..4_usize)
        .map(|reader| {
            let (address, stop, right) = (address.clone(), stop.clone(), right.clone());
            let (path, content) = (path.clone(), content.clone());
            std::thread::spawn(move || {
                let mut at = reader * 2_700_001;
                while !stop.load(Ordering::SeqCst) {
                    at = (at + 777_777) % (content.len() - 200_000);
                    let to = address.lock().unwrap().clone();
                    if let Ok((206, bytes)) = part(&to, &path, at..at + 200_000) {
                        // A kill may cut a body short; what came is right.
                        assert!(content[at..at + 200_000].starts_with(&bytes), "wrong bytes at {at}");
                        right.fetch_add(usize::from(bytes.len() == 200_000), Ordering::SeqCst);
                    }
                }
            })
        })
        .collect();
    for _ in 0..5 {
        let daemon = Daemon::start(&config);
        *address.lock().unwrap() = daemon.address.clone();
        let before = right.load(Ordering::SeqCst);
        while right.load(Ordering::SeqCst) < before + 5 {
            std::thread::sleep(Duration::from_millis(10));
        }
        daemon.end(Signal::SIGKILL);
    }
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        reader.join().unwrap();
    }
    let daemon = Daemon::start(&config);
    assert!(daemon.get(&path) == *content);
    // What it learned about rights is on the disk soon; then nobody else is needed.
    let written = || dir.path().join("data/rights").metadata().and_then(|file| file.modified()).ok();
    let begin = std::time::SystemTime::now();
    part(&daemon.address, &blob("another/repo", &content), 0..1).unwrap();
    while written().is_none_or(|when| when < begin) {
        std::thread::sleep(Duration::from_millis(50));
    }
    daemon.end(Signal::SIGKILL);
    registry.set(Mode::Down);
    let daemon = Daemon::start(&config);
    assert!(daemon.get(&path) == *content);
    assert_eq!(daemon.end(Signal::SIGTERM).0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_go_past_a_mirror_that_hangs_and_come_back_to_it() {
    use nydus_backend::http::Timeouts;
    use nydus_backend::{Avoid, Route, RouteOptions, Urgency};
    let dir = tempfile::tempdir().unwrap();
    let content = noise(6_000_000);
    let registry = Registry::start(content.clone());
    let daemon = Daemon::start(&config(dir.path(), &registry.name));
    let table = serde_json::json!({
        "scheme": "http", "host": registry.name, "repo": "some/repo",
        "mirrors": [{"host": format!("http://{}", daemon.address), "health_check_interval": 1}],
    });
    let limits = Timeouts { first_byte: Duration::from_millis(700), ..Timeouts::MIRROR };
    let options = RouteOptions { mirror_limits: limits, ..RouteOptions::default() };
    let route = Route::open(&nydus_backend::Config::from_parts("registry", table).unwrap(), options).unwrap();
    let id = blob("", &content).rsplit_once(':').unwrap().1.parse().unwrap();
    let read = async |at: u64| {
        let served = route.read_from(&id, at..at + 1000, Urgency::Demand, Avoid::Nothing).await.unwrap();
        assert_eq!(served.bytes, content[at as usize..at as usize + 1000]);
        served.from_mirror
    };
    assert!(read(0).await);
    let pid = Pid::from_raw(daemon.child.id() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    assert!(!read(2_000_000).await && !read(3_000_000).await);
    kill(pid, Signal::SIGCONT).unwrap();
    let begin = Instant::now();
    while !read(4_000_000).await {
        assert!(begin.elapsed() < Duration::from_secs(60), "the mirror was never asked again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    daemon.end(Signal::SIGKILL);
    assert!(!read(5_000_000).await);
}
