//! RAFS v6: an EROFS image with the data of regular files on other devices.

pub(crate) mod format;
pub(crate) mod read;
