//! Our requests to members, and what comes back.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use tokio::task::AbortHandle;

use super::flights::Draft;
use super::{Driver, Mind, view};
use crate::node::{Answer, Record, Records, Vouched};
use crate::swarm::grid::PIECE;
use crate::swarm::message::{Ask, Frame, Vouch};
use crate::swarm::port::{End, Exchange, Input};
use crate::swarm::wire::Message as _;
use crate::swarm::{Object, Peer};

/// How often the swarm hears that bytes come.
const STEP: usize = 64 << 10;

/// A request that is out.
#[derive(Debug)]
pub(super) struct Asking {
    to: Peer,
    task: AbortHandle,
    /// Pieces that have come whole and wait for what becomes of them.
    arrived: HashMap<u32, Arrived>,
}

/// A piece that has come whole.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) from: Peer,
    pub(super) bytes: Bytes,
    pub(super) vouched: Vouched,
}

impl Asking {
    /// Takes no more from it.
    pub(super) fn leave(self) {
        self.task.abort();
    }

    /// Takes a piece that has come out of it.
    pub(super) fn take(&mut self, piece: u32) -> Option<Arrived> {
        self.arrived.remove(&piece)
    }
}

/// A piece that is coming.
struct Coming {
    piece: u32,
    draft: Draft,
    told: usize,
    left: u32,
}

/// Receives the answer to one ask.
struct Receiver {
    driver: Arc<Driver>,
    exchange: Exchange,
    object: Object,
    size: Option<u64>,
    coming: Option<Coming>,
}

impl Driver {
    pub(super) fn ask(self: &Arc<Self>, mind: &mut Mind, exchange: Exchange, to: Peer, ask: Ask) {
        let member = self.node().and_then(|node| view::find(&node.table(), &to));
        let Some(member) = member else {
            mind.inputs.push_back(Input::Ended { exchange, end: End::Refused });
            return;
        };
        tracing::trace!(%to, ?exchange, group = ask.group, mask = ?ask.mask, manner = ?ask.manner, "asking a member");
        let own = self.clone();
        let mut receiver =
            Receiver { driver: self.clone(), exchange, object: ask.object, size: ask.size, coming: None };
        let task = self.spawn(async move {
            let Some(node) = own.node() else { return };
            let end = match node.ask(&member, ask.encode().into()).await {
                Ok(answer) => receiver.receive(answer).await,
                Err(error) => {
                    tracing::debug!(%to, %error, "could not ask a member");
                    End::Refused
                }
            };
            receiver.end(end);
        });
        mind.asking.insert(exchange, Asking { to, task, arrived: HashMap::new() });
    }
}

impl Receiver {
    async fn receive(&mut self, mut answer: Answer) -> End {
        let mut records = Records::default();
        loop {
            match answer.next().await {
                Ok(Some(part)) => {
                    self.driver.limits.down.take(part.len() as u64).await;
                    records.push(part);
                    loop {
                        match records.read() {
                            Ok(Some(record)) => {
                                if !self.take(record) {
                                    return End::Broken;
                                }
                            }
                            Ok(None) => break,
                            Err(error) => {
                                tracing::debug!(%error, "a member answers nonsense");
                                return End::Broken;
                            }
                        }
                    }
                }
                Ok(None) if records.is_between() => {
                    self.arrive(None);
                    return End::Finished;
                }
                Ok(None) | Err(_) => return End::Broken,
            }
        }
    }

    /// Takes the next thing in the answer; false if it cannot be there.
    fn take(&mut self, record: Record) -> bool {
        match record {
            Record::Message(message) => {
                self.arrive(None);
                let Ok(frame) = Frame::decode(&message) else { return false };
                tracing::trace!(exchange = ?self.exchange, ?frame, "a member says");
                self.driver.feed(Input::Framed { exchange: self.exchange, frame });
            }
            Record::Piece { piece, offset, length } => {
                self.arrive(None);
                let whole = self.size.map(|size| size.saturating_sub(u64::from(piece) * PIECE).min(PIECE));
                let end = u64::from(offset) + u64::from(length);
                if end > PIECE || whole.is_some_and(|whole| whole != end) {
                    return false;
                }
                let draft = self.driver.mind().flights.draft(&self.object.0, piece, offset as usize);
                let Some(draft) = draft else { return false };
                self.coming = Some(Coming { piece, draft, told: 0, left: length });
            }
            Record::Bytes(bytes) => {
                let Some(coming) = &mut self.coming else { return false };
                let got = {
                    let mut draft = coming.draft.lock().unwrap_or_else(PoisonError::into_inner);
                    draft.extend_from_slice(&bytes);
                    draft.len()
                };
                coming.left = coming.left.saturating_sub(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                if coming.told == 0 || got >= coming.told + STEP {
                    coming.told = got;
                    let (piece, got) = (coming.piece, u32::try_from(got).unwrap_or(u32::MAX));
                    self.driver.feed(Input::Bytes { exchange: self.exchange, piece, got });
                }
            }
            Record::Vouch { piece, vouched } => {
                if self.coming.as_ref().is_none_or(|coming| coming.piece != piece || coming.left > 0) {
                    return false;
                }
                self.arrive(Some(vouched));
            }
        }
        true
    }

    /// The piece that was coming is here, or never will be whole.
    fn arrive(&mut self, vouched: Option<Vouched>) {
        let Some(Coming { piece, draft, left, .. }) = self.coming.take() else { return };
        let (exchange, object) = (self.exchange, self.object);
        if left > 0 {
            return self.driver.mind().flights.break_off(&object.0, piece, &draft);
        }
        let bytes = Bytes::from(std::mem::take(&mut *draft.lock().unwrap_or_else(PoisonError::into_inner)));
        let sum = *blake3::hash(&bytes).as_bytes();
        let vouched = vouched.filter(|vouched| vouched.holds(&object.0, piece));
        let vouch = vouched.map(|vouched| Vouch { by: vouched.by, sum: vouched.sum });
        let mut mind = self.driver.mind();
        if let Some((asking, vouched)) = mind.asking.get_mut(&exchange).zip(vouched) {
            let from = asking.to;
            asking.arrived.insert(piece, Arrived { from, bytes, vouched });
        }
        self.driver.feed_all(&mut mind, [Input::Arrived { exchange, piece, sum, vouch }]);
    }

    fn end(&mut self, end: End) {
        self.break_off();
        tracing::trace!(exchange = ?self.exchange, ?end, "an ask ended");
        let mut mind = self.driver.mind();
        self.driver.feed_all(&mut mind, [Input::Ended { exchange: self.exchange, end }]);
        mind.asking.remove(&self.exchange);
    }

    fn break_off(&mut self) {
        if let Some(coming) = self.coming.take() {
            self.driver.mind().flights.break_off(&self.object.0, coming.piece, &coming.draft);
        }
    }
}

impl Drop for Receiver {
    /// A request that is left has sent something, too.
    fn drop(&mut self) {
        self.break_off();
    }
}
