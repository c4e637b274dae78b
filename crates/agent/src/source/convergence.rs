//! Whether a pre-copy that may go over to post-copy gets anywhere.
//!
//! It goes over when a person says so, and when the plan's time is over. Else the rule: two rounds in a row that begin with nine tenths or more of what the round before began
//! with, or more bytes of QEMU's stream than four times the VM's memory. A round that leaves no more than twice
//! what QEMU may leave to the switch-over is as good as the last one.

use std::time::Duration;

use guest::{MigrationInfo, MigrationStatus};
use page::ByteLen;

/// A round that begins with more than this part of what the one before began with has got nowhere.
const GETS_NOWHERE: (u64, u64) = (9, 10);
/// So many in a row, because one may be the guest's busiest moment.
const ROUNDS: u32 = 2;
/// Memory is sent so often at most.
const TIMES: u64 = 4;

/// What was seen of one move.
#[derive(Default)]
pub(super) struct Convergence {
    /// A person has said that it goes over.
    is_ordered: bool,
    /// How long memory is copied at most.
    limit: Option<Duration>,
    /// When it was first seen to be copied.
    since: Option<Duration>,
    /// The last round, and what was left when it was first seen.
    round: Option<(u64, ByteLen)>,
    /// Rounds in a row that got nowhere.
    in_vain: u32,
}

impl Convergence {
    /// Of a move whose memory is copied for `limit` at most.
    pub(super) fn new(limit: Option<Duration>) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    /// A person wants it to go over, whether it converges or not.
    pub(super) fn order(&mut self) {
        self.is_ordered = true;
    }

    /// What QEMU says of itself `now`; it may leave `leaves` bytes to the switch-over. Returns why it goes
    /// over, if so.
    pub(super) fn observe(
        &mut self,
        info: &MigrationInfo,
        leaves: u64,
        now: Duration,
    ) -> Option<String> {
        let (round, left) = (info.dirty_sync_count, info.remaining);
        // Before it is active QEMU takes no order, and afterwards none is needed.
        if round == 0 || info.status != MigrationStatus::Active {
            return None;
        }
        if self.is_ordered {
            return Some("a person has said so".into());
        }
        let copied = now.saturating_sub(*self.since.get_or_insert(now));
        if let Some(limit) = self.limit.filter(|limit| copied >= *limit) {
            let seconds = limit.as_secs();
            return Some(format!(
                "its memory was copied for {seconds} s, the plan's limit"
            ));
        }
        if info.transferred.0 > info.total.0.saturating_mul(TIMES) {
            return Some(format!(
                "memory was sent {TIMES} times over, and {} MB are left",
                left.0 / 1_000_000
            ));
        }
        let before = match self.round {
            Some((seen, _)) if seen == round => return None,
            before => before.map(|(_, left)| left),
        };
        self.round = Some((round, left));
        let is_near = left.0 <= leaves.saturating_mul(2);
        let (part, of) = GETS_NOWHERE;
        match before {
            Some(before)
                if !is_near && left.0.saturating_mul(of) >= before.0.saturating_mul(part) =>
            {
                self.in_vain += 1;
            }
            _ => self.in_vain = 0,
        }
        (self.in_vain >= ROUNDS).then(|| {
            format!(
                "it does not converge: round {round} begins with {} MB, as the {ROUNDS} before did",
                left.0 / 1_000_000
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1_000_000;

    /// Shows rounds that begin with so many megabytes; in which of them it gives up.
    fn gives_up(rounds: &[u64]) -> Option<usize> {
        let mut convergence = Convergence::default();
        let mut transferred = 0;
        (1..).zip(rounds).find_map(|(round, left)| {
            let info = |left: u64, transferred: u64| MigrationInfo {
                status: MigrationStatus::Active,
                dirty_sync_count: round,
                remaining: ByteLen(left * MB),
                transferred: ByteLen(transferred * MB),
                total: ByteLen(1000 * MB),
                ..MigrationInfo::default()
            };
            let now = Duration::from_secs(round);
            let first = convergence.observe(&info(*left, transferred), 5 * MB, now);
            transferred += left;
            // The same round again, nearly done.
            let again = convergence.observe(&info(1, transferred), 5 * MB, now);
            first.or(again).map(|_| usize::try_from(round).unwrap())
        })
    }

    #[test]
    fn two_rounds_in_a_row_that_get_nowhere_are_enough_and_one_is_not() {
        assert_eq!(gives_up(&[1000, 300, 300, 310]), Some(4));
        assert_eq!(gives_up(&[1000, 300, 300, 150, 140, 60, 10]), None);
    }

    #[test]
    fn a_guest_that_converges_never_goes_over() {
        assert_eq!(gives_up(&[1000, 500, 250, 125, 60, 30, 15, 8]), None);
        // What QEMU may leave is in sight, and it only waits to be told the rate.
        assert_eq!(gives_up(&[1000, 8, 8, 9, 9, 8]), None);
    }

    /// When a VM that converges goes over.
    fn seen(convergence: &mut Convergence, status: MigrationStatus, second: u64) -> Option<String> {
        let info = MigrationInfo {
            status,
            dirty_sync_count: 1,
            remaining: ByteLen(100 * MB),
            total: ByteLen(1000 * MB),
            ..MigrationInfo::default()
        };
        convergence.observe(&info, MB, Duration::from_secs(second))
    }

    #[test]
    fn the_plans_time_counts_from_the_first_byte_of_memory() {
        let mut convergence = Convergence::new(Some(Duration::from_secs(30)));
        assert_eq!(seen(&mut convergence, MigrationStatus::Setup, 50), None);
        assert_eq!(seen(&mut convergence, MigrationStatus::Active, 100), None);
        assert_eq!(seen(&mut convergence, MigrationStatus::Active, 129), None);
        let why = seen(&mut convergence, MigrationStatus::Active, 130).unwrap();
        assert!(why.contains("30 s"), "{why}");
    }

    #[test]
    fn an_order_is_carried_out_as_soon_as_qemu_takes_it() {
        let mut convergence = Convergence::default();
        assert_eq!(seen(&mut convergence, MigrationStatus::Active, 1), None);
        convergence.order();
        assert_eq!(seen(&mut convergence, MigrationStatus::Setup, 2), None);
        assert_eq!(seen(&mut convergence, MigrationStatus::Device, 2), None);
        assert!(seen(&mut convergence, MigrationStatus::Active, 2).is_some());
    }

    #[test]
    fn memory_is_not_sent_for_ever() {
        let mut slowly = vec![1000, 900];
        while let Some(last) = slowly.last().filter(|last| **last > 100) {
            slowly.push(last * 85 / 100);
        }
        assert_eq!(gives_up(&slowly), Some(6));
    }
}
