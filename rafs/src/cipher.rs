//! AES-128-XTS as encrypted blobs have it.
//!
//! Every chunk, every batch, the chunk table and its header are encrypted by themselves, all with the same key
//! and tweak. XTS wants at least 16 bytes: shorter pieces are filled up to 16 and marked by two more bytes.

use aes::Aes128;
use aes::cipher::KeyInit;
use xts_mode::Xts128;

use crate::codec::DecodeError;

/// Marks a piece that was filled up.
const MARK: [u8; 2] = [0x78, 0x90];

/// The key of an encrypted blob.
#[derive(Clone, PartialEq, Eq)]
pub struct Cipher {
    /// Two keys of 16 bytes each.
    pub key: [u8; 32],
    /// The tweak, the same for every piece.
    pub iv: [u8; 16],
}

impl std::fmt::Debug for Cipher {
    /// Keys do not belong into logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cipher(..)")
    }
}

impl Cipher {
    /// Encrypts one piece; one of less than 16 bytes becomes one of 18.
    pub fn encrypt(&self, plain: &[u8]) -> Vec<u8> {
        let mut stored = plain.to_vec();
        if plain.len() < 16 {
            // Less than 16: the number of bytes to fill up fits into one of them.
            stored.resize(16, (16 - plain.len()) as u8);
            stored.extend_from_slice(&MARK);
        }
        let half =
            |range: std::ops::Range<usize>| Aes128::new_from_slice(&self.key[range]).expect("a key has 16 bytes");
        Xts128::new(half(0..16), half(16..32)).encrypt_sector(&mut stored, self.iv.into());
        stored
    }

    /// Decrypts one piece.
    pub fn decrypt(&self, stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
        if stored.len() < 16 {
            return Err(DecodeError::Length { wanted: 16, found: stored.len() });
        }
        let (data, tweak) = self.key.split_at(16);
        let cipher = |key: &[u8]| {
            Aes128::new_from_slice(key)
                .map_err(|source| DecodeError::Invalid { codec: "AES-XTS", source: source.into() })
        };
        let mut plain = stored.to_vec();
        Xts128::new(cipher(data)?, cipher(tweak)?).decrypt_sector(&mut plain, self.iv.into());
        if plain.len() == 18 && plain[16..] == MARK {
            plain.truncate(16usize.saturating_sub(usize::from(plain[15])));
        }
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_length_are_decrypted() {
        let cipher = Cipher { key: std::array::from_fn(|at| at as u8), iv: [7; 16] };
        for len in (1..70).chain([4096, 5000]) {
            let plain: Vec<u8> = (0..len).map(|at| at as u8).collect();
            assert_eq!(cipher.decrypt(&cipher.encrypt(&plain)).expect("long enough"), plain, "{len} bytes");
        }
        assert!(cipher.decrypt(&[0; 15]).is_err());
    }
}
