//! RAFS v6: an EROFS image with the data of regular files on other devices.

pub(crate) mod format;
mod place;
pub(crate) mod read;
pub(crate) mod write;
