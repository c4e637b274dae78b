//! Tests of whole streams through the public interface.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

mod common;
mod golden;
mod limits;
mod properties;
mod return_path;
mod rewriter;
mod shortened;
mod splits;
