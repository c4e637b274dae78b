//! What the lab and its guests must agree about: what a stamped page looks like, and some numbers and
//! names.

#![forbid(unsafe_code)]

pub mod agreed;
pub mod stamp;
