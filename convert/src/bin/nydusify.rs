//! `nydusify`.

fn main() {}
