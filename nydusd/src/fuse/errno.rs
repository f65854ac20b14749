//! From errors to the numbers that the kernel understands. Nothing else in this crate names an errno.

use std::io;

use nix::errno::Errno;
use nydus_rafs::FormatError;

use crate::store::ReadError;

/// Why a request of the kernel cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The bytes of the file could not be had.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The bootstrap is damaged.
    #[error("could not read the bootstrap: {0}")]
    Format(#[from] FormatError),
    /// The image has no chunk for a part of a file.
    #[error("could not find bytes {from} and following of inode {ino:#x} in any chunk")]
    Gap {
        /// The inode.
        ino: u64,
        /// The first byte that is missing.
        from: u64,
    },
    /// The caller was interrupted (or killed) while it waited.
    #[error("interrupted")]
    Interrupted,
    /// No such name.
    #[error("no such name")]
    NoEntry,
    /// What is asked for is not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// The image that the inode belongs to was unmounted.
    #[error("the image was unmounted")]
    Unmounted,
    /// No such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// The caller's buffer is too small.
    #[error("the buffer is too small")]
    Range,
    /// Nothing can be changed here.
    #[error("read-only")]
    ReadOnly,
    /// The request is not supported, and the kernel need not ask again.
    #[error("not supported")]
    NotSupported,
    /// The reply could not be filled.
    #[error("could not fill the reply: {0}")]
    Reply(io::Error),
}

impl FsError {
    /// Returns whether whoever found it has said so in the log already, better than can be done here.
    pub(crate) fn is_logged(&self) -> bool {
        let Self::Read(error) = self else { return false };
        matches!(error, ReadError::Corrupt { .. } | ReadError::Unavailable { .. } | ReadError::TableSource { .. })
    }

    /// Returns the number.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Read(_) | Self::Format(_) | Self::Gap { .. } | Self::Reply(_) => Errno::EIO,
            Self::Interrupted => Errno::EINTR,
            Self::NoEntry => Errno::ENOENT,
            Self::NotDirectory => Errno::ENOTDIR,
            Self::Unmounted => Errno::ESTALE,
            Self::NoAttribute => Errno::ENODATA,
            Self::Range => Errno::ERANGE,
            Self::ReadOnly => Errno::EROFS,
            Self::NotSupported => Errno::ENOSYS,
        }
    }
}

impl From<FsError> for io::Error {
    fn from(error: FsError) -> Self {
        Self::from_raw_os_error(error.errno() as i32)
    }
}

/// The answer to a request that could not be served to its end.
pub(crate) const PANICKED: Errno = Errno::EIO;

/// The answer to an interruption of a request that this thread has not seen yet: ask again.
pub(crate) const AGAIN: Errno = Errno::EAGAIN;
