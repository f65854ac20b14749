//! What the tests of the whole system share.
#![forbid(unsafe_code)]
