//! A session's connections as a target agent takes them; the source is the test.

use wire::{
    Channel, ControlReply, FrameHeader, FrameKind, Hello, PROTOCOL_VERSION, WireCompression,
};

use super::*;
use crate::link::{Link, LinkError, Security};

const PATIENCE: Duration = Duration::from_secs(10);

fn connect(target: SocketAddr, channel: Channel) -> Link {
    let mut link = Link::connect(&target.to_string(), &Security::Plaintext, PATIENCE).unwrap();
    let hello = Hello {
        version: PROTOCOL_VERSION,
        session: "of the test".into(),
        channel,
        source: "test".into(),
        compression: WireCompression::None,
        domain_key: (channel == Channel::Forward).then(|| "42".repeat(32)),
        rack: None,
    };
    link.send_hello(&hello).unwrap();
    assert_eq!(
        link.receive::<ControlReply>().unwrap(),
        ControlReply::Welcome
    );
    link
}

/// Something numbered that no VM is there for.
fn frame(order: u32) -> [u8; wire::HEADER_LEN] {
    let header = FrameHeader::new(FrameKind::Hurry, 7, 0, 0);
    header.with_order(order).to_bytes()
}

/// Whether the target has cut the connection after this long.
fn is_cut(link: &mut Link, after: Duration) -> bool {
    link.set_timeout(after);
    match link.read_exact(&mut [0]) {
        Err(LinkError::Silent(_)) => false,
        Err(LinkError::Closed | LinkError::Io(_)) => true,
        other => panic!("a target says nothing here: {other:?}"),
    }
}

#[test]
fn a_lane_that_ends_within_a_frame_ends_the_session() {
    let agents = agents();
    let mut forward = connect(agents.target_bulk, Channel::Forward);
    for sent in [0, wire::HEADER_LEN] {
        let mut lane = connect(agents.target_bulk, Channel::Lane);
        lane.write_all(&frame(1)[..sent]).unwrap();
    }
    assert!(!is_cut(&mut forward, Duration::from_millis(600)));
    let mut lane = connect(agents.target_bulk, Channel::Lane);
    lane.write_all(&frame(2)[..wire::HEADER_LEN / 2]).unwrap();
    drop(lane);
    assert!(is_cut(&mut forward, PATIENCE));
}

#[test]
fn a_lane_that_its_source_closes_ends_nothing_and_a_frame_that_comes_twice_ends_the_session() {
    let agents = agents();
    let mut forward = connect(agents.target_bulk, Channel::Forward);
    let mut lanes = [Channel::Lane, Channel::Lane].map(|lane| connect(agents.target_bulk, lane));
    // The last first: both wait for those before them.
    lanes[0].write_all(&frame(3)).unwrap();
    lanes[1].write_all(&frame(2)).unwrap();
    let [closed, mut other] = lanes;
    drop(closed);
    forward.write_all(&frame(1)).unwrap();
    let since = Duration::from_millis(600);
    assert!(!is_cut(&mut forward, since) && !is_cut(&mut other, since));
    // The third was taken, though its connection is gone: the fourth is due.
    other.write_all(&frame(4)).unwrap();
    assert!(!is_cut(&mut other, since));
    forward.write_all(&frame(3)).unwrap();
    assert!(is_cut(&mut forward, PATIENCE) && is_cut(&mut other, PATIENCE));
}
