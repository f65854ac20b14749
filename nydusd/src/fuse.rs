//! The kernel's requests: where they come in, who serves them, and what they are answered.
//!
//! A [`session::Session`] owns the connection and a pool of threads. Each thread reads one request, serves it to
//! its end and reads the next; whenever the last idle one takes a request another is started, so that a
//! reader who waits for the network never stands in front of one whose bytes are here. [`filesystem`] turns requests
//! into questions to the images in the [`namespace::Namespace`], and [`errno`] turns what went wrong into numbers.

pub mod errno;
pub mod filesystem;
pub mod inodes;
pub mod namespace;
pub mod session;
pub mod slot;

pub use errno::FsError;
pub use inodes::NodeId;
pub use namespace::Namespace;
pub use session::Session;
