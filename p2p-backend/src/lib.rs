//! Where blob bytes come from.
//!
//! [`Route`] is what readers of images use: it knows the mirrors, the registry behind them, and how long to try.
//! [`registry::Client`] speaks the OCI distribution protocol for everybody else: converter, snapshotter, mirror.
#![forbid(unsafe_code)]

pub mod config;
pub mod credentials;
pub mod http;
pub mod localfs;
pub mod memory;
pub mod metrics;
#[cfg(feature = "mirror")]
pub mod mirror;
#[cfg(feature = "node")]
pub mod node;
pub mod overview;
#[cfg(feature = "node")]
mod quantity;
pub mod registry;
pub mod route;
#[cfg(feature = "swarm")]
pub mod swarm;

pub use config::Config;
pub use credentials::Credential;
pub use route::{Avoid, CredentialSource, Route, RouteOptions, Served, SourceError, Urgency, WholeBlob};
