//! What lies in a data blob besides the chunks: its chunk table, its digests, its table of contents.
//!
//! A native blob is a sequence of sections; which of them there are depends on the [`Form`](write::Form):
//!
//! ```text
//! | chunks | chunk table + header | chunk digests | bootstrap | table of contents |
//! ```
//!
//! The order lets a builder write strictly forward: each section is known only when those before it are
//! written, and a tar header *after* each section tells its size. A reader therefore begins at the end.

mod batch;
pub mod format;
pub mod section;
pub mod table;
pub mod toc;
pub mod write;
