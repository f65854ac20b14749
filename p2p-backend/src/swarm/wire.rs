//! Messages as bytes: little endian, lengths before what they count, every length limited before memory is taken.
//!
//! A message begins with its version. A node understands its own version and the one before, and says what it cannot read
//! instead of guessing. Fields that a version does not know go to the end, and are skipped.

use super::grid::{MOST_PIECES, Mask, Object, Pieces};
use super::members::Peer;
use super::message::{
    Ask, Frame, HaveMap, Holder, MOST_HOLDERS, MOST_NEWS, MOST_OBJECTS, Manner, News, Other, Report, Summary, Urgency,
};
use nydus_rafs::Digest;

/// The version that we speak.
pub const VERSION: u8 = 1;
/// Bytes of an origin's name at most.
pub const MOST_ORIGIN: usize = 512;
/// Bytes of a message at most: a have-map of four maps of the largest object, and some.
pub const MOST_BYTES: usize = 5 * (MOST_PIECES as usize / 8) + 4096;

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It ends early.
    #[error("the message ends after {0} bytes, in the middle of a field")]
    Short(usize),
    /// It is longer than any message.
    #[error("a message of {0} bytes; the longest has {MOST_BYTES}")]
    Long(usize),
    /// Of a version that we do not know.
    #[error("version {0} of the swarm's messages; this node speaks {VERSION}: update the older node")]
    Version(u8),
    /// A value that the field cannot have.
    #[error("field `{0}` has a value that it cannot have")]
    Field(&'static str),
}

/// A message that can be bytes.
pub trait Message: Sized {
    /// Adds what follows the version.
    fn put(&self, to: &mut Vec<u8>);
    /// Reads what follows the version.
    fn take(from: &mut Bytes<'_>) -> Result<Self, WireError>;

    /// Returns the message as bytes.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION];
        self.put(&mut bytes);
        bytes
    }

    /// Reads a message; the bytes are a stranger's.
    fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > MOST_BYTES {
            return Err(WireError::Long(bytes.len()));
        }
        let mut from = Bytes { bytes, at: 0 };
        match from.u8()? {
            VERSION => Self::take(&mut from),
            other => Err(WireError::Version(other)),
        }
    }
}

/// Bytes that are read from the beginning on.
#[derive(Debug)]
pub struct Bytes<'b> {
    bytes: &'b [u8],
    at: usize,
}

impl<'b> Bytes<'b> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let rest = &self.bytes[self.at..];
        let (array, _) = rest.split_first_chunk::<N>().ok_or(WireError::Short(self.bytes.len()))?;
        self.at += N;
        Ok(*array)
    }

    fn slice(&mut self, length: usize) -> Result<&'b [u8], WireError> {
        let slice = self.bytes[self.at..].get(..length).ok_or(WireError::Short(self.bytes.len()))?;
        self.at += length;
        Ok(slice)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    fn peer(&mut self) -> Result<Peer, WireError> {
        self.array().map(Peer)
    }

    fn object(&mut self) -> Result<Object, WireError> {
        self.array().map(|bytes| Object(Digest(bytes)))
    }

    fn mask(&mut self) -> Result<Mask, WireError> {
        Mask::from_bits(self.u8()?).ok_or(WireError::Field("mask"))
    }

    fn flag(&mut self, name: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Field(name)),
        }
    }

    fn group(&mut self) -> Result<u32, WireError> {
        let group = self.u32()?;
        if group < MOST_PIECES / super::grid::GROUP { Ok(group) } else { Err(WireError::Field("group")) }
    }

    fn count(&mut self, most: usize, name: &'static str) -> Result<usize, WireError> {
        let count = usize::from(self.u16()?);
        if count <= most { Ok(count) } else { Err(WireError::Field(name)) }
    }

    fn pieces(&mut self) -> Result<Pieces, WireError> {
        let words = self.count(MOST_PIECES as usize / 64, "pieces")?;
        let bytes = self.slice(words * 8)?;
        let (words, _) = bytes.as_chunks::<8>();
        Ok(Pieces::from_words(words.iter().map(|word| u64::from_le_bytes(*word)).collect()))
    }
}

fn put_pieces(pieces: &Pieces, to: &mut Vec<u8>) {
    let words = pieces.words();
    put_count(words.len(), to);
    to.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// Lengths are limited where messages are made; what is longer is cut there.
fn put_count(count: usize, to: &mut Vec<u8>) {
    to.extend(u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes());
}

impl Message for Ask {
    fn put(&self, to: &mut Vec<u8>) {
        to.extend(self.object.0.0);
        to.extend(self.size.unwrap_or(u64::MAX).to_le_bytes());
        to.extend(self.group.to_le_bytes());
        to.push(self.mask.bits());
        to.extend(self.offset.to_le_bytes());
        to.push(match self.manner {
            Manner::Holder => 0,
            Manner::Home => 1,
            Manner::BytesOnly => 2,
            Manner::Spare => 3,
        });
        to.push(self.below);
        to.push(u8::from(self.urgency == Urgency::Demand));
        to.push(u8::from(self.can_read));
        put_count(self.origin.len(), to);
        to.extend(self.origin.as_bytes());
        put_pieces(&self.have, to);
        to.push(self.backlog);
    }

    fn take(from: &mut Bytes<'_>) -> Result<Self, WireError> {
        let object = from.object()?;
        let size = Some(from.u64()?).filter(|size| *size != u64::MAX);
        let (group, mask, offset) = (from.group()?, from.mask()?, from.u32()?);
        if mask.is_empty() {
            return Err(WireError::Field("mask"));
        }
        if offset > 0 && (mask.len() > 1 || u64::from(offset) >= super::grid::PIECE) {
            return Err(WireError::Field("offset"));
        }
        let manner = match from.u8()? {
            0 => Manner::Holder,
            1 => Manner::Home,
            2 => Manner::BytesOnly,
            3 => Manner::Spare,
            _ => return Err(WireError::Field("manner")),
        };
        let below = from.u8()?;
        let urgency = if from.flag("urgency")? { Urgency::Demand } else { Urgency::Prefetch };
        let can_read = from.flag("can_read")?;
        let length = from.count(MOST_ORIGIN, "origin")?;
        let origin = std::str::from_utf8(from.slice(length)?).map_err(|_| WireError::Field("origin"))?.into();
        let (have, backlog) = (from.pieces()?, from.u8()?);
        Ok(Self { object, size, origin, group, mask, offset, manner, below, urgency, can_read, have, backlog })
    }
}

impl Message for Frame {
    fn put(&self, to: &mut Vec<u8>) {
        let mut simple = |kind, mask: &Mask| to.extend([kind, mask.bits()]);
        match self {
            Self::Pending { mask, depth, retry_after } => {
                simple(0, mask);
                to.push(depth.map_or(0, |depth| depth.saturating_add(1)));
                to.extend(retry_after.to_le_bytes());
            }
            Self::Refer { mask, holders } | Self::Busy { mask, holders } => {
                simple(if matches!(self, Self::Refer { .. }) { 1 } else { 2 }, mask);
                put_count(holders.len(), to);
                for holder in holders {
                    to.extend(holder.peer.0);
                    to.extend([holder.have.bits(), holder.coming.bits(), holder.backlog]);
                }
            }
            Self::Gone { mask } => simple(3, mask),
            Self::Lease { mask } => simple(4, mask),
            Self::Denied { mask } => simple(5, mask),
            Self::Map(map) => {
                simple(6, &Mask::NONE);
                put_pieces(&map.have, to);
                put_pieces(&map.coming, to);
                to.push(map.backlog);
                put_count(map.others.len(), to);
                for other in &map.others {
                    to.extend(other.peer.0);
                    put_pieces(&other.have, to);
                    to.push(other.backlog);
                }
            }
        }
    }

    fn take(from: &mut Bytes<'_>) -> Result<Self, WireError> {
        let (kind, mask) = (from.u8()?, from.mask()?);
        Ok(match kind {
            0 => {
                let (depth, retry_after) = (from.u8()?.checked_sub(1), from.u32()?);
                Self::Pending { mask, depth, retry_after }
            }
            1 | 2 => {
                let count = from.count(MOST_HOLDERS, "holders")?;
                let holder = |from: &mut Bytes<'_>| {
                    let (peer, have, coming) = (from.peer()?, from.mask()?, from.mask()?);
                    Ok(Holder { peer, have, coming, backlog: from.u8()? })
                };
                let holders = (0..count).map(|_| holder(from)).collect::<Result<_, _>>()?;
                if kind == 1 { Self::Refer { mask, holders } } else { Self::Busy { mask, holders } }
            }
            3 => Self::Gone { mask },
            4 => Self::Lease { mask },
            5 => Self::Denied { mask },
            6 => {
                let (have, coming, backlog) = (from.pieces()?, from.pieces()?, from.u8()?);
                let count = from.count(MOST_HOLDERS, "others")?;
                let other =
                    |from: &mut Bytes<'_>| Ok(Other { peer: from.peer()?, have: from.pieces()?, backlog: from.u8()? });
                let others = (0..count).map(|_| other(from)).collect::<Result<_, _>>()?;
                Self::Map(HaveMap { have, coming, backlog, others })
            }
            _ => return Err(WireError::Field("kind")),
        })
    }
}

impl Message for Report {
    fn put(&self, to: &mut Vec<u8>) {
        to.push(self.backlog);
        put_count(self.news.len(), to);
        for news in &self.news {
            to.extend(news.object.0.0);
            to.extend(news.group.to_le_bytes());
            to.extend([news.have.bits(), news.reading.bits(), u8::from(news.all)]);
        }
    }

    fn take(from: &mut Bytes<'_>) -> Result<Self, WireError> {
        let backlog = from.u8()?;
        let count = from.count(MOST_NEWS, "news")?;
        let news = |from: &mut Bytes<'_>| {
            let (object, group, have, reading) = (from.object()?, from.group()?, from.mask()?, from.mask()?);
            Ok(News { object, group, have, reading, all: from.flag("all")? })
        };
        let news = (0..count).map(|_| news(from)).collect::<Result<_, _>>()?;
        Ok(Self { backlog, news })
    }
}

impl Message for Summary {
    fn put(&self, to: &mut Vec<u8>) {
        to.extend(self.generation.to_le_bytes());
        put_count(self.objects.len(), to);
        for (object, tenths) in &self.objects {
            to.extend(object.0.0);
            to.push(*tenths);
        }
        put_count(self.forgotten.len(), to);
        for (object, seconds) in &self.forgotten {
            to.extend(object.0.0);
            to.extend(seconds.to_le_bytes());
        }
    }

    fn take(from: &mut Bytes<'_>) -> Result<Self, WireError> {
        let generation = from.u64()?;
        let count = from.count(MOST_OBJECTS, "objects")?;
        let objects = (0..count).map(|_| Ok((from.object()?, from.u8()?))).collect::<Result<_, _>>()?;
        let count = from.count(MOST_OBJECTS, "forgotten")?;
        let forgotten = (0..count).map(|_| Ok((from.object()?, from.u32()?))).collect::<Result<_, _>>()?;
        Ok(Self { generation, objects, forgotten })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn mask() -> impl Strategy<Value = Mask> {
        (0..16_u8).prop_map(|bits| Mask::from_bits(bits).unwrap())
    }

    fn peer() -> impl Strategy<Value = Peer> {
        any::<[u8; 32]>().prop_map(Peer)
    }

    fn object() -> impl Strategy<Value = Object> {
        any::<[u8; 32]>().prop_map(|bytes| Object(Digest(bytes)))
    }

    fn pieces() -> impl Strategy<Value = Pieces> {
        vec(0..500_u32, 0..20).prop_map(|pieces| pieces.into_iter().collect())
    }

    fn ask() -> impl Strategy<Value = Ask> {
        let manner = prop::sample::select(vec![Manner::Holder, Manner::Home, Manner::BytesOnly, Manner::Spare]);
        let urgency = prop::sample::select(vec![Urgency::Prefetch, Urgency::Demand]);
        let what = (object(), option::of(0..u64::MAX), "[a-z./]{0,40}", 0..1000_u32, (1..16_u8, 0..1_u32 << 20));
        let how = (manner, any::<u8>(), urgency, any::<bool>(), pieces(), any::<u8>());
        (what, how).prop_map(|((object, size, origin, group, (bits, offset)), how)| {
            let (manner, below, urgency, can_read, have, backlog) = how;
            let mask = Mask::from_bits(bits).unwrap();
            let (offset, origin) = (if mask.len() == 1 { offset } else { 0 }, origin.into());
            Ask { object, size, origin, group, mask, offset, manner, below, urgency, can_read, have, backlog }
        })
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let holders = || {
            let holder = (peer(), mask(), mask(), any::<u8>());
            vec(holder.prop_map(|(peer, have, coming, backlog)| Holder { peer, have, coming, backlog }), 0..=3)
        };
        let other = (peer(), pieces(), any::<u8>()).prop_map(|(peer, have, backlog)| Other { peer, have, backlog });
        let map = (pieces(), pieces(), any::<u8>(), vec(other, 0..=3))
            .prop_map(|(have, coming, backlog, others)| Frame::Map(HaveMap { have, coming, backlog, others }));
        prop_oneof![
            (mask(), option::of(0..255_u8), any::<u32>()).prop_map(|(mask, depth, retry_after)| Frame::Pending {
                mask,
                depth,
                retry_after
            }),
            (mask(), holders()).prop_map(|(mask, holders)| Frame::Refer { mask, holders }),
            (mask(), holders()).prop_map(|(mask, holders)| Frame::Busy { mask, holders }),
            mask().prop_map(|mask| Frame::Gone { mask }),
            mask().prop_map(|mask| Frame::Lease { mask }),
            mask().prop_map(|mask| Frame::Denied { mask }),
            map,
        ]
    }

    fn report() -> impl Strategy<Value = Report> {
        let news = (object(), 0..1000_u32, mask(), mask(), any::<bool>())
            .prop_map(|(object, group, have, reading, all)| News { object, group, have, reading, all });
        (any::<u8>(), vec(news, 0..9)).prop_map(|(backlog, news)| Report { backlog, news })
    }

    fn summary() -> impl Strategy<Value = Summary> {
        (any::<u64>(), vec((object(), 0..=10_u8), 0..9), vec((object(), any::<u32>()), 0..9))
            .prop_map(|(generation, objects, forgotten)| Summary { generation, objects, forgotten })
    }

    fn survives<M: Message + PartialEq + std::fmt::Debug>(message: &M) {
        let bytes = message.encode();
        assert_eq!(M::decode(&bytes).as_ref(), Ok(message));
        // What a later version adds at the end is skipped; what is cut is an error and no panic.
        assert_eq!(M::decode(&[&bytes[..], b"later"].concat()).as_ref(), Ok(message));
        for end in 0..bytes.len() {
            assert_eq!(M::decode(&bytes[..end]), Err(WireError::Short(end)), "cut at {end}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(ask in ask(), frame in frame(), report in report(), summary in summary()) {
            survives(&ask);
            survives(&frame);
            survives(&report);
            survives(&summary);
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(mut bytes in vec(any::<u8>(), 0..200)) {
            if let Some(first) = bytes.first_mut() {
                *first = VERSION;
            }
            let _ = (Ask::decode(&bytes), Frame::decode(&bytes), Report::decode(&bytes), Summary::decode(&bytes));
        }
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_is_read() {
        assert_eq!(Frame::decode(&vec![VERSION; MOST_BYTES + 1]), Err(WireError::Long(MOST_BYTES + 1)));
        assert_eq!(Frame::decode(&[VERSION, 1, 1, 255, 255]), Err(WireError::Field("holders")));
        assert_eq!(Frame::decode(&[VERSION, 6, 0, 255, 255]), Err(WireError::Field("pieces")));
        assert_eq!(Frame::decode(&[VERSION + 1]), Err(WireError::Version(VERSION + 1)));
    }
}
