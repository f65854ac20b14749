//! What lies in a data blob besides the chunks: its chunk table, its digests, its table of contents.

pub mod format;
