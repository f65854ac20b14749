//! The only place where the compiler's proofs end: memory that a library hands out as raw pointers, and
//! structures of the C library that have no constructor.

#![expect(unsafe_code, reason = "this module is where the unsafe code lives")]

pub(crate) mod allocator;
pub(crate) mod mount;
pub(crate) mod reply;
