//! A connection between two members, proved.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::identity::Identity;
use super::key::ClusterKeys;
use super::peer::Peer;
use super::proof::{self, Channel, ProofError};
use super::tls::{self, Tls};

/// How long a connection may take to be there.
const CONNECT: Duration = Duration::from_secs(3);

/// Bytes both ways.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Why there is no connection; completes "could not connect to …".
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Nobody listens there, or a firewall is between.
    #[error("{0}; check that nydus-p2p runs there and that its swarm port is open for TCP")]
    Connect(io::Error),
    /// TLS failed.
    #[error("the TLS handshake failed: {0}; check that `swarm.tls` is the same on both nodes")]
    Tls(io::Error),
    /// It is not a member, or not the one we meant.
    #[error(transparent)]
    Proof(#[from] ProofError),
}

/// A connection whose other end is proved to be a member.
pub(super) struct Link {
    pub(super) peer: Peer,
    pub(super) stream: Box<dyn Duplex>,
}

/// What makes links.
#[derive(Debug, Clone)]
pub(super) struct Linker {
    pub(super) identity: Arc<Identity>,
    pub(super) keys: ClusterKeys,
    /// None where the operator chose plain text.
    pub(super) tls: Option<Tls>,
}

impl Linker {
    /// Connects to `address`, where `expected` should be.
    pub(super) async fn connect(&self, address: SocketAddr, expected: Option<Peer>) -> Result<Link, LinkError> {
        let silent = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {CONNECT:?}"));
        let connecting = tokio::time::timeout(CONNECT, TcpStream::connect(address)).await;
        let mut stream = connecting.unwrap_or_else(|_| Err(silent())).map_err(LinkError::Connect)?;
        stream.set_nodelay(true).map_err(LinkError::Connect)?;
        let Some(tls) = &self.tls else {
            let plain = Channel { peer: None, exported: [0; 32] };
            let peer = proof::connect(&mut stream, &self.identity, &self.keys, plain, expected).await?;
            return Ok(Link { peer, stream: Box::new(stream) });
        };
        let name = ServerName::from(address.ip());
        let shaking = TlsConnector::from(tls.client.clone()).connect(name, stream);
        let shaken = tokio::time::timeout(CONNECT, shaking).await;
        let mut stream = shaken.unwrap_or_else(|_| Err(silent())).map_err(LinkError::Tls)?;
        let (_, session) = stream.get_ref();
        let exported = session.export_keying_material([0; 32], tls::EXPORTED, None);
        let channel = channel(session.peer_certificates(), exported)?;
        let peer = proof::connect(&mut stream, &self.identity, &self.keys, channel, expected).await?;
        Ok(Link { peer, stream: Box::new(stream) })
    }

    /// Proves the other end of a connection that somebody opened.
    pub(super) async fn accept(&self, mut stream: TcpStream) -> Result<Link, LinkError> {
        stream.set_nodelay(true).map_err(LinkError::Connect)?;
        let Some(tls) = &self.tls else {
            let plain = Channel { peer: None, exported: [0; 32] };
            let peer = proof::accept(&mut stream, &self.identity, &self.keys, plain).await?;
            return Ok(Link { peer, stream: Box::new(stream) });
        };
        let silent = || io::Error::new(io::ErrorKind::TimedOut, format!("no handshake within {CONNECT:?}"));
        let shaken = tokio::time::timeout(CONNECT, TlsAcceptor::from(tls.server.clone()).accept(stream)).await;
        let mut stream = shaken.unwrap_or_else(|_| Err(silent())).map_err(LinkError::Tls)?;
        let (_, session) = stream.get_ref();
        let exported = session.export_keying_material([0; 32], tls::EXPORTED, None);
        let channel = channel(session.peer_certificates(), exported)?;
        let peer = proof::accept(&mut stream, &self.identity, &self.keys, channel).await?;
        Ok(Link { peer, stream: Box::new(stream) })
    }
}

fn channel(
    shown: Option<&[rustls::pki_types::CertificateDer<'_>]>,
    exported: Result<[u8; 32], rustls::Error>,
) -> Result<Channel, LinkError> {
    let exported = exported.map_err(|error| LinkError::Tls(io::Error::other(error)))?;
    let peer = tls::peer(shown).ok_or(ProofError::Stranger)?;
    Ok(Channel { peer: Some(peer), exported })
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::super::key::ClusterKey;
    use super::*;

    fn linker(seed: u8, key: u8, tls: bool) -> Linker {
        let identity = Arc::new(Identity::from_seed([seed; 32]));
        let tls = tls.then(|| Tls::new(&identity).unwrap());
        Linker { identity, keys: ClusterKey::new([key; 32]).into(), tls }
    }

    async fn meet(server: Linker, client: Linker, expected: Option<Peer>) -> [Result<Peer, String>; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut link = server.accept(stream).await.map_err(|error| error.to_string())?;
            let mut text = [0; 4];
            link.stream.read_exact(&mut text).await.map_err(|error| error.to_string())?;
            assert_eq!(&text, b"ping");
            Ok(link.peer)
        });
        let asked = match client.connect(address, expected).await {
            Ok(mut link) => {
                link.stream.write_all(b"ping").await.unwrap();
                link.stream.flush().await.unwrap();
                Ok(link.peer)
            }
            Err(error) => Err(error.to_string()),
        };
        [serving.await.unwrap(), asked]
    }

    fn peer(seed: u8) -> Peer {
        Identity::from_seed([seed; 32]).peer()
    }

    #[tokio::test]
    async fn members_are_linked_by_tls_or_in_plain_text_and_know_each_other() {
        for tls in [true, false] {
            let met = meet(linker(1, 7, tls), linker(2, 7, tls), Some(peer(1))).await;
            assert_eq!(met, [Ok(peer(2)), Ok(peer(1))]);
        }
    }

    #[tokio::test]
    async fn another_peer_another_key_and_another_manner_are_refused_with_the_reason() {
        for tls in [true, false] {
            let [_, asked] = meet(linker(1, 7, tls), linker(2, 7, tls), Some(peer(3))).await;
            assert!(asked.unwrap_err().contains(&peer(3).to_string()));
            let both = meet(linker(1, 7, tls), linker(2, 8, tls), None).await;
            assert!(both.iter().all(|told| told.as_ref().unwrap_err().contains("cluster_key_file")), "{both:?}");
            let [_, asked] = meet(linker(1, 7, tls), linker(2, 7, !tls), None).await;
            assert!(asked.as_ref().is_err_and(|told| told.contains("swarm.tls")), "{asked:?}");
        }
    }
}
