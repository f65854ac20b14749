//! Who is in the cluster: SWIM over sealed packets.
//!
//! [`foca`] decides, one task here drives it: it owns the socket and the timers and publishes the list of those alive whenever
//! that changes. A joiner gets the whole list from one member first ([`Members::apply`]), because rumours cannot carry a mass join;
//! it announces itself then, and from there on every node hears of every other.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::num::{NonZeroU8, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foca::{AccumulatingRuntime, Foca, PeriodicParams, PostcardCodec, Timer};
use rand::rngs::StdRng;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::member::{Member, Standing};
use super::peer::Peer;
use super::sealed::{Dropped, OVERHEAD, Opener, Sealer};
use super::seldom::Seldom;

/// Bytes of a packet on the wire at most, so that no network cuts it.
const PACKET: usize = 1400;
/// Bytes of a list of members at most: some 20,000 of them.
pub(super) const MOST_LIST: usize = 4 << 20;

/// The members that are alive, by peer; we are among them.
pub type Table = Arc<Vec<Member>>;

type Swim = Foca<Member, PostcardCodec, StdRng, foca::NoCustomBroadcast>;

enum Command {
    Apply(Vec<foca::Member<Member>>),
    Announce(Member),
    Change(Standing, Option<SocketAddr>),
    List(oneshot::Sender<Bytes>),
    Leave(oneshot::Sender<()>),
}

/// A handle to the task.
#[derive(Debug, Clone)]
pub(super) struct Members {
    commands: mpsc::Sender<Command>,
    table: watch::Receiver<Table>,
}

/// What the task is made of.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) me: Member,
    pub(super) socket: UdpSocket,
    pub(super) sealer: Sealer,
    pub(super) opener: Opener,
}

impl Members {
    /// Starts the task, which ends when all handles are gone or after [`Members::leave`].
    pub(super) fn start(start: Start) -> Self {
        let (commands, receiver) = mpsc::channel(64);
        let (sender, table) = watch::channel(Table::new(vec![start.me.clone()]));
        let foca = Foca::new(start.me, config(), rand::make_rng(), PostcardCodec);
        let task = Task {
            foca,
            socket: start.socket,
            sealer: start.sealer,
            opener: start.opener,
            timers: BinaryHeap::new(),
            order: 0,
            table: sender,
            runtime: AccumulatingRuntime::new(),
            wrong_key: Seldom::default(),
            copy: Seldom::default(),
        };
        tokio::spawn(task.run(receiver));
        Self { commands, table }
    }

    /// Returns the members that are alive now.
    pub(super) fn table(&self) -> Table {
        self.table.borrow().clone()
    }

    /// Returns the list as it changes.
    pub(super) fn watch(&self) -> watch::Receiver<Table> {
        self.table.clone()
    }

    /// Takes in the list that another member gave us; returns who is in it, or none if it is no list.
    pub(super) async fn apply(&self, list: &[u8]) -> Option<Vec<Member>> {
        let list = read_list(list)?;
        let found = list.iter().filter(|member| member.state() != foca::State::Down);
        let found = found.map(|member| member.id().clone()).collect();
        let _ = self.commands.send(Command::Apply(list)).await;
        Some(found)
    }

    /// Tells a member that we are here.
    pub(super) async fn announce(&self, to: Member) {
        let _ = self.commands.send(Command::Announce(to)).await;
    }

    /// Says something new of ourselves.
    pub(super) async fn change(&self, standing: Standing, address: Option<SocketAddr>) {
        let _ = self.commands.send(Command::Change(standing, address)).await;
    }

    /// Returns the whole list, for one who joins.
    pub(super) async fn list(&self) -> Option<Bytes> {
        let (answer, list) = oneshot::channel();
        self.commands.send(Command::List(answer)).await.ok()?;
        list.await.ok()
    }

    /// Tells everybody that we go, and ends the task.
    pub(super) async fn leave(&self) {
        let (answer, left) = oneshot::channel();
        if self.commands.send(Command::Leave(answer)).await.is_ok() {
            let _ = left.await;
        }
    }
}

/// Returns those in a list of members who can be.
pub(super) fn read_list(list: &[u8]) -> Option<Vec<foca::Member<Member>>> {
    let list: Vec<foca::Member<Member>> = postcard::from_bytes(list).ok()?;
    Some(list.into_iter().filter(|member| member.id().is_sound()).collect())
}

/// Probing once a second, a suspect has 8 s to speak up: 5 % dead of 1,000 are known everywhere within 18 s.
pub(super) fn config() -> foca::Config {
    let every = |seconds, members| {
        let num_members = NonZeroUsize::new(members).expect("not zero");
        Some(PeriodicParams { frequency: Duration::from_secs(seconds), num_members })
    };
    foca::Config {
        probe_period: Duration::from_secs(1),
        probe_rtt: Duration::from_millis(300),
        max_transmissions: NonZeroU8::new(12).expect("not zero"),
        suspect_to_down_after: Duration::from_secs(8),
        remove_down_after: Some(Duration::from_secs(3600)),
        max_packet_size: NonZeroUsize::new(PACKET - OVERHEAD).expect("not zero"),
        notify_down_members: true,
        periodic_announce: every(30, 1),
        periodic_announce_to_down_members: every(15, 2),
        periodic_gossip: every(1, 2),
        ..foca::Config::simple()
    }
}

/// A timer of foca's, in the order in which it was set.
struct Due {
    at: Instant,
    order: u64,
    timer: Timer<Member>,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

struct Task {
    foca: Swim,
    socket: UdpSocket,
    sealer: Sealer,
    opener: Opener,
    timers: BinaryHeap<Reverse<Due>>,
    order: u64,
    table: watch::Sender<Table>,
    runtime: AccumulatingRuntime<Member>,
    wrong_key: Seldom,
    copy: Seldom,
}

impl Task {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut packet = vec![0; 64 << 10];
        loop {
            let due = self.timers.peek().map(|Reverse(due)| due.at);
            let timer = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // What is due first: foca counts on its timers.
                biased;
                () = timer => {
                    if let Some(Reverse(due)) = self.timers.pop() {
                        let outcome = self.foca.handle_timer(due.timer, &mut self.runtime);
                        note(outcome, "a timer");
                    }
                }
                command = commands.recv() => match command {
                    None => return,
                    Some(Command::Leave(answer)) => {
                        let outcome = self.foca.leave_cluster(&mut self.runtime);
                        note(outcome, "leaving");
                        self.carry_out().await;
                        let _ = answer.send(());
                        return;
                    }
                    Some(command) => self.obey(command),
                },
                received = self.socket.recv_from(&mut packet) => match received {
                    Ok((length, from)) => self.receive(&mut packet[..length], from),
                    // Of an earlier packet that nobody took: ICMP says so.
                    Err(error) => tracing::debug!(%error, "the socket of the members"),
                },
            }
            self.carry_out().await;
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Apply(list) => {
                let outcome = self.foca.apply_many(list.into_iter(), true, &mut self.runtime);
                note(outcome, "a list of members");
            }
            Command::Announce(to) => {
                let outcome = self.foca.announce(to, &mut self.runtime);
                note(outcome, "announcing");
            }
            Command::Change(standing, address) => {
                let mut me = self.foca.identity().later();
                me.standing = standing;
                me.address = address.unwrap_or(me.address);
                let outcome = self.foca.change_identity(me, &mut self.runtime);
                note(outcome, "a change of our own");
                self.publish();
            }
            Command::List(answer) => {
                let me = foca::Member::alive(self.foca.identity().clone());
                let all: Vec<_> = self.foca.iter_membership_state().chain([&me]).collect();
                if let Ok(list) = postcard::to_allocvec(&all) {
                    let _ = answer.send(list.into());
                }
            }
            Command::Leave(_) => {}
        }
    }

    fn receive(&mut self, packet: &mut [u8], from: SocketAddr) {
        match self.opener.open(packet) {
            Ok((_, text)) => {
                let outcome = self.foca.handle_data(text, &mut self.runtime);
                note(outcome, "a packet");
            }
            Err(Dropped::WrongKey(theirs)) if self.wrong_key.now() => {
                tracing::warn!(
                    %from, %theirs,
                    "a node has another cluster key; put the same key into both nodes' swarm.cluster_key_file, or take it off our port"
                );
            }
            Err(Dropped::Copy) if self.copy.now() => {
                tracing::error!(
                    %from, peer = %self.foca.identity().peer(),
                    "another node has our own peer id: a data directory was copied; stop one of the two nodes, remove `identity` from its data_dir and start it again"
                );
            }
            Err(dropped) => tracing::trace!(%from, %dropped, "a packet is dropped"),
        }
    }

    /// Does what foca wants done.
    async fn carry_out(&mut self) {
        while let Some((to, text)) = self.runtime.to_send() {
            let packet = self.sealer.seal(&text);
            // A full socket loses a packet, as every network does.
            if let Err(error) = self.socket.send_to(&packet, to.address).await {
                tracing::trace!(%error, to = %to.address, "a packet is lost");
            }
        }
        let now = Instant::now();
        while let Some((after, timer)) = self.runtime.to_schedule() {
            self.order += 1;
            self.timers.push(Reverse(Due { at: now + after, order: self.order, timer }));
        }
        let mut changed = false;
        while let Some(notification) = self.runtime.to_notify() {
            changed = true;
            tracing::debug!(?notification, "members");
        }
        if changed {
            self.publish();
        }
    }

    fn publish(&mut self) {
        let me = self.foca.identity().clone();
        let sound = self.foca.iter_members().map(foca::Member::id).filter(|member| member.is_sound());
        let mut all: Vec<Member> = sound.filter(|member| member.peer() != me.peer()).cloned().collect();
        all.push(me);
        all.sort_by_key(Member::peer);
        self.opener.forget(|peer: &Peer| all.binary_search_by_key(peer, Member::peer).is_ok());
        self.table.send_if_modified(|table| {
            let changed = **table != all;
            if changed {
                *table = Arc::new(all);
            }
            changed
        });
    }
}

/// What strangers send may be nonsense, and what is late is late.
fn note(outcome: Result<(), foca::Error>, what: &str) {
    if let Err(error) = outcome {
        tracing::debug!(%error, what, "the members' protocol");
    }
}

#[cfg(test)]
mod tests {
    use super::super::identity::Identity;
    use super::super::key::{ClusterKey, ClusterKeys};
    use super::*;

    async fn node(seed: u8, key: u8) -> (Members, Member) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let identity = Identity::from_seed([seed; 32]);
        let keys: ClusterKeys = ClusterKey::new([key; 32]).into();
        let me = Member::new(identity.peer(), socket.local_addr().unwrap(), "a", 1, 1);
        let sealer = Sealer::new(&identity, &keys).unwrap();
        let opener = Opener::new(identity.peer(), keys);
        (Members::start(Start { me: me.clone(), socket, sealer, opener }), me)
    }

    async fn until(members: &Members, what: impl Fn(&Table) -> bool) {
        let mut watch = members.watch();
        let waiting = watch.wait_for(|table| what(table));
        tokio::time::timeout(Duration::from_secs(20), waiting).await.expect("in time").unwrap();
    }

    #[tokio::test]
    async fn who_pulls_the_list_and_announces_itself_is_known_to_all_and_its_news_spread() {
        let (ann, _) = node(1, 7).await;
        let (bob, bobs) = node(2, 7).await;
        let (eve, eves) = node(3, 7).await;
        for joiner in [&bob, &eve] {
            let list = ann.list().await.unwrap();
            for other in joiner.apply(&list).await.unwrap() {
                joiner.announce(other).await;
            }
        }
        for node in [&ann, &bob, &eve] {
            until(node, |table| table.len() == 3).await;
        }
        eve.change(Standing::Ready, None).await;
        let ready = |table: &Table| {
            let found = table.iter().find(|member| member.peer() == eves.peer());
            found.is_some_and(|member| member.standing == Standing::Ready && member.revision == 1)
        };
        until(&ann, ready).await;
        until(&bob, ready).await;
        bob.leave().await;
        until(&ann, |table| table.iter().all(|member| member.peer() != bobs.peer())).await;
    }

    #[tokio::test]
    async fn who_has_another_key_is_not_heard() {
        let (ann, _) = node(1, 7).await;
        let (eve, _) = node(2, 8).await;
        let list = ann.list().await.unwrap();
        for other in eve.apply(&list).await.unwrap() {
            eve.announce(other).await;
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(ann.table().len(), 1);
    }
}
