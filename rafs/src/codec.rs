//! How plain bytes are made smaller for storage, and back.
//!
//! Decoders are given the exact number of plain bytes and never produce more, so that hostile input costs no
//! more memory than the chunk it claims to be. A gzip member may hold more than the chunk: in layers whose table of
//! contents names their chunks the next files' headers follow in the same member. Encoders give the bytes that the established builder gives
//! as far as the libraries allow: LZ4's default level from the C library (the Rust port chooses other
//! matches), zstd level 3 in one frame that states its content's size, and the plain bytes where a
//! compressor does not win.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{self, Read, Write};

use crate::chunk::{Codec, Compressor};

/// The level at which builders compress.
const ZSTD_LEVEL: i32 = 3;

/// Why stored bytes could not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The decoder does not accept the bytes.
    #[error("the stored bytes are not valid {codec}")]
    Invalid {
        /// Name of the codec.
        codec: &'static str,
        /// What the decoder says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The bytes decode to another length than that of the chunk.
    #[error("the stored bytes hold {found} plain bytes, {wanted} are wanted")]
    Length {
        /// The length wanted.
        wanted: usize,
        /// The length found; one more than wanted stands for anything longer.
        found: usize,
    },
    /// The chunk is a part of something that must be decoded as a whole.
    #[error("a part of a batch or gzip stream cannot be decoded by itself")]
    Member,
}

thread_local! {
    // Making a context costs more than decoding a small chunk.
    static COMPRESS: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESS: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decodes `stored` to exactly `plain_len` bytes.
///
/// Parts of batches and gzip streams are refused: they are cut out of what a whole context decodes to.
pub fn decode(codec: Codec, stored: &[u8], plain_len: usize) -> Result<Vec<u8>, DecodeError> {
    let plain = match codec {
        Codec::Plain => stored.to_vec(),
        Codec::Lz4Block => {
            let mut plain = vec![0; plain_len];
            let len = lz4_flex::block::decompress_into(stored, &mut plain)
                .map_err(|source| DecodeError::Invalid { codec: "lz4", source: source.into() })?;
            plain.truncate(len);
            plain
        }
        Codec::Zstd => DECOMPRESS.with_borrow_mut(|slot| {
            let invalid = |source: io::Error| DecodeError::Invalid { codec: "zstd", source: source.into() };
            let context = match slot {
                Some(context) => context,
                None => slot.insert(zstd::bulk::Decompressor::new().map_err(invalid)?),
            };
            context.decompress(stored, plain_len).map_err(invalid)
        })?,
        Codec::Gzip => {
            let mut plain = Vec::with_capacity(plain_len);
            let mut limited = flate2::read::GzDecoder::new(stored).take(plain_len as u64);
            limited
                .read_to_end(&mut plain)
                .map_err(|source| DecodeError::Invalid { codec: "gzip", source: source.into() })?;
            plain
        }
        Codec::Zran { .. } | Codec::Batch { .. } => return Err(DecodeError::Member),
    };
    if plain.len() != plain_len {
        return Err(DecodeError::Length { wanted: plain_len, found: plain.len() });
    }
    Ok(plain)
}

/// Encodes `plain`; [`Codec::Plain`] and the bytes themselves where `compressor` does not make them smaller.
///
/// gzip is only ever read; asked for, it stores the bytes as they are.
pub fn encode(compressor: Compressor, plain: &[u8]) -> (Codec, Cow<'_, [u8]>) {
    match compress(compressor, plain) {
        Some(stored) if stored.len() < plain.len() => (compressor.codec(), Cow::Owned(stored)),
        _ => (Codec::Plain, Cow::Borrowed(plain)),
    }
}

/// Compresses `plain` whether that makes it smaller or not; `None` where there is nothing to compress with.
pub(crate) fn compress(compressor: Compressor, plain: &[u8]) -> Option<Vec<u8>> {
    match compressor {
        Compressor::None | Compressor::Gzip => None,
        Compressor::Lz4Block => lz4::block::compress(plain, None, false).ok(),
        Compressor::Zstd => COMPRESS.with_borrow_mut(|slot| {
            let context = match slot {
                Some(context) => context,
                None => slot.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
            };
            context.compress(plain).ok()
        }),
    }
}

/// Compresses `len` bytes as they are read into one zstd frame that states its content's size.
pub(crate) fn compress_stream(mut plain: impl Read, len: u64, out: impl Write) -> io::Result<()> {
    let mut encoder = zstd::stream::write::Encoder::new(out, ZSTD_LEVEL)?;
    encoder.set_pledged_src_size(Some(len))?;
    io::copy(&mut plain, &mut encoder)?;
    encoder.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn compressors() -> impl Strategy<Value = Compressor> {
        prop_oneof![Just(Compressor::None), Just(Compressor::Lz4Block), Just(Compressor::Zstd)]
    }

    proptest! {
        #[test]
        fn what_was_encoded_decodes_to_itself(
            plain in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..3000),
                prop::collection::vec(0u8..3, 0..3000),
            ],
            compressor in compressors(),
        ) {
            let (codec, stored) = encode(compressor, &plain);
            prop_assert!(stored.len() <= plain.len());
            prop_assert_eq!(decode(codec, &stored, plain.len()).expect("own bytes"), plain);
        }

        #[test]
        fn any_bytes_decode_to_the_wanted_length_or_an_error(
            stored in prop::collection::vec(any::<u8>(), 0..200),
            len in 0usize..500,
            codec in prop_oneof![Just(Codec::Plain), Just(Codec::Lz4Block), Just(Codec::Zstd), Just(Codec::Gzip)],
        ) {
            if let Ok(plain) = decode(codec, &stored, len) {
                prop_assert_eq!(plain.len(), len);
            }
        }
    }

    #[test]
    fn a_longer_or_shorter_result_than_wanted_is_an_error() {
        let plain = vec![7; 5000];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).expect("memory");
        let gzip = gzip.finish().expect("memory");
        let (zstd, lz4) = (encode(Compressor::Zstd, &plain).1, encode(Compressor::Lz4Block, &plain).1);
        for (codec, stored) in [(Codec::Zstd, &*zstd), (Codec::Lz4Block, &*lz4), (Codec::Gzip, &*gzip)] {
            assert_eq!(decode(codec, stored, 5000).expect("exact"), plain);
            // A chunk may be the beginning of a gzip member.
            assert_eq!(decode(codec, stored, 4999).is_ok(), codec == Codec::Gzip, "{codec:?} to less");
            assert!(decode(codec, stored, 5001).is_err(), "{codec:?} to more");
        }
    }
}
