//! Makes RAFS images.
//!
//! [`tar`] reads a layer, [`layer`] puts its entries into a tree, [`pack`] makes its file bodies into a blob, and
//! [`overlay`] lays the trees of all layers on one another. `nydus-image` does this for files ([`image`]), `nydusify`
//! for images in registries ([`nydusify`]).
#![forbid(unsafe_code)]

pub mod layer;
pub mod overlay;
pub mod pack;
pub(crate) mod path;
pub mod tar;
