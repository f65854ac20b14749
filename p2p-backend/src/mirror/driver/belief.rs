//! What readers may be given who do not verify, where a member's word is not enough.

use std::sync::Arc;

use nydus_rafs::Digest;

use super::{Driver, Mind, narrow};
use crate::mirror::pieces::Look;
use crate::mirror::quota::Pin;
use crate::swarm::config::Trust;
use crate::swarm::grid::Pieces;

impl Mind {
    /// Notes that a piece is not what it was believed to be, or not here any more.
    pub(super) fn doubt(&mut self, digest: &Digest, piece: u32) {
        if let Some(proved) = self.proved.get_mut(digest) {
            proved.remove(piece);
        }
    }
}

impl Driver {
    /// Whether readers that do not verify are given proved bytes only.
    pub(in super::super) fn wants_proof(&self) -> bool {
        self.trust == Trust::Proof
    }

    pub(super) fn believe(&self, mind: &mut Mind, digest: Digest, pieces: &Pieces) {
        if self.wants_proof() {
            let proved = mind.proved.entry(digest).or_default();
            for piece in pieces.iter() {
                proved.insert(piece);
            }
            self.believed.notify_waiters();
        }
    }

    /// Whether there is more than a member's word behind a piece.
    pub(in super::super) fn believes(&self, pin: &Pin, piece: u64) -> bool {
        let proved = |piece| self.mind().proved.get(&pin.digest()).is_some_and(|proved| proved.has(piece));
        pin.proved() || narrow(piece).is_some_and(proved)
    }

    /// Waits until a piece is believed; false if it is not here any more.
    pub(in super::super) async fn believed(self: &Arc<Self>, pin: &Pin, piece: u64) -> bool {
        loop {
            let news = self.believed.notified();
            if self.believes(pin, piece) {
                return true;
            }
            if !matches!(pin.look(piece), Look::Ready) {
                return false;
            }
            news.await;
        }
    }
}
