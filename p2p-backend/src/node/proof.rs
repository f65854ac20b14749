//! The first exchange on every connection: that both ends are members of one cluster.
//!
//! ```text
//!     server  "SHOALP2P" version=1 nonce[32] peer[32]
//!     client  "SHOALP2P" version=1 nonce[32] peer[32] fingerprint[4] proof[32] signature[64]
//!     server  status     fingerprint[4] proof[32] signature[64]
//! ```
//!
//! A proof is the keyed BLAKE3 of the role and of the transcript: version, both nonces, both peers and what TLS exports, so it
//! fits this connection only. On TLS the peers are proved by the handshake and signatures are zeros; on plain text each
//! end signs the transcript. The fingerprint says which key is meant, so that a wrong key is told as that.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::identity::{Identity, random};
use super::key::{ClusterKey, ClusterKeys, Fingerprint};
use super::peer::{Peer, Signature};

const MAGIC: &[u8; 8] = b"SHOALP2P";
const VERSION: u8 = 1;
/// How long the exchange may take.
const LIMIT: Duration = Duration::from_secs(5);

const HELLO: usize = 8 + 1 + 32 + 32;
const PROOF: usize = 4 + 32 + 64;

/// How the server ends the exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Member = 0,
    WrongKey = 1,
    SamePeer = 2,
}

/// Why a connection is not one between members; completes "could not connect to …".
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The connection broke.
    #[error(
        "the connection broke while membership was being proved: {0}; if it always does, compare `swarm.tls` of both nodes"
    )]
    Io(#[from] io::Error),
    /// The other end takes too long.
    #[error("the other end did not prove its membership within {LIMIT:?}")]
    Silent,
    /// The other end speaks something else.
    #[error(
        "the other end is no nydus-p2p of this kind; check the address, and that `swarm.tls` is the same on both nodes"
    )]
    Stranger,
    /// Another version.
    #[error("the other node speaks version {0} of the swarm's protocol, and we speak {VERSION}; update the older one")]
    Version(u8),
    /// Another cluster, or a key that was not rotated.
    #[error(
        "the cluster keys differ: ours has fingerprint {ours}, theirs {theirs}; put the same key into both nodes' swarm.cluster_key_file"
    )]
    WrongKey {
        /// The fingerprint of our key.
        ours: Fingerprint,
        /// The fingerprint of theirs.
        theirs: Fingerprint,
    },
    /// The key is said to be the same, but the proof is not.
    #[error("the other end does not know the cluster key whose fingerprint it names")]
    Unproved,
    /// It is somebody else.
    #[error("the peer there is {found}, not {expected}; its address went to another node")]
    Another {
        /// Whom we meant.
        expected: Peer,
        /// Who it is.
        found: Peer,
    },
    /// It is us, or a copy of us.
    #[error(
        "the peer there has our own peer id {0}: a data directory was copied; stop one of the two nodes, remove `identity` from its data_dir and start it again"
    )]
    SamePeer(Peer),
}

/// What is known of a connection before the exchange.
#[derive(Debug, Clone, Copy)]
pub(super) struct Channel {
    /// Whom TLS has proved to be there, if there is TLS.
    pub(super) peer: Option<Peer>,
    /// What TLS exports, or zeros.
    pub(super) exported: [u8; 32],
}

/// The values that a connection's proofs are about.
struct Transcript([u8; 32]);

impl Transcript {
    fn new(server: &Hello, client: &Hello, exported: &[u8; 32]) -> Self {
        let mut hash = blake3::Hasher::new();
        hash.update(MAGIC).update(&[VERSION]);
        for part in [&server.nonce, &client.nonce, &server.peer.0, &client.peer.0, exported] {
            hash.update(part);
        }
        Self(*hash.finalize().as_bytes())
    }

    fn text(&self, role: &str) -> Vec<u8> {
        [b"shoal swarm membership ", role.as_bytes(), b" ", &self.0].concat()
    }

    /// Adds what proves `role` to `message`.
    fn prove(&self, role: &str, identity: &Identity, key: &ClusterKey, channel: &Channel, message: &mut Vec<u8>) {
        let text = self.text(role);
        message.extend(key.fingerprint().0);
        message.extend(keyed(key, &text).as_bytes());
        let signature = if channel.peer.is_some() { Signature([0; 64]) } else { identity.sign(&text) };
        message.extend(signature.0);
    }

    /// Whether `proof` proves `role` of `peer`, who named `key`.
    fn proves(&self, role: &str, peer: &Peer, key: &ClusterKey, channel: &Channel, proof: &Proof) -> bool {
        let text = self.text(role);
        // Compared in constant time: it is a blake3::Hash.
        let known = keyed(key, &text) == blake3::Hash::from_bytes(proof.proof);
        known && (channel.peer.is_some() || peer.signed(&text, &proof.signature))
    }
}

fn keyed(key: &ClusterKey, text: &[u8]) -> blake3::Hash {
    blake3::keyed_hash(&key.derive("shoal swarm: proof of membership, version 1"), text)
}

struct Hello {
    nonce: [u8; 32],
    peer: Peer,
}

impl Hello {
    fn ours(identity: &Identity) -> Result<Self, ProofError> {
        Ok(Self { nonce: random().map_err(io::Error::other)?, peer: identity.peer() })
    }

    fn bytes(&self) -> Vec<u8> {
        [&MAGIC[..], &[VERSION], &self.nonce, &self.peer.0].concat()
    }

    async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Self, ProofError> {
        let mut bytes = [0; HELLO];
        from.read_exact(&mut bytes).await?;
        let (magic, rest) = bytes.split_at(8);
        if magic != MAGIC {
            return Err(ProofError::Stranger);
        }
        if rest[0] != VERSION {
            return Err(ProofError::Version(rest[0]));
        }
        let part = |at: usize| rest[at..at + 32].try_into().expect("a hello has two parts of 32 bytes");
        Ok(Self { nonce: part(1), peer: Peer(part(33)) })
    }
}

struct Proof {
    fingerprint: Fingerprint,
    proof: [u8; 32],
    signature: Signature,
}

impl Proof {
    async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Self, ProofError> {
        let mut bytes = [0; PROOF];
        from.read_exact(&mut bytes).await?;
        Ok(Self {
            fingerprint: Fingerprint(bytes[..4].try_into().expect("four bytes")),
            proof: bytes[4..36].try_into().expect("32 bytes"),
            signature: Signature(bytes[36..].try_into().expect("64 bytes")),
        })
    }
}

/// Proves us to the one who connected, and it to us; returns who it is.
pub(super) async fn accept(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    identity: &Identity,
    keys: &ClusterKeys,
    channel: Channel,
) -> Result<Peer, ProofError> {
    let exchange = async {
        let ours = Hello::ours(identity)?;
        stream.write_all(&ours.bytes()).await?;
        let theirs = Hello::read(stream).await?;
        let proof = Proof::read(stream).await?;
        check_peer(&channel, theirs.peer)?;
        let transcript = Transcript::new(&ours, &theirs, &channel.exported);
        let key = keys.find(proof.fingerprint);
        let (status, outcome) = match key {
            None => {
                let wrong = ProofError::WrongKey { ours: keys.own().fingerprint(), theirs: proof.fingerprint };
                (Status::WrongKey, Err(wrong))
            }
            Some(key) if !transcript.proves("client", &theirs.peer, key, &channel, &proof) => {
                return Err(ProofError::Unproved);
            }
            Some(_) if theirs.peer == identity.peer() => (Status::SamePeer, Err(ProofError::SamePeer(theirs.peer))),
            Some(_) => (Status::Member, Ok(theirs.peer)),
        };
        let mut answer = vec![status as u8];
        // With the key that the other one meant, which may not be our first.
        transcript.prove("server", identity, key.unwrap_or(keys.own()), &channel, &mut answer);
        stream.write_all(&answer).await?;
        stream.flush().await?;
        outcome
    };
    tokio::time::timeout(LIMIT, exchange).await.unwrap_or(Err(ProofError::Silent))
}

/// Proves us to the one to whom we connected, and it to us; returns who it is.
pub(super) async fn connect(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    identity: &Identity,
    keys: &ClusterKeys,
    channel: Channel,
    expected: Option<Peer>,
) -> Result<Peer, ProofError> {
    let exchange = async {
        let theirs = Hello::read(stream).await?;
        check_peer(&channel, theirs.peer)?;
        if let Some(expected) = expected.filter(|expected| *expected != theirs.peer) {
            return Err(ProofError::Another { expected, found: theirs.peer });
        }
        let ours = Hello::ours(identity)?;
        let transcript = Transcript::new(&theirs, &ours, &channel.exported);
        let mut message = ours.bytes();
        transcript.prove("client", identity, keys.own(), &channel, &mut message);
        stream.write_all(&message).await?;
        stream.flush().await?;
        let status = stream.read_u8().await?;
        let proof = Proof::read(stream).await?;
        if status == Status::WrongKey as u8 {
            return Err(ProofError::WrongKey { ours: keys.own().fingerprint(), theirs: proof.fingerprint });
        }
        let key = keys.find(proof.fingerprint).ok_or(ProofError::Unproved)?;
        if !transcript.proves("server", &theirs.peer, key, &channel, &proof) {
            return Err(ProofError::Unproved);
        }
        match status {
            _ if theirs.peer == identity.peer() => Err(ProofError::SamePeer(theirs.peer)),
            status if status == Status::Member as u8 => Ok(theirs.peer),
            _ => Err(ProofError::Stranger),
        }
    };
    tokio::time::timeout(LIMIT, exchange).await.unwrap_or(Err(ProofError::Silent))
}

/// Compares who the other end says that it is with whom TLS has found there.
fn check_peer(channel: &Channel, said: Peer) -> Result<(), ProofError> {
    match channel.peer {
        Some(proved) if proved != said => Err(ProofError::Another { expected: said, found: proved }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Channel = Channel { peer: None, exported: [0; 32] };

    fn keys(numbers: &[u8]) -> ClusterKeys {
        let text: Vec<String> = numbers.iter().map(|number| hex::encode([*number; 32])).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, text.join("\n")).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        ClusterKeys::read(&path).unwrap()
    }

    /// What server and client come to, as text where it is an error.
    async fn meet(
        server: (u8, &[u8], Channel),
        client: (u8, &[u8], Channel),
    ) -> (Result<Peer, String>, Result<Peer, String>) {
        let (mut near, mut far) = tokio::io::duplex(1024);
        let (theirs, ours) = (Identity::from_seed([server.0; 32]), Identity::from_seed([client.0; 32]));
        let (their_keys, our_keys) = (keys(server.1), keys(client.1));
        let serving = async {
            let got = accept(&mut far, &theirs, &their_keys, server.2).await;
            drop(far);
            got
        };
        let asking = connect(&mut near, &ours, &our_keys, client.2, None);
        let (server, client) = tokio::join!(serving, asking);
        (server.map_err(|error| error.to_string()), client.map_err(|error| error.to_string()))
    }

    fn peer(seed: u8) -> Peer {
        Identity::from_seed([seed; 32]).peer()
    }

    #[tokio::test]
    async fn members_know_each_other_also_while_keys_are_rotated() {
        for (server, client) in [(&[7][..], &[7][..]), (&[7, 8], &[7]), (&[7, 8], &[8, 7]), (&[8, 7], &[7, 8])] {
            assert_eq!(meet((1, server, PLAIN), (2, client, PLAIN)).await, (Ok(peer(2)), Ok(peer(1))));
        }
    }

    #[tokio::test]
    async fn a_wrong_key_is_told_as_that_at_both_ends_with_both_fingerprints() {
        let (server, client) = meet((1, &[7], PLAIN), (2, &[8], PLAIN)).await;
        let prints = [7, 8].map(|key| keys(&[key]).own().fingerprint().to_string());
        for told in [server.unwrap_err(), client.unwrap_err()] {
            assert!(told.contains("cluster_key_file"), "{told}");
            assert!(prints.iter().all(|print| told.contains(print)), "{told}");
            assert!(!told.contains("0707") && !told.contains("0808"), "{told}");
        }
    }

    #[tokio::test]
    async fn a_copy_of_a_node_is_told_apart_from_it() {
        let (server, client) = meet((1, &[7], PLAIN), (1, &[7], PLAIN)).await;
        for told in [server.unwrap_err(), client.unwrap_err()] {
            assert!(told.contains("copied") && told.contains(&peer(1).to_string()), "{told}");
        }
    }

    #[tokio::test]
    async fn nobody_is_believed_who_is_not_the_one_that_tls_found_or_is_on_another_connection() {
        let tls = |seed, exported| Channel { peer: Some(peer(seed)), exported: [exported; 32] };
        assert_eq!(meet((1, &[7], tls(2, 5)), (2, &[7], tls(1, 5))).await, (Ok(peer(2)), Ok(peer(1))));
        let (server, _) = meet((1, &[7], tls(3, 5)), (2, &[7], tls(1, 5))).await;
        assert!(server.unwrap_err().contains(&peer(2).to_string()));
        // Somebody in the middle has two connections, and what he passes on fits neither.
        let (server, client) = meet((1, &[7], tls(2, 5)), (2, &[7], tls(1, 6))).await;
        assert!(server.is_err() && client.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_and_the_silent_are_let_go() {
        let (mut near, mut far) = tokio::io::duplex(1024);
        let identity = Identity::from_seed([1; 32]);
        let silent = accept(&mut far, &identity, &keys(&[7]), PLAIN).await.unwrap_err();
        assert!(matches!(silent, ProofError::Silent));
        near.write_all(&[b"GET / HTTP/1.1\r\n".as_slice(), &[b' '; 300]].concat()).await.unwrap();
        let stranger = accept(&mut far, &identity, &keys(&[7]), PLAIN).await.unwrap_err();
        assert!(matches!(stranger, ProofError::Stranger), "{stranger}");
    }
}
