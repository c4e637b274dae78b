//! One host pair: the source and target agents of a session around the machines.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use content::{HostTable, Places, Recent};
use migrate::exchange::Store;
use migrate::pack::{Packer, Scan};
use migrate::unpack::{Arrived, Batch, Segment, Unpacker};
use migrate::window::Window;
use page::{BlockIndex, ByteLen, ContentId, ContentKey, EntryId, HostNo, PAGE_SIZE, PageRun};
use wire::Reached;
use wire::index::Verdict;

use crate::guest::{NOT_REPAIRABLE, SourceQemu};
use crate::rng::Rng;
use crate::target::TargetQemu;

pub(crate) type Body = Arc<Vec<u8>>;

/// A scan that waits for the index, or for those before it.
pub(crate) struct Asked {
    pub(crate) scan: Scan,
    pub(crate) buffer: Vec<u8>,
    pub(crate) ids: Vec<ContentId>,
    /// Absent until the index has answered.
    pub(crate) verdicts: Option<Vec<Verdict>>,
    pub(crate) is_first_round: bool,
}

/// What a frame of the wire is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Pages,
    Repair,
    Urgent,
}

/// What comes for a VM's thread at the target.
pub(crate) enum Inbox {
    Frame(Body, bool),
    Arrived(Vec<Arrived<Body>>),
    NotComing(HostNo, Vec<EntryId>),
}

pub(crate) struct Move {
    pub(crate) source: SourceQemu,
    pub(crate) read: usize,
    pub(crate) buffer: Vec<u8>,
    pub(crate) packer: Packer,
    pub(crate) scans: VecDeque<Asked>,
    pub(crate) window: Window,
    pub(crate) requests: VecDeque<(BlockIndex, PageRun)>,
    pub(crate) answers: VecDeque<Vec<u8>>,
    pub(crate) inbox: VecDeque<Inbox>,
    /// What a processor waits for, at the target: before all that is in the inbox.
    pub(crate) urgent: VecDeque<Body>,
    pub(crate) unpacker: Unpacker,
    pub(crate) pings: VecDeque<(u32, Reached)>,
    pub(crate) pongs_seen: usize,
    /// Entries in frames that are not acknowledged.
    pub(crate) carried: VecDeque<(u64, Vec<EntryId>)>,
}

pub(crate) struct Host {
    pub(crate) no: HostNo,
    pub(crate) table: HostTable,
    pub(crate) moves: Vec<Move>,
    pub(crate) targets: Vec<TargetQemu>,
    pub(crate) wire: VecDeque<(usize, Kind, Body)>,
    pub(crate) recent: Recent<Body>,
    pub(crate) places: Places,
    pub(crate) store: Store<Body>,
    pub(crate) is_dead: bool,
}

impl Move {
    fn new(key: &ContentKey, postcopy: usize, rng: &mut Rng) -> Self {
        let source = SourceQemu::with_mode(rng.chance(postcopy), rng);
        let blocks = source.layout.blocks.iter();
        let repairable: HashSet<_> = blocks
            .filter(|(index, _)| *index != NOT_REPAIRABLE)
            .map(|(_, block)| block.name.to_string())
            .collect();
        let blocks = source.layout.blocks.iter();
        let pages = |len: ByteLen| u32::try_from(len.pages()).unwrap();
        let mappable = blocks.map(|(_, block)| (block.name.to_string(), pages(block.used_len)));
        let mappable = mappable.collect();
        Self {
            source,
            read: 0,
            buffer: Vec::new(),
            packer: Packer::new(Some(key.clone()), repairable),
            scans: VecDeque::new(),
            window: Window::new(50_000 + rng.next() % 1_000_000),
            requests: VecDeque::new(),
            answers: VecDeque::new(),
            inbox: VecDeque::new(),
            urgent: VecDeque::new(),
            unpacker: Unpacker::mapping(mappable),
            pings: VecDeque::new(),
            pongs_seen: 0,
            carried: VecDeque::new(),
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.source.tail_at.is_some()
            && self.window.acked() == self.source.stream.len() as u64
            && self.requests.is_empty()
            && self.answers.is_empty()
            && self.inbox.is_empty()
            && self.urgent.is_empty()
    }
}

impl Host {
    pub(crate) fn new(
        no: HostNo,
        vms: usize,
        (key, shelf, postcopy): (&ContentKey, usize, usize),
        rng: &mut Rng,
    ) -> Self {
        let moves: Vec<_> = (0..vms).map(|_| Move::new(key, postcopy, rng)).collect();
        let target = |m: &Move| TargetQemu::new(Arc::clone(&m.source.layout));
        Self {
            no,
            table: HostTable::default(),
            targets: moves.iter().map(target).collect(),
            moves,
            wire: VecDeque::new(),
            recent: Recent::with_limit(shelf),
            places: Places::default(),
            store: Store::new(no, key.clone(), shelf),
            is_dead: false,
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        self.is_dead || self.moves.iter().all(Move::is_done)
    }

    /// Everything is at the target as it was at the source when the guest stopped.
    pub(crate) fn check_arrived(&mut self) {
        for (m, target) in self.moves.iter().zip(&mut self.targets) {
            let source = &m.source;
            target.load(usize::MAX, source);
            for row in 0..source.layout.len() {
                assert_eq!(target.content(row), Some(source.read(row)), "page {row}");
            }
            let tail_at = usize::try_from(source.tail_at.unwrap()).unwrap();
            assert_eq!(target.tail, source.stream[tail_at..]);
            assert_eq!((target.unread(), m.unpacker.waiting()), (0, 0));
            assert_eq!(target.package, source.package);
            assert!(target.forgotten.is_empty() && m.unpacker.owed() == 0);
        }
    }

    /// The target QEMU loads some of what was written; positions that it has acknowledged.
    pub(crate) fn load(&mut self, vm: usize, most: usize) -> Vec<Reached> {
        let (m, target) = (&mut self.moves[vm], &mut self.targets[vm]);
        target.load(most, &m.source);
        let mut positions = Vec::new();
        for value in &target.pongs[m.pongs_seen..] {
            if Unpacker::is_our_ping(*value) {
                let (ping, reached) = m.pings.pop_front().unwrap();
                assert_eq!(*value, ping);
                positions.push(reached);
            }
        }
        m.pongs_seen = target.pongs.len();
        positions
    }

    /// Checks that everything up to `position` is in the target QEMU.
    pub(crate) fn check_acknowledged(&self, vm: usize, position: u64) {
        let (m, target) = (&self.moves[vm], &self.targets[vm]);
        assert!(position <= m.read as u64);
        for row in 0..m.source.layout.len() {
            let Some(version) = m.source.version_at(row, position) else {
                continue;
            };
            if target.forgotten.contains(&row) && !m.source.has_followed(row, position) {
                continue;
            }
            let newer = m.source.versions_from(row, version);
            let is_there = target.content(row).is_some_and(|c| newer.contains(&c));
            // Or it waits for a newer version, which ended its wait for this one.
            let newest = m.source.version_at(row, m.read as u64).unwrap();
            assert!(
                is_there || newest > version,
                "page {row} is not in {newer:?}"
            );
        }
    }
}

/// The bytes of a batch in the order in which they are written.
pub(crate) fn bytes_written(batch: &Batch<Body>, own: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for segment in &batch.segments {
        out.extend_from_slice(match segment {
            Segment::Head(range) => &batch.head[range.clone()],
            Segment::Own(at) => &own[*at..][..PAGE_SIZE],
            Segment::Held(body, at) => &body[*at..][..PAGE_SIZE],
            Segment::Scratch(at) => &batch.scratch[*at..][..PAGE_SIZE],
        });
    }
    out
}

/// Entries that crossed the core link as bytes, by how often.
pub(crate) type Crossed = HashMap<EntryId, u32>;
