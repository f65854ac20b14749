//! Makes RAFS images.
#![forbid(unsafe_code)]
