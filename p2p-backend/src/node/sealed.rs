//! Packets between members: sealed with a key of the cluster, each good once.
//!
//! ```text
//!      0   version = 1
//!      1   fingerprint of the cluster key
//!      5   peer of the sender
//!     37   its boot, big endian
//!     41   salt, random for every start of the sender
//!     49   number, rising from 1; with the sender's own key it is the nonce
//!     57   ChaCha20-Poly1305, with all the above as what is authenticated beside it
//! ```
//!
//! A sender's key is the keyed BLAKE3 of peer, boot and salt, so numbers of two lives never meet. A receiver remembers per sender
//! its latest life and the last 128 numbers: what was recorded and comes again is dropped, as is what comes from an earlier life.
//! After its own restart a receiver may take an old packet once more, which the protocol inside bears (it is about rumours that
//! have versions of their own).

use std::collections::HashMap;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::identity::{Identity, IdentityError, random};
use super::key::{ClusterKey, ClusterKeys, Fingerprint};
use super::peer::Peer;

const VERSION: u8 = 1;
const HEADER: usize = 57;
/// Bytes that sealing adds.
pub(super) const OVERHEAD: usize = HEADER + 16;
/// Senders that are remembered; beyond it, packets of strangers are dropped.
const MOST_SENDERS: usize = 16_384;

/// Why a packet is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Dropped {
    /// It is none of ours.
    #[error("it is no packet of the swarm")]
    Foreign,
    /// Sealed with another cluster key.
    #[error("it is sealed with a cluster key of fingerprint {0}")]
    WrongKey(Fingerprint),
    /// It was tampered with, or its sender does not know the key.
    #[error("it does not open")]
    Forged,
    /// It came before, or belongs to an earlier life of its sender.
    #[error("it came before")]
    Again,
    /// Its sender has our own peer id and is not us.
    #[error("it comes from a copy of this node")]
    Copy,
}

/// Seals what this node sends.
pub(super) struct Sealer {
    prefix: [u8; 49],
    key: LessSafeKey,
    number: u64,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Sealer {
    pub(super) fn new(identity: &Identity, keys: &ClusterKeys) -> Result<Self, IdentityError> {
        let key = keys.own();
        let mut prefix = [VERSION; 49];
        prefix[1..5].copy_from_slice(&key.fingerprint().0);
        prefix[5..37].copy_from_slice(&identity.peer().0);
        prefix[37..41].copy_from_slice(&identity.boot().to_be_bytes());
        prefix[41..].copy_from_slice(&random::<8>()?);
        Ok(Self { prefix, key: sender_key(key, &prefix), number: 0 })
    }

    /// Returns `text` as a packet.
    pub(super) fn seal(&mut self, text: &[u8]) -> Vec<u8> {
        self.number += 1;
        let mut packet = Vec::with_capacity(text.len() + OVERHEAD);
        packet.extend(self.prefix);
        packet.extend(self.number.to_be_bytes());
        let mut body = text.to_vec();
        self.key
            .seal_in_place_append_tag(nonce(self.number), Aad::from(&packet), &mut body)
            .expect("a packet is shorter than what may be sealed at once");
        packet.append(&mut body);
        packet
    }
}

fn sender_key(key: &ClusterKey, prefix: &[u8]) -> LessSafeKey {
    let cluster = key.derive("shoal swarm: sealed packets, version 1");
    let own = blake3::keyed_hash(&cluster, &prefix[5..49]);
    LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, own.as_bytes()).expect("keys have 32 bytes"))
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

struct Sender {
    boot: u32,
    prefix: [u8; 49],
    key: LessSafeKey,
    highest: u64,
    /// Bit `n`: `highest - n` has come.
    seen: u128,
}

impl Sender {
    fn is_new(&self, number: u64) -> bool {
        match self.highest.checked_sub(number) {
            None => true,
            Some(back) => back < 128 && self.seen & (1 << back) == 0,
        }
    }

    fn note(&mut self, number: u64) {
        if let Some(ahead) = number.checked_sub(self.highest) {
            self.seen = u32::try_from(ahead).ok().and_then(|ahead| self.seen.checked_shl(ahead)).unwrap_or(0) | 1;
            self.highest = number;
        } else {
            self.seen |= 1 << (self.highest - number);
        }
    }
}

/// Opens what others send.
pub(super) struct Opener {
    me: Peer,
    keys: ClusterKeys,
    senders: HashMap<Peer, Sender>,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener").field("senders", &self.senders.len()).finish_non_exhaustive()
    }
}

impl Opener {
    pub(super) fn new(me: Peer, keys: ClusterKeys) -> Self {
        Self { me, keys, senders: HashMap::new() }
    }

    /// Returns who sent a packet, and what.
    pub(super) fn open<'p>(&mut self, packet: &'p mut [u8]) -> Result<(Peer, &'p [u8]), Dropped> {
        if packet.len() < OVERHEAD || packet[0] != VERSION {
            return Err(Dropped::Foreign);
        }
        let (header, body) = packet.split_at_mut(HEADER);
        let fingerprint = Fingerprint(header[1..5].try_into().expect("four bytes"));
        let key = self.keys.find(fingerprint).ok_or(Dropped::WrongKey(fingerprint))?;
        let peer = Peer(header[5..37].try_into().expect("32 bytes"));
        let boot = u32::from_be_bytes(header[37..41].try_into().expect("four bytes"));
        let number = u64::from_be_bytes(header[49..].try_into().expect("eight bytes"));
        let known = self.senders.get_mut(&peer);
        let same_life = |sender: &Sender| sender.prefix == header[..49];
        match known {
            Some(sender) if same_life(sender) => {
                if !sender.is_new(number) {
                    return Err(Dropped::Again);
                }
                let text = sender.key.open_in_place(nonce(number), Aad::from(&*header), body);
                let text = text.map_err(|_| Dropped::Forged)?;
                sender.note(number);
                if peer == self.me { Err(Dropped::Copy) } else { Ok((peer, text)) }
            }
            known => {
                // The same life under the other cluster key is a later one of the same boot.
                let earlier = known.as_ref().is_some_and(|sender| {
                    sender.boot > boot || (sender.boot == boot && sender.prefix[41..49] != header[41..49])
                });
                if known.is_none() && self.senders.len() >= MOST_SENDERS {
                    return Err(Dropped::Again);
                }
                let key = sender_key(key, header);
                let text = key.open_in_place(nonce(number), Aad::from(&*header), body);
                let text = text.map_err(|_| Dropped::Forged)?;
                if peer == self.me {
                    return Err(Dropped::Copy);
                }
                if earlier {
                    return Err(Dropped::Again);
                }
                let prefix = header[..49].try_into().expect("49 bytes");
                self.senders.insert(peer, Sender { boot, prefix, key, highest: number, seen: 1 });
                Ok((peer, text))
            }
        }
    }

    /// Forgets senders that are no members any more, when there are many.
    pub(super) fn forget(&mut self, is_member: impl Fn(&Peer) -> bool) {
        if self.senders.len() > MOST_SENDERS / 2 {
            self.senders.retain(|peer, _| is_member(peer));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn identity(seed: u8) -> Identity {
        Identity::from_seed([seed; 32])
    }

    fn keys(number: u8) -> ClusterKeys {
        ClusterKey::new([number; 32]).into()
    }

    #[test]
    fn a_packet_is_opened_once_by_those_who_have_the_key() {
        let ann = identity(1);
        let mut sealer = Sealer::new(&ann, &keys(7)).unwrap();
        let mut opener = Opener::new(identity(2).peer(), keys(7));
        let (one, two) = (sealer.seal(b"one"), sealer.seal(b"two"));
        assert!(!one.windows(3).any(|window| window == b"one"), "it is sealed");
        // Out of order, and then again.
        assert_eq!(opener.open(&mut two.clone()), Ok((ann.peer(), &b"two"[..])));
        assert_eq!(opener.open(&mut one.clone()), Ok((ann.peer(), &b"one"[..])));
        for packet in [&one, &two] {
            assert_eq!(opener.open(&mut packet.clone()), Err(Dropped::Again));
        }
        let mut other = Opener::new(identity(2).peer(), keys(8));
        assert_eq!(other.open(&mut one.clone()), Err(Dropped::WrongKey(keys(7).own().fingerprint())));
        let mut copy = Opener::new(ann.peer(), keys(7));
        assert_eq!(copy.open(&mut one.clone()), Err(Dropped::Copy));
    }

    #[test]
    fn no_changed_byte_goes_unnoticed() {
        let mut sealer = Sealer::new(&identity(1), &keys(7)).unwrap();
        let packet = sealer.seal(b"text");
        for at in 0..packet.len() {
            let mut opener = Opener::new(identity(2).peer(), keys(7));
            let mut bad = packet.clone();
            bad[at] ^= 1;
            assert!(opener.open(&mut bad).is_err(), "byte {at}");
            assert!(opener.senders.is_empty(), "byte {at}: nothing is remembered of a forger");
        }
    }

    #[test]
    fn what_an_earlier_life_sent_is_void() {
        let dir = tempfile::tempdir().unwrap();
        let old = Identity::take_up(dir.path()).unwrap();
        let mut sealer = Sealer::new(&old, &keys(7)).unwrap();
        let mut opener = Opener::new(identity(2).peer(), keys(7));
        let (first, later) = (sealer.seal(b"x"), sealer.seal(b"y"));
        opener.open(&mut first.clone()).unwrap();
        let new = Identity::take_up(dir.path()).unwrap();
        let mut sealer = Sealer::new(&new, &keys(7)).unwrap();
        assert!(opener.open(&mut sealer.seal(b"z")).is_ok());
        assert_eq!(opener.open(&mut later.clone()), Err(Dropped::Again));
    }

    proptest! {
        #[test]
        fn each_number_is_taken_once_whatever_the_order(order in prop::collection::vec(1..60_usize, 1..80)) {
            let mut sealer = Sealer::new(&identity(1), &keys(7)).unwrap();
            let packets: Vec<Vec<u8>> = (0..60).map(|_| sealer.seal(b"x")).collect();
            let mut opener = Opener::new(identity(2).peer(), keys(7));
            let mut taken = std::collections::BTreeSet::new();
            for number in order {
                let opened = opener.open(&mut packets[number].clone()).is_ok();
                prop_assert_eq!(opened, taken.insert(number), "{}", number);
            }
        }

        #[test]
        fn any_bytes_are_a_packet_or_dropped(mut bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut opener = Opener::new(identity(2).peer(), keys(7));
            prop_assert!(opener.open(&mut bytes).is_err());
        }
    }
}
