//! One caller's way through a blob: pieces from the disk, from fetches in flight, and from those it starts itself.
//!
//! It looks a window ahead, so that the next request upstream is under way before the last one ends, and no further:
//! callers with open-ended ranges hang up when they have enough. Dropping it lets go of everything.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use bytes::Bytes;

use super::driver::Driver;
use super::fetch::{Errand, Fetcher, WINDOW};
use super::filling::{End, Interest, Step};
use super::metrics::Of;
use super::pieces::{Look, PIECE};
use super::quota::Pin;
use super::upstream::UpstreamError;

/// Bytes of one read from the disk.
const READ: u64 = 256 << 10;
/// Times that one piece is tried to be had before its reader gives up; each time something else went wrong.
const TRIES: u32 = 8;

/// A caller's way through a part of a blob.
#[derive(Debug)]
pub(super) struct Reader {
    fetcher: Arc<Fetcher>,
    pin: Pin,
    errand: Arc<Errand>,
    at: u64,
    end: u64,
    held: BTreeMap<u64, Interest>,
    /// The piece from which the window was last looked at.
    looked: Option<u64>,
    /// Pieces below it were dropped already for a caller that wants the registry's own bytes.
    cleaned: u64,
    tries: u32,
    /// Who knows what is proved, where this reader is given nothing else.
    prover: Option<Arc<Driver>>,
    /// It wants all of the blob, which proves itself in the end.
    whole: bool,
}

impl Reader {
    /// Begins at `range.start`, which must lie in the blob; `held` are pieces that are on their way on its behalf.
    pub(super) fn new(
        fetcher: Arc<Fetcher>,
        pin: Pin,
        errand: Arc<Errand>,
        range: Range<u64>,
        held: Vec<(u64, Interest)>,
    ) -> Self {
        fetcher.prove(&pin);
        let Range { start: at, end } = range;
        let pieces = at / PIECE..end.div_ceil(PIECE);
        let held: BTreeMap<u64, Interest> = held.into_iter().filter(|(piece, _)| pieces.contains(piece)).collect();
        let cleaned = held.keys().last().map_or(pieces.start, |last| last + 1);
        let driver = fetcher.driver.get().and_then(Weak::upgrade);
        let prover = driver.filter(|driver| driver.wants_proof() && !errand.verifies);
        let whole = at == 0 && end == pin.size();
        Self { fetcher, pin, errand, at, end, held, looked: None, cleaned, tries: 0, prover, whole }
    }

    /// Returns how many bytes are still to come.
    pub(super) fn left(&self) -> u64 {
        self.end - self.at
    }

    /// Returns the next bytes, or none at the end. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Arc<UpstreamError>> {
        while self.at < self.end {
            let piece = self.at / PIECE;
            if self.looked != Some(piece) {
                self.look_ahead(piece).await?;
            }
            let extent = self.pin.extent(piece);
            // What is not proved is waited for to its end.
            let from = if self.prover.is_some() { extent.end } else { self.at } - extent.start;
            let got = match self.held.get_mut(&piece) {
                Some(interest) => match interest.after(from).await {
                    Step::Bytes(bytes) => Some(bytes),
                    Step::End(end) => {
                        let other = interest.launch().key != self.errand.key;
                        self.held.remove(&piece);
                        match end {
                            End::Stored => None,
                            // The refusal of somebody else's token says nothing about ours.
                            End::Failed(error) if !(error.is_refusal() && other) => return Err(error),
                            End::Failed(_) | End::Unstored | End::Abandoned => {
                                self.again()?;
                                continue;
                            }
                        }
                    }
                },
                None => None,
            };
            if got.is_none() && !self.proved(piece).await {
                self.again()?;
                continue;
            }
            let got = match got {
                Some(bytes) => Some(bytes),
                None => self.read(piece).await,
            };
            let Some(mut bytes) = got else {
                self.again()?;
                continue;
            };
            bytes.truncate(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
            self.at += bytes.len() as u64;
            self.tries = 0;
            return Ok(Some(bytes));
        }
        self.held.clear();
        Ok(None)
    }

    /// Notes that the piece must be looked for anew.
    fn again(&mut self) -> Result<(), Arc<UpstreamError>> {
        self.looked = None;
        self.tries += 1;
        if self.tries < TRIES {
            return Ok(());
        }
        let reason = format!("piece {} could not be had in {TRIES} tries", self.at / PIECE);
        Err(Arc::new(UpstreamError::Odd { by: self.errand.registry.clone(), reason }))
    }

    /// Whether a piece that is here may be given to this reader, who may have to wait for that.
    async fn proved(&self, piece: u64) -> bool {
        match &self.prover {
            None => true,
            Some(driver) if self.whole => driver.believed(&self.pin, piece).await,
            Some(driver) => driver.believes(&self.pin, piece),
        }
    }

    async fn read(&self, piece: u64) -> Option<Bytes> {
        let extent = self.pin.extent(piece);
        let within = self.at..extent.end.min(self.end).min(self.at + READ);
        let pin = self.pin.clone();
        let bytes = tokio::task::spawn_blocking(move || pin.read(piece, within)).await.ok()??;
        self.fetcher.metrics.bytes.get_or_create(&Of { source: "cache" }).inc_by(bytes.len() as u64);
        Some(bytes)
    }

    async fn look_ahead(&mut self, piece: u64) -> Result<(), Arc<UpstreamError>> {
        self.held = self.held.split_off(&piece);
        // What failed before we came is no answer to us.
        self.held.retain(|_, interest| !interest.failed());
        let end = (piece + WINDOW).min((self.end - 1) / PIECE + 1);
        for piece in (piece..end).filter(|piece| self.must_clean(*piece)) {
            // All of them first, so that they are asked for in one request.
            if let Look::Ready = self.pin.look(piece)
                && let Some(giver) = self.pin.drop_piece(piece)
            {
                tracing::warn!(
                    digest = %self.pin.digest(), piece, ?giver,
                    "a reader says that this piece does not verify; reading it from the registry"
                );
            }
        }
        let mut next = piece;
        while next < end {
            if self.held.contains_key(&next) {
                next += 1;
                continue;
            }
            match self.pin.look(next) {
                // Somebody fetched it since.
                Look::Ready if self.must_clean(next) => {
                    self.pin.drop_piece(next);
                }
                // A member's word for it is not enough, and nothing else will come: the registry's own bytes will do.
                Look::Ready if self.must_prove(next) => {
                    self.pin.drop_piece(next);
                }
                Look::Ready => next += 1,
                Look::Filling(mut interest) => {
                    let at_registry = interest.launch().at_registry.load(Ordering::Relaxed);
                    if self.must_clean(next) && !at_registry {
                        if next > piece {
                            break;
                        }
                        // Not what we came for; it will be dropped when it is there.
                        let length = self.pin.extent(next).end - self.pin.extent(next).start;
                        let _ = interest.after(length).await;
                        continue;
                    }
                    if !self.errand.hops.is_empty() && !at_registry {
                        if next > piece {
                            break;
                        }
                        return Err(Arc::new(UpstreamError::Entangled));
                    }
                    self.fetcher.metrics.joins.inc();
                    self.cleaned = self.cleaned.max(next + 1);
                    self.held.insert(next, interest);
                    next += 1;
                }
                // Far enough ahead, it can wait until more of it is wanted at once.
                Look::Absent if next > piece + WINDOW / 2 => break,
                Look::Absent => {
                    let last = (self.end - 1) / PIECE + 1;
                    // What has to be whole to be proved is asked for as a whole.
                    let until = if self.prover.is_some() && self.whole { last } else { (next + WINDOW).min(last) };
                    for (number, interest) in self.fetcher.launch(&self.pin, &self.errand, next..until) {
                        self.cleaned = self.cleaned.max(number + 1);
                        self.held.insert(number, interest);
                    }
                }
            }
        }
        self.looked = Some(piece);
        Ok(())
    }

    fn must_prove(&self, piece: u64) -> bool {
        self.prover.as_ref().is_some_and(|driver| !self.whole && !driver.believes(&self.pin, piece))
    }

    fn must_clean(&self, piece: u64) -> bool {
        self.errand.no_peer && piece >= self.cleaned
    }
}
