//! One node among members that mean no good, or just much.

use nydus_rafs::Digest;

use super::grid::{GROUP, Mask, PIECE, Pieces};
use super::message::{Ask, Frame, Holder, Manner, News, Origin, Report, Summary};
use super::port::{Credential, End, ReadEnd, Reader, Verdict};
use super::*;

const ME: Peer = Peer([9; 32]);
const THING: Object = Object(Digest([7; 32]));
const HERE: &str = "a.example/team/image";

fn other(number: u8) -> Peer {
    Peer([number; 32])
}

fn mind(config: Config) -> Swarm {
    let registries = vec!["a.example".to_owned(), "b.example".to_owned()];
    Swarm::new(ME, 1, Config { registries, ..config }, 1, Time(0))
}

/// A view of these and us, long ago.
fn view(others: &[Peer]) -> Input {
    let member = |peer| Member { peer, zone: Zone::default(), since: Time(0), home: true };
    let members = others.iter().copied().chain([ME]).map(member).collect();
    Input::View(Arc::new(View::new(members, at(100_000))))
}

fn at(milliseconds: u64) -> Time {
    Time(milliseconds * 1000)
}

fn want(number: u64, pieces: std::ops::Range<u32>, urgency: Urgency, caller: port::Caller) -> Input {
    Input::Want {
        want: Want(number),
        object: THING,
        size: Some(100 * PIECE),
        origin: HERE.into(),
        pieces,
        urgency,
        order: Order::InOrder,
        reader: Reader { caller, verifies: true, no_peer: false },
    }
}

fn ask(object: Object, origin: &str, group: u32, manner: Manner, urgency: Urgency) -> Ask {
    Ask {
        object,
        size: None,
        origin: origin.into(),
        group,
        mask: Mask::ALL,
        offset: 0,
        manner,
        below: u8::MAX,
        urgency,
        can_read: false,
        have: Pieces::new(),
        backlog: 0,
    }
}

fn asked(from: Peer, number: u64, ask: Ask) -> Input {
    Input::Asked { from, inbound: Inbound(number), ask }
}

fn reads(outputs: &[Output]) -> Vec<(Origin, Credential, std::ops::Range<u32>, u32)> {
    let read = |output: &Output| match output {
        Output::Read { origin, credential, pieces, offset, .. } => {
            Some((origin.clone(), *credential, pieces.clone(), *offset))
        }
        _ => None,
    };
    outputs.iter().filter_map(read).collect()
}

fn reading(outputs: &[Output]) -> port::Reading {
    let found = outputs.iter().find_map(|output| match output {
        Output::Read { reading, .. } => Some(*reading),
        _ => None,
    });
    found.expect("the registry is read")
}

fn asks(outputs: &[Output]) -> Vec<(Exchange, Peer, Ask)> {
    let asks = |output: &Output| match output {
        Output::Ask { exchange, to, ask } => Some((*exchange, *to, ask.clone())),
        _ => None,
    };
    outputs.iter().filter_map(asks).collect()
}

/// Lets time pass until nothing is due.
fn until(swarm: &mut Swarm, end: Time) -> Vec<Output> {
    let mut all = Vec::new();
    while let Some(next) = swarm.wake().filter(|next| *next <= end) {
        all.extend(swarm.step(next, Input::Tick));
    }
    all.extend(swarm.step(end, Input::Tick));
    all
}

#[test]
fn a_token_is_shown_only_where_its_owner_reads() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[]));
    // A member names another place first, which this node reads, too.
    swarm.step(at(100_000), asked(other(1), 1, ask(THING, "b.example/evil/image", 0, Manner::Holder, Urgency::Demand)));
    swarm.step(at(100_000), asked(other(1), 2, ask(THING, "b.example/evil/image", 9, Manner::Home, Urgency::Demand)));
    let caller = Some([3; 32]);
    let mut outputs = swarm.step(at(100_010), want(1, 0..4, Urgency::Demand, caller));
    let checked = Input::Checked { caller, object: THING, origin: HERE.into(), verdict: Verdict::Granted };
    outputs.extend(swarm.step(at(100_020), checked));
    outputs.extend(until(&mut swarm, at(110_000)));
    let reads = reads(&outputs);
    assert!(!reads.is_empty());
    assert!(reads.iter().all(|(origin, ..)| **origin == *HERE), "{reads:?}");
}

#[test]
fn a_member_cannot_name_a_place_that_is_not_read() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1)]));
    let pieces = vec![(0, message::Vouch { by: ME, sum: [0; 32] })];
    swarm.step(at(100_000), Input::Restored { object: THING, size: Some(8 * PIECE), pieces, sealed: false });
    let one = Ask { mask: Mask::of(0), ..ask(THING, "169.254.169.254/x/y", 0, Manner::Home, Urgency::Demand) };
    swarm.step(at(100_000), asked(other(1), 1, one));
    let outputs = swarm.step(at(100_000), asked(other(1), 2, ask(THING, HERE, 1, Manner::BytesOnly, Urgency::Demand)));
    let mut all = outputs;
    all.extend(until(&mut swarm, at(110_000)));
    assert!(reads(&all).iter().all(|(origin, ..)| **origin == *HERE), "{all:?}");
}

#[test]
fn what_came_of_one_piece_is_not_taken_for_another() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[]));
    let outputs = swarm.step(at(100_000), want(1, 0..4, Urgency::Demand, None));
    let first = reading(&outputs);
    swarm.step(at(100_010), Input::ReadBytes { reading: first, piece: 0, got: 70_000 });
    let mut outputs = swarm.step(at(100_020), Input::ReadEnded { reading: first, end: ReadEnd::Failed });
    outputs.extend(until(&mut swarm, at(101_000)));
    assert_eq!(reads(&outputs)[0].2.start, 0);
    assert_eq!(reads(&outputs)[0].3, 70_000, "it goes on where it broke off");
    let again = reading(&outputs);
    // This time the first piece comes, and nothing of the second.
    swarm.step(at(101_010), Input::ReadPiece { reading: again, piece: 0, sum: [0; 32] });
    let mut outputs = swarm.step(at(101_020), Input::ReadEnded { reading: again, end: ReadEnd::Failed });
    outputs.extend(until(&mut swarm, at(103_000)));
    let next = reads(&outputs);
    assert_eq!((next[0].2.start, next[0].3), (1, 0));
}

#[test]
fn names_that_are_made_up_are_not_remembered() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1)]));
    let mut outputs = swarm.step(at(100_000), want(1, 0..100, Urgency::Demand, None));
    let exchanges = asks(&outputs);
    assert!(!exchanges.is_empty(), "another one is home of some");
    for (turn, (exchange, _, ask)) in exchanges.into_iter().enumerate() {
        let made_up = |number: u8| Holder {
            peer: Peer([100 + 10 * u8::try_from(turn).unwrap() + number; 32]),
            have: Mask::ALL,
            coming: Mask::NONE,
            backlog: 255,
        };
        let frame = Frame::Refer { mask: ask.mask, holders: vec![made_up(0), made_up(1), made_up(2)] };
        outputs = swarm.step(at(100_001), Input::Framed { exchange, frame });
        assert!(asks(&outputs).iter().all(|(_, to, _)| *to == other(1)), "{outputs:?}");
    }
    assert!(swarm.standings.len() <= 2);
}

#[test]
fn what_members_say_is_remembered_within_bounds() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1)]));
    let mut number = 0_u32;
    for _ in 0..80 {
        let news = |_| {
            number += 1;
            let mut name = [1; 32];
            name[..4].copy_from_slice(&(number / 8).to_le_bytes());
            let (object, group) = (Object(Digest(name)), number % 8);
            News { object, group, have: Mask::ALL, reading: Mask::NONE, all: true }
        };
        let report = Report { backlog: 0, news: (0..1024).map(news).collect() };
        swarm.step(at(100_001), Input::Reported { from: other(1), report });
    }
    let ledgers: usize = swarm.blobs.values().map(|blob| blob.ledgers.len()).sum();
    assert!(number > 80_000 && ledgers <= 65_536, "{ledgers}");
    // The one that said so is gone, and so is what it said.
    swarm.step(at(100_002), view(&[]));
    until(&mut swarm, at(300_000));
    assert!(swarm.blobs.is_empty());
}

#[test]
fn asks_for_what_does_not_exist_leave_nothing_behind() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1)]));
    for number in 0..200_u8 {
        let object = Object(Digest([number; 32]));
        let question = ask(object, HERE, 3, Manner::BytesOnly, Urgency::Demand);
        let outputs = swarm.step(at(100_000), asked(other(1), u64::from(number), question));
        for output in outputs {
            if let Output::Read { reading, .. } = output {
                swarm.step(at(100_000), Input::ReadEnded { reading, end: ReadEnd::Denied });
            }
        }
        swarm.step(at(100_001), Input::Hung { inbound: Inbound(u64::from(number)) });
    }
    until(&mut swarm, at(300_000));
    assert!(swarm.blobs.is_empty(), "{}", swarm.blobs.len());
    assert!(swarm.timers.len() < 4, "{:?}", swarm.timers);
}

#[test]
fn nothing_is_read_beyond_the_end() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1)]));
    swarm.step(at(100_000), want(1, 0..1, Urgency::Demand, None));
    let question = ask(THING, HERE, 100 / GROUP, Manner::BytesOnly, Urgency::Demand);
    let outputs = swarm.step(at(100_000), asked(other(1), 1, question));
    assert!(reads(&outputs).is_empty());
    assert!(outputs.iter().any(|output| matches!(output, Output::Answer { frame: Frame::Gone { .. }, .. })));
}

#[test]
fn one_who_leaves_tells_everybody_and_keeps_its_cache() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1), other(2)]));
    let pieces = (0..8).map(|piece| (piece, message::Vouch { by: ME, sum: [0; 32] })).collect();
    swarm.step(at(100_000), Input::Restored { object: THING, size: Some(8 * PIECE), pieces, sealed: true });
    let outputs = swarm.step(at(100_001), Input::Drain);
    let place = |what: fn(&Output) -> bool| outputs.iter().position(what);
    let told = place(
        |output| matches!(output, Output::Report { report, .. } if report.news.iter().all(|news| news.have.is_empty())),
    );
    let gossip = place(|output| matches!(output, Output::Gossip { summary } if summary.objects.is_empty()));
    let drained = place(|output| matches!(output, Output::Drained));
    assert!(told.is_some() && told < drained && gossip.is_some() && gossip < drained, "{outputs:?}");
    let later = until(&mut swarm, at(160_000));
    assert!(!later.iter().any(|output| matches!(output, Output::Unlink { .. })));
    let outputs = swarm.step(at(160_000), asked(other(1), 1, ask(THING, HERE, 0, Manner::Home, Urgency::Demand)));
    assert!(matches!(outputs[0], Output::Answer { frame: Frame::Gone { .. }, .. }));
}

#[test]
fn what_somebody_waits_for_is_asked_for_again_if_it_was_only_prefetched() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1)]));
    let outputs = swarm.step(at(100_000), want(1, 0..100, Urgency::Prefetch, None));
    let (early, _, question) = asks(&outputs)[0].clone();
    assert_eq!(question.urgency, Urgency::Prefetch);
    let piece = question.mask.pieces(question.group).next().unwrap();
    let outputs = swarm.step(at(100_001), want(2, piece..piece + 1, Urgency::Demand, None));
    assert!(outputs.iter().any(|output| matches!(output, Output::Leave { exchange } if *exchange == early)));
    let urgent = |ask: &Ask| ask.urgency == Urgency::Demand && ask.group == question.group && ask.mask.has(piece);
    assert!(asks(&outputs).iter().any(|(_, _, ask)| urgent(ask)), "{outputs:?}");
}

#[test]
fn a_home_reads_little_ahead_at_a_time_and_at_once_what_somebody_waits_for() {
    let mut swarm = mind(Config { prefetch_reads: 1, ..Config::default() });
    swarm.step(at(100_000), view(&[]));
    let outputs = swarm.step(at(100_000), want(1, 0..100, Urgency::Prefetch, None));
    assert_eq!(reads(&outputs).len(), 1);
    // And so for others.
    let early = swarm.step(at(100_000), asked(other(1), 1, ask(THING, HERE, 20, Manner::Home, Urgency::Prefetch)));
    assert!(reads(&early).is_empty());
    let outputs = swarm.step(at(100_000), asked(other(1), 2, ask(THING, HERE, 22, Manner::Home, Urgency::Demand)));
    assert_eq!(reads(&outputs).len(), 1);
    // Once one is done, the next one begins.
    let first = reading(&early_reads(&mut swarm));
    assert!(first.0 > 0);
}

/// Ends the oldest request; returns what follows.
fn early_reads(swarm: &mut Swarm) -> Vec<Output> {
    let mut outputs = swarm.step(at(100_050), Input::ReadEnded { reading: port::Reading(1), end: ReadEnd::Finished });
    outputs.extend(until(swarm, at(100_100)));
    outputs
}

#[test]
fn a_new_life_of_a_cache_voids_what_was_said_of_the_old_one() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1)]));
    let summary = |generation| Summary { generation, objects: vec![(THING, 10)], forgotten: Vec::new() };
    swarm.step(at(100_000), Input::Summarized { from: other(1), summary: summary(4) });
    let news = News { object: THING, group: 0, have: Mask::ALL, reading: Mask::NONE, all: true };
    swarm.step(at(100_000), Input::Reported { from: other(1), report: Report { backlog: 0, news: vec![news] } });
    assert!(!swarm.blobs[&THING].ledgers[&0].is_empty());
    swarm.step(at(100_000), Input::Summarized { from: other(1), summary: summary(3) });
    swarm.step(at(100_000), Input::Summarized { from: other(1), summary: summary(4) });
    assert!(!swarm.blobs[&THING].ledgers[&0].is_empty(), "an older or the same one is no news");
    swarm.step(at(100_000), Input::Summarized { from: other(1), summary: summary(5) });
    assert!(swarm.blobs[&THING].ledgers[&0].is_empty());
}

#[test]
fn one_piece_is_sent_to_few_at_a_time_and_the_others_wait_in_line() {
    let mut swarm = mind(Config { uploads: 16, uploads_per_piece: 2, ..Config::default() });
    swarm.step(at(100_000), view(&[other(1)]));
    let pieces = (0..8).map(|piece| (piece, message::Vouch { by: ME, sum: [0; 32] })).collect();
    swarm.step(at(100_000), Input::Restored { object: THING, size: Some(8 * PIECE), pieces, sealed: true });
    let one = |piece: u32| Ask { mask: Mask::of(piece), ..ask(THING, HERE, 0, Manner::Spare, Urgency::Demand) };
    let mut sent = Vec::new();
    for number in 1..=5 {
        sent.extend(swarm.step(at(100_000), asked(other(number), u64::from(number), one(0))));
    }
    sent.extend(swarm.step(at(100_000), asked(other(6), 6, one(1))));
    let sends = |outputs: &[Output]| {
        let send = |output: &Output| if let Output::Send { inbound, .. } = output { Some(inbound.0) } else { None };
        outputs.iter().filter_map(send).collect::<Vec<_>>()
    };
    assert_eq!(sends(&sent), [1, 2, 6]);
    assert_eq!(sends(&swarm.step(at(100_005), Input::Sent { inbound: Inbound(1), piece: 0 })), [3]);
}

#[test]
fn one_who_is_told_to_read_what_it_cannot_does_not_ask_at_once_again() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1)]));
    let outputs = swarm.step(at(100_000), want(1, 0..100, Urgency::Demand, None));
    let (exchange, _, question) = asks(&outputs)[0].clone();
    let frame = Frame::Lease { mask: question.mask };
    let outputs = swarm.step(at(100_001), Input::Framed { exchange, frame });
    assert!(!asks(&outputs).iter().any(|(_, to, ask)| *to == other(1) && ask.group == question.group), "{outputs:?}");
    let _ = swarm.step(at(100_002), Input::Ended { exchange, end: End::Finished });
}

#[test]
fn a_node_that_nobody_asks_says_what_it_holds_once_and_nothing_more() {
    let mut swarm = mind(Config::default());
    swarm.step(at(100_000), view(&[other(1), other(2)]));
    let pieces = (0..8).map(|piece| (piece, message::Vouch { by: ME, sum: [0; 32] })).collect();
    swarm.step(at(100_000), Input::Restored { object: THING, size: Some(8 * PIECE), pieces, sealed: true });
    let said = until(&mut swarm, at(700_000));
    let gossip = said.iter().filter(|output| matches!(output, Output::Gossip { .. })).count();
    // Two groups are told to their homes, in one report to each.
    assert!(gossip == 1 && said.len() <= 3, "{said:?}");
}
