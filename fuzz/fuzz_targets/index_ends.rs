//! Both ends of the index channel on the same bytes; how they are cut must not matter.

#![no_main]

use std::time::Duration;

use index::{Answer, Client, Groups, Item, LEASE, Server, TableKey, Ticket};
use libfuzzer_sys::fuzz_target;
use page::{ContentId, HostNo};

fuzz_target!(|input: &[u8]| {
    let Some((&piece, bytes)) = input.split_first() else {
        return;
    };
    let piece = usize::from(piece).max(1);
    assert_eq!(serve(bytes, usize::MAX), serve(bytes, piece));
    assert_eq!(answers(bytes, usize::MAX), answers(bytes, piece));
});

/// What a server answers, and the error if there is one.
fn serve(bytes: &[u8], piece: usize) -> (Vec<u8>, Option<String>) {
    let (mut groups, mut server) = (Groups::with_limit(0, 1000), Server::new(7));
    let mut out = Vec::new();
    let error = bytes
        .chunks(piece)
        .find_map(|piece| server.handle(&mut groups, piece, &mut out).err());
    for (_, table) in groups.iter() {
        let summary = table.summary();
        assert!(summary.entries() <= 1000 && summary.contents() <= summary.entries());
    }
    server.closed(&mut groups, Duration::ZERO);
    assert!(
        groups
            .iter()
            .all(|(_, table)| table.summary().in_flight == 0)
    );
    groups.tick(LEASE);
    assert!(groups.is_empty());
    (out, error.map(|e| format!("{e:?}")))
}

/// What a client understands as answers to one request of each kind.
fn answers(bytes: &[u8], piece: usize) -> (Vec<(Ticket, Answer)>, bool) {
    let (mut client, mut out) = (Client::new(), Vec::new());
    let key = TableKey {
        group: "g".into(),
        domain: [0; 16],
    };
    let ids = [1, 2, 3].map(|n| ContentId([n; 16]));
    client.join(key, &mut out);
    client.register(HostNo(0), &ids.map(|id| Item { id, pages: 1 }), &mut out);
    client.claim(HostNo(0), &ids, &mut out);
    client.summary(&mut out);
    let mut all = Vec::new();
    for piece in bytes.chunks(piece) {
        client.handle(piece);
        loop {
            match client.poll_answer() {
                Ok(Some(answer)) => all.push(answer),
                Ok(None) => break,
                Err(_) => return (all, true),
            }
        }
    }
    assert_eq!(all.len() + client.waiting(), 4);
    (all, false)
}
