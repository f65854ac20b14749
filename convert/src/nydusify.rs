//! The commands of `nydusify`: images in registries and OCI layouts.

pub mod convert;
pub mod layout;
pub mod place;
pub mod progress;

mod bundle;
mod fetch;
mod layer;
mod push;
mod readback;
