//! Several nodes as real processes on loopback, in one swarm: what leaves the registry, and what does not.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nydus_backend::overview::{Blob, Peer, Status};

use crate::node::{Node, ask, cluster, cluster_with, until};
use crate::registry::{Mode, Registry, Request, TOKEN, blob, noise};

#[test]
fn nodes_that_start_at_once_take_a_blob_from_the_registry_once() {
    let content = noise(24_500_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let first = Node::start(&registry.name, 7, &[]);
    let nodes = [Node::start(&registry.name, 7, &[&first]), Node::start(&registry.name, 7, &[&first]), first];
    for node in &nodes {
        node.sees(3);
    }
    std::thread::scope(|scope| {
        for node in &nodes {
            scope.spawn(|| {
                let (status, bytes) = node.get(&path);
                assert_eq!(status, 200);
                assert!(bytes == *content, "{} bytes, and not the right ones", bytes.len());
            });
        }
    });
    let sent = registry.sent.load(Ordering::SeqCst);
    assert!(sent <= content.len() * 105 / 100, "the registry sent {sent} bytes of {}", content.len());
    let from_peers: u64 = nodes.iter().map(Node::peer_bytes).sum();
    assert!(from_peers as usize >= content.len() * 19 / 10, "{from_peers} bytes came from peers");
    // Each finishes with the whole proved, and says so in a line and to its operator.
    for node in &nodes {
        until(node.dir.path(), || node.log().contains("blob finished").then_some(()));
        let (code, status) = ask(&node.metrics, "GET", "/swarm/status", "").unwrap();
        let status: Status = serde_json::from_slice(&status).unwrap();
        assert_eq!((code, status.members, status.standing.as_str()), (200, 3, "ready"));
        assert_eq!(status.registry_bytes + status.peer_bytes, content.len() as u64);
        let (_, peers) = ask(&node.metrics, "GET", "/swarm/peers", "").unwrap();
        let peers: Vec<Peer> = serde_json::from_slice(&peers).unwrap();
        assert_eq!(peers.iter().filter(|peer| peer.own).map(|peer| &peer.peer).collect::<Vec<_>>(), [&status.peer]);
        let (_, blobs) = ask(&node.metrics, "GET", "/swarm/blobs", "").unwrap();
        let blobs: Vec<Blob> = serde_json::from_slice(&blobs).unwrap();
        assert!(blobs[0].proved && blobs[0].stored_bytes == content.len() as u64);
    }
}

#[test]
fn a_node_that_is_killed_in_the_middle_costs_no_read() {
    let content = noise(60_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let mut nodes = cluster(&registry, 4);
    registry.set(Mode::Slow(200_000, 20));
    let mut victim = nodes.pop().unwrap();
    let (victims, others) = (victim.listen.clone(), &nodes);
    std::thread::scope(|scope| {
        let path = &path;
        // What becomes of its own readers is their affair.
        scope.spawn(move || drop(ask(&victims, "GET", path, "")));
        for node in others {
            let content = content.clone();
            scope.spawn(move || {
                let (status, bytes) = node.get(path);
                assert_eq!(status, 200);
                assert!(bytes == *content, "{} bytes, and not the right ones", bytes.len());
            });
        }
        while registry.sent.load(Ordering::SeqCst) < content.len() / 3 {
            std::thread::sleep(Duration::from_millis(5));
        }
        victim.kill(Signal::SIGKILL);
    });
    let sent = registry.sent.load(Ordering::SeqCst);
    assert!(sent <= content.len() * 110 / 100, "the registry sent {sent} bytes of {}", content.len());
}

#[test]
fn a_token_that_only_callers_have_opens_its_own_caller_s_way_and_nobody_else_s() {
    let content = noise(9_000_000);
    let path = blob("secret/repo", &content);
    let registry = Registry::start(content.clone());
    registry.set(Mode::Private);
    let nodes = cluster(&registry, 3);
    for token in ["Bearer wrong", "Basic b25seS10aGU="] {
        let (status, body) = nodes[1].get_as(&path, token);
        assert_eq!(status, 401, "{}", String::from_utf8_lossy(&body));
    }
    std::thread::scope(|scope| {
        for node in &nodes {
            scope.spawn(|| assert!(node.get_as(&path, TOKEN) == (200, content.to_vec())));
        }
    });
    let sent = registry.sent.load(Ordering::SeqCst);
    assert!(sent <= content.len() * 105 / 100, "the registry sent {sent} bytes of {}", content.len());
    // All of it is here now, for those who may have it.
    for node in &nodes {
        for token in ["", "Bearer wrong"] {
            let (status, body) = node.get_as(&path, token);
            assert_eq!(status, 401);
            assert!(!content.windows(64).step_by(1 << 20).any(|part| body.windows(64).any(|told| told == part)));
        }
        // The digest under a name of the caller's own is another question.
        assert_eq!(node.get_as(&blob("own/repo", &content), "Bearer wrong").0, 401);
        assert!(!node.log().contains("only-the-callers-have-it"), "a token is in a log");
    }
}

#[test]
fn a_miss_is_one_request_whose_answer_is_the_caller_s_right_as_well() {
    let content = noise(3_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let node = Node::start(&registry.name, 7, &[]);
    node.sees(1);
    let part = |token: &str| {
        let headers = format!("Range: bytes=0-999999\r\n{token}");
        ask(&node.listen, "GET", &path, &headers).unwrap()
    };
    registry.set(Mode::Private);
    assert_eq!(part("Authorization: Bearer wrong\r\n").0, 401);
    assert_eq!(registry.requests(), [Request { head: false, shown: "Bearer wrong".into() }]);
    let (status, bytes) = part(&format!("Authorization: {TOKEN}\r\n"));
    assert!(status == 206 && bytes == content[..1_000_000]);
    assert_eq!(registry.requests(), [Request { head: false, shown: TOKEN.into() }]);
    // It is remembered, and is nobody else's.
    assert_eq!(part(&format!("Authorization: {TOKEN}\r\n")).0, 206);
    assert_eq!(registry.requests(), []);
    assert_eq!(part("").0, 401);
}

#[test]
fn bytes_from_members_come_beside_the_question_and_wait_for_its_answer() {
    let content = noise(41_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let mut nodes = cluster(&registry, 2);
    let mut reader = nodes.pop().unwrap();
    assert!(nodes[0].get_as(&path, TOKEN) == (200, content.to_vec()));
    // A group whose home is the other node: the reader did not take it from the registry. Of ten there is one.
    let blobs = reader.dir.path().join("data/blobs");
    let taken = std::fs::read(blobs.join(path.rsplit_once(':').unwrap().1).with_extension("data")).unwrap_or_default();
    let groups = (0..content.len()).step_by(4 << 20);
    let at =
        groups.into_iter().find(|at| taken.get(at + 5) != content.get(at + 5)).expect("a group that is not its own");
    reader.kill(Signal::SIGKILL);
    std::fs::remove_dir_all(blobs).unwrap();
    reader.run();
    nodes[0].sees(2);
    reader.sees(2);
    let sent = registry.sent.load(Ordering::SeqCst);
    for (token, may) in [("Bearer wrong", false), (TOKEN, true)] {
        registry.set(Mode::Thinking);
        let told = reader.log().len();
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let headers = format!("Range: bytes={}-{}\r\nAuthorization: {token}\r\n", at + 100, at + 2_000_000);
                ask(&reader.listen, "GET", &path, &headers).unwrap()
            });
            until(reader.dir.path(), || reader.log()[told..].contains("a piece waits for its caller").then_some(()));
            assert!(!reading.is_finished(), "nobody has said that this caller may have it");
            registry.set(Mode::Private);
            let (status, bytes) = reading.join().unwrap();
            if may {
                assert!(status == 206 && bytes == content[at + 100..=at + 2_000_000], "{status}");
            } else {
                assert_eq!(status, 401, "{}", String::from_utf8_lossy(&bytes));
                assert!(bytes.len() < 1000);
            }
        });
    }
    assert!(reader.peer_bytes() > 0);
    assert_eq!(registry.sent.load(Ordering::SeqCst), sent, "a member has it");
}

#[test]
fn a_token_is_shown_to_the_registry_that_it_is_for_and_to_no_other_with_the_same_blob() {
    let content = noise(9_000_000);
    let path = blob("some/repo", &content);
    let (open, private) = (Registry::start(content.clone()), Registry::start(content.clone()));
    private.set(Mode::Private);
    let mut node = Node::start(&open.name, 7, &[]);
    node.configure("[swarm]", &format!("[[registry]]\nname = {0:?}\nurl = \"http://{0}\"\n[swarm]", private.name));
    assert_eq!(ask(&node.listen, "GET", &path, "Range: bytes=0-99\r\n").unwrap().0, 206);
    let headers = format!("X-Dragonfly-Registry: {}\r\nAuthorization: {TOKEN}\r\n", private.name);
    assert!(ask(&node.listen, "GET", &path, &headers).unwrap() == (200, content.to_vec()));
    assert!(private.requests().iter().any(|request| request.shown == TOKEN));
    let shown: Vec<Request> = open.requests().into_iter().filter(|request| !request.shown.is_empty()).collect();
    assert_eq!(shown, []);
}

#[test]
fn the_registry_may_go_once_one_node_has_it_all() {
    let content = noise(12_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let mut nodes = cluster(&registry, 3);
    // Who may read it was asked while the registry was there.
    for node in &nodes {
        assert_eq!(ask(&node.listen, "HEAD", &path, "").unwrap().0, 200);
    }
    let [seed, first, second] = &mut nodes[..] else { panic!("three nodes") };
    assert!(first.get(&path) == (200, content.to_vec()));
    registry.set(Mode::Down);
    assert!(second.get(&path) == (200, content.to_vec()));
    // One that comes back has what it had, and says so.
    assert_eq!(first.kill(Signal::SIGTERM), Some(0));
    seed.sees(2);
    first.run();
    seed.sees(3);
    assert_eq!(second.kill(Signal::SIGTERM), Some(0));
    seed.sees(2);
    assert!(seed.get(&path) == (200, content.to_vec()));
}

#[test]
fn wrong_bytes_of_a_member_reach_no_reader_and_cost_it_its_trust() {
    let content = noise(24_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let nodes = cluster(&registry, 3);
    let [reader, others @ ..] = &nodes[..] else { panic!("three nodes") };
    assert!(others[0].get(&path) == (200, content.to_vec()));
    // What these processes have checked once is on disks that lie now.
    for node in others {
        let data = node.dir.path().join(format!("data/blobs/{}.data", path.rsplit_once(':').unwrap().1));
        // Who is no home of any of its groups (peer ids are drawn) has never seen it.
        if !data.exists() {
            continue;
        }
        let mut bytes = std::fs::read(&data).unwrap();
        bytes.iter_mut().step_by(1000).for_each(|byte| *byte ^= 1);
        std::fs::write(&data, bytes).unwrap();
    }
    let (status, bytes) = reader.get(&path);
    assert_eq!(status, 200);
    assert!(bytes == *content, "wrong bytes reached a reader");
    assert!(reader.metric("nydus_p2p_swarm_quarantines_total") >= 1);
    // A reader that finds a chunk wrong is given the registry's own bytes of these pieces.
    let before = registry.sent.load(Ordering::SeqCst);
    let headers = "Range: bytes=3000000-5000000\r\nX-Shoal-No-Peer: 1\r\n";
    let (status, part) = ask(&reader.listen, "GET", &path, headers).unwrap();
    assert!(status == 206 && part == content[3_000_000..=5_000_000]);
    let again = registry.sent.load(Ordering::SeqCst) - before;
    assert!((2_000_000..=4 << 20).contains(&again), "the registry sent {again} bytes again");
    reader.says(&["WARN", "a member gave wrong bytes", "Bytes"]);
}

#[test]
fn strangers_copies_and_the_unreachable_are_told_what_to_do_and_read_by_themselves() {
    let content = noise(3_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let first = Node::start(&registry.name, 7, &[]);
    first.sees(1);
    let stranger = Node::start(&registry.name, 8, &[&first]);
    stranger.says(&["WARN", "the cluster keys differ", "cluster_key_file"]);
    let mut copy = Node::start(&registry.name, 7, &[&first]);
    first.sees(2);
    copy.kill(Signal::SIGKILL);
    std::fs::copy(first.dir.path().join("data/identity"), copy.dir.path().join("data/identity")).unwrap();
    copy.run();
    copy.says(&["ERROR", "a data directory was copied", "remove `identity`"]);
    first.says(&["ERROR", "a data directory was copied"]);
    let mut hidden = Node::start(&registry.name, 7, &[]);
    hidden.configure("seeds = []", &format!("seeds = [{:?}]\nadvertise = \"127.0.0.1:1\"", first.swarm));
    hidden.says(&["ERROR", "a member cannot reach us", "swarm.advertise", "127.0.0.1:1"]);
    for node in [&stranger, &copy, &hidden, &first] {
        assert!(node.get(&path) == (200, content.to_vec()));
        assert!(!node.log().contains(&hex::encode([7; 32])) && !node.log().contains(&hex::encode([8; 32])));
    }
}

#[test]
fn a_cache_that_is_nearly_full_withdraws_what_is_to_leave_and_keeps_serving() {
    let registries: Vec<(Registry, String, Arc<Vec<u8>>)> = (0..4)
        .map(|number| {
            let content = noise(6_000_000 + number);
            (Registry::start(content.clone()), blob("some/repo", &content), content)
        })
        .collect();
    let names: Vec<String> = registries.iter().map(|(registry, ..)| registry.name.clone()).collect();
    let mut small = Node::start(&names[0], 7, &[]);
    let more = names[1..].iter().map(|name| format!("[[registry]]\nname = \"{name}\"\nurl = \"http://{name}\"\n"));
    small.configure("listen = \"127.0.0.1:0\"\nhealth", "quota = \"16MiB\"\nlisten = \"127.0.0.1:0\"\nhealth");
    small.configure("[swarm]", &format!("{}[swarm]", more.collect::<String>()));
    for round in 0..2 {
        for (registry, path, content) in &registries {
            let headers = format!("X-Dragonfly-Registry: {}\r\n", registry.name);
            let (status, bytes) = ask(&small.listen, "GET", path, &headers).unwrap();
            assert!(status == 200 && bytes == **content, "round {round}");
        }
    }
    // What is above nine tenths leaves by itself, ten seconds after it was withdrawn.
    let limit = (16 << 20) * 9 / 10;
    until(small.dir.path(), || (small.metric("nydus_p2p_disk_usage_bytes") <= limit).then_some(()));
    assert!(small.metric("nydus_p2p_disk_usage_bytes") > 0);
}

#[test]
fn what_the_operator_has_forgotten_goes_everywhere_and_does_not_come_back() {
    let content = noise(6_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let mut nodes = cluster_with(&registry, 2, "summary = \"1s\"");
    for node in &nodes {
        assert!(node.get(&path) == (200, content.to_vec()));
    }
    let digest = path.rsplit_once('/').unwrap().1;
    let mut stream = UnixStream::connect(nodes[0].dir.path().join("data/control.sock")).unwrap();
    write!(stream, "POST /swarm/forget/{digest} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    let gone = |node: &Node| ask(&node.metrics, "GET", "/swarm/blobs", "").unwrap().1 == b"[]";
    for node in &nodes {
        until(node.dir.path(), || gone(node).then_some(()));
        let files = std::fs::read_dir(node.dir.path().join("data/blobs")).unwrap().flatten();
        let names: Vec<String> = files.map(|file| file.file_name().into_string().unwrap()).collect();
        assert!(!names.iter().any(|name| name.contains(&digest[7..])), "{names:?}");
        let (status, told) = node.get(&path);
        assert!(status >= 500 && String::from_utf8_lossy(&told).contains("nydusctl swarm forget"), "{status}");
    }
    nodes[1].kill(Signal::SIGTERM);
    nodes[1].run();
    nodes[1].sees(2);
    assert!(nodes[1].get(&path).0 >= 500 && gone(&nodes[1]));
}

#[test]
fn bytes_pass_no_faster_than_the_operator_lets_them() {
    let content = noise(9_000_000);
    let path = blob("some/repo", &content);
    for (first, second) in
        [("source_rate = \"4MiB\"", ""), ("upload_rate = \"4MiB\"", ""), ("", "download_rate = \"4MiB\"")]
    {
        let registry = Registry::start(content.clone());
        let holder = Node::start_with(&registry.name, 7, &[], first);
        holder.sees(1);
        let begin = Instant::now();
        assert!(holder.get(&path) == (200, content.to_vec()));
        let mut took = begin.elapsed();
        if !first.contains("source") {
            let reader = Node::start_with(&registry.name, 7, &[&holder], second);
            holder.sees(2);
            reader.sees(2);
            let begin = Instant::now();
            assert!(reader.get(&path) == (200, content.to_vec()));
            // What it read as a home that is new does not count.
            let part = reader.peer_bytes() as f64 / content.len() as f64;
            assert!(part > 0.2, "only {part} of it came from the member");
            took = begin.elapsed().div_f64(part);
        }
        let least = Duration::from_secs_f64(content.len() as f64 / f64::from(4 << 20)) - Duration::from_millis(300);
        assert!(took >= least, "{first}{second}: {took:?} instead of {least:?}");
    }
}
