//! What everybody is told: gossipsub between members.
//!
//! Few words that are for all (what a node holds, and what is to be forgotten) go through a mesh of connections of their own, so
//! that bulk never delays them. Noise proves who is at the other end, and only members are let in: those in the list that the cluster
//! key guards. Each node connects to those at distances 1, 2, 4, … in the order of the peers, which keeps the
//! mesh whole as long as every node reaches its neighbour.
//!
//! In a large cluster a node speaks to its own zone only, so that nobody hears of thousands; it listens to both, as members do not
//! grow many at the same moment. Messages are signed by their authors, and passed on only if the author is a member and did not speak a moment ago.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use libp2p::allow_block_list::{self, AllowedPeers};
use libp2p::gossipsub::{self, IdentTopic, MessageAcceptance, MessageAuthenticity, ValidationMode};
use libp2p::identity::Keypair;
use libp2p::multiaddr::{Multiaddr, Protocol};
use libp2p::swarm::{DialError, NetworkBehaviour, SwarmEvent};
use libp2p::{PeerId, SwarmBuilder, noise, tcp, yamux};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::identity::Identity;
use super::member::{Member, Standing};
use super::members::Table;
use super::peer::Peer;
use super::seldom::Seldom;

/// Connections that a node opens.
const LINKS: usize = 8;
/// How often it looks whether they are there.
const LOOK: Duration = Duration::from_secs(2);
/// An author that speaks more often is not passed on: once in 10 s is what is agreed, and summaries can come early.
const OFTEN: Duration = Duration::from_secs(1);
/// Bytes of a message: a summary of the most objects.
const MOST: usize = 320 << 10;

/// How long it may take until a member that joins is known here.
const JOINING: Duration = Duration::from_secs(5);
/// Strangers that are remembered, and for how long.
const MOST_STRANGERS: usize = 64;
const STRANGE: Duration = Duration::from_secs(600);
/// With more members than this, each speaks to its own zone only.
const LARGE: usize = 2000;

/// What is spoken of to whom.
struct Topics {
    all: IdentTopic,
    zone: IdentTopic,
}

impl Topics {
    fn of(zone: &str) -> Self {
        let all = "shoal/summary/1";
        Self { all: IdentTopic::new(all), zone: IdentTopic::new(format!("{all}/zone/{zone}")) }
    }

    /// Returns the topic on which one of so many members speaks.
    fn of_so_many(&self, members: usize) -> &IdentTopic {
        if members > LARGE { &self.zone } else { &self.all }
    }
}

/// Gossip among those who are allowed to be there.
#[derive(NetworkBehaviour)]
struct Talk {
    allowed: allow_block_list::Behaviour<AllowedPeers>,
    gossip: gossipsub::Behaviour,
}

type Mesh = libp2p::Swarm<Talk>;

/// Why there is no gossip; completes "cannot set up gossip".
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GossipError(String);

/// A mesh that listens.
pub(super) struct Bound {
    mesh: Mesh,
    topics: Topics,
    /// Where it listens.
    pub(super) port: u16,
}

impl std::fmt::Debug for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bound").field("port", &self.port).finish_non_exhaustive()
    }
}

/// Says things to everybody.
#[derive(Debug, Clone)]
pub(super) struct Gossip(mpsc::Sender<Bytes>);

impl Gossip {
    /// Says it, unless much is waiting to be said.
    pub(super) fn say(&self, text: Bytes) {
        if self.0.try_send(text).is_err() {
            tracing::debug!("gossip is not keeping up");
        }
    }
}

fn configuration() -> Result<gossipsub::Config, GossipError> {
    let mut builder = gossipsub::ConfigBuilder::default();
    builder
        // The default of 5 s is longer than many a crowd lasts.
        .heartbeat_initial_delay(Duration::from_millis(200))
        .heartbeat_interval(Duration::from_secs(1))
        // Clusters of two or three are meshes, too.
        .mesh_n(4)
        .mesh_n_low(2)
        .mesh_n_high(8)
        .mesh_outbound_min(1)
        .validation_mode(ValidationMode::Strict)
        .validate_messages()
        .max_transmit_size(MOST);
    builder.build().map_err(|error| GossipError(error.to_string()))
}

impl Bound {
    /// Opens the listener.
    pub(super) async fn bind(identity: &Identity, zone: &str, listen: SocketAddr) -> Result<Self, GossipError> {
        let failed = |error: &dyn std::fmt::Display| GossipError(error.to_string());
        let pair = Keypair::ed25519_from_bytes(*identity.seed()).map_err(|error| failed(&error))?;
        let config = configuration()?;
        let mut mesh: Mesh = SwarmBuilder::with_existing_identity(pair)
            .with_tokio()
            .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, yamux::Config::default)
            .map_err(|error| failed(&error))?
            .with_behaviour(|pair| {
                let gossip = gossipsub::Behaviour::new(MessageAuthenticity::Signed(pair.clone()), config)?;
                Ok(Talk { allowed: allow_block_list::Behaviour::default(), gossip })
            })
            .map_err(|error| failed(&error))?
            .build();
        let topics = Topics::of(zone);
        for topic in [&topics.all, &topics.zone] {
            mesh.behaviour_mut().gossip.subscribe(topic).map_err(|error| failed(&error))?;
        }
        mesh.listen_on(address(listen)).map_err(|error| failed(&error))?;
        loop {
            match mesh.select_next_some().await {
                SwarmEvent::NewListenAddr { address, .. } => {
                    let port = address.iter().find_map(|part| match part {
                        Protocol::Tcp(port) => Some(port),
                        _ => None,
                    });
                    return Ok(Self { mesh, topics, port: port.unwrap_or(listen.port()) });
                }
                SwarmEvent::ListenerError { error, .. } => return Err(failed(&error)),
                SwarmEvent::ListenerClosed { reason: Err(error), .. } => return Err(failed(&error)),
                _ => {}
            }
        }
    }

    /// Begins to listen to members and to speak; what members say goes to `hear`.
    pub(super) fn start(
        self,
        me: Peer,
        table: watch::Receiver<Table>,
        hear: impl Fn(Peer, &[u8]) + Send + 'static,
    ) -> Gossip {
        let (say, says) = mpsc::channel(16);
        let task = Task {
            mesh: self.mesh,
            topics: self.topics,
            me,
            table,
            members: HashMap::new(),
            heard: HashMap::new(),
            strangers: HashMap::new(),
            told: Seldom::default(),
        };
        tokio::spawn(task.run(says, hear));
        Gossip(say)
    }
}

fn address(at: SocketAddr) -> Multiaddr {
    Multiaddr::from(at.ip()).with(Protocol::Tcp(at.port()))
}

struct Task {
    mesh: Mesh,
    topics: Topics,
    me: Peer,
    table: watch::Receiver<Table>,
    /// Who is let in.
    members: HashMap<PeerId, Peer>,
    /// When each author last spoke.
    heard: HashMap<PeerId, Instant>,
    /// Who was refused as no member, and since when.
    strangers: HashMap<PeerId, Instant>,
    told: Seldom,
}

impl Task {
    async fn run(mut self, mut says: mpsc::Receiver<Bytes>, hear: impl Fn(Peer, &[u8])) {
        let mut look = tokio::time::interval(LOOK);
        let mut changes = true;
        loop {
            tokio::select! {
                said = says.recv() => match said {
                    // The node is gone.
                    None => return,
                    Some(text) => {
                        let topic = self.topics.of_so_many(self.table.borrow().len()).clone();
                        if let Err(error) = self.mesh.behaviour_mut().gossip.publish(topic, text) {
                            tracing::debug!(%error, "nobody to tell");
                        }
                    }
                },
                changed = self.table.changed(), if changes => {
                    changes = changed.is_ok();
                    self.link();
                }
                _ = look.tick() => self.link(),
                event = self.mesh.select_next_some() => self.take(event, &hear),
            }
        }
    }

    /// Lets members in and nobody else, and connects to those to whom this node should be connected.
    fn link(&mut self) {
        let table = self.table.borrow().clone();
        let members: HashMap<PeerId, Peer> =
            table.iter().filter_map(|member| Some((member.peer().id()?, member.peer()))).collect();
        let allowed = &mut self.mesh.behaviour_mut().allowed;
        for gone in self.members.keys().filter(|id| !members.contains_key(id)) {
            allowed.disallow_peer(*gone);
        }
        for new in members.keys().filter(|id| !self.members.contains_key(id)) {
            allowed.allow_peer(*new);
        }
        self.members = members;
        self.heard.retain(|_, at| at.elapsed() < OFTEN);
        for member in neighbours(&table, &self.me) {
            let Some(id) = member.peer().id() else { continue };
            if self.mesh.is_connected(&id) {
                continue;
            }
            let at = SocketAddr::new(member.address.ip(), member.gossip);
            match self.mesh.dial(address(at).with(Protocol::P2p(id))) {
                Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
                Err(error) => tracing::debug!(%error, %at, "could not begin to connect for gossip"),
            }
        }
    }

    /// Whether one who is refused has come for so long that it is not just joining.
    fn is_stranger(&mut self, id: PeerId) -> bool {
        let now = Instant::now();
        let members = &self.members;
        self.strangers.retain(|id, since| now - *since < STRANGE && !members.contains_key(id));
        if members.contains_key(&id) || self.strangers.len() >= MOST_STRANGERS {
            return false;
        }
        now - *self.strangers.entry(id).or_insert(now) >= JOINING
    }

    fn take(&mut self, event: SwarmEvent<TalkEvent>, hear: &impl Fn(Peer, &[u8])) {
        match event {
            SwarmEvent::Behaviour(TalkEvent::Gossip(gossipsub::Event::Message {
                propagation_source,
                message_id,
                message,
            })) => {
                let author = message.source.and_then(|id| self.members.get(&id).map(|peer| (*peer, id)));
                let acceptance = match author {
                    Some((peer, id)) => {
                        let now = Instant::now();
                        let often = self.heard.insert(id, now).is_some_and(|before| now - before < OFTEN);
                        if often {
                            MessageAcceptance::Ignore
                        } else {
                            hear(peer, &message.data);
                            MessageAcceptance::Accept
                        }
                    }
                    // News of a member may come before news of its joining.
                    None => MessageAcceptance::Ignore,
                };
                let gossip = &mut self.mesh.behaviour_mut().gossip;
                let _ = gossip.report_message_validation_result(&message_id, &propagation_source, acceptance);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, peer_id, error, .. } => {
                if peer_id.is_some_and(|id| self.is_stranger(id)) && self.told.now() {
                    tracing::warn!(
                        from = %send_back_addr, peer = ?peer_id,
                        "one who is no member connects for gossip and is refused; if it is a node of this cluster, put our key into its swarm.cluster_key_file, else keep the port of swarm.gossip_listen from it"
                    );
                } else {
                    tracing::debug!(from = %send_back_addr, %error, "a connection for gossip did not come about");
                }
            }
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                tracing::debug!(peer = ?peer_id, %error, "could not connect for gossip; check that the port of swarm.gossip_listen is open");
            }
            _ => {}
        }
    }
}

/// Returns those to whom a node connects: at distances 1, 2, 4, … behind it, among all, or among its zone if that is to whom it speaks.
fn neighbours<'t>(table: &'t Table, me: &Peer) -> Vec<&'t Member> {
    let large = table.len() > LARGE;
    let Some(me) = table.binary_search_by_key(me, Member::peer).ok().map(|at| &table[at]) else { return Vec::new() };
    let listens = |member: &&Member| member.gossip != 0 && member.standing != Standing::Leaving;
    let concerns = |member: &&Member| !large || member.zone == me.zone;
    let all = table.iter().filter(|member| member.peer() == me.peer() || (listens(member) && concerns(member)));
    let all: Vec<&Member> = all.collect();
    let Some(own) = all.iter().position(|member| member.peer() == me.peer()) else { return Vec::new() };
    let distances = (0..usize::BITS).map(|power| 1 << power).take_while(|distance| *distance < all.len());
    distances.take(LINKS).map(|distance| all[(own + distance) % all.len()]).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn few_speak_to_all_and_many_to_their_zone() {
        let topics = Topics::of("a");
        assert_eq!(topics.of_so_many(LARGE).hash(), Topics::of("b").of_so_many(2).hash());
        assert_eq!(topics.of_so_many(LARGE + 1).hash(), Topics::of("a").of_so_many(9000).hash());
        assert_ne!(topics.of_so_many(LARGE + 1).hash(), Topics::of("b").of_so_many(9000).hash());
    }

    /// Returns so many members, in as many zones.
    fn crowd(members: u32, zones: u32) -> Table {
        let member = |number: u32| {
            let peer = Peer(*blake3::hash(&number.to_le_bytes()).as_bytes());
            let zone = format!("z{}", number % zones);
            let mut member = Member::new(peer, (std::net::Ipv4Addr::from(number + 1), 1).into(), &zone, 1, 1);
            member.gossip = 2;
            member
        };
        let mut all: Vec<Member> = (0..members).map(member).collect();
        all.sort_by_key(Member::peer);
        Arc::new(all)
    }

    #[test]
    fn the_neighbours_connect_all_or_all_of_a_zone() {
        for (table, reach, hops) in [(crowd(100, 3), 100, 8), (crowd(3000, 3), 1000, 16)] {
            let mut reached = std::collections::BTreeSet::from([table[0].peer()]);
            let mut edge = vec![table[0].peer()];
            let mut steps = 0;
            while !edge.is_empty() {
                let next: Vec<Peer> = edge.iter().flat_map(|peer| neighbours(&table, peer)).map(Member::peer).collect();
                edge = next.into_iter().filter(|peer| reached.insert(*peer)).collect();
                steps += 1;
            }
            assert_eq!(reached.len(), reach);
            assert!(steps <= hops, "in {steps} steps");
            assert!(table.iter().all(|member| neighbours(&table, &member.peer()).len() <= LINKS));
        }
    }
}
