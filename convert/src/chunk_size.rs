//! Sizes of chunks and batches as the command line gives them.

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
        power_of_two(text).map(Self).ok_or_else(|| InvalidChunkSize(text.to_owned()))
    }
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn power_of_two(text: &str) -> Option<u32> {
    number(text).filter(|number| number.is_power_of_two() && (0x1000..=0x100_0000).contains(number))
}

/// Below which number of bytes small files are packed together: nothing, or a power of two from 4 KiB to 16 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BatchSize(Option<u32>);

/// Text that is no batch size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid batch size: {0} (0, or a power of two from 0x1000 to 0x1000000, is wanted)")]
pub struct InvalidBatchSize(String);

impl BatchSize {
    /// Returns the size in bytes, if files are to be packed together.
    pub fn bytes(self) -> Option<u32> {
        self.0
    }
}

impl FromStr for BatchSize {
    type Err = InvalidBatchSize;

    /// Parses a decimal number, or a hexadecimal one after `0x`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (number(text), power_of_two(text)) {
            (Some(0), _) => Ok(Self(None)),
            (_, Some(size)) => Ok(Self(Some(size))),
            _ => Err(InvalidBatchSize(text.to_owned())),
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
            assert!(bad.parse::<BatchSize>().is_err(), "{bad}");
        }
        assert!("0".parse::<ChunkSize>().is_err());
        assert_eq!("0x0".parse(), Ok(BatchSize(None)));
        assert_eq!("0x40000".parse(), Ok(BatchSize(Some(0x40000))));
    }
}
