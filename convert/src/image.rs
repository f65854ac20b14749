//! The commands of `nydus-image`: images in files.

pub mod check;
pub mod create;
pub mod merge;
pub mod report;
