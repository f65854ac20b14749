//! Images of the established builder, read and written.

mod blob;
mod fixtures;
mod read;
mod write;
