//! Generated trees through the v6 writer and reader, and hostile bytes through the reader.

#[expect(dead_code, reason = "no blobs are read here")]
#[path = "../golden/fixtures.rs"]
mod fixtures;
mod hostile;
mod kernel;
mod roundtrip;
mod trees;
