//! A node's public key as a name, and what it signs.

use std::fmt;

use libp2p::identity::{PeerId, PublicKey, ed25519};

pub use crate::swarm::Peer;

/// What a peer signed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature(pub [u8; 64]);

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({}..)", hex::encode(&self.0[..4]))
    }
}

impl Peer {
    /// Whether this peer signed `text`.
    pub fn signed(&self, text: &[u8], signature: &Signature) -> bool {
        let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, &self.0);
        key.verify(text, &signature.0).is_ok()
    }

    /// Returns libp2p's name of the key; none if the bytes are no key.
    pub fn id(&self) -> Option<PeerId> {
        let key = ed25519::PublicKey::try_from_bytes(&self.0).ok()?;
        Some(PublicKey::from(key).to_peer_id())
    }

    /// Returns the peer whose libp2p key this is; none if it is of another kind.
    pub fn of(key: PublicKey) -> Option<Self> {
        key.try_into_ed25519().ok().map(|key| Self(key.to_bytes()))
    }
}

/// As libp2p writes it (`12D3KooW…`).
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.id() {
            Some(id) => id.fmt(f),
            None => write!(f, "(no key: {})", hex::encode(&self.0[..4])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::identity::Identity;

    #[test]
    fn a_peer_is_called_as_libp2p_calls_it() {
        let identity = Identity::from_seed([7; 32]);
        let pair = libp2p::identity::Keypair::ed25519_from_bytes(*identity.seed()).unwrap();
        assert_eq!(identity.peer().to_string(), pair.public().to_peer_id().to_string());
        assert!(identity.peer().to_string().starts_with("12D3KooW"));
        assert_eq!(super::Peer::of(pair.public()), Some(identity.peer()));
    }
}
