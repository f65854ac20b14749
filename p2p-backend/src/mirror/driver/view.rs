//! The members as the swarm sees them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::Driver;
use crate::node::Table;
use crate::node::member::{Member, Standing};
use crate::swarm::port::Input;
use crate::swarm::{self, Peer, Time, View, Zone};

/// Changes within this time are one.
const TOGETHER: Duration = Duration::from_millis(100);

/// Returns a member by its peer.
pub(super) fn find(table: &Table, peer: &Peer) -> Option<Member> {
    table.binary_search_by_key(peer, Member::peer).ok().map(|at| table[at].clone())
}

/// Returns the number that all nodes give to a zone.
fn zone(name: &str) -> Zone {
    let hash = blake3::derive_key("shoal swarm: number of a zone", name.as_bytes());
    Zone(u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]))
}

impl Driver {
    /// Tells the swarm who is there, whenever that changes.
    pub(super) async fn watch_members(self: Arc<Self>, mut table: watch::Receiver<Table>) {
        // Since when each has been ready, by our clock.
        let mut since: HashMap<(Peer, u32), Time> = HashMap::new();
        let mut view = Arc::new(View::default());
        loop {
            let (now, members) = (self.now(), table.borrow_and_update().clone());
            let alone = members.len() == 1;
            let known = members.iter().any(|member| member.standing == Standing::Ready);
            since.retain(|(peer, boot), _| find(&members, peer).is_some_and(|member| member.boot == *boot));
            let member = |member: &Member| {
                let home = member.standing == Standing::Ready;
                let since = if home { *since.entry((member.peer(), member.boot)).or_insert(now) } else { now };
                swarm::Member { peer: member.peer(), zone: zone(&member.zone), since, home }
            };
            view = Arc::new(view.next(members.iter().map(member).collect(), now));
            let settles = view.settles(now);
            if let Some(node) = self.node() {
                node.forget(&members);
            }
            let ready = members.iter().filter(|member| member.standing == Standing::Ready).count();
            // One who has not begun to look knows nobody, which is another thing than being alone.
            if !alone || known {
                self.feed(Input::View(view.clone()));
            }
            self.fetcher.metrics.members.set(i64::try_from(ready).unwrap_or(i64::MAX));
            let settled = async {
                match settles {
                    Some(at) => tokio::time::sleep(at.since(now) + Duration::from_millis(1)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = table.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    tokio::time::sleep(TOGETHER).await;
                }
                () = settled => {}
            }
        }
    }
}
