//! `containerd-nydus-grpc`.

fn main() {}
