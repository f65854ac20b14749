//! Gives RAFS images to containerd.
#![forbid(unsafe_code)]
