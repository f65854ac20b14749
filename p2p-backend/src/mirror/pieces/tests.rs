//! Claims, what survives a restart, and what is believed of it.

use super::*;
use crate::mirror::filling::Step;
use crate::mirror::upstream::UpstreamError;

const SIZE: u64 = 3 * PIECE + 100;

fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn digest() -> Digest {
    Digest(sha2::Sha256::digest(content()).into())
}

struct Bed {
    dir: tempfile::TempDir,
    usage: Arc<AtomicU64>,
    blob: Arc<Blob>,
}

fn bed() -> Bed {
    let dir = tempfile::tempdir().unwrap();
    let usage = Arc::new(AtomicU64::new(0));
    let blob = Arc::new(Blob::create(dir.path(), digest(), SIZE, usage.clone()));
    Bed { dir, usage, blob }
}

impl Bed {
    fn fill(&self, pieces: Range<u64>, giver: Giver) {
        for claim in self.blob.claim(pieces, &Launch::new([0; 32], true)).0 {
            give(claim, giver, &content());
        }
    }

    fn reopened(&self) -> Option<Arc<Blob>> {
        self.usage.store(0, Ordering::Relaxed);
        Blob::reopen(self.dir.path(), digest(), self.usage.clone()).map(Arc::new)
    }

    fn path(&self, extension: &str) -> PathBuf {
        self.dir.path().join(digest().to_string()).with_extension(extension)
    }

    fn flip(&self, extension: &str, at: u64) {
        let file = OpenOptions::new().read(true).write(true).open(self.path(extension)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
    }
}

fn give(claim: Claim, giver: Giver, content: &[u8]) {
    let extent = claim.blob.extent(claim.piece());
    let bytes = &content[extent.start as usize..extent.end as usize];
    for part in bytes.chunks(300_000) {
        claim.filling().push(Bytes::copy_from_slice(part));
    }
    let room = Room::new(claim.blob.usage.clone(), bytes.len() as u64);
    assert!(claim.commit(giver, Some(room)).unwrap());
}

fn is_ready(blob: &Blob, piece: u64) -> bool {
    matches!(blob.look(piece), Look::Ready)
}

#[test]
fn a_run_of_claims_ends_before_what_somebody_else_has() {
    let bed = bed();
    let launch = Launch::new([0; 32], true);
    let (other, _) = bed.blob.claim(2..3, &launch);
    let (mine, interests) = bed.blob.claim(0..4, &launch);
    assert_eq!(mine.iter().map(Claim::piece).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(interests.len(), 2);
    assert!(bed.blob.claim(1..4, &launch).0.is_empty());
    drop((other, mine));
    assert_eq!(bed.blob.claim(0..4, &launch).0.len(), 4);
}

#[tokio::test]
async fn a_dropped_claim_gives_the_piece_back_and_wakes_its_waiters() {
    let bed = bed();
    let (claims, mut interests) = bed.blob.claim(0..1, &Launch::new([0; 32], true));
    let Look::Filling(mut joined) = bed.blob.look(0) else { panic!("not being filled") };
    let waiting = tokio::spawn(async move { joined.after(0).await });
    tokio::task::yield_now().await;
    drop(claims);
    let woken = tokio::time::timeout(std::time::Duration::from_secs(30), waiting).await.expect("nobody woke it");
    assert!(matches!(woken.unwrap(), Step::End(End::Abandoned)));
    assert!(matches!(interests[0].after(0).await, Step::End(End::Abandoned)));
    assert!(matches!(bed.blob.look(0), Look::Absent));
}

#[tokio::test]
async fn a_failure_reaches_those_who_wait_and_is_not_remembered() {
    let bed = bed();
    let (claims, mut interests) = bed.blob.claim(0..2, &Launch::new([0; 32], true));
    for claim in claims {
        claim.fail(Arc::new(UpstreamError::Entangled));
    }
    for interest in &mut interests {
        assert!(matches!(interest.after(0).await, Step::End(End::Failed(_))));
    }
    assert!(matches!(bed.blob.look(0), Look::Absent));
    assert_eq!(bed.blob.claim(0..4, &Launch::new([0; 32], true)).0.len(), 4);
}

#[tokio::test]
async fn readers_have_bytes_before_the_piece_is_whole_and_the_disk_after() {
    let bed = bed();
    let (mut claims, mut interests) = bed.blob.claim(0..1, &Launch::new([0; 32], true));
    let claim = claims.pop().unwrap();
    claim.filling().push(Bytes::copy_from_slice(&content()[..10]));
    assert!(matches!(interests[0].after(4).await, Step::Bytes(bytes) if bytes == content()[4..10]));
    claim.filling().push(Bytes::copy_from_slice(&content()[10..PIECE as usize]));
    assert!(claim.commit(Giver::Registry, Some(Room::new(bed.usage.clone(), PIECE))).unwrap());
    assert!(matches!(interests[0].after(10).await, Step::End(End::Stored)));
    assert_eq!(bed.blob.read(0, 100..200).unwrap(), content()[100..200]);
}

#[tokio::test]
async fn what_is_not_kept_is_still_there_for_those_who_hold_it() {
    let bed = bed();
    let (mut claims, mut interests) = bed.blob.claim(0..1, &Launch::new([0; 32], true));
    let claim = claims.pop().unwrap();
    claim.filling().push(Bytes::copy_from_slice(&content()[..PIECE as usize]));
    assert!(!claim.commit(Giver::Registry, None).unwrap());
    assert!(matches!(bed.blob.look(0), Look::Absent));
    assert!(matches!(interests[0].after(7).await, Step::Bytes(bytes) if bytes == content()[7..PIECE as usize]));
    assert_eq!(bed.usage.load(Ordering::Relaxed), 0);
}

#[test]
fn pieces_and_their_proof_survive_the_process() {
    let bed = bed();
    bed.fill(1..3, Giver::Registry);
    let again = bed.reopened().unwrap();
    assert_eq!((0..4).map(|piece| is_ready(&again, piece)).collect::<Vec<_>>(), [false, true, true, false]);
    assert_eq!(bed.usage.load(Ordering::Relaxed), 2 * PIECE);
    assert_eq!(again.read(2, 2 * PIECE + 5..2 * PIECE + 9).unwrap(), content()[2 * PIECE as usize + 5..][..4]);

    bed.fill(0..1, Giver::Registry);
    bed.fill(3..4, Giver::Mirror(0));
    assert!(bed.blob.wants_proof());
    let givers = vec![(Giver::Registry, 3 * PIECE), (Giver::Mirror(0), 100)];
    assert_eq!(bed.blob.prove(), Verdict::Proved(givers));
    assert_eq!(bed.blob.prove(), Verdict::NotNow, "once is enough");
    let again = bed.reopened().unwrap();
    assert!(again.proved() && !again.wants_proof());
}

#[test]
fn a_flipped_byte_on_the_disk_is_found_on_first_use() {
    let bed = bed();
    bed.fill(0..4, Giver::Registry);
    assert!(matches!(bed.blob.prove(), Verdict::Proved(_)));
    bed.flip("data", PIECE + 777);
    let again = bed.reopened().unwrap();
    assert_eq!(again.read(1, PIECE..PIECE + 4), None, "even where the wanted bytes are good");
    assert!(!is_ready(&again, 1) && is_ready(&again, 0));
    assert!(!again.proved(), "a blob that lost a piece is not proved");
    assert_eq!(bed.usage.load(Ordering::Relaxed), SIZE - PIECE);
    assert!(!is_ready(&bed.reopened().unwrap(), 1), "and the loss is recorded");
}

#[test]
fn no_flip_and_no_cut_in_the_map_makes_wrong_bytes_readable() {
    let bed = bed();
    bed.fill(0..4, Giver::Registry);
    assert!(matches!(bed.blob.prove(), Verdict::Proved(_)));
    let good = std::fs::read(bed.path("pieces")).unwrap();
    let look = || {
        let Some(again) = bed.reopened() else { return };
        for piece in 0..again.pieces() {
            let extent = again.extent(piece);
            let wanted = &content()[extent.start as usize..extent.end as usize];
            assert!(again.read(piece, extent).is_none_or(|bytes| bytes == wanted));
        }
    };
    for at in (0..good.len()).step_by(5) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(bed.path("pieces"), &bad).unwrap();
        look();
    }
    for cut in [0, 7, 31, 40, 64, 80, good.len() - 1] {
        std::fs::write(bed.path("pieces"), &good[..cut]).unwrap();
        look();
    }
    std::fs::write(bed.path("pieces"), &good).unwrap();
    std::fs::write(bed.path("data"), &content()[..PIECE as usize]).unwrap();
    assert!(bed.reopened().is_none(), "data of the wrong length is not taken in");
}

#[test]
fn sums_without_their_data_are_not_believed() {
    // What a power cut leaves when the map reached the disk and the data did not.
    let bed = bed();
    bed.fill(0..4, Giver::Registry);
    let data = OpenOptions::new().write(true).open(bed.path("data")).unwrap();
    data.set_len(0).unwrap();
    data.set_len(SIZE).unwrap();
    let again = bed.reopened().unwrap();
    for piece in 0..again.pieces() {
        assert_eq!(again.read(piece, again.extent(piece)), None);
    }
    assert_eq!(bed.usage.load(Ordering::Relaxed), 0);
}

#[test]
fn a_whole_that_is_not_the_blob_is_dropped_and_its_givers_are_named() {
    let bed = bed();
    bed.fill(0..3, Giver::Registry);
    let mut lie = content();
    lie[3 * PIECE as usize + 1] ^= 1;
    let (mut claims, _held) = bed.blob.claim(3..4, &Launch::new([0; 32], false));
    give(claims.pop().unwrap(), Giver::Mirror(2), &lie);
    let givers = vec![(Giver::Registry, 3 * PIECE), (Giver::Mirror(2), 100)];
    assert_eq!(bed.blob.prove(), Verdict::Refuted(givers));
    assert!((0..4).all(|piece| !is_ready(&bed.blob, piece)));
    assert!(bed.blob.registry_only.load(Ordering::Relaxed));
    assert!(bed.reopened().is_none(), "nothing of it is taken in again");
}

#[test]
fn an_empty_blob_is_whole_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let empty = Digest(sha2::Sha256::digest([]).into());
    let blob = Blob::create(dir.path(), empty, 0, Arc::default());
    assert_eq!(blob.prove(), Verdict::Proved(vec![]));
}

/// What one of many threads does with the table; `holders` counts who has which piece, by the model.
fn meddle(blob: &Arc<Blob>, holders: &[AtomicUsize], content: &[u8], seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..400 {
        let piece = random.u64(..blob.pieces());
        let extent = blob.extent(piece);
        match random.u8(..8) {
            0..=3 => {
                let launch = Launch::new([seed as u8; 32], true);
                let (claims, interests) = blob.claim(piece..blob.pieces().min(piece + random.u64(1..4)), &launch);
                assert_eq!(claims.len(), interests.len());
                for claim in &claims {
                    let before = holders[claim.piece() as usize].fetch_add(1, Ordering::SeqCst);
                    assert_eq!(before, 0, "two have piece {}", claim.piece());
                }
                for claim in claims {
                    holders[claim.piece() as usize].fetch_sub(1, Ordering::SeqCst);
                    match random.u8(..4) {
                        0 => drop(claim),
                        1 => claim.fail(Arc::new(UpstreamError::Entangled)),
                        _ => give(claim, Giver::Registry, content),
                    }
                }
            }
            4 | 5 => {
                let within = random.u64(extent.clone())..extent.end;
                if let Some(bytes) = blob.read(piece, within.clone()) {
                    assert!(*bytes == content[within.start as usize..within.end as usize], "wrong bytes of {piece}");
                }
            }
            6 => {
                if let Look::Filling(mut interest) = blob.look(piece) {
                    // Whoever fills it comes to an end, and tells everybody.
                    let step = futures::executor::block_on(interest.after(extent.end - extent.start));
                    assert!(matches!(step, Step::End(_)));
                }
            }
            _ => match random.u8(..4) {
                0 => assert!(!matches!(blob.prove(), Verdict::Refuted(_)), "what is right is refuted"),
                _ => drop(blob.drop_piece(piece)),
            },
        }
    }
}

#[test]
fn many_threads_leave_the_table_as_one_would() {
    for round in 0..4 {
        let bed = bed();
        let (content, holders) = (content(), [const { AtomicUsize::new(0) }; 4]);
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let (blob, holders, content) = (&bed.blob, &holders, &content);
                scope.spawn(move || meddle(blob, holders, content, round * 100 + thread));
            }
        });
        assert_eq!(bed.usage.load(Ordering::SeqCst), bed.blob.stored(), "what is counted is what is there");
        let ready: Vec<u64> = (0..4).filter(|piece| is_ready(&bed.blob, *piece)).collect();
        let again = bed.reopened();
        let there = |blob: &Arc<Blob>| -> Vec<u64> { (0..4).filter(|piece| is_ready(blob, *piece)).collect() };
        let kept = again.as_ref().map(there);
        assert_eq!(kept.unwrap_or_default(), ready, "the disk knows the same");
        bed.fill(0..4, Giver::Registry);
        for piece in 0..4 {
            let claims = bed.blob.claim(piece..piece + 1, &Launch::new([0; 32], true)).0;
            claims.into_iter().for_each(|claim| give(claim, Giver::Registry, &content));
        }
        assert!(matches!(bed.blob.prove(), Verdict::Proved(_)) || bed.blob.proved());
    }
}
