//! Makes RAFS images.
//!
//! [`tar`] reads a layer, [`layer`] puts its entries into a tree, [`pack`] makes its file bodies into a blob, and
//! [`overlay`] lays the trees of all layers on one another; [`bootstrap`] writes the tree, and [`verify`] compares what
//! was made with where it came from. `nydus-image` does this for files ([`image`]), `nydusify` for images in
//! registries ([`nydusify`]).
#![forbid(unsafe_code)]

pub mod bootstrap;
pub mod chunk_size;
pub mod dictionary;
pub mod image;
pub mod layer;
pub mod nydusify;
pub mod oci;
pub mod overlay;
pub mod pack;
pub(crate) mod path;
pub mod prefetch;
pub mod source;
pub mod tar;
pub mod verify;
mod zran;
