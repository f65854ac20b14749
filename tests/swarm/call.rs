//! A request between nodes, as the world sees it.

use nydus_backend::swarm::grid::Mask;
use nydus_backend::swarm::port::Exchange;

/// A request that is open.
#[derive(Debug)]
pub struct Call {
    /// Who asks.
    pub from: usize,
    /// Who is asked.
    pub to: usize,
    /// The asker's number for it.
    pub exchange: Exchange,
    /// The object, by number.
    pub object: u32,
    /// The group.
    pub group: u32,
    /// Pieces that were promised and have not come.
    pub promised: Mask,
    /// The flow that is on it.
    pub flow: Option<usize>,
    /// The asker listens no more.
    pub left: bool,
    /// The one asked has said all.
    pub closed: bool,
}
