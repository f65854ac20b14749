//! Gives RAFS images to the kernel.
#![deny(unsafe_code)]

pub mod store;
