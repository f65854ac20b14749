//! The daemon `nydus-p2p`: the mirror of a node.

fn main() {}
