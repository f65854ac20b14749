//! Where `nydus-image create` takes its files from.

pub mod directory;
