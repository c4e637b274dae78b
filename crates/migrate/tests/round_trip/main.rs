//! Both roles together, without sockets: several VMs of one session, from the source QEMU's
//! bytes to the target QEMU's memory, with every step in random order.

#![expect(clippy::unwrap_used, reason = "a test may fail")]

mod golden;
#[expect(dead_code, reason = "shared with the tests of several hosts")]
mod guest;
mod hostile;
mod opening;
mod rng;
mod session;
mod sharing;
mod target;

use std::collections::HashSet;

use page::ContentKey;

use guest::{is_alike, is_fill};
use rng::Rng;
use session::{Faults, Session, Sharing};

fn key() -> Option<ContentKey> {
    Some(ContentKey::new([7; 32]))
}

/// The session itself checks at each step that no page goes back to an older version, that
/// nothing is acknowledged that is not in the target QEMU, and that it gets a valid stream.
#[test]
fn every_vm_arrives_as_it_was_at_its_stop_whatever_is_lost() {
    let (mut repaired, mut mapped) = (0, 0);
    for seed in 0..1500 {
        let mut rng = Rng::new(!seed);
        let key = key().filter(|_| !rng.chance(10));
        let mut session = Session::new(seed, 1 + rng.below(3), key, Faults::random(&mut rng));
        println!("seed {seed}");
        session.run();
        repaired += session.repaired_pages;
        mapped += session.mapped_pages;
    }
    assert!(
        repaired > 10_000,
        "{repaired} pages are too few to prove it"
    );
    assert!(mapped > 10_000, "{mapped} pages are too few to prove it");
}

#[test]
fn each_content_crosses_as_bytes_once_when_nothing_is_lost() {
    for seed in 0..500 {
        println!("seed {seed}");
        let mut session = Session::new(seed, 3, key(), Faults::NONE);
        session.run();
        let sources = session.sources();
        let sent = sources.flat_map(|source| source.contents_sent());
        let expected: HashSet<_> = sent.filter(|content| !is_fill(*content)).collect();
        let literals = session.literals.iter();
        assert!(literals.clone().all(|(_, times)| *times == 1));
        let crossed: HashSet<_> = literals.map(|(content, _)| *content).collect();
        assert_eq!(crossed, expected);
        assert_eq!(session.repaired_pages, 0);
    }
}

#[test]
fn only_contents_of_shared_frames_are_compared_and_all_of_them_are_mapped() {
    for (marked_percent, only) in [(100, true), (0, true), (100, false)] {
        let sharing = Sharing {
            marked_percent,
            only,
            identical: false,
            refused_percent: 0,
        };
        let faults = Faults {
            sharing,
            ..Faults::NONE
        };
        let mut session = Session::new(3, 3, key(), faults);
        session.run();
        assert_eq!(session.literals.is_empty(), marked_percent == 0);
        assert_eq!(session.mapped_pages == 0, marked_percent == 0);
        assert!(session.literals.values().all(|times| *times == 1));
    }
}

/// With no frame shared, just the pages that hold what is to share are mapped, which is checked where
/// they are; the others are compared only if all are.
#[test]
fn pages_that_hold_what_is_to_share_are_mapped_whatever_their_frames_and_no_others() {
    for only in [true, false] {
        let sharing = Sharing {
            marked_percent: 0,
            only,
            identical: true,
            refused_percent: 0,
        };
        let faults = Faults {
            sharing,
            ..Faults::NONE
        };
        let mut mapped = 0;
        for seed in 0..20 {
            let mut session = Session::new(seed, 3, key(), faults);
            session.run();
            mapped += session.mapped_pages;
            let others = session
                .literals
                .keys()
                .filter(|content| !is_alike(**content));
            assert_eq!(others.count() == 0, only);
            assert!(session.literals.values().all(|times| *times == 1));
        }
        assert!(mapped > 500, "{mapped} pages");
    }
}

#[test]
fn without_a_key_nothing_is_deduplicated() {
    let mut session = Session::new(1, 2, None, Faults::NONE);
    session.run();
    assert!(session.literals.is_empty());
}
