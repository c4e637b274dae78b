//! Several host pairs of a group with their index, without sockets and in virtual time: every
//! message takes as long as it likes, in any order between hosts, and some go wrong.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

#[path = "../round_trip/guest.rs"]
#[expect(dead_code, reason = "shared with the tests of one session")]
mod guest;
#[path = "../round_trip/opening.rs"]
mod opening;
#[path = "../round_trip/rng.rs"]
mod rng;
#[path = "../round_trip/target.rs"]
mod target;

mod arrival;
mod faults;
mod host;
mod world;

use faults::Faults;
use rng::Rng;
use world::World;

/// Seeds of the large test; a failing one is printed by it.
const SEEDS: u64 = 10_000;

/// The world itself checks at each step that no page goes back to an older version, that nothing
/// is acknowledged that is not in the target QEMU, that every QEMU gets a valid stream, and at
/// the end that every VM of a host that lives is at its target as it was at its stop.
#[test]
fn every_vm_arrives_as_it_was_at_its_stop_whatever_fails_between_hosts() {
    let (mut remote, mut repaired, mut died, mut late) = (0, 0, 0, 0);
    let (mut behind, mut urgent, mut expected) = (0, 0, 0);
    for seed in 0..SEEDS {
        let mut rng = Rng::new(!seed);
        let faults = Faults::random(&mut rng);
        let mut world = World::new(seed, 2 + rng.below(3), faults);
        world.run(seed);
        remote += world.remote_pages;
        repaired += world.repaired_pages;
        died += world.dead_hosts();
        late += world.mapped_late;
        behind += world.remote_behind;
        urgent += world.urgent_pages;
        expected += world.expected;
    }
    assert!(remote > 100_000, "{remote} remote pages prove too little");
    assert!(repaired > 10_000, "{repaired} repairs prove too little");
    assert!(late > 10_000, "{late} late mappings prove too little");
    assert!(
        behind > 10_000,
        "{behind} pages that followed prove too little"
    );
    assert!(urgent > 10_000, "{urgent} urgent pages prove too little");
    assert!(
        expected > 10_000,
        "{expected} expected pages prove too little"
    );
    assert!(died > 500, "{died} dead hosts prove too little");
}

#[test]
fn each_entry_crosses_the_core_once_when_nothing_fails() {
    for seed in 0..1000 {
        let mut rng = Rng::new(!seed);
        let faults = [Faults::NONE, Faults::PREPARED][rng.below(2)];
        let mut world = World::new(seed, 2 + rng.below(3), faults);
        world.run(seed);
        for (entry, times) in &world.carried {
            assert_eq!(*times, 1, "seed {seed}: {entry:?} crossed {times} times");
        }
        assert_eq!(world.repaired_pages, 0, "seed {seed}");
        assert_eq!(
            world.doubled, 0,
            "seed {seed}: contents crossed again in the first round"
        );
    }
}
