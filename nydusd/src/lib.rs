//! Gives RAFS images to the kernel.
#![deny(unsafe_code)]

pub mod api;
pub mod config;
pub mod store;
