//! Inflates a part of a gzip stream from the middle.
//!
//! A random-access point names the bytes to feed, the plain bytes that deflate may look back to, and, since
//! deflate counts bits, how many upper bits of the byte before belong to the point. zlib has calls for both,
//! which the safe interface of our inflater lacks. It needs neither: the same state is reached by putting
//! ordinary deflate blocks before the point, one that holds the dictionary as it is, and empty ones whose
//! lengths add up to the wanted number of bits.

use flate2::{Decompress, FlushDecompress, Status};

use crate::blob::table::Point;
use crate::codec::DecodeError;

/// An empty block of fixed codes, from the lowest bit on: not the last, fixed codes, end of block.
const EMPTY_FIXED: (u128, u32) = (0b010, 10);

/// Inflates what lies between a point and the next.
pub(crate) fn inflate(point: &Point, stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
    let skip = point.dictionary.len();
    let wanted = skip + point.plain_size as usize;
    let mut plain = Vec::with_capacity(wanted);
    let mut inflater = Decompress::new(false);
    step(&mut inflater, &lead_in(point), &mut plain)?;
    let mut rest = stored;
    while plain.len() < wanted {
        let (used, status) = step(&mut inflater, rest, &mut plain)?;
        rest = &rest[used..];
        if status == Status::StreamEnd {
            // Where a gzip member ends within the point another begins, without a window of its own.
            rest = rest.get(8..).and_then(after_header).unwrap_or_default();
            inflater.reset(false);
        } else if used == 0 || rest.is_empty() {
            break;
        }
    }
    if plain.len() != wanted {
        return Err(DecodeError::Length { wanted: wanted - skip, found: plain.len().saturating_sub(skip) });
    }
    plain.drain(..skip);
    Ok(plain)
}

/// Inflates into the spare room of `plain`; returns how many bytes were used.
fn step(inflater: &mut Decompress, input: &[u8], plain: &mut Vec<u8>) -> Result<(usize, Status), DecodeError> {
    let before = inflater.total_in();
    let status = inflater
        .decompress_vec(input, plain, FlushDecompress::None)
        .map_err(|source| DecodeError::Invalid { codec: "deflate", source: source.into() })?;
    // Never more than the length of the input.
    Ok(((inflater.total_in() - before) as usize, status))
}

/// Bits, the lowest of each byte first, as deflate has them.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    count: u32,
}

impl Bits {
    fn push(&mut self, value: u128, count: u32) {
        for bit in 0..count {
            if self.count.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if let Some(last) = self.bytes.last_mut() {
                *last |= ((value >> bit & 1) as u8) << (self.count % 8);
            }
            self.count += 1;
        }
    }
}

/// Makes whole bytes of deflate that leave an inflater in the state that it has at the point.
fn lead_in(point: &Point) -> Vec<u8> {
    let mut bits = Bits::default();
    if !point.dictionary.is_empty() {
        // A stored block: header, lengths from the next byte on, bytes. Dictionaries have at most 32 KiB.
        let len = point.dictionary.len() as u16;
        bits.push(0, 8);
        bits.bytes.extend_from_slice(&len.to_le_bytes());
        bits.bytes.extend_from_slice(&(!len).to_le_bytes());
        bits.bytes.extend_from_slice(&point.dictionary);
    }
    if point.bits == 0 {
        return bits.bytes;
    }
    let missing = 8 - u32::from(point.bits);
    bits.count = 0;
    if missing % 2 == 1 {
        empty_dynamic(&mut bits);
    }
    while bits.count % 8 != missing {
        bits.push(EMPTY_FIXED.0, EMPTY_FIXED.1);
    }
    bits.push(u128::from(point.byte >> missing), u32::from(point.bits));
    bits.bytes
}

/// Pushes an empty block with codes of its own, of 99 bits: the shortest way to an odd number of them.
fn empty_dynamic(bits: &mut Bits) {
    // Not the last, dynamic codes; 257 literals, 1 distance, 18 lengths of code lengths.
    bits.push(0b100, 3);
    bits.push(0, 5);
    bits.push(0, 5);
    bits.push(14, 4);
    // In the order 16 17 18 0 8 7 9 6 10 5 11 4 12 3 13 2 14 1: two bits each for 17, 18, 0 and 1.
    for length in [0, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2] {
        bits.push(length, 3);
    }
    // Codes count up in the order 0, 1, 17, 18 and are stored with the highest bit first.
    let (zero, one, few, many) = (0b00, 0b10, 0b01, 0b11);
    bits.push(many, 2);
    bits.push(138 - 11, 7);
    bits.push(many, 2);
    bits.push(108 - 11, 7);
    bits.push(few, 2);
    bits.push(10 - 3, 3);
    // The end of block alone has a code, of one bit; the distance has none.
    bits.push(one, 2);
    bits.push(zero, 2);
    bits.push(0, 1);
}

/// Returns what follows a gzip header.
fn after_header(bytes: &[u8]) -> Option<&[u8]> {
    let flags = *bytes.get(3)?;
    if bytes[..3] != [0x1f, 0x8b, 8] {
        return None;
    }
    let mut rest = bytes.get(10..)?;
    if flags & 4 != 0 {
        let len = usize::from(u16::from_le_bytes([*rest.first()?, *rest.get(1)?]));
        rest = rest.get(2 + len..)?;
    }
    for text in [8, 16] {
        if flags & text != 0 {
            rest = rest.get(rest.iter().position(|&byte| byte == 0)? + 1..)?;
        }
    }
    if flags & 2 != 0 { rest.get(2..) } else { Some(rest) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_lead_in_leaves_dictionary_and_bits(
            dictionary in prop::collection::vec(any::<u8>(), 0..300),
            bits in 0u8..8,
            text in prop::collection::vec(0u8..20, 1..2000),
        ) {
            // Text that looks back into the dictionary, deflated as if it went on after it, then moved up by
            // `bits` bits: as at a point in the middle of a byte.
            let mut text = text;
            text.extend_from_slice(&dictionary);
            let mut lead = Bits::default();
            let missing = (8 - u32::from(bits)) % 8;
            if missing % 2 == 1 {
                empty_dynamic(&mut lead);
            }
            while lead.count % 8 != missing {
                lead.push(EMPTY_FIXED.0, EMPTY_FIXED.1);
            }
            // One fixed block of literals.
            lead.push(0b011, 3);
            let begin = lead.count - 3;
            let code = |code: u128, len: u32| (0..len).fold(0, |turned, bit| turned | (code >> bit & 1) << (len - 1 - bit));
            for &byte in &text {
                if byte < 144 { lead.push(code(0x30 + u128::from(byte), 8), 8) } else { lead.push(code(0x190 + u128::from(byte) - 144, 9), 9) }
            }
            lead.push(0, 7);
            let first = (begin / 8) as usize;
            let (byte, stored) = if bits == 0 { (0, &lead.bytes[first..]) } else { (lead.bytes[first], &lead.bytes[first + 1..]) };
            let point = Point { stored: 0..stored.len() as u64, plain_at: 0, plain_size: text.len() as u32, dictionary, byte, bits };
            prop_assert_eq!(inflate(&point, stored).expect("own bits"), text);
        }

        #[test]
        fn any_bytes_inflate_to_the_wanted_length_or_an_error(
            stored in prop::collection::vec(any::<u8>(), 0..300),
            (plain_size, byte, bits) in (0u32..600, any::<u8>(), 0u8..8),
        ) {
            let point = Point { stored: 0..stored.len() as u64, plain_at: 0, plain_size, dictionary: vec![1; 9], byte, bits };
            if let Ok(plain) = inflate(&point, &stored) {
                prop_assert_eq!(plain.len(), plain_size as usize);
            }
        }
    }

    #[test]
    fn members_within_a_point_are_joined() {
        let member = |text: &[u8]| {
            let mut gzip =
                flate2::GzBuilder::new().filename("n").extra(vec![1, 2]).write(Vec::new(), flate2::Compression::best());
            gzip.write_all(text).expect("memory");
            gzip.finish().expect("memory")
        };
        let stream = [member(b"one "), member(b"two "), member(b""), member(b"three")].concat();
        let deflate = after_header(&stream).expect("a header");
        let point = Point {
            stored: 0..deflate.len() as u64,
            plain_at: 0,
            plain_size: 13,
            dictionary: Vec::new(),
            byte: 0,
            bits: 0,
        };
        assert_eq!(inflate(&point, deflate).expect("sound"), b"one two three");
        let longer = Point { plain_size: 14, ..point };
        assert!(inflate(&longer, deflate).is_err());
    }
}
