//! How far a move is, from QEMU's word and our own counts.

use std::sync::atomic::Ordering;
use std::time::Instant;

use guest::MigrationInfo;

use crate::types::{Faults, PageCounts, Progress};

use super::stream::Stream;

/// Turns samples into [`Progress`].
pub(crate) struct ProgressMeter {
    memory_bytes: u64,
    last: Option<Sample>,
    current: Progress,
}

struct Sample {
    at: Instant,
    wire: u64,
    stream: u64,
    pages: u64,
}

impl ProgressMeter {
    pub(crate) fn new(memory_bytes: u64) -> Self {
        let current = Progress {
            memory_bytes,
            ..Progress::default()
        };
        Self {
            memory_bytes,
            last: None,
            current,
        }
    }

    /// A new sample. `info` is absent while QEMU cannot be asked.
    pub(crate) fn sample(&mut self, stream: &Stream, info: Option<&MigrationInfo>) -> Progress {
        let (position, backlog, _, _) = stream.flow();
        let position = stream.earlier_bytes() + position;
        let (counts, repaired) = stream.counts();
        let wire = stream.wire_bytes.load(Ordering::Relaxed);
        let total = counts.zero + counts.fill + counts.literal + counts.reference + counts.remote;
        let now = Instant::now();
        let mut processed_bytes_per_s = None;
        if let Some(last) = &self.last {
            let seconds = now.duration_since(last.at).as_secs_f64().max(0.001);
            self.current.wire_bytes_per_s = per_second(wire - last.wire, seconds);
            self.current.stream_bytes_per_s = per_second(position - last.stream, seconds);
            processed_bytes_per_s = Some(per_second(
                (total - last.pages) * page::PAGE_SIZE as u64,
                seconds,
            ));
        }
        self.last = Some(Sample {
            at: now,
            wire,
            stream: position,
            pages: total,
        });
        self.current.memory_bytes = self.memory_bytes;
        self.current.stream_bytes = position;
        self.current.wire_bytes = wire;
        self.current.backlog_bytes = backlog;
        self.current.pages = PageCounts {
            total,
            zero: counts.zero,
            fill: counts.fill,
            literal: counts.literal,
            reference: counts.reference,
            remote_reference: counts.remote,
            repaired,
            mapped: stream.mapped.load(Ordering::Relaxed),
        };
        self.current.faults = stream.faults().map(|times| Faults {
            count: times.count,
            median_us: times.median_us,
            p99_us: times.p99_us,
            max_us: times.max_us,
        });
        if let Some(info) = info {
            self.current.round = info.dirty_sync_count;
            self.current.remaining_bytes = info.remaining.0;
            self.current.dirty_bytes_per_s = info.dirty_bytes_per_s;
            self.current.eta_s = processed_bytes_per_s.and_then(|rate| eta(info, rate));
        }
        self.current
    }
}

/// Time to go if the guest keeps dirtying memory as it does: what remains, and what is dirtied
/// while that is sent, and so on.
fn eta(info: &MigrationInfo, processed_bytes_per_s: u64) -> Option<f64> {
    let gain = processed_bytes_per_s
        .checked_sub(info.dirty_bytes_per_s)
        .filter(|gain| *gain > 0)?;
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    Some(info.remaining.0 as f64 / gain as f64)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "for people; rates are far below 2^53"
)]
fn per_second(bytes: u64, seconds: f64) -> u64 {
    (bytes as f64 / seconds) as u64
}
