//! Where blob bytes come from.
#![forbid(unsafe_code)]

pub mod config;
pub mod registry;
pub mod route;

pub use config::Config;
pub use route::{Route, SourceError, Urgency};
