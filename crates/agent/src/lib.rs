//! (being written)
pub mod api;
pub mod config;
pub mod plan;
pub mod types;
