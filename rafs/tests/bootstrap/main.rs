//! Generated trees through the v6 writer and reader, and hostile bytes through the reader.

mod hostile;
mod kernel;
mod roundtrip;
mod trees;
