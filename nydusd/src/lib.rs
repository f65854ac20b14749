//! Gives RAFS images to the kernel.
//!
//! A [`daemon::Daemon`] holds one FUSE mount ([`fuse`]) under which any number of images appear, each an
//! [`instance::Instance`]: a bootstrap in memory, and blobs whose chunks come through the [`store`] from the cache
//! directory or from where the configuration ([`config`]) says. A snapshotter talks to it over a unix socket ([`api`]).
#![deny(unsafe_code)]

pub mod api;
pub mod backend_source;
pub mod build;
pub mod cli;
mod clock;

pub mod config;
pub mod crashed;
pub mod daemon;
pub mod events;
pub mod fuse;
pub mod instance;
pub mod limits;
pub mod log;
pub mod metrics;
pub mod store;
mod sys;
