//! What the tests of the whole system share, and the demo with them.
//!
//! Everything here starts the programs that users start (the binaries of this workspace, containerd, a
//! registry) in folders and on ports of its own, and takes them down again when the value that stands for
//! them is dropped: processes by pid, mounts below their own folder only.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, reason = "what is skipped and what could not be cleaned up is for people to read")]

pub mod authority;
pub mod bed;
pub mod cache;
pub mod cluster;
pub mod containerd;
pub mod converted;
pub mod cri;
pub mod debian;
pub mod disk;
pub mod estargz;
pub mod fixture;
pub mod front;
pub mod fuse;
pub mod gate;
pub mod image;
pub mod keeper;
pub mod lab;
pub mod liar;
pub mod manner;
pub mod moments;
pub mod moody;
mod multiplex;
pub mod needs;
pub mod nerdctl;
pub mod node;
pub mod oddity;
pub mod oracle;
pub mod parsers;
pub mod process;
pub mod proxy;
pub mod rawtar;
pub mod registry;
pub mod runner;
pub mod scratch;
pub mod sky;
pub mod smoke;
pub mod stack;
pub mod tree;
