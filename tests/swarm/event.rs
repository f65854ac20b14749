//! What will happen, and when.

use nydus_backend::swarm::Input;
use nydus_backend::swarm::message::{Ask, Frame, Report};
use nydus_backend::swarm::port::End;

/// Something that will happen.
#[derive(Debug)]
pub(crate) enum Event {
    Tick(usize),
    Input(usize, Box<Input>),
    Ask { call: u64, bytes: Vec<u8>, ask: Option<Box<Ask>> },
    Frame { call: u64, frame: Box<Frame> },
    Closed { call: u64, end: End },
    Hung { call: u64 },
    Report { from: usize, to: usize, report: Box<Report> },
    Open { node: usize, reading: u64, object: u32, pieces: std::ops::Range<u32>, offset: u64 },
    Left(usize),
    Landed(usize, u64),
    Drip { call: u64, piece: u32, got: u32 },
    Begin(usize),
    Fault(usize),
}

#[derive(Debug)]
pub(crate) struct Planned(pub(crate) u64, pub(crate) u64, pub(crate) Event);

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

impl Eq for Planned {}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.0, self.1).cmp(&(other.0, other.1))
    }
}
