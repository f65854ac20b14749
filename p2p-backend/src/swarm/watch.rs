//! Patience and its end: sources that are silent, only promise or hardly send, and fetches that do not get on.

use std::time::Duration;

use super::ask::{RETRY, STUCK};
use super::blob::{Place, Vain, Via};
use super::message::Manner;
use super::port::{Event, Exchange, Output};
use super::{Swarm, Timer};

/// What sends fewer bytes per second drips.
const DRIP: u64 = 64 << 10;
/// Over so long that is measured.
const DRIP_TIME: Duration = Duration::from_millis(500);

impl Swarm {
    pub(super) fn watch_exchange(&mut self, exchange: Exchange) {
        let now = self.now;
        let hedge = self.standings.hedge(self.config.hedge);
        let silence = self.intake.silence(self.config.silence);
        let Some(asked) = self.asked.get(&exchange) else { return };
        let silent_at = asked.heard.unwrap_or(asked.at) + silence;
        let hedge_at = asked.at + hedge;
        let (patience, doubted) = (asked.at + STUCK, asked.doubted);
        let (object, group, mask, to) = (asked.object, asked.group, asked.mask, asked.to);
        if now >= silent_at {
            self.out.push(Output::Count(Event::Silent));
            self.bury(to);
            self.leave(exchange, Vain { until: now + RETRY, skip: true });
            return;
        }
        if now >= asked.deadline {
            // A home that promised, or anybody who dripped, for so long is as good as silent. Who waits itself is not to
            // blame, and gets more time: if whom it waits for is left, it may have the piece soon.
            if asked.manner != Manner::Holder || asked.flowing.is_some() {
                self.despair(to);
            }
            self.leave(exchange, Vain { until: now + RETRY, skip: true });
            return;
        }
        let drips = self.drips(exchange);
        let Some(asked) = self.asked.get(&exchange) else { return };
        let mut next = silent_at.min(asked.deadline);
        if asked.heard.is_none() && !asked.hedged {
            if now >= hedge_at {
                if let Some(asked) = self.asked.get_mut(&exchange) {
                    asked.hedged = true;
                }
                self.out.push(Output::Count(Event::Hedge));
                if let Some(blob) = self.blobs.get_mut(&object) {
                    mask.pieces(group).for_each(|piece| blob.hedge(piece));
                }
                self.dirty.insert(object);
            } else {
                next = next.min(hedge_at);
            }
        }
        if let Some(piece) = drips
            && let Some(blob) = self.blobs.get_mut(&object)
        {
            blob.hedge(piece);
            self.dirty.insert(object);
        }
        // Others came to us because they gave up on this one: we do not wait for as long as they did. And who waits itself
        // may wait in vain.
        if now >= patience && !doubted {
            let holder = self.asked.get(&exchange).is_some_and(|asked| asked.manner == Manner::Holder);
            let stands_in = holder || mask.pieces(group).any(|piece| self.stands_in(object, piece));
            if let Some(asked) = self.asked.get_mut(&exchange) {
                asked.doubted = true;
            }
            if let Some(blob) = self.blobs.get_mut(&object).filter(|_| stands_in) {
                mask.pieces(group).for_each(|piece| blob.hedge(piece));
                self.dirty.insert(object);
            }
        } else if !doubted {
            next = next.min(patience);
        }
        self.timer(next, Timer::Exchange(exchange));
    }

    /// Returns the piece that comes so slowly that somebody else is asked, too; once.
    pub(super) fn drips(&mut self, exchange: Exchange) -> Option<u32> {
        let now = self.now;
        let asked = self.asked.get_mut(&exchange)?;
        let piece = asked.flowing.filter(|_| !asked.drips)?;
        let (since, before) = asked.mark;
        let took = now.since(since);
        if took < DRIP_TIME {
            return None;
        }
        let came = u64::from(asked.got.saturating_sub(before));
        asked.mark = (now, asked.got);
        asked.drips = u128::from(came) * 1_000_000 < u128::from(DRIP) * took.as_micros();
        asked.drips.then_some(piece)
    }

    /// Looks whether a fetch gets on; one that does not will read the registry itself.
    pub(super) fn watch_fetch(&mut self, place: Place) {
        let now = self.now;
        let Some(blob) = self.blobs.get_mut(&place.object) else { return };
        let Some(fetch) = blob.fetches.get(&place.piece) else { return };
        let since = if fetch.begun.is_some() { fetch.progress } else { now };
        let end = since + (self.config.alone + fetch.patience);
        if now < end {
            self.timer(end, Timer::Fetch(place));
            return;
        }
        let reads = fetch.sources.iter().any(|via| matches!(via, Via::Read(_)));
        if !reads && !fetch.sources.is_empty() {
            blob.hedge(place.piece);
        }
        self.dirty.insert(place.object);
        self.timer(now + self.config.alone, Timer::Fetch(place));
    }
}
