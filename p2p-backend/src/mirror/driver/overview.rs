//! What the operator is told.

use super::{Driver, view};
use crate::mirror::metrics::Of;
use crate::node::member::{Member, Standing};
use crate::overview::{Blob, Peer, Status};

fn standing(member: &Member) -> String {
    match member.standing {
        Standing::Joining => "joining",
        Standing::Ready => "ready",
        Standing::Leaving => "leaving",
    }
    .into()
}

impl Driver {
    /// Tells how this node is; none before it has begun.
    pub(in super::super) fn status(&self) -> Option<Status> {
        let (node, metrics) = (self.node()?, &self.fetcher.metrics);
        let table = node.table();
        let own = view::find(&table, &node.identity().peer())?;
        let bytes = |source| metrics.bytes.get_or_create(&Of { source }).get();
        let (registry, peers) = (bytes("registry"), bytes("peer"));
        let taken = registry + peers;
        Some(Status {
            peer: own.peer().to_string(),
            address: own.address.to_string(),
            zone: own.zone.to_string(),
            standing: standing(&own),
            members: table.iter().filter(|member| member.standing == Standing::Ready).count() as u64,
            stored_bytes: self.store.usage(),
            registry_bytes: registry,
            peer_bytes: peers,
            sent_bytes: metrics.to_peers.get(),
            egress_ratio: (taken > 0).then(|| registry as f64 / taken as f64),
            quarantines: metrics.quarantines.get(),
        })
    }

    /// Tells who the members are.
    pub(in super::super) fn peers(&self) -> Vec<Peer> {
        let Some(node) = self.node() else { return Vec::new() };
        let me = node.identity().peer();
        let tell = |member: &Member| Peer {
            peer: member.peer().to_string(),
            address: member.address.to_string(),
            zone: member.zone.to_string(),
            standing: standing(member),
            boot: member.boot,
            generation: member.generation,
            own: member.peer() == me,
        };
        node.table().iter().map(tell).collect()
    }

    /// Tells what is in the cache.
    pub(in super::super) fn blobs(&self) -> Vec<Blob> {
        let mut blobs: Vec<Blob> = self
            .store
            .all()
            .iter()
            .map(|pin| Blob {
                digest: format!("sha256:{}", pin.digest()),
                size: pin.size(),
                stored_bytes: pin.stored(),
                proved: pin.inventory().1,
            })
            .collect();
        blobs.sort_by(|one, other| one.digest.cmp(&other.digest));
        blobs
    }
}
