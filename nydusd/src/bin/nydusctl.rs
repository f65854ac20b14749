//! `nydusctl`.

fn main() {}
