//! `nydus-image`.

fn main() {}
