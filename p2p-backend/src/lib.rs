//! Where blob bytes come from.
#![forbid(unsafe_code)]

pub mod config;
pub mod credentials;
pub mod http;
#[cfg(feature = "mirror")]
pub mod mirror;
pub mod registry;
pub mod route;

pub use config::Config;
pub use credentials::Credential;
pub use route::{Route, SourceError, Urgency};
