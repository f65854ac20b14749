//! Network cards: each sends in turn what its flows have, and receives in the order of arrival.

/// Bytes per second of 1 Gbit/s.
pub const GIGABIT: u64 = 125_000_000;

/// One direction of a card.
#[derive(Debug, Clone, Copy)]
pub struct Line {
    /// Bytes per second.
    pub rate: u64,
    free: u64,
    /// Bytes that went through it.
    pub carried: u64,
}

impl Line {
    /// Returns an idle line.
    pub fn new(rate: u64) -> Self {
        Self { rate, free: 0, carried: 0 }
    }

    /// Puts bytes on the line at `now`; returns when the last of them is through, in microseconds.
    pub fn carry(&mut self, now: u64, bytes: u64) -> u64 {
        self.carried += bytes;
        self.free = self.free.max(now) + (bytes * 1_000_000).div_ceil(self.rate);
        self.free
    }
}

/// What a flow is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cargo {
    /// A piece in answer to a call.
    Call(u64),
    /// What a node reads from the registry, by that node and the number of its request.
    Read(usize, u64),
}

/// Bytes that are under way from one card to another.
#[derive(Debug)]
pub struct Flow {
    /// Whose; none is the registry.
    pub from: Option<usize>,
    /// To whom.
    pub to: usize,
    /// For what.
    pub cargo: Cargo,
    /// The object, by number.
    pub object: u32,
    /// The piece whose bytes come next out of the sender.
    pub piece: u32,
    /// Its bytes that have left.
    pub left_at: u64,
    /// The piece whose bytes come next to the receiver.
    pub landing: u32,
    /// Its bytes that have arrived.
    pub landed: u64,
    /// One past the last piece.
    pub end: u32,
    /// Segments between the two cards.
    pub in_flight: u32,
    /// One is in the sender's line, or none can be sent now.
    pub queued: bool,
    /// When the receiver's driver last told how far it is.
    pub told: u64,
    /// It was stopped.
    pub dead: bool,
}

/// Segments that a flow has under way at most: a window of 256 KiB.
pub const WINDOW: u32 = 4;
