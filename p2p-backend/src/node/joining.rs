//! Becoming a member, and staying one of the same cluster.
//!
//! A node asks somebody whom [`discovery`](super::discovery) names: for the list of members, where it was seen from there, and to be
//! called back at the address that it is going to tell everybody. Only then is it ready, which is to say that others may count on
//! it. It goes on to look: those who are named, or were members once, and are not now are another half of the cluster, or new.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rand::RngExt as _;
use rand::rngs::StdRng;

use super::discovery::{Discovery, MOST};
use super::link::LinkError;
use super::member::Standing;
use super::members::{MOST_LIST, Members};
use super::peer::Peer;
use super::pool::{AskError, Pool};
use super::proof::ProofError;
use super::remembered::Remembered;
use super::seldom::Seldom;
use super::server::{MEMBERS, REACH, Troubles};

/// Between two looks at who is named.
const LOOK: Duration = Duration::from_secs(30);
/// The first time that one who found nobody, or was not reached, waits; then twice as long each time, up to [`LOOK`].
const RETRY: Duration = Duration::from_millis(500);

/// Former members that are tried at a time.
const REMEMBERED: usize = 3;

/// Becomes a member.
pub(super) struct Joining {
    pub(super) me: Peer,
    pub(super) discovery: Discovery,
    pub(super) remembered: Remembered,
    pub(super) pool: Arc<Pool>,
    pub(super) members: Members,
    /// Whether the operator says under which address we are reached.
    pub(super) advertised: bool,
    pub(super) troubles: Mutex<Troubles>,
    pub(super) unreached: Seldom,
    pub(super) alone: Seldom,
    pub(super) chance: StdRng,
}

/// How it went with one who was named.
enum Met {
    /// It is one of us, and so are we.
    Member,
    /// It cannot be had.
    Nobody,
    /// It could not reach us.
    Unreached,
    /// There is a copy of us.
    Copied,
}

impl Joining {
    /// Looks for others until it is dropped.
    pub(super) async fn run(mut self) {
        let mut wait = RETRY;
        loop {
            let settled = self.look().await;
            wait = if settled { LOOK } else { (wait * 2).min(LOOK) };
            // Not all at once.
            let part = self.chance.random_range(0.5..1.0);
            tokio::time::sleep(wait.mul_f64(part)).await;
        }
    }

    /// Asks some of those who are named and not known; returns whether all is as it should be.
    async fn look(&mut self) -> bool {
        let table = self.members.table();
        let own = table.iter().find(|member| member.peer() == self.me).cloned();
        let ready = own.as_ref().is_some_and(|own| own.standing == Standing::Ready);
        let others = table.iter().filter(|member| member.peer() != self.me);
        let there: Vec<SocketAddr> = others.map(|member| member.address).collect();
        self.remembered.note(&there).await;
        let mut named = self.discovery.addresses().await;
        named.retain(|address| own.as_ref().is_none_or(|own| own.address != *address));
        let count = named.len();
        if ready {
            named.retain(|address| table.iter().all(|member| member.address != *address));
        }
        // Each node begins elsewhere, so that no member is asked by all.
        if !named.is_empty() {
            let first = usize::from(self.me.0[0]) % named.len();
            named.rotate_left(first);
        }
        named.truncate(MOST);
        let gone = self.remembered.addresses().into_iter().filter(|address| !there.contains(address));
        let new: Vec<SocketAddr> = gone.filter(|address| !named.contains(address)).collect();
        // Not always the same ones.
        let skip = if new.is_empty() { 0 } else { self.chance.random_range(0..new.len()) };
        named.extend(new.iter().cycle().skip(skip).take(new.len().min(REMEMBERED)));
        let mut met_any = false;
        for address in named {
            match self.meet(address).await {
                Met::Member => {
                    met_any = true;
                    // One gives the whole list.
                    break;
                }
                Met::Copied => return false,
                Met::Unreached => return false,
                Met::Nobody => {}
            }
        }
        if met_any || ready {
            let lonely = table.len() == 1 && !met_any && count > 0;
            return !lonely;
        }
        // Nobody there: we are the first.
        if count > 0 && self.alone.now() {
            tracing::info!(named = count, "no other member answers yet; this node begins alone");
        }
        self.members.change(Standing::Ready, None).await;
        count == 0
    }

    async fn meet(&mut self, address: SocketAddr) -> Met {
        let (peer, list) = match self.ask(address).await {
            Ok(answer) => answer,
            Err(error) => return self.failed(address, error),
        };
        let Ok((seen, list)) = postcard::take_from_bytes::<IpAddr>(&list) else { return Met::Nobody };
        let Some(found) = self.members.apply(list).await else {
            tracing::debug!(%address, "a member's list cannot be read");
            return Met::Nobody;
        };
        let own = self.members.table().iter().find(|member| member.peer() == self.me).cloned();
        let Some(own) = own else { return Met::Nobody };
        // Our own earlier life, at another address, is no copy unless it lives.
        for other in found.iter().filter(|other| other.peer() == self.me && other.address != own.address) {
            if let Err(LinkError::Proof(error @ ProofError::SamePeer(_))) =
                self.pool.linker().connect(other.address, None).await
            {
                self.troubles().tell(other.address, &LinkError::Proof(error));
                return Met::Copied;
            }
        }
        let mut at = own.address;
        if !self.advertised && !seen.is_loopback() {
            at.set_ip(seen);
        }
        if own.standing == Standing::Joining || at != own.address {
            let reach = Bytes::from(at.to_string());
            if let Err(error) = self.pool.send_unknown(address, REACH, reach).await {
                if let AskError::Status { text, .. } = &error
                    && self.unreached.now()
                {
                    tracing::error!(
                        address = %at, by = %address,
                        "a member cannot reach us, so this node serves nobody: {text}; open the port of swarm.listen for TCP and UDP, or set swarm.advertise to an address that others reach"
                    );
                }
                return Met::Unreached;
            }
            self.members.change(Standing::Ready, Some(at)).await;
            tracing::info!(address = %at, members = found.len(), through = %peer, "joined the swarm");
        }
        if let Some(other) = found.into_iter().find(|member| member.peer() == peer) {
            self.members.announce(other).await;
        }
        Met::Member
    }

    async fn ask(&self, address: SocketAddr) -> Result<(Peer, Bytes), AskError> {
        let (peer, mut answer) = self.pool.send_unknown(address, MEMBERS, Bytes::new()).await?;
        Ok((peer, answer.whole(MOST_LIST).await?))
    }

    fn failed(&mut self, address: SocketAddr, error: AskError) -> Met {
        match &error {
            AskError::Link(link) => {
                self.troubles().tell(address, link);
                match link {
                    LinkError::Proof(ProofError::SamePeer(_)) => Met::Copied,
                    _ => Met::Nobody,
                }
            }
            error => {
                tracing::debug!(%address, %error, "a member gives no list");
                Met::Nobody
            }
        }
    }

    fn troubles(&self) -> std::sync::MutexGuard<'_, Troubles> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
