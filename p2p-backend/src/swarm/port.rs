//! What a driver tells the [`Swarm`](super::Swarm), and what it has to do for it.
//!
//! The driver has sockets, disks and a clock, and no opinion. It calls [`Swarm::step`](super::Swarm::step) with each thing
//! that happened, does every [`Output`] in order, and sends [`Input::Tick`] when [`Swarm::wake`](super::Swarm::wake) says so.
//! It may do outputs late (that is what a busy machine looks like), but it drops none, and it never invents an input.
//!
//! ```text
//!   readers ──Want──▶ ┌───────┐ ──Ask──▶ peers ──Frame, Bytes, Arrived, Ended──▶ back in
//!   peers ───Asked──▶ │ Swarm │ ──Answer, Send──▶ that peer ──Sent, Hung──▶ back in
//!   members, news ──▶ └───────┘ ──Read──▶ registry ──ReadBytes, ReadPiece, ReadEnded──▶ back in
//! ```

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::grid::{Object, Pieces};
use super::members::{Peer, View};
use super::message::{Ask, Frame, Origin, Report, Sum, Summary, Urgency, Vouch};

/// A request of ours to a peer, numbered by the swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Exchange(pub u64);

/// A peer's request to us, numbered by the driver; never twice the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inbound(pub u64);

/// A request of ours to a registry, numbered by the swarm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reading(pub u64);

/// Something that a local reader wants, numbered by the driver; never twice the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Want(pub u64);

/// Stands for the token of a local caller: a keyed hash, so that no token is in here. None is a caller without one.
pub type Caller = Option<[u8; 32]>;

/// Who reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reader {
    /// With whose right.
    pub caller: Caller,
    /// It compares what it gets with a digest of its own, so that wrong bytes do it no harm.
    pub verifies: bool,
    /// It was given wrong bytes by peers and wants the registry's.
    pub no_peer: bool,
}

/// In which order pieces are of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The first first: somebody reads on.
    InOrder,
    /// Any: they are all needed, and it is for the swarm to choose which come first.
    Any,
}

/// How a registry was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Credential {
    /// Anonymously, or with what this node's configuration has for the registry.
    Own,
    /// With the token of this local caller: the registry let it in, or says so now.
    Caller([u8; 32]),
}

impl Credential {
    /// Returns whose right it is.
    pub(super) fn caller(self) -> Caller {
        match self {
            Self::Own => None,
            Self::Caller(caller) => Some(caller),
        }
    }
}

/// How a request to a peer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Its last frame said so.
    Finished,
    /// It could not be connected to, or refused the request as such (another cluster key, not that peer, 5xx).
    Refused,
    /// The connection broke, or what came was no message.
    Broken,
}

/// How a request to a registry ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadEnd {
    /// All bytes came.
    Finished,
    /// 401, 403 or 404 for this credential.
    Denied,
    /// 429 or 503; how long it wants to be left alone (a second where it does not say).
    Later(Duration),
    /// An answer that makes no sense for this object: another size, nothing at this range, something that is no blob.
    Odd,
    /// Anything else: no connection, silence, 5xx, a body that ends early.
    Failed,
}

/// What a registry says about a caller and an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The caller may have it (2xx or a redirect that was not followed).
    Granted,
    /// It may not (401, 403, 404).
    Denied,
    /// No answer that says either (429, 5xx, silence).
    Unknown,
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// Time has passed.
    Tick,
    /// The members are these now. Changes within 100 ms should come as one.
    View(Arc<View>),

    /// A local reader wants pieces. What is there already may be left out, and does no harm.
    Want {
        /// Its number.
        want: Want,
        /// Of what.
        object: Object,
        /// Its size as stored, if known.
        size: Option<u64>,
        /// Where it can be read.
        origin: Origin,
        /// Which.
        pieces: Range<u32>,
        /// How soon.
        urgency: Urgency,
        /// In which order.
        order: Order,
        /// For whom.
        reader: Reader,
    },
    /// The reader has what it wanted, or is gone. Always sent, in the end.
    Unwant {
        /// Which.
        want: Want,
    },
    /// What the registry said to an [`Output::Check`]. What it says to an [`Output::Read`] with the same right is said by that.
    Checked {
        /// Whose right.
        caller: Caller,
        /// To what.
        object: Object,
        /// Where.
        origin: Origin,
        /// What it said.
        verdict: Verdict,
    },

    /// The cache has these, from an earlier life; each with who vouched for it. Before anything is asked of us.
    Restored {
        /// Of what.
        object: Object,
        /// Its size.
        size: Option<u64>,
        /// The pieces.
        pieces: Vec<(u32, Vouch)>,
        /// Whether the whole was compared with its digest once.
        sealed: bool,
    },
    /// The cache wants to delete an object, or parts could not be read any more. [`Output::Unlink`] follows when it may.
    Evict {
        /// Which.
        object: Object,
    },
    /// A piece that was kept cannot be read any more; it is as if it had never come.
    Lost {
        /// Of what.
        object: Object,
        /// Which.
        piece: u32,
    },
    /// The size of an object has become known.
    Sized {
        /// Which.
        object: Object,
        /// In bytes, as stored.
        size: u64,
    },
    /// All pieces are there, and the whole matches its digest.
    Sealed {
        /// Which.
        object: Object,
    },
    /// A reader that verifies, or the whole's digest, says that these pieces are wrong.
    Wrong {
        /// Of what.
        object: Object,
        /// Which.
        pieces: Pieces,
    },
    /// The operator wants this object forgotten everywhere.
    Forget {
        /// Which.
        object: Object,
        /// For how long, a day at most.
        lasts: Duration,
    },
    /// This node is to leave: nothing new is begun for others, and everybody is told.
    Drain,

    /// A member asks. `from` is proved.
    Asked {
        /// Who.
        from: Peer,
        /// The number of the request.
        inbound: Inbound,
        /// What.
        ask: Ask,
    },
    /// All bytes of a piece that we [sent](Output::Send) were taken by the other side's connection.
    Sent {
        /// On which request.
        inbound: Inbound,
        /// Which.
        piece: u32,
    },
    /// The asker hung up, or its connection broke. Not after [`Output::Close`].
    Hung {
        /// Which request.
        inbound: Inbound,
    },
    /// A member has news for a home. `from` is proved.
    Reported {
        /// Who.
        from: Peer,
        /// The news.
        report: Report,
    },
    /// A member tells everybody what it holds. `from` is its author.
    Summarized {
        /// Who.
        from: Peer,
        /// What.
        summary: Summary,
    },

    /// The peer whom we asked says something. A [`Frame::Map`] comes before the bytes of the piece that it goes with.
    Framed {
        /// To which request.
        exchange: Exchange,
        /// What.
        frame: Frame,
    },
    /// Bytes of a piece have come from a peer; at least once for the first byte, and then every 64 KiB or so.
    Bytes {
        /// On which request.
        exchange: Exchange,
        /// Which piece.
        piece: u32,
        /// How many of it are there now, those that came from others before included.
        got: u32,
    },
    /// All bytes of a piece have come from a peer. The driver has hashed them, and holds them until it is told to
    /// [keep](Output::Keep) or to [reject](Output::Reject) them.
    Arrived {
        /// On which request.
        exchange: Exchange,
        /// Which.
        piece: u32,
        /// The BLAKE3 of what came.
        sum: Sum,
        /// What the sender says that it is, if the signature on it is good.
        vouch: Option<Vouch>,
    },
    /// No more will come.
    Ended {
        /// On which request.
        exchange: Exchange,
        /// Why.
        end: End,
    },

    /// Bytes have come from the registry; at least once for the first byte of each piece, and every 64 KiB or so.
    ReadBytes {
        /// On which request.
        reading: Reading,
        /// Which piece.
        piece: u32,
        /// How many of it are there now.
        got: u32,
    },
    /// All bytes of a piece have come from the registry. The driver signs its hash in our name and stores it with the piece.
    ReadPiece {
        /// On which request.
        reading: Reading,
        /// Which.
        piece: u32,
        /// Its BLAKE3.
        sum: Sum,
    },
    /// No more will come.
    ReadEnded {
        /// On which request.
        reading: Reading,
        /// Why.
        end: ReadEnd,
    },
}

/// Why somebody is in quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blame {
    /// It sent bytes that are not what it said.
    Bytes,
    /// It signed a hash that is not that of the registry's bytes.
    Vouch,
    /// It signed two hashes for one piece.
    TwoVouches,
}

/// Why a piece cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The caller has no right to it. It gets no byte, of this or any other piece.
    Denied,
    /// The caller's right is not known, and the registry cannot be asked.
    Unproved,
    /// The registry refuses it to us and to everybody who asked us.
    Refused,
    /// Nobody has it, and the registry fails.
    Unavailable,
    /// It was forgotten.
    Forgotten,
}

/// Something to do.
#[derive(Debug, Clone)]
pub enum Output {
    /// Send an ask to a peer on a kept connection, or a new one; at most four per peer. Feed what comes back.
    Ask {
        /// Its number.
        exchange: Exchange,
        /// Whom.
        to: Peer,
        /// What.
        ask: Ask,
    },
    /// Take no more from this request: close its connection unless what is left of it is little. Nothing is fed for it any more.
    Leave {
        /// Which.
        exchange: Exchange,
    },
    /// Keep the bytes that arrived for this piece, on the disk and for those who wait. If the disk is full pass them on and
    /// feed [`Input::Lost`] when they are gone.
    Keep {
        /// On which request they came; none if from the registry.
        from: Option<Exchange>,
        /// Of what.
        object: Object,
        /// Which.
        piece: u32,
    },
    /// Forget what arrived for this piece on this request: it is not what it should be, or came too late.
    Reject {
        /// On which request.
        exchange: Exchange,
        /// Which.
        piece: u32,
    },
    /// Forget the kept bytes of these pieces, those on the disk too; nobody gets them any more.
    Drop {
        /// Of what.
        object: Object,
        /// Which.
        pieces: Pieces,
    },
    /// Readers that do not verify may have these now, too.
    Trust {
        /// Of what.
        object: Object,
        /// Which.
        pieces: Pieces,
    },

    /// Say this to the asker.
    Answer {
        /// On which request.
        inbound: Inbound,
        /// What.
        frame: Frame,
    },
    /// Send a piece to the asker from this offset on, with [`Frame::Map`] before it and our record of who vouches after
    /// it; if it is just coming from the registry, as it comes. Feed [`Input::Sent`].
    Send {
        /// On which request.
        inbound: Inbound,
        /// Of what.
        object: Object,
        /// Which.
        piece: u32,
        /// From which byte.
        offset: u32,
        /// What goes before it.
        map: Frame,
    },
    /// A piece that is being sent will not be completed: break the connection.
    Abort {
        /// Which request.
        inbound: Inbound,
    },
    /// The answer is whole.
    Close {
        /// Which request.
        inbound: Inbound,
    },

    /// Read neighbouring pieces from the registry in one ranged request. Feed what comes.
    Read {
        /// Its number.
        reading: Reading,
        /// Of what.
        object: Object,
        /// Its size, if known.
        size: Option<u64>,
        /// Where. It is one that the configuration allows.
        origin: Origin,
        /// Which.
        pieces: Range<u32>,
        /// Bytes of the first one that came from the registry before, and need not come again.
        offset: u32,
        /// As whom.
        credential: Credential,
    },
    /// Take no more from this request. Nothing is fed for it any more.
    StopRead {
        /// Which.
        reading: Reading,
    },
    /// Ask the registry whether this caller may have this object, beside all else, and feed [`Input::Checked`]; not needed if an
    /// [`Output::Read`] with the same right is answered first.
    Check {
        /// Who.
        caller: Caller,
        /// What.
        object: Object,
        /// Where.
        origin: Origin,
    },
    /// The reader may have bytes now. Before it, none; after it, each piece that is there and that it may believe.
    Grant {
        /// Which.
        want: Want,
    },
    /// The reader will not get these.
    Fail {
        /// Which reader.
        want: Want,
        /// Which pieces.
        pieces: Pieces,
        /// Why.
        why: Failure,
    },

    /// Bring news to a home. No answer is expected, and a loss does little harm.
    Report {
        /// To whom.
        to: Peer,
        /// What.
        report: Report,
    },
    /// Tell everybody.
    Gossip {
        /// What.
        summary: Summary,
    },
    /// The object is withdrawn and nobody is being sent it: its files may go.
    Unlink {
        /// Which.
        object: Object,
    },
    /// We are done with what we owed to others: the process may end.
    Drained,
    /// Log it: a member is not asked for a long time.
    Quarantine {
        /// Who.
        peer: Peer,
        /// Why.
        blame: Blame,
        /// Of what.
        object: Object,
        /// Which piece gave it away.
        piece: u32,
    },
    /// Log it: an object is whole. Compare it with its digest, and feed [`Input::Sealed`] or [`Input::Wrong`].
    Whole {
        /// Which.
        object: Object,
    },
    /// Count it.
    Count(Event),
}

/// Things worth counting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A second source was asked because the first was slow.
    Hedge,
    /// A source was left because it was silent.
    Silent,
    /// We went to the registry although we are not the home.
    Alone,
    /// We sent somebody on.
    Referral,
    /// We read for others what they cannot read, or let them read it.
    Lease,
}
