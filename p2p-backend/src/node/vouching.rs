//! Signed statements about what the bytes of a piece are.
//!
//! The node that takes a piece from the registry signs its BLAKE3, and whoever passes the piece on passes that on too, so that it stays
//! known who brought which bytes into the cluster.

use nydus_rafs::Digest;

use super::identity::Identity;
use super::peer::{Peer, Signature};

/// A statement about a piece; its signature may be of anything until it [holds](Self::holds).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vouched {
    /// Who says it.
    pub by: Peer,
    /// The BLAKE3 of the piece.
    pub sum: [u8; 32],
    /// Of object, piece and sum.
    pub signature: Signature,
}

fn text(object: &Digest, piece: u32, sum: &[u8; 32]) -> Vec<u8> {
    [&b"shoal swarm vouch 1 "[..], &object.0, &piece.to_le_bytes(), sum].concat()
}

impl Vouched {
    /// Says in our name that `piece` of `object` has this `sum`.
    pub fn sign(identity: &Identity, object: &Digest, piece: u32, sum: [u8; 32]) -> Self {
        let signature = identity.sign(&text(object, piece, &sum));
        Self { by: identity.peer(), sum, signature }
    }

    /// Whether it was really said of this piece.
    pub fn holds(&self, object: &Digest, piece: u32) -> bool {
        self.by.signed(&text(object, piece, &self.sum), &self.signature)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vouch_is_for_one_piece_of_one_object_and_one_sum() {
        let (a, b) = (Digest([1; 32]), Digest([2; 32]));
        let vouched = Vouched::sign(&Identity::from_seed([1; 32]), &a, 3, [9; 32]);
        assert!(vouched.holds(&a, 3));
        assert!(!vouched.holds(&a, 4) && !vouched.holds(&b, 3));
        assert!(!Vouched { sum: [8; 32], ..vouched }.holds(&a, 3));
        let other = Identity::from_seed([2; 32]).peer();
        assert!(!Vouched { by: other, ..vouched }.holds(&a, 3));
    }
}
