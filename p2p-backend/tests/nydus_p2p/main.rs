//! The program `nydus-p2p` from outside: its flags, its signals, and what a kill leaves.
#![cfg(feature = "mirror")]
#![expect(clippy::print_stdout, reason = "what nodes logged is for whoever looks at a failed test")]

mod daemon;
mod hostile;
mod node;
mod registry;
mod swarm;

use std::path::Path;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use daemon::{Daemon, config, part, program};
use registry::{Mode, Registry, blob, noise};

fn check(config: &Path, flags: &[&str]) -> Output {
    program().arg("--config").arg(config).arg("--check-config").args(flags).output().unwrap()
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
