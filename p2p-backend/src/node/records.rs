//! The body of an answer to an ask: messages, bytes of pieces, and who vouches for them.
//!
//! ```text
//!     1  length u32  message                                    a swarm::Frame
//!     2  piece u32  offset u32  length u32  bytes[length]       a piece from `offset` to its end
//!     3  piece u32  vouch by[32] sum[32] signature[64]          after the bytes of the piece
//! ```
//!
//! Numbers are little endian. The reader takes the body in whatever parts it comes, holds back no byte of a piece, and nothing else
//! that is longer than a message may be.

use bytes::{Buf as _, Bytes, BytesMut};

use super::peer::{Peer, Signature};
use super::vouching::Vouched;

/// Bytes of a message at most; the longest is a have-map of the largest object.
const MOST_MESSAGE: usize = 1 << 20;
const PIECE_BYTES: u32 = 1 << 20;

/// Something in a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A message of the swarm's.
    Message(Bytes),
    /// A piece begins.
    Piece {
        /// Which.
        piece: u32,
        /// From which of its bytes on.
        offset: u32,
        /// How many come.
        length: u32,
    },
    /// The next bytes of the piece that has begun.
    Bytes(Bytes),
    /// Who says what the piece is.
    Vouch {
        /// Which.
        piece: u32,
        /// Who, and what; not checked.
        vouched: Vouched,
    },
}

/// Why a body is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A kind that we do not know.
    #[error("a record of kind {0}")]
    Kind(u8),
    /// A length that cannot be.
    #[error("a record of {0} bytes")]
    Length(u32),
}

impl Record {
    /// Returns the record as bytes; those of a piece follow it as they are.
    pub fn encode(&self) -> Bytes {
        let mut to = BytesMut::new();
        match self {
            Self::Message(message) => {
                to.extend([1]);
                to.extend(u32::try_from(message.len()).unwrap_or(u32::MAX).to_le_bytes());
                to.extend(message);
            }
            Self::Piece { piece, offset, length } => {
                to.extend([2]);
                to.extend([piece, offset, length].iter().flat_map(|number| number.to_le_bytes()));
            }
            Self::Bytes(bytes) => return bytes.clone(),
            Self::Vouch { piece, vouched } => {
                to.extend([3]);
                to.extend(piece.to_le_bytes());
                to.extend(vouched.by.0);
                to.extend(vouched.sum);
                to.extend(vouched.signature.0);
            }
        }
        to.freeze()
    }
}

/// Reads records from the parts of a body.
#[derive(Debug, Default)]
pub struct Records {
    waiting: BytesMut,
    part: Bytes,
    /// Bytes of the piece that has begun.
    left: u32,
}

impl Records {
    /// Takes in the next part of the body. The one before must have been [read](Self::read) to its end.
    pub fn push(&mut self, part: Bytes) {
        debug_assert!(self.part.is_empty(), "a part is read before the next one is pushed");
        self.part = part;
    }

    /// Whether the body may end here.
    pub fn is_between(&self) -> bool {
        self.left == 0 && self.waiting.is_empty() && self.part.is_empty()
    }

    /// Returns the next record, or none until there is another part.
    pub fn read(&mut self) -> Result<Option<Record>, RecordError> {
        if self.left > 0 {
            let take = self.part.len().min(self.left as usize);
            if take == 0 {
                return Ok(None);
            }
            self.left -= take as u32;
            return Ok(Some(Record::Bytes(self.part.split_to(take))));
        }
        let Some(kind) = self.waiting.first().or(self.part.first()).copied() else { return Ok(None) };
        let head = match kind {
            1 => 5,
            2 => 13,
            3 => 5 + 128,
            other => return Err(RecordError::Kind(other)),
        };
        if !self.gather(head) {
            return Ok(None);
        }
        let number = |at: usize| {
            let bytes = self.waiting[at..at + 4].try_into().expect("a head was gathered");
            u32::from_le_bytes(bytes)
        };
        let record = match kind {
            1 => {
                let length = number(1);
                if length as usize > MOST_MESSAGE {
                    return Err(RecordError::Length(length));
                }
                if !self.gather(head + length as usize) {
                    return Ok(None);
                }
                Record::Message(self.waiting.split().freeze().slice(head..))
            }
            2 => {
                let (piece, offset, length) = (number(1), number(5), number(9));
                if offset > PIECE_BYTES || length > PIECE_BYTES - offset {
                    return Err(RecordError::Length(length));
                }
                self.left = length;
                Record::Piece { piece, offset, length }
            }
            _ => {
                let part = |from: usize, to: usize| &self.waiting[from..to];
                let by = Peer(part(5, 37).try_into().expect("32 bytes"));
                let sum = part(37, 69).try_into().expect("32 bytes");
                let signature = Signature(part(69, 133).try_into().expect("64 bytes"));
                Record::Vouch { piece: number(1), vouched: Vouched { by, sum, signature } }
            }
        };
        self.waiting.clear();
        Ok(Some(record))
    }

    /// Whether `length` bytes are waiting now.
    fn gather(&mut self, length: usize) -> bool {
        let take = length.saturating_sub(self.waiting.len()).min(self.part.len());
        self.waiting.extend_from_slice(&self.part[..take]);
        self.part.advance(take);
        self.waiting.len() >= length
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> impl Strategy<Value = Vec<Record>> {
        let bytes = |most| prop::collection::vec(any::<u8>(), 0..most).prop_map(Bytes::from);
        let vouched = (any::<[u8; 32]>(), any::<[u8; 32]>(), any::<[u8; 32]>())
            .prop_map(|(by, sum, half)| [by, sum, half])
            .prop_map(|[by, sum, half]| {
                let signature = Signature([half, half].concat().try_into().unwrap());
                Vouched { by: Peer(by), sum, signature }
            });
        prop_oneof![
            bytes(300).prop_map(|message| vec![Record::Message(message)]),
            (any::<u32>(), 0..1000_u32, bytes(2000)).prop_map(|(piece, offset, bytes)| {
                let head = Record::Piece { piece, offset, length: bytes.len() as u32 };
                if bytes.is_empty() { vec![head] } else { vec![head, Record::Bytes(bytes)] }
            }),
            (any::<u32>(), vouched).prop_map(|(piece, vouched)| vec![Record::Vouch { piece, vouched }]),
        ]
    }

    /// Joins neighbouring bytes, which come in whatever parts.
    fn joined(records: Vec<Record>) -> Vec<Record> {
        let mut all: Vec<Record> = Vec::new();
        for record in records {
            match (all.last_mut(), record) {
                (Some(Record::Bytes(before)), Record::Bytes(bytes)) => *before = [&before[..], &bytes].concat().into(),
                (_, record) => all.push(record),
            }
        }
        all
    }

    proptest! {
        #[test]
        fn a_body_is_read_whatever_the_parts(records in prop::collection::vec(record(), 0..8), cuts in prop::collection::vec(1..700_usize, 1..9)) {
            let records = records.concat();
            let mut body: Bytes = records.iter().flat_map(Record::encode).collect::<Vec<u8>>().into();
            let (mut reader, mut read, mut cuts) = (Records::default(), Vec::new(), cuts.iter().cycle());
            while !body.is_empty() {
                reader.push(body.split_to((*cuts.next().unwrap()).min(body.len())));
                while let Some(record) = reader.read().unwrap() {
                    read.push(record);
                }
            }
            prop_assert!(reader.is_between());
            prop_assert_eq!(joined(read), joined(records));
        }

        #[test]
        fn any_bytes_are_records_or_an_error_and_little_is_held(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..9)) {
            let mut reader = Records::default();
            for part in parts {
                reader.push(part.into());
                while let Ok(Some(_)) = reader.read() {}
                reader.part.clear();
                prop_assert!(reader.waiting.len() <= 500);
            }
        }
    }

    #[test]
    fn what_is_too_long_is_refused_by_its_head() {
        let refused = |head: &[u8]| {
            let mut reader = Records::default();
            reader.push(head.to_vec().into());
            reader.read()
        };
        assert_eq!(refused(&[1, 0, 0, 0x20, 0]), Err(RecordError::Length(0x20_0000)));
        assert_eq!(refused(&[2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0x10, 0]), Err(RecordError::Length(0x10_0000)));
        assert_eq!(refused(&[4]), Err(RecordError::Kind(4)));
    }
}
