//! The commands of `nydusify`: images in registries and OCI layouts.

pub mod check;
pub mod convert;
pub mod copy;
pub mod fetch;
pub mod known;
pub mod layout;
pub mod mount;
pub mod place;
pub mod progress;

mod assembly;
mod bundle;
mod layer;
mod push;
mod readback;
