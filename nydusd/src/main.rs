//! `nydusd`.

fn main() {}
