//! Everything that a node reads of what others send, as functions of bytes: for fuzzing, and for nothing else.

use std::io::Cursor;
use std::time::Duration;

use foca::{AccumulatingRuntime, Foca, PostcardCodec};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::identity::Identity;
use super::key::{ClusterKey, ClusterKeys};
use super::member::Member;
use super::members::{self, read_list};
use super::proof::{self, Channel};
use super::records::{Record, Records};
use super::sealed::Opener;

fn keys() -> ClusterKeys {
    ClusterKey::new([7; 32]).into()
}

/// The body of an answer, in parts of sizes that the bytes themselves choose.
pub fn records(bytes: &[u8]) {
    let (mut records, mut rest, mut pieces) = (Records::default(), bytes, 0);
    while let Some((&first, _)) = rest.split_first() {
        let (part, left) = rest.split_at(usize::from(first).clamp(1, rest.len()));
        rest = left;
        records.push(bytes::Bytes::copy_from_slice(part));
        loop {
            match records.read() {
                Ok(Some(Record::Bytes(bytes))) => pieces += bytes.len(),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    assert!(pieces <= bytes.len(), "more bytes come out than went in");
}

/// A packet of the membership's, as it is on the wire.
pub fn packet(bytes: &[u8]) {
    let mut opener = Opener::new(Identity::from_seed([1; 32]).peer(), keys());
    // What is told of a stranger's packet is why it is dropped.
    let _ = opener.open(&mut bytes.to_vec());
}

/// The first exchange of a connection, as the one who was called hears it, and as the caller does.
pub fn greeting(bytes: &[u8]) {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_time().build() else { return };
    let (us, plain) = (Identity::from_seed([1; 32]), Channel { peer: None, exported: [0; 32] });
    runtime.block_on(async {
        let mut stream = tokio::io::join(Cursor::new(bytes), tokio::io::sink());
        let accepted = proof::accept(&mut stream, &us, &keys(), plain).await;
        let mut stream = tokio::io::join(Cursor::new(bytes), tokio::io::sink());
        let connected = proof::connect(&mut stream, &us, &keys(), plain, None).await;
        assert!(accepted.is_err() && connected.is_err(), "nobody proves anything without hearing our nonce");
    });
}

/// What a member says of all members to one who joins.
pub fn list(bytes: &[u8]) {
    if let Ok((_, list)) = postcard::take_from_bytes::<std::net::IpAddr>(bytes) {
        let all = read_list(list).unwrap_or_default();
        assert!(all.iter().all(|member| member.id().is_sound()), "one who cannot be is in the list");
    }
}

/// What a member says in a packet.
pub fn gossip(bytes: &[u8]) {
    let me = Member::new(Identity::from_seed([1; 32]).peer(), ([10, 0, 0, 1], 4011).into(), "a", 1, 1);
    let mut foca: Foca<Member, PostcardCodec, StdRng, foca::NoCustomBroadcast> =
        Foca::new(me, members::config(), StdRng::seed_from_u64(1), PostcardCodec);
    let mut runtime = AccumulatingRuntime::new();
    // Nonsense is an error, and changes nothing.
    let _ = foca.handle_data(bytes, &mut runtime);
    while let Some((after, timer)) = runtime.to_schedule() {
        assert!(after <= Duration::from_secs(24 * 3600), "a timer that never rings");
        let mut later = AccumulatingRuntime::new();
        let _ = foca.handle_timer(timer, &mut later);
    }
}
