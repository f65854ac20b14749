//! Images of the established builder, read and written.

mod fixtures;
mod read;
