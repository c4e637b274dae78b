use super::*;
use crate::index_host::{IndexAlone, IndexHost};
use crate::link::{Hold, Security, Terms, listen};

const SECRET: [u8; 32] = [3; 32];
const ID: ContentId = ContentId([7; 16]);
const FIRST: HostNo = HostNo(0);
const SECOND: HostNo = HostNo(1);

fn index() -> IndexKey {
    let terms = Terms {
        security: Security::Plaintext,
        peer_timeout: PATIENCE,
    };
    let host = IndexHost::start(0, index::MAX_ENTRIES).unwrap();
    let address = listen(([127, 0, 0, 1], 0).into(), terms, IndexAlone(host)).unwrap();
    IndexKey {
        group: "g-1".into(),
        domain_key: hex::encode(SECRET),
        shards: vec![address.to_string()],
    }
}

fn link(key: &IndexKey) -> IndexLink {
    let context = SessionContext {
        host: "s1".into(),
        security: Security::Plaintext,
        peer_timeout: PATIENCE,
        hold: Hold(None),
        connections_max: 1,
        budget: Arc::default(),
    };
    IndexLink::connect(key, &ContentKey::new(SECRET), &context).unwrap()
}

fn claim(link: &IndexLink, target: HostNo) -> Verdict {
    let answers = link.claim(target, vec![ID]).wait();
    assert_eq!(answers.len(), 1, "the index answers");
    answers[0].1
}

#[test]
fn a_content_that_one_source_carries_is_at_its_target_for_the_others() {
    let key = index();
    let (one, other) = (link(&key), link(&key));
    assert!(matches!(claim(&one, FIRST), Verdict::Carry { .. }));
    let verdict = claim(&other, SECOND);
    assert!(matches!(verdict, Verdict::At { carrier: FIRST, .. }));
}

#[test]
fn what_is_claimed_and_not_waited_for_is_carried_by_the_next_who_asks() {
    let key = index();
    let (one, other) = (link(&key), link(&key));
    drop(one.claim(FIRST, vec![ID]));
    // The first is answered after it has been said, the second after it has been heard.
    for other in [[8; 16], [9; 16]] {
        one.claim(FIRST, vec![ContentId(other)]).wait();
    }
    let verdict = claim(&other, SECOND);
    assert!(matches!(verdict, Verdict::Carry { .. }), "{verdict:?}");
}
