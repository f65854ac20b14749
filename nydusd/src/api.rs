//! The HTTP API on a daemon's unix socket: types, client and server.
//!
//! Whoever manages daemons (a snapshotter, `nydusctl`) and the daemon itself share the same types, so that
//! they cannot disagree about a key.

pub mod client;
pub mod server;
pub mod types;

pub use client::{Client, ClientError};
pub use types::{DaemonInfo, DaemonState, ErrorBody, FsType, MountRequest};
