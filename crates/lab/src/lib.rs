//! The lab: racks of network namespaces with real VMs, and what is measured on them.

pub mod compare;
pub mod report;
pub mod results;
