//! What can go wrong, and when.
use serde::Deserialize;
/// placeholder while stock comes up
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Fault {}
