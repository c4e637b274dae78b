use std::net::TcpListener;

use crossbeam_channel::Receiver;
use page::{HostAddr, PageRun};
use wire::{Channel, ControlReply, FrameKind, WireCompression, decode_entries, encode_entries};

use super::*;
use crate::link::{Link, Pool, Security};

const PATIENCE: Duration = Duration::from_secs(10);
const ME: HostNo = HostNo(0);
const PEER: HostNo = HostNo(1);
const ENTRY: EntryId = EntryId(5);

/// A store with one VM, and another target host, played by the test, that carries what it needs.
struct Bench {
    store: Arc<RackStore>,
    key: ContentKey,
    peer: TcpListener,
    frames: Receiver<SinkFrame>,
    vm: u16,
}

impl Bench {
    fn new() -> Self {
        let peer = TcpListener::bind("127.0.0.1:0").unwrap();
        let key = ContentKey::new([9; 32]);
        let hello = RackHello {
            store: "s".into(),
            host: ME.0,
            peers: vec![(PEER.0, peer.local_addr().unwrap().to_string())],
        };
        let context = PeerContext {
            host: "t1".into(),
            security: Security::Plaintext,
            peer_timeout: PATIENCE,
            compression: WireCompression::None,
        };
        let store = RackStore::new(&hello, &key, &context, 1 << 20);
        let (sink, frames) = SinkHandle::alone();
        let vm = store.add(sink).unwrap();
        Self {
            store,
            key,
            peer,
            frames,
            vm,
        }
    }

    /// The VM needs a page with these bytes.
    fn need(&self, bytes: &[u8; PAGE_SIZE]) -> Found<Arc<Buffer>> {
        self.need_from(PEER, bytes, &mut Vec::new())
    }

    /// The same of a page that this host carries.
    fn need_from(
        &self,
        carrier: HostNo,
        bytes: &[u8; PAGE_SIZE],
        scratch: &mut Vec<u8>,
    ) -> Found<Arc<Buffer>> {
        let ids = [self.key.id_of(bytes).0];
        let remote = Remote {
            run: PageRun {
                start: PageNo(0),
                count: 1,
            },
            first: ENTRY,
            carrier,
            pushed: false,
            ids: &ids,
        };
        let mut found = Vec::new();
        let entries = (ENTRY, 1);
        self.store
            .find(self.vm, entries, Some(&remote), scratch, &mut found);
        found.remove(0)
    }

    /// What the other host is asked for.
    fn asked(&self) -> Vec<EntryId> {
        let (tcp, _) = self.peer.accept().unwrap();
        let mut link = Link::accepted(tcp, &Security::Plaintext, PATIENCE).unwrap();
        assert_eq!(link.receive_hello().unwrap().channel, Channel::Peer);
        link.send(&ControlReply::Welcome).unwrap();
        let pool = Pool::new(PAGE_SIZE);
        loop {
            let (header, body) = link.receive_frame(&pool, None, &mut Vec::new()).unwrap();
            if header.kind() == FrameKind::Pull {
                return decode_entries(&body).unwrap();
            }
        }
    }

    /// The other host brings the entry with these bytes, over a connection of its own.
    fn bring(&self, bytes: &[u8; PAGE_SIZE]) {
        let door = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = door.local_addr().unwrap().to_string();
        let mut link = Link::connect(&address, &Security::Plaintext, PATIENCE).unwrap();
        let front = encode_entries(&[ENTRY]);
        let pieces = [front.as_slice(), bytes];
        let kind = (FrameKind::Contents, 0);
        link.send_frame(kind, pieces.into_iter(), None, &mut Vec::new())
            .unwrap();
        drop(link);
        let (tcp, _) = door.accept().unwrap();
        let link = Link::accepted(tcp, &Security::Plaintext, PATIENCE).unwrap();
        let store = Arc::downgrade(&self.store);
        let ended = super::super::peer::receive(link, &store, PEER, WireCompression::None);
        assert!(matches!(ended, Err(crate::link::LinkError::Closed)));
    }
}

#[test]
fn wrong_bytes_of_another_host_reach_no_vm_and_the_source_is_asked_instead() {
    let bench = Bench::new();
    assert!(matches!(bench.need(&[7; PAGE_SIZE]), Found::Coming));
    assert_eq!(bench.asked(), [ENTRY]);
    bench.bring(&[8; PAGE_SIZE]);
    match bench.frames.recv_timeout(PATIENCE).unwrap() {
        SinkFrame::NotComing { carrier, entries } => {
            assert_eq!((carrier, entries), (PEER, vec![ENTRY]));
        }
        _ => panic!("the VM was given the bytes"),
    }
    assert!(bench.frames.is_empty());
    // They are not found later either.
    assert!(!matches!(
        bench.need(&[7; PAGE_SIZE]),
        Found::Held(..) | Found::Scratch(_)
    ));
}

#[test]
fn what_a_vm_has_that_stays_is_used_until_it_is_written_over() {
    let bench = Bench::new();
    // This process plays the VM that stays.
    let mut page = Box::new([7_u8; PAGE_SIZE]);
    let at = HostAddr(page.as_ptr().addr() as u64);
    let memory = sys::ProcessMemory::open(std::process::id()).unwrap();
    let seed = Seed {
        memory: Arc::new(GuestMemory::new(memory, vec![Some(at)])),
        places: vec![(ENTRY, bench.key.id_of(&page), BlockIndex(0), PageNo(0))],
    };
    bench.store.add_seed(&seed);
    let mut scratch = Vec::new();
    let found = bench.need_from(ME, &[7; PAGE_SIZE], &mut scratch);
    assert!(matches!(found, Found::Scratch(0)));
    assert_eq!(scratch, [7; PAGE_SIZE]);

    page[9] = 8;
    std::hint::black_box(&page);
    // Nobody will bring it: the source is asked at once.
    let found = bench.need_from(ME, &[7; PAGE_SIZE], &mut Vec::new());
    assert!(matches!(found, Found::Missing));
}

#[test]
fn wrong_bytes_that_come_before_they_are_needed_are_not_used() {
    let bench = Bench::new();
    bench.bring(&[8; PAGE_SIZE]);
    assert!(matches!(bench.need(&[7; PAGE_SIZE]), Found::Coming));
}

#[test]
fn the_right_bytes_of_another_host_reach_the_vm_that_waits() {
    let bench = Bench::new();
    assert!(matches!(bench.need(&[7; PAGE_SIZE]), Found::Coming));
    bench.bring(&[7; PAGE_SIZE]);
    match bench.frames.recv_timeout(PATIENCE).unwrap() {
        SinkFrame::Arrived(contents) => {
            let one = &contents[0];
            assert_eq!(one.entry, ENTRY);
            assert_eq!(one.body[one.at..one.at + PAGE_SIZE], [7; PAGE_SIZE]);
        }
        _ => panic!("the VM was given nothing"),
    }
}
