//! What goes wrong between hosts.

use std::time::Duration;

use crate::rng::Rng;

/// What goes wrong. Percentages are of the messages or pages of the kind.
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    /// Contents between target hosts that get lost.
    pub(crate) forward_lost: usize,
    /// Pulls that get lost.
    pub(crate) pull_lost: usize,
    /// Contents between target hosts that are other bytes.
    pub(crate) forward_wrong: usize,
    /// Pages read from a guest's memory that have changed.
    pub(crate) changed: usize,
    /// After so many steps the index is gone.
    pub(crate) index_dies_at: Option<u64>,
    /// After so many steps host 0's target agent is gone.
    pub(crate) host_dies_at: Option<u64>,
    /// After so many steps hosts 0 and 1 cannot talk.
    pub(crate) cut_at: Option<u64>,
    /// Contents are registered before; the guests write on meanwhile.
    pub(crate) prepared: bool,
    /// Room for what came, in pages.
    pub(crate) shelf_pages: usize,
    /// How long a step takes: with long steps everything is late for somebody.
    pub(crate) step: Duration,
    /// Of 100 pages, so many are said to share their frame at the source, truly or not.
    pub(crate) marked: usize,
    /// Of those that are to be mapped, so many cannot be.
    pub(crate) unmappable: usize,
    /// Of 100 VMs, so many go over to post-copy.
    pub(crate) postcopy: usize,
}

impl Faults {
    pub(crate) const NONE: Self = Self {
        forward_lost: 0,
        pull_lost: 0,
        forward_wrong: 0,
        changed: 0,
        index_dies_at: None,
        host_dies_at: None,
        cut_at: None,
        prepared: false,
        shelf_pages: 1 << 18,
        step: Duration::from_nanos(1),
        marked: 0,
        unmappable: 0,
        postcopy: 0,
    };

    /// Nothing fails, after a preparation.
    pub(crate) const PREPARED: Self = Self {
        prepared: true,
        ..Self::NONE
    };

    pub(crate) fn random(rng: &mut Rng) -> Self {
        let at = |rng: &mut Rng| rng.chance(25).then(|| rng.next() % 20_000);
        Self {
            forward_lost: [0, 0, 10, 100][rng.below(4)],
            pull_lost: [0, 0, 10, 100][rng.below(4)],
            forward_wrong: [0, 0, 0, 20][rng.below(4)],
            changed: [0, 20][rng.below(2)],
            index_dies_at: at(rng),
            host_dies_at: at(rng),
            cut_at: at(rng),
            prepared: rng.chance(50),
            shelf_pages: rng.below(40),
            step: Duration::from_micros([100, 1000][rng.below(2)]),
            marked: [0, 30, 100][rng.below(3)],
            unmappable: [0, 0, 20][rng.below(3)],
            postcopy: [0, 50, 100][rng.below(3)],
        }
    }
}
