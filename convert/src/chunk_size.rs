//! Chunk sizes as the command line gives them.

use std::str::FromStr;

/// A chunk size: a power of two from 4 KiB to 16 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSize(u32);

/// Text that is no chunk size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid chunk size: {0} (a power of two from 0x1000 to 0x1000000 is wanted)")]
pub struct InvalidChunkSize(String);

impl ChunkSize {
    /// 1 MiB.
    pub const DEFAULT: Self = Self(1 << 20);

    /// Returns the size in bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }
}

impl FromStr for ChunkSize {
    type Err = InvalidChunkSize;

    /// Parses a decimal number, or a hexadecimal one after `0x`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => text.parse(),
        };
        match number {
            Ok(number) if number.is_power_of_two() && (0x1000..=0x100_0000).contains(&number) => Ok(Self(number)),
            _ => Err(InvalidChunkSize(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_between_the_limits_are_taken() {
        assert_eq!("0x100000".parse(), Ok(ChunkSize::DEFAULT));
        assert_eq!("4096".parse(), Ok(ChunkSize(4096)));
        for bad in ["1000", "2048", "0x2000000", "-1", "", "1M", "0x"] {
            assert!(bad.parse::<ChunkSize>().is_err(), "{bad}");
        }
    }
}
