//! RAFS v5: the older form, which only a daemon can serve.

pub(crate) mod format;
pub(crate) mod read;
pub(crate) mod write;
