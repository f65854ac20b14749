//! Those who mean a node ill: members that lie, strangers at its ports, and members without measure.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libp2p::futures::StreamExt as _;
use libp2p::swarm::SwarmEvent;
use nydus_backend::node::identity::Identity;
use nydus_backend::node::peer::Peer;
use nydus_backend::node::{Bound, BrokenOff, Config, Ear, Node as Member, Parts, Record, Vouched};
use nydus_backend::swarm::grid::PIECE;
use nydus_backend::swarm::message::{Ask, Frame, HaveMap, Manner, Urgency};
use nydus_backend::swarm::wire::Message as _;
use nydus_rafs::Digest;
use tempfile::TempDir;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;

use crate::node::{Node, ask, cluster_with, until};
use crate::registry::{Registry, blob, noise};

/// A member that answers every ask with bytes of its own, and signs them as if the registry had sent them.
struct Liar {
    identity: Arc<Identity>,
    told: AtomicUsize,
}

impl Ear for Liar {
    fn asked(&self, _: Peer, ask: &[u8]) -> Result<Parts, String> {
        let ask = Ask::decode(ask).map_err(|error| error.to_string())?;
        let (sender, parts) = mpsc::channel(64);
        let say = |record: Record| sender.try_send(Ok::<_, BrokenOff>(record.encode())).expect("there is room");
        for piece in ask.mask.pieces(ask.group) {
            let start = u64::from(piece) * PIECE;
            let length = ask.size.map_or(PIECE, |size| size.saturating_sub(start).min(PIECE));
            let lie = vec![0x66; usize::try_from(length).unwrap()];
            let vouched = Vouched::sign(&self.identity, &ask.object.0, piece, *blake3::hash(&lie).as_bytes());
            say(Record::Message(Frame::Map(HaveMap::default()).encode().into()));
            say(Record::Piece { piece, offset: 0, length: u32::try_from(length).unwrap() });
            say(Record::Bytes(lie.into()));
            say(Record::Vouch { piece, vouched });
            self.told.fetch_add(1, Ordering::SeqCst);
        }
        Ok(parts)
    }

    fn reported(&self, _: Peer, _: &[u8]) -> Result<(), String> {
        Ok(())
    }

    fn gossiped(&self, _: Peer, _: &[u8]) {}
}

impl Liar {
    /// Makes one a member of the cluster of `node`.
    async fn join(node: &Node) -> (Arc<Self>, Member, TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        std::fs::copy(node.dir.path().join("key"), &key).unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let config = Config {
            listen: anywhere,
            gossip_listen: anywhere,
            cluster_key_file: key,
            seeds: vec![node.swarm.clone()],
            ..Config::default()
        };
        let bound = Bound::bind(config, dir.path()).await.unwrap();
        let liar = Arc::new(Self { identity: bound.identity().clone(), told: AtomicUsize::new(0) });
        (liar.clone(), bound.start(liar).unwrap(), dir)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_signs_wrong_bytes_is_found_out_by_a_reader_that_verifies() {
    // Of so many groups the liar is the home of some.
    let content = noise(41_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let node = Node::start(&registry.name, 7, &[]);
    node.sees(1);
    let (liar, _member, _dir) = Liar::join(&node).await;
    node.sees(2);
    let part = |at: usize, headers: &str| {
        let end = (at + PIECE as usize).min(content.len());
        let headers = format!("Range: bytes={at}-{}\r\nX-Shoal-Verifies: 1\r\n{headers}", end - 1);
        let (status, bytes) = ask(&node.listen, "GET", &path, &headers).unwrap();
        assert_eq!(status, 206);
        (bytes == content[at..end], bytes.len() == end - at)
    };
    let mut lies = 0;
    for at in (0..content.len()).step_by(PIECE as usize) {
        if part(at, "") != (true, true) {
            lies += 1;
            // As nydusd does when a chunk does not match its digest.
            assert_eq!(part(at, "X-Shoal-No-Peer: 1\r\n"), (true, true), "the registry's own bytes at {at}");
        }
    }
    assert_eq!(lies, 1, "one lie is enough; it told {}", liar.told.load(Ordering::SeqCst));
    let peer = liar.identity.peer().to_string();
    node.says(&["WARN", "it is not asked for a while", "Vouch", &peer]);
    // It is not asked again, and all is well.
    let told = liar.told.load(Ordering::SeqCst);
    assert!(node.get(&path) == (200, content.to_vec()));
    assert_eq!(liar.told.load(Ordering::SeqCst), told);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_proof_is_asked_for_nobody_is_given_a_member_s_word() {
    let content = noise(25_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let strict = "trust = \"proof\"";
    let nodes = cluster_with(&registry, 3, strict);
    // What is read whole leaves the registry once all the same.
    std::thread::scope(|scope| {
        for node in &nodes {
            scope.spawn(|| assert!(node.get(&path) == (200, content.to_vec())));
        }
    });
    // One group may have two homes while the members' lists are still being compared.
    let (sent, group) = (registry.sent.load(Ordering::SeqCst), 4 * PIECE as usize);
    assert!(sent <= content.len() * 105 / 100 + group, "the registry sent {sent} bytes of {}", content.len());

    let content = noise(24_999_999);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let node = Node::start_with(&registry.name, 9, &[], strict);
    node.sees(1);
    let (liar, _member, _dir) = Liar::join(&node).await;
    node.sees(2);
    let (status, part) = ask(&node.listen, "GET", &path, "Range: bytes=3000000-14000000\r\n").unwrap();
    assert!(status == 206 && part == content[3_000_000..=14_000_000], "a part is read from the registry");
    assert_eq!(liar.told.load(Ordering::SeqCst), 0);
    let (status, bytes) = node.get(&path);
    assert_eq!(status, 200);
    assert!(content.starts_with(&bytes), "not one wrong byte");
    let (status, bytes) = node.get(&path);
    assert!(status == 200 && bytes == *content);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_at_the_ports_are_refused_and_the_log_names_the_fix() {
    let content = noise(1_000_000);
    let registry = Registry::start(content.clone());
    let node = Node::start(&registry.name, 7, &[]);
    node.sees(1);
    // Whoever has another cluster key and comes for bytes.
    let stranger = Node::start(&registry.name, 8, &[&node]);
    for log in [&stranger, &node] {
        log.says(&["WARN", "the cluster keys differ", "swarm.cluster_key_file"]);
    }
    // Whoever comes for gossip.
    let gossip = until(node.dir.path(), || {
        // The port is not told to operators; it is the only other one on which the process listens for TCP.
        let told =
            [&node.listen, &node.metrics, &node.swarm].map(|address| address.parse::<SocketAddr>().unwrap().port());
        ports_of(node.child.as_ref().unwrap().id())
            .into_iter()
            .find(|port| !told.contains(port) && speaks_multistream(*port))
    });
    let mut dialler = libp2p::SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(libp2p::tcp::Config::default(), libp2p::noise::Config::new, libp2p::yamux::Config::default)
        .unwrap()
        .with_behaviour(|_| libp2p::allow_block_list::Behaviour::<libp2p::allow_block_list::BlockedPeers>::default())
        .unwrap()
        .build();
    let address: libp2p::Multiaddr = format!("/ip4/127.0.0.1/tcp/{gossip}").parse().unwrap();
    let begin = Instant::now();
    // One who is refused once may be a member whose joining is not known yet.
    while !node.log().contains("one who is no member connects for gossip") {
        assert!(begin.elapsed() < Duration::from_secs(60), "nothing is said about it");
        dialler.dial(address.clone()).unwrap();
        let closed = async {
            loop {
                match dialler.select_next_some().await {
                    SwarmEvent::ConnectionClosed { .. } | SwarmEvent::OutgoingConnectionError { .. } => return,
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), closed).await.expect("a stranger is not kept");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    node.says(&["WARN", "no member connects for gossip", "swarm.cluster_key_file"]);
    assert!(node.get(&blob("some/repo", &content)).0 == 200);
}

/// Returns the TCP ports of 127.0.0.1 on which a process listens.
fn ports_of(process: u32) -> Vec<u16> {
    let links = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap().flatten();
    let sockets: Vec<String> = links
        .filter_map(|link| {
            std::fs::read_link(link.path())
                .ok()?
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')
                .map(str::to_owned)
        })
        .collect();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let listening = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (words.get(1)?, words.get(3)?, words.get(9)?);
        (*state == "0A" && sockets.iter().any(|socket| socket == inode)).then_some(())?;
        u16::from_str_radix(local.split_once(':')?.1, 16).ok()
    });
    listening.collect()
}

fn speaks_multistream(port: u16) -> bool {
    let greet = || -> std::io::Result<bool> {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"\x13/multistream/1.0.0\n")?;
        let mut answer = [0; 20];
        stream.read_exact(&mut answer)?;
        Ok(answer.starts_with(b"\x13/multistream"))
    };
    greet().unwrap_or(false)
}

/// A member's connection in plain text, on which anything can be said.
struct Raw(TcpStream);

impl Raw {
    /// Connects to a node whose cluster has no TLS and this key, and proves that it is a member.
    async fn connect(address: &str, key: u8, seed: u8) -> std::io::Result<Self> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let identity = Identity::from_seed([seed; 32]);
        let mut stream = TcpStream::connect(address).await?;
        let mut hello = [0; 8 + 1 + 32 + 32];
        stream.read_exact(&mut hello).await?;
        let (nonce, peer) = ([seed; 32], identity.peer().0);
        let mut transcript = blake3::Hasher::new();
        transcript
            .update(&hello[..9])
            .update(&hello[9..41])
            .update(&nonce)
            .update(&hello[41..])
            .update(&peer)
            .update(&[0; 32]);
        let text = [&b"shoal swarm membership client "[..], transcript.finalize().as_bytes()].concat();
        let proof = blake3::derive_key("shoal swarm: proof of membership, version 1", &[key; 32]);
        let fingerprint = blake3::derive_key("shoal swarm: fingerprint of a cluster key, version 1", &[key; 32]);
        let mut message = [&hello[..9], &nonce, &peer, &fingerprint[..4]].concat();
        message.extend(blake3::keyed_hash(&proof, &text).as_bytes());
        message.extend(identity.sign(&text).0);
        stream.write_all(&message).await?;
        let mut answer = [0; 1 + 4 + 32 + 64];
        stream.read_exact(&mut answer).await?;
        if answer[0] == 0 { Ok(Self(stream)) } else { Err(std::io::ErrorKind::PermissionDenied.into()) }
    }

    /// Says this again and again until the node ends the connection; returns how many bytes it took.
    async fn say_for_ever(mut self, head: &[u8], again: &[u8]) -> usize {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut said = 0;
        if self.0.write_all(head).await.is_err() {
            return said;
        }
        let (mut from, mut to) = self.0.split();
        let saying = async {
            while said < 1 << 30 && to.write_all(again).await.is_ok() {
                said += again.len();
            }
        };
        // It may answer first; then it hears no more.
        let hearing = async { while from.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {} };
        let both = async {
            tokio::select! { () = saying => {}, () = hearing => {} }
        };
        tokio::time::timeout(Duration::from_secs(30), both).await.expect("the node ends it");
        said
    }
}

/// Returns the bytes of memory that a node's process has.
fn memory(node: &Node) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", node.child.as_ref().unwrap().id())).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[tokio::test(flavor = "multi_thread")]
async fn members_without_measure_get_no_more_than_their_share() {
    let content = noise(30_000_000);
    let path = blob("some/repo", &content);
    let registry = Registry::start(content.clone());
    let node = Node::start_with(&registry.name, 7, &[], "tls = false");
    node.sees(1);
    assert!(node.get(&path) == (200, content.to_vec()));
    let before = memory(&node);

    // Heads and bodies without end.
    let raw = Raw::connect(&node.swarm, 7, 1).await.unwrap();
    let said =
        raw.say_for_ever(b"POST /swarm/1/ask HTTP/1.1\r\n", &[b"X: ", &[b'x'; 1000][..], b"\r\n"].concat()).await;
    assert!(said < 16 << 20, "{said} bytes of headers were taken");
    let raw = Raw::connect(&node.swarm, 7, 1).await.unwrap();
    let said = raw
        .say_for_ever(b"POST /swarm/1/report HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999999\r\n\r\n", &[0; 64 << 10])
        .await;
    assert!(said < 16 << 20, "{said} bytes of a body were taken");

    // Asks whose answers nobody takes, and more connections than a member may have.
    let digest: Digest = path.rsplit_once(':').unwrap().1.parse().unwrap();
    let ask = Ask {
        object: nydus_backend::swarm::Object(digest),
        size: Some(content.len() as u64),
        origin: format!("{}/some/repo", registry.name).into(),
        group: 0,
        mask: (0..4).fold(nydus_backend::swarm::grid::Mask::NONE, |all, piece| {
            all.or(nydus_backend::swarm::grid::Mask::of(piece))
        }),
        offset: 0,
        manner: Manner::BytesOnly,
        below: u8::MAX,
        urgency: Urgency::Demand,
        can_read: false,
        have: Default::default(),
        backlog: 0,
    }
    .encode();
    let held = Mutex::new(Vec::new());
    for _ in 0..40 {
        use tokio::io::AsyncWriteExt as _;
        let Ok(mut raw) = Raw::connect(&node.swarm, 7, 2).await else { continue };
        let head = format!("POST /swarm/1/ask HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", ask.len());
        let _ = raw.0.write_all(&[head.as_bytes(), &ask].concat()).await;
        held.lock().unwrap().push(raw);
    }
    // Another member is served meanwhile.
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let begin = Instant::now();
    let mut other = Raw::connect(&node.swarm, 7, 3).await.unwrap();
    other.0.write_all(b"POST /swarm/1/members HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    let mut answer = [0; 12];
    other.0.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    assert!(begin.elapsed() < Duration::from_secs(5), "after {:?}", begin.elapsed());
    node.says(&["WARN", "a member has 16 connections to us"]);
    let grown = memory(&node).saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes of memory for one member");
    // Whoever takes nothing is left.
    let mut last = held.into_inner().unwrap().swap_remove(0);
    let rest = tokio::time::timeout(Duration::from_secs(60), async {
        tokio::time::sleep(Duration::from_secs(12)).await;
        let mut sink = Vec::new();
        // The beginning that the network held, and then the end.
        let _ = last.0.read_to_end(&mut sink).await;
        sink.len()
    });
    assert!(rest.await.expect("the node hangs up") < 16 << 20);
    assert!(node.get(&path) == (200, content.to_vec()));
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_that_say_nothing_keep_no_member_out() {
    let content = noise(3_000_000);
    let registry = Registry::start(content.clone());
    let node = Node::start(&registry.name, 7, &[]);
    node.sees(1);
    let to: SocketAddr = node.swarm.parse().unwrap();
    let mut silent = Vec::new();
    for _ in 0..300 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 9], 0).into()).unwrap();
        silent.push(socket.connect(to).await.unwrap());
    }
    node.says(&["WARN", "connections from there have not proved"]);
    let member = Node::start(&registry.name, 7, &[&node]);
    member.sees(2);
    drop(silent);
    assert!(member.get(&blob("some/repo", &content)) == (200, content.to_vec()));
}
