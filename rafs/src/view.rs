//! Bytes of a stranger: every access is checked, none panics.

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::bootstrap::FormatError;

/// Bytes whose offsets come from the bytes themselves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a>(pub(crate) &'a [u8]);

impl<'a> View<'a> {
    /// Returns the number of bytes.
    pub(crate) fn len(self) -> u64 {
        self.0.len() as u64
    }

    /// Returns `len` bytes from `at` on; `what` names them in the error.
    pub(crate) fn bytes(self, what: &'static str, at: u64, len: u64) -> Result<&'a [u8], FormatError> {
        let end = at.checked_add(len).filter(|&end| end <= self.len());
        match (usize::try_from(at), end.map(usize::try_from)) {
            (Ok(start), Some(Ok(end))) => Ok(&self.0[start..end]),
            _ => Err(FormatError::Truncated { what, at, len: self.len() }),
        }
    }

    /// Returns the structure at `at`.
    pub(crate) fn read<T>(self, what: &'static str, at: u64) -> Result<&'a T, FormatError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let bytes = self.bytes(what, at, size_of::<T>() as u64)?;
        T::ref_from_bytes(bytes).map_err(|_| FormatError::Truncated { what, at, len: self.len() })
    }

    /// Returns the `count` structures that begin at `at`.
    pub(crate) fn array<T>(self, what: &'static str, at: u64, count: u64) -> Result<&'a [T], FormatError>
    where
        T: FromBytes + KnownLayout + Immutable + Unaligned,
    {
        let truncated = || FormatError::Truncated { what, at, len: self.len() };
        let len = count.checked_mul(size_of::<T>() as u64).ok_or_else(truncated)?;
        let bytes = self.bytes(what, at, len)?;
        <[T]>::ref_from_bytes(bytes).map_err(|_| truncated())
    }
}

/// Makes the error for a field that holds what it must not.
pub(crate) fn invalid(what: &'static str, at: u64, why: impl Into<String>) -> FormatError {
    FormatError::Invalid { what, at, why: why.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_beyond_the_end_is_an_error_for_any_offset() {
        let view = View(&[0; 16]);
        for (at, len) in [(0, 17), (17, 0), (16, 1), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(view.bytes("test", at, len).is_err(), "{at} {len}");
        }
        assert!(view.array::<[u8; 8]>("test", 0, u64::MAX).is_err());
        assert_eq!(view.array::<[u8; 8]>("test", 0, 2).expect("fits").len(), 2);
        assert_eq!(view.bytes("test", 16, 0).expect("empty"), b"");
    }
}
