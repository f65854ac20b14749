//! Filling a FUSE reply without an intermediate copy.

use std::io;

use fuse_backend_rs::abi::fuse_abi::statvfs64;
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

/// A source of bytes that writes straight into the memory of a reply: `fill(buffer, offset)` returns how many
/// bytes it wrote.
pub(crate) struct Source<F>(pub(crate) F);

impl<F: FnMut(&mut [u8], u64) -> io::Result<usize>> FileReadWriteVolatile for Source<F> {
    fn read_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> io::Result<usize> {
        // SAFETY: the slice covers `len` initialised bytes of the reply buffer of the thread that serves this
        // request. That thread is the one running here, the buffer outlives the request (and thereby the slice), and
        // nobody else looks at it until the reply is written, after this borrow has ended.
        let buffer = unsafe { std::slice::from_raw_parts_mut(slice.as_ptr(), slice.len()) };
        let filled = (self.0)(buffer, offset)?;
        Ok(filled.min(slice.len()))
    }

    fn read_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_at_volatile(&mut self, _slice: FileVolatileSlice<'_>, _offset: u64) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Returns an all-zero answer to `statfs`, to be filled in.
pub(crate) fn empty_statvfs() -> statvfs64 {
    // SAFETY: `statvfs64` is a C structure of integers, for which all bits zero is a value.
    unsafe { std::mem::zeroed() }
}
