//! A node among others: how members find each other, know each other, and send each other what they have.
//!
//! What is decided about pieces is decided elsewhere; here are the sockets. Every connection is a `link`: TLS by the keys that are
//! the peers' names (`tls`), then a `proof` that both ends know the cluster [`key`]. `joining` makes a node a member, `members` keeps
//! the list of them, `server` answers what they ask ([`Ear`]), [`Node::ask`] asks them, on connections that are kept (`pool`), and `gossip` tells everybody.

#[doc(hidden)]
pub mod anything;
mod config;
mod discovery;
mod gossip;
pub mod identity;
mod joining;
pub mod key;
mod link;
pub mod member;
mod members;
pub mod peer;
mod pool;
mod proof;
mod records;
mod remembered;
mod sealed;
mod seldom;
mod server;
mod tls;
mod vouching;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use config::Config;
pub use gossip::GossipError;
pub use link::LinkError;
pub use members::Table;
pub use pool::AskError;
pub use proof::ProofError;

pub use pool::Answer;
pub use records::{Record, RecordError, Records};
pub use server::{BrokenOff, Ear, Parts};
pub use vouching::Vouched;

use discovery::Discovery;
use gossip::Gossip;
use identity::{Identity, IdentityError};
use joining::Joining;
use key::{ClusterKeys, KeyError};
use link::Linker;
use member::{Member, Standing};
use members::{Members, Start};
use pool::Pool;
use remembered::Remembered;
use sealed::{Opener, Sealer};
use seldom::Seldom;
use server::Server;
use tls::Tls;

/// Why a node cannot be one; completes "could not start the swarm".
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// It has no identity.
    #[error("cannot take up the node's identity: {0}")]
    Identity(#[from] IdentityError),
    /// It has no cluster key.
    #[error("cannot read the cluster key: {0}")]
    Key(#[from] KeyError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address} ({key}, {protocol}): {source}; is another nydus-p2p running?")]
    Listen {
        /// The key of the configuration.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// TCP or UDP.
        protocol: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Gossip cannot be set up.
    #[error("cannot listen for gossip on {address} (swarm.gossip_listen): {source}; is another nydus-p2p running?")]
    Gossip {
        /// The address.
        address: SocketAddr,
        /// What is wrong.
        source: GossipError,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// A node that listens; [`Node::run`] makes it one of the cluster.
#[derive(Debug)]
pub struct Bound {
    config: Config,
    identity: Arc<Identity>,
    remembered: Remembered,
    keys: ClusterKeys,
    tls: Option<Tls>,
    listener: TcpListener,
    socket: UdpSocket,
    gossip: gossip::Bound,
}

/// A member of a cluster.
#[derive(Debug)]
pub struct Node {
    identity: Arc<Identity>,
    pool: Arc<Pool>,
    members: Members,
    gossip: Gossip,
    quit: CancellationToken,
    joining: JoinHandle<()>,
    serving: Mutex<Option<JoinHandle<()>>>,
}

impl Bound {
    /// Takes up the identity in `data_dir`, reads the key, and opens the sockets.
    pub async fn bind(config: Config, data_dir: &Path) -> Result<Self, NodeError> {
        let (dir, key_file) = (data_dir.to_owned(), config.cluster_key_file.clone());
        let read = move || {
            let identity = Identity::take_up(&dir)?;
            Ok::<_, NodeError>((identity, ClusterKeys::read(&key_file)?, Remembered::read(&dir)))
        };
        let (identity, keys, remembered) = match tokio::task::spawn_blocking(read).await {
            Ok(read) => read?,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        };
        let address = config.listen;
        let failed = |protocol| move |source| NodeError::Listen { key: "swarm.listen", address, protocol, source };
        let listener = TcpListener::bind(address).await.map_err(failed("TCP"))?;
        // The port that the system chose is the same for both.
        let address = listener.local_addr().map_err(failed("TCP"))?;
        let socket = UdpSocket::bind(address).await.map_err(failed("UDP"))?;
        let address = config.gossip_listen;
        let bound = gossip::Bound::bind(&identity, &config.zone, address).await;
        let gossip = bound.map_err(|source| NodeError::Gossip { address, source })?;
        let tls = if config.tls { Some(Tls::new(&identity)?) } else { None };
        Ok(Self { config, identity: Arc::new(identity), remembered, keys, tls, listener, socket, gossip })
    }

    /// Returns who it is.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Returns where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap_or(self.config.listen)
    }

    /// Begins to look for others and to answer them through `ear`.
    pub fn start(self, ear: Arc<dyn Ear>) -> Result<Node, NodeError> {
        let Self { config, identity, remembered, keys, tls, listener, socket, gossip } = self;
        let port = listener.local_addr().map_or(config.listen.port(), |address| address.port());
        let mut address = config.advertise.unwrap_or(SocketAddr::new(config.listen.ip(), port));
        if address.ip().is_unspecified() {
            address.set_ip(own_address());
        }
        let mut me = Member::new(identity.peer(), address, &config.zone, identity.boot(), identity.generation());
        me.gossip = gossip.port;
        let sealer = Sealer::new(&identity, &keys)?;
        let opener = Opener::new(identity.peer(), keys.clone());
        let members = Members::start(Start { me, socket, sealer, opener });
        let linker = Linker { identity: identity.clone(), keys, tls };
        let pool = Pool::new(linker.clone());
        let joining = Joining {
            me: identity.peer(),
            discovery: Discovery::new(config.seeds),
            remembered,
            pool: pool.clone(),
            members: members.clone(),
            advertised: config.advertise.is_some() || !config.listen.ip().is_unspecified(),
            troubles: Mutex::default(),
            unreached: Seldom::default(),
            alone: Seldom::default(),
            chance: rand::make_rng(),
        };
        let heard = ear.clone();
        let gossip = gossip.start(identity.peer(), members.watch(), move |from, text| heard.gossiped(from, text));
        let quit = CancellationToken::new();
        let server = Arc::new(Server {
            linker,
            members: members.clone(),
            ear,
            troubles: Mutex::default(),
            guests: Mutex::default(),
            strangers: Mutex::default(),
        });
        let serving = tokio::spawn(server.run(listener, quit.clone()));
        let joining = tokio::spawn(joining.run());
        Ok(Node { identity, pool, members, gossip, quit, joining, serving: Mutex::new(Some(serving)) })
    }
}

impl Node {
    /// Returns who we are.
    pub fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Returns the members that are alive now.
    pub fn table(&self) -> Table {
        self.members.table()
    }

    /// Returns the list of members as it changes.
    pub fn watch(&self) -> watch::Receiver<Table> {
        self.members.watch()
    }

    /// Sends an ask to a member.
    pub async fn ask(&self, to: &Member, ask: Bytes) -> Result<Answer, AskError> {
        self.pool.send(to.peer(), to.address, server::ASK, ask).await
    }

    /// Sends news to a member.
    pub async fn report(&self, to: &Member, report: Bytes) -> Result<(), AskError> {
        let mut answer = self.pool.send(to.peer(), to.address, server::REPORT, report).await?;
        answer.whole(4096).await.map(drop)
    }

    /// Tells everybody.
    pub fn gossip(&self, text: Bytes) {
        self.gossip.say(text);
    }

    /// Forgets connections to those who left.
    pub fn forget(&self, table: &Table) {
        self.pool.forget(|peer| table.binary_search_by_key(peer, Member::peer).is_ok());
    }

    /// Tells the others that we are about to go: nothing new is to be asked of us.
    pub async fn say_leaving(&self) {
        self.joining.abort();
        self.members.change(Standing::Leaving, None).await;
    }

    /// Leaves: tells the others, answers no more, and ends what is under way.
    pub async fn leave(&self) {
        self.joining.abort();
        self.members.leave().await;
        self.quit.cancel();
        let serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(serving) = serving {
            // A broken task is as good as an ended one.
            let _ = serving.await;
        }
    }
}

/// Returns the address by which this machine reaches others; loopback if it has none.
fn own_address() -> IpAddr {
    // Nothing is sent: to connect a UDP socket is to ask the routing table.
    let ask = || {
        let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
        socket.connect(("192.0.2.1", 9))?;
        socket.local_addr()
    };
    ask().map_or(IpAddr::from([127, 0, 0, 1]), |address| address.ip())
}

#[cfg(test)]
mod tests;
