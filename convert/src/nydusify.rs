//! The commands of `nydusify`: images in registries.

pub mod convert;
pub mod progress;

mod bundle;
mod fetch;
mod layer;
mod push;
