//! What a QEMU process is to Gangway: its monitor, its memory, its command line, its migration.
//!
//! [`SourceGuest`] is a QEMU that somebody else started and that shall move away,
//! [`TargetGuest`] one that this host starts to receive it. Both stand on [`Qmp`], the client of
//! QEMU's monitor. Nothing here reads the migration stream. Calls block; there is no runtime.
//!
//! Goals: stock QEMU from 7.2 on; every setting that a migration changes is given back; no text
//! from QEMU, however odd, makes this crate panic or allocate without bound.

mod argv;
mod binary;
mod cgroup;
mod cow;
mod error;
mod found;
mod host;
mod migration;
mod obstacle;
mod qmp;
mod qmp_wire;
mod ram;
pub mod scan;
mod settings;
mod shared;
mod source;
mod state;
mod target;

pub use argv::{ArgvError, pin_machine, qmp_socket, target_argv};
pub use binary::{QemuBinary, QemuVersion};
pub use cgroup::MemoryCgroup;
pub use cow::{CowError, CowLibrary, CowListener, cow_library_places, find_cow_library};
pub use error::GuestError;
pub use found::{FoundVm, running_vms};
pub use host::{HostMemory, HostReport, KsmState, MemoryReading, host_report};
pub use migration::{MigrationInfo, MigrationStatus};
pub use obstacle::{MappingObstacle, mapping_obstacle};
pub use qmp::{Qmp, QmpError, QmpEvent};
pub use ram::RamBlock;
pub use settings::{MigrationParameters, SavedSettings};
pub use shared::{ClassNo, FramePage, MemoryBlock, ScanReport, SharedFrames, VmMemory};
pub use source::{HeldMemory, SourceGuest};
pub use state::RunState;
pub use target::{KeptMonitor, Recovery, TargetGuest};

/// Longest path of a unix socket, in bytes: `sun_path` has 108, one is for the NUL.
pub const UNIX_PATH_BYTES_MAX: usize = 107;
