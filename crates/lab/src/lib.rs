//! The lab: racks of network namespaces with real VMs, and what is measured on them.

pub mod bench;
pub mod cgroup;
pub mod clock;
pub mod compare;
pub mod fault;
pub mod gangway;
pub mod guest;
pub mod install;
pub mod matrix;
pub mod measure;
pub mod memory;
pub mod net;
pub mod observer;
pub mod outcome;
pub mod pki;
pub mod process;
pub mod qmp;
pub mod report;
pub mod results;
pub mod run;
pub mod scenario;
pub mod session;
pub mod shell;
pub mod stock;
