//! Numbers and names that stand at both ends: in the guests, and in the lab that looks at them.

use std::time::Duration;

/// What a template waits with, at the start of a page: these bytes, each turned by
/// [`TEMPLATE_MARKER_TURN`], so that neither program holds the marker anywhere else.
pub const TEMPLATE_MARKER: &[u8; 32] = b"gangway lab: who is this guest? ";
/// See [`TEMPLATE_MARKER`].
pub const TEMPLATE_MARKER_TURN: u8 = 0x55;
/// What a template says on its console when it waits.
pub const TEMPLATE_WAITS: &str = "lab-init: template waits";

/// Upper end of the first bucket of touches. What a page that is there takes is below it; so are the
/// hiccups of an emulated processor that shares a core, mostly.
pub const TOUCH_FIRST: Duration = Duration::from_micros(200);
/// Buckets for each doubling: their ends are 9 % apart. Bucket `n` ends at
/// `TOUCH_FIRST * 2^(n / TOUCH_PER_DOUBLING)`.
pub const TOUCH_PER_DOUBLING: f64 = 8.0;

/// Bytes that a guest writes over NFS at a time, asks the server to confirm, and counts as one.
pub const NFS_PIECE: usize = 256 << 10;
/// Port of the first guest's iperf3 server less 1; each guest has its own, as a server has one client.
pub const IPERF_FIRST_PORT: u32 = 5200;
