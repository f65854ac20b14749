//! Gives RAFS images to containerd.
//!
//! containerd asks over gRPC ([`grpc`]) for snapshots. Labels tell what a layer is ([`labels`]), a pure function says what is to
//! be done ([`plan`]), another what is to be mounted ([`mounts`]); [`snapshots`] carries it out on the records ([`meta`]), the
//! directories ([`layout`]) and the nydusd processes ([`daemons`]). Beside it, kubelet's image service is passed on to
//! containerd ([`image_service`]) where the operator wants the secrets of its pulls to be used.
#![forbid(unsafe_code)]

pub mod authority;
pub mod bootstrap;
pub mod cache;
pub mod cli;
pub mod config;
pub mod configure;
pub mod credentials;
pub mod daemons;
pub mod estargz;
pub mod filter;
pub mod grpc;
pub mod image_service;
pub mod keychain;
pub mod labels;
pub mod layout;
pub mod meta;
pub mod metrics;
pub mod mounts;
pub mod notify;
pub mod overlay;
pub mod plan;
pub mod run;
pub mod server;
pub mod snapshots;
pub mod status;
pub mod system_api;
pub mod usage;
