//! The control API of one agent.

pub mod mover;
