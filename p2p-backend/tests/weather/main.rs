//! Registries and mirrors as they are: odd, slow, wrong, broken, and back again.
//!
//! Each test runs against servers in this process that speak HTTP by hand ([`server`]), so that they can do
//! what no HTTP library would. Limits are made short; no test depends on how long something takes, only on
//! whether it ends, how, and how many requests it needed.

mod auth;
mod authority;
mod blobs;
mod child;
mod documents;
mod multiplexed;
mod names;
mod proxies;
mod real;
mod routes;
mod server;
mod tls;
mod uploads;
