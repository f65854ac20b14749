//! Members' requests to us: one task each, which says what the swarm wants said, in order.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{Driver, Mind};
use crate::mirror::filling::{End, Interest, Step};
use crate::mirror::pieces::Look;
use crate::mirror::quota::Pin;
use crate::node::{BrokenOff, Ear, Parts, Record};
use crate::swarm::message::{Ask, Frame, Report, Summary};
use crate::swarm::port::{Inbound, Input};
use crate::swarm::wire::Message as _;
use crate::swarm::{Object, Peer};

/// How long an asker may take nothing before it counts as gone.
const PATIENCE: Duration = Duration::from_secs(10);
/// Parts of an answer that wait for the network.
const WAITING: usize = 4;
/// Bytes of one read from the disk.
const READ: u64 = 256 << 10;

/// Through which an answer is said; dropped, the answer is whole.
#[derive(Debug)]
pub(super) struct Saying(mpsc::UnboundedSender<Say>);

/// What is to be said. The swarm limits how much waits here: a few pieces for each of a limited number of asks.
#[derive(Debug)]
enum Say {
    Frame(Bytes),
    Piece(Sending),
    Abort,
}

/// A piece that is to be sent.
#[derive(Debug)]
struct Sending {
    pin: Pin,
    object: Object,
    piece: u32,
    offset: u64,
    map: Bytes,
    /// Where its bytes come, if they are not on the disk.
    interest: Option<Interest>,
}

impl Saying {
    pub(super) fn frame(&self, frame: &Frame) {
        // An asker that is gone is told of by its task.
        let _ = self.0.send(Say::Frame(frame.encode().into()));
    }

    pub(super) fn abort(&self) {
        let _ = self.0.send(Say::Abort);
    }
}

/// Hands a part of an answer over to the network; false if the asker is gone, or takes nothing.
async fn hand_over(parts: &mpsc::Sender<Result<Bytes, BrokenOff>>, part: Bytes) -> bool {
    tokio::time::timeout(PATIENCE, parts.send(Ok(part))).await.is_ok_and(|sent| sent.is_ok())
}

/// What became of an answer.
enum Said {
    Whole,
    Hung,
    Aborted,
}

impl Ear for Driver {
    fn asked(&self, from: Peer, ask: &[u8]) -> Result<Parts, String> {
        let ask = Ask::decode(ask).map_err(|error| error.to_string())?;
        let Some(own) = self.me.upgrade() else { return Err("this node is ending".into()) };
        let (saying, says) = mpsc::unbounded_channel();
        let (sender, parts) = mpsc::channel(WAITING);
        tracing::trace!(%from, group = ask.group, mask = ?ask.mask, manner = ?ask.manner, "a member asks");
        let mut mind = self.mind();
        mind.next += 1;
        let inbound = Inbound(mind.next);
        mind.answering.insert(inbound, Saying(saying));
        self.feed_all(&mut mind, [Input::Asked { from, inbound, ask }]);
        drop(mind);
        self.spawn(async move {
            if let Said::Hung = own.say(inbound, says, &sender).await {
                let mut mind = own.mind();
                mind.answering.remove(&inbound);
                own.feed_all(&mut mind, [Input::Hung { inbound }]);
            }
        });
        Ok(parts)
    }

    fn reported(&self, from: Peer, report: &[u8]) -> Result<(), String> {
        let report = Report::decode(report).map_err(|error| error.to_string())?;
        self.feed(Input::Reported { from, report });
        Ok(())
    }

    fn gossiped(&self, from: Peer, summary: &[u8]) {
        match Summary::decode(summary) {
            Ok(summary) => {
                self.hear_of_tombs(&summary.forgotten);
                self.feed(Input::Summarized { from, summary });
            }
            Err(error) => tracing::debug!(%from, %error, "a member gossips nonsense"),
        }
    }
}

impl Driver {
    pub(super) fn send(&self, mind: &mut Mind, inbound: Inbound, object: Object, piece: u32, offset: u32, map: &Frame) {
        let Some(saying) = mind.answering.get(&inbound) else { return };
        let Some(pin) = self.store.held(&object.0) else {
            mind.inputs.push_back(Input::Lost { object, piece });
            saying.abort();
            return;
        };
        let interest = match pin.look(u64::from(piece)) {
            Look::Filling(interest) => Some(interest),
            Look::Ready | Look::Absent => None,
        };
        let sending = Sending { pin, object, piece, offset: u64::from(offset), map: map.encode().into(), interest };
        let _ = saying.0.send(Say::Piece(sending));
    }

    async fn say(
        &self,
        inbound: Inbound,
        mut says: mpsc::UnboundedReceiver<Say>,
        parts: &mpsc::Sender<Result<Bytes, BrokenOff>>,
    ) -> Said {
        loop {
            let say = tokio::select! {
                say = says.recv() => say,
                () = parts.closed() => return Said::Hung,
            };
            let went = match say {
                None => return Said::Whole,
                Some(Say::Frame(frame)) => hand_over(parts, Record::Message(frame).encode()).await,
                Some(Say::Piece(sending)) => {
                    let piece = sending.piece;
                    match self.send_piece(sending, parts).await {
                        Some(true) => {
                            self.feed(Input::Sent { inbound, piece });
                            true
                        }
                        Some(false) => false,
                        None => {
                            let _ = parts.send(Err(BrokenOff)).await;
                            return Said::Hung;
                        }
                    }
                }
                Some(Say::Abort) => {
                    let _ = parts.send(Err(BrokenOff)).await;
                    return Said::Aborted;
                }
            };
            if !went {
                return Said::Hung;
            }
        }
    }

    /// Sends a piece; false if the asker is gone, none if the piece is.
    async fn send_piece(&self, sending: Sending, parts: &mpsc::Sender<Result<Bytes, BrokenOff>>) -> Option<bool> {
        let Sending { pin, object, piece, offset, map, mut interest } = sending;
        let extent = pin.extent(u64::from(piece));
        let mut at = extent.start + offset;
        let length = u32::try_from(extent.end.checked_sub(at)?).ok()?;
        let head = Record::Piece { piece, offset: u32::try_from(offset).ok()?, length };
        for record in [Record::Message(map), head] {
            if !hand_over(parts, record.encode()).await {
                return Some(false);
            }
        }
        while at < extent.end {
            let coming = match &mut interest {
                Some(interest) => match interest.after(at - extent.start).await {
                    Step::Bytes(bytes) => Some(bytes),
                    Step::End(End::Stored) => None,
                    Step::End(_) => return None,
                },
                None => None,
            };
            let bytes = match coming {
                Some(bytes) => bytes,
                None => {
                    interest = None;
                    let within = at..extent.end.min(at + self.limits.up.part(READ));
                    let (from, number) = (pin.clone(), u64::from(piece));
                    let read = tokio::task::spawn_blocking(move || from.read(number, within)).await.ok().flatten();
                    let Some(bytes) = read else {
                        self.feed(Input::Lost { object, piece });
                        return None;
                    };
                    bytes
                }
            };
            let mut rest = bytes;
            while !rest.is_empty() {
                let part = self.limits.up.part(rest.len() as u64);
                let part = rest.split_to(usize::try_from(part).unwrap_or(rest.len()));
                self.limits.up.take(part.len() as u64).await;
                at += part.len() as u64;
                if !hand_over(parts, part).await {
                    return Some(false);
                }
            }
        }
        // What just came from the registry is signed when it is whole.
        if let Some(mut interest) = interest
            && self.vouches.get(&object.0, piece).is_none()
        {
            let _ = interest.after(extent.end - extent.start).await;
        }
        let vouched = self.vouches.get(&object.0, piece)?;
        self.fetcher.metrics.to_peers.inc_by(u64::from(length));
        Some(hand_over(parts, Record::Vouch { piece, vouched }.encode()).await)
    }
}
