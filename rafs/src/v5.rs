//! RAFS v5: the older form, which only a daemon can serve. It is read, never written.

pub(crate) mod format;
pub(crate) mod read;
