//! What the lab and its guests must agree about: what a stamped page looks like.

#![forbid(unsafe_code)]

pub mod stamp;
