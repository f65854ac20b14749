//! What nodes say to each other about pieces. How it looks as bytes is `wire`'s.
//!
//! An [`Ask`] is the body of a request and names pieces of one group. The answer is a stream of [`Frame`]s and pieces that
//! ends when every piece that was asked for has been sent, referred or refused. [`Report`] and [`Summary`] expect no answer.

use std::sync::Arc;

use super::grid::{Mask, Object, Pieces};
use super::members::Peer;

/// Where the bytes come from in the end: `<registry>/<repository>`, as the first caller named it.
pub type Origin = Arc<str>;

/// How soon something is needed. Later ones overtake earlier ones everywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// Some time.
    Prefetch,
    /// Somebody waits.
    Demand,
}

/// As what a node is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Manner {
    /// As one who has it or will have it: bytes, busy, or gone.
    Holder,
    /// As the home: bytes, a referral, or patience while it is fetched.
    Home,
    /// As the home that has referred twice already, or to no good: bytes, or patience.
    BytesOnly,
    /// By another home that looks for copies: bytes that are there, or gone. Nothing is fetched.
    Spare,
}

/// A question for some pieces of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Of what.
    pub object: Object,
    /// The size of the object as stored, if the asker knows it.
    pub size: Option<u64>,
    /// Where it can be read.
    pub origin: Origin,
    /// The group.
    pub group: u32,
    /// The pieces.
    pub mask: Mask,
    /// Bytes of the first piece that the asker has got elsewhere; the answer goes on there. Only with a single piece.
    pub offset: u32,
    /// As what the other is asked.
    pub manner: Manner,
    /// One who waits for a piece itself may let the asker wait only if it stands above this depth, so that nobody waits in a circle.
    pub below: u8,
    /// How soon.
    pub urgency: Urgency,
    /// The asker's caller has a token that the registry accepted: it may be told to read the registry itself.
    pub can_read: bool,
    /// What the asker has: whoever is asked is somebody who will look for holders, too, or name them to others.
    pub have: Pieces,
    /// Pieces that the asker has to send.
    pub backlog: u8,
}

/// A node that has pieces of a group, or will.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// Who.
    pub peer: Peer,
    /// What it has.
    pub have: Mask,
    /// What is on its way to it.
    pub coming: Mask,
    /// Pieces that it has to send, as far as is known.
    pub backlog: u8,
}

/// What a node has of an object, and how busy it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HaveMap {
    /// Pieces that are there.
    pub have: Pieces,
    /// Pieces that are on their way.
    pub coming: Pieces,
    /// Pieces that it has to send.
    pub backlog: u8,
    /// Others that have some, as far as it knows.
    pub others: Vec<Other>,
}

/// What one node says of another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    /// Who.
    pub peer: Peer,
    /// What it has.
    pub have: Pieces,
    /// Pieces that it probably has to send.
    pub backlog: u8,
}

/// Who says what the bytes of a piece are: the one that took it from the registry, and signed its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vouch {
    /// Who.
    pub by: Peer,
    /// The BLAKE3 of the piece.
    pub sum: Sum,
}

/// The BLAKE3 of a piece.
pub type Sum = [u8; 32];

/// A part of the answer to an [`Ask`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Patience: these will come. Sent every [`pending`](super::Config::pending) to each who waits.
    Pending {
        /// Which pieces.
        mask: Mask,
        /// How many stand between the sender and the registry; none if it has the pieces and sends others first.
        depth: Option<u8>,
        /// How long the registry wants to be left alone, in milliseconds.
        retry_after: u32,
    },
    /// Others have these. Nothing more comes for them from here.
    Refer {
        /// Which pieces.
        mask: Mask,
        /// Up to [`MOST_HOLDERS`].
        holders: Vec<Holder>,
    },
    /// The sender has too much to do for these. It may know who has less to do; that is a hint and no referral.
    Busy {
        /// Which pieces.
        mask: Mask,
        /// Up to [`MOST_HOLDERS`].
        holders: Vec<Holder>,
    },
    /// The sender has not got these, and does not expect them.
    Gone {
        /// Which pieces.
        mask: Mask,
    },
    /// The registry lets the home not read these; the asker may, and shall do it now, for all.
    Lease {
        /// Which pieces.
        mask: Mask,
    },
    /// These will not be given: the origin is not one that this node reads, or the object was forgotten.
    Denied {
        /// Which pieces.
        mask: Mask,
    },
    /// What the sender has. Goes with every piece.
    Map(HaveMap),
}

impl Frame {
    /// Returns the pieces that it is about.
    pub fn mask(&self) -> Mask {
        match self {
            Self::Pending { mask, .. }
            | Self::Refer { mask, .. }
            | Self::Busy { mask, .. }
            | Self::Gone { mask }
            | Self::Lease { mask }
            | Self::Denied { mask } => *mask,
            Self::Map(_) => Mask::NONE,
        }
    }
}

/// Holders in a referral, and others in a have-map, at most.
pub const MOST_HOLDERS: usize = 3;

/// News about one group, for its home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Of what.
    pub object: Object,
    /// Which group.
    pub group: u32,
    /// What the sender has.
    pub have: Mask,
    /// What the sender reads from the registry under a lease.
    pub reading: Mask,
    /// Whether this is all that the sender has of the group: what the home believed beyond it is wrong.
    pub all: bool,
}

/// News for a home: finished pieces, leases, withdrawals.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Pieces that the sender has to send.
    pub backlog: u8,
    /// The news, at most [`MOST_NEWS`].
    pub news: Vec<News>,
}

/// News in one report at most.
pub const MOST_NEWS: usize = 1024;

/// What a node holds, for everybody; the newest one counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Summary {
    /// Rises with every life of the sender's cache; claims of an older one are void.
    pub generation: u64,
    /// Objects with at least one piece, and the tenths of them that are there; at most [`MOST_OBJECTS`].
    pub objects: Vec<(Object, u8)>,
    /// Objects that are to be forgotten, with the seconds that this still holds.
    pub forgotten: Vec<(Object, u32)>,
}

/// Objects in a summary at most.
pub const MOST_OBJECTS: usize = 4096;
