//! `nydus-overlayfs`.

fn main() {}
