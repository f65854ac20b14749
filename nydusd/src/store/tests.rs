//! The store against a backend whose faults are known.

pub(super) mod fake;
