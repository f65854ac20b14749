//! A crowd of nodes in one process: the daemon's decisions, models of everything else.
//!
//! Each node is a [`Swarm`](nydus_backend::swarm::Swarm), the same code as in `nydus-p2p`, driven by a [`world`] that has
//! a clock of integer microseconds, network cards that send 64 KiB at a time in turn, connections that cost round trips,
//! and a registry with an uplink, a latency, manners and moods. Bodies are not bytes but what is wrong with them. Control
//! messages are really encoded and decoded. A [`scenario`] says who starts when and what goes wrong; the same seed gives the
//! same run, event for event, so that a seed that fails is a test.

pub mod bar;
mod bytes;
pub mod call;
mod calls;
mod check;
mod event;
mod faults;
pub mod liar;
pub mod net;
pub mod node;
pub mod outcome;
pub mod plot;
mod reader;
pub mod registry;
pub mod scenario;
pub mod world;

pub use bar::Bar;
pub use outcome::Outcome;
pub use scenario::{Fault, Scenario};
