//! A session: the agents of both hosts around the machines, and the connections between them.
//! Every step is chosen at random; what is true at each of them is checked.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use content::{HostTable, Place, Places, Recent};
use migrate::pack::{Packer, repair_front};
use migrate::unpack::{Ack, Batch, Contents, Found, Segment, Unpacker, literal_runs};
use migrate::window::Window;
use page::{BlockIndex, ContentKey, EntryId, PAGE_SIZE, PageRun};
use wire::{
    BackMessage, FrameHeader, FrameKind, HEADER_LEN, Op, OpReader, Reached, Remote,
    split_pages_body,
};

use crate::guest::{Content, NOT_REPAIRABLE, SourceQemu};
use crate::guest::{alike, bytes_of, content_of, is_alike, is_fill, is_left_out, marks};
use crate::rng::Rng;
use crate::target::TargetQemu;

/// More steps than any run takes: a run that gets here is stuck.
const MAX_STEPS: u64 = 1_000_000;

pub(crate) type Body = Arc<[u8]>;

/// What the target's agent does with contents that it should have.
#[derive(Clone, Copy)]
pub(crate) struct Faults {
    /// Of 100 contents asked for, so many are not found.
    pub(crate) lost_percent: usize,
    /// Of 100 pages read back, so many have changed.
    pub(crate) corrupt_percent: usize,
    /// Room for the newest contents.
    pub(crate) recent_bytes: usize,
    /// Room in the source's table.
    pub(crate) max_entries: u32,
    pub(crate) sharing: Sharing,
}

/// What is said of shared frames, and what becomes of their pages.
#[derive(Clone, Copy)]
pub(crate) struct Sharing {
    /// Of 100 pages, so many are said to share their frame, truly or not.
    pub(crate) marked_percent: usize,
    /// Only their contents are compared.
    pub(crate) only: bool,
    /// Some contents share whatever is said of frames.
    pub(crate) identical: bool,
    /// Of 100 pages that are to be mapped, so many cannot be.
    pub(crate) refused_percent: usize,
}

impl Sharing {
    const OFF: Self = Self {
        marked_percent: 0,
        only: false,
        identical: false,
        refused_percent: 0,
    };

    fn random(rng: &mut Rng) -> Self {
        Self {
            marked_percent: [0, 30, 100][rng.below(3)],
            only: rng.chance(50),
            identical: rng.chance(30),
            refused_percent: [0, 20, 100][rng.below(3)],
        }
    }
}

impl Faults {
    pub(crate) const NONE: Self = Self {
        lost_percent: 0,
        corrupt_percent: 0,
        recent_bytes: 1 << 30,
        max_entries: 1 << 20,
        sharing: Sharing::OFF,
    };

    pub(crate) fn random(rng: &mut Rng) -> Self {
        Self {
            lost_percent: [0, 5, 30, 100][rng.below(4)],
            corrupt_percent: [0, 20][rng.below(2)],
            recent_bytes: rng.below(16) * PAGE_SIZE,
            max_entries: if rng.chance(20) { 10 } else { 1 << 20 },
            sharing: Sharing::random(rng),
        }
    }
}

/// What can happen next, to one VM or to the connection.
type Action = fn(&mut Session, usize);

const ACTIONS: [Action; 8] = [
    Session::guest_writes,
    Session::qemu_writes,
    Session::read_stream,
    Session::read_memory,
    Session::send_repair,
    Session::receive,
    Session::unpack,
    Session::load,
];

/// One VM: its QEMUs, and what the agents hold for it.
struct Move {
    source: SourceQemu,
    /// Bytes read from the source QEMU.
    read: usize,
    buffer: Vec<u8>,
    packer: Packer,
    window: Window,
    requests: VecDeque<(BlockIndex, PageRun)>,
    /// Repairs that were read from memory and are not on their way.
    answers: VecDeque<Vec<u8>>,
    inbox: VecDeque<(FrameKind, Body)>,
    unpacker: Unpacker,
    pings: VecDeque<(u32, Reached)>,
    pongs_seen: usize,
    /// For each page, the newest version that the source was asked to send again.
    asked: HashMap<usize, usize>,
}

pub(crate) struct Session {
    rng: Rng,
    faults: Faults,
    key: Option<ContentKey>,
    now: Duration,
    table: HostTable,
    moves: Vec<Move>,
    targets: Vec<TargetQemu>,
    wire: VecDeque<([u8; HEADER_LEN], Body)>,
    recent: Recent<Body>,
    places: Places,
    /// Everything that went over the wire.
    pub(crate) frames: Vec<(u16, FrameKind, Body)>,
    /// How often each content went as bytes that become an entry.
    pub(crate) literals: HashMap<Content, u32>,
    pub(crate) repaired_pages: u64,
    pub(crate) mapped_pages: u64,
}

impl Session {
    pub(crate) fn new(seed: u64, vms: usize, key: Option<ContentKey>, faults: Faults) -> Self {
        let mut rng = Rng::new(seed);
        let moves: Vec<_> = (0..vms)
            .map(|_| Move::new(&key, faults.sharing, &mut rng))
            .collect();
        let target = |m: &Move| TargetQemu::new(Arc::clone(&m.source.layout));
        Self {
            targets: moves.iter().map(target).collect(),
            moves,
            rng,
            faults,
            key,
            now: Duration::ZERO,
            table: HostTable::with_limit(faults.max_entries),
            wire: VecDeque::new(),
            recent: Recent::with_limit(faults.recent_bytes),
            places: Places::default(),
            frames: Vec::new(),
            literals: HashMap::new(),
            repaired_pages: 0,
            mapped_pages: 0,
        }
    }

    /// Moves all VMs, and checks that they are at the target as they were at their stop.
    pub(crate) fn run(&mut self) {
        // Some are slow in this run, others quick.
        let mut likely = Vec::new();
        for action in ACTIONS {
            let weight = [1, 4, 16][self.rng.below(3)];
            likely.resize(likely.len() + weight, action);
        }
        for _ in 0..MAX_STEPS {
            self.now += Duration::from_millis(1);
            let vm = self.rng.below(self.moves.len());
            likely[self.rng.below(likely.len())](self, vm);
            if (0..self.moves.len()).all(|vm| self.is_done(vm)) {
                return (0..self.moves.len()).for_each(|vm| self.check_arrived(vm));
            }
        }
        panic!("stuck");
    }

    pub(crate) fn sources(&self) -> impl Iterator<Item = &SourceQemu> {
        self.moves.iter().map(|m| &m.source)
    }

    fn guest_writes(&mut self, vm: usize) {
        self.moves[vm].source.guest_writes(&mut self.rng);
    }

    fn qemu_writes(&mut self, vm: usize) {
        self.moves[vm].source.writes(&mut self.rng);
    }

    fn is_done(&self, vm: usize) -> bool {
        let m = &self.moves[vm];
        m.source.tail_at.is_some()
            && m.window.acked() == m.source.stream.len() as u64
            && m.requests.is_empty()
            && m.answers.is_empty()
            && m.inbox.is_empty()
            && self.wire.is_empty()
    }

    fn check_arrived(&mut self, vm: usize) {
        let (source, target) = (&self.moves[vm].source, &mut self.targets[vm]);
        target.load(usize::MAX, source);
        for row in 0..source.layout.len() {
            assert_eq!(target.content(row), Some(source.read(row)), "page {row}");
        }
        let tail_at = usize::try_from(source.tail_at.unwrap()).unwrap();
        assert_eq!(target.tail, source.stream[tail_at..]);
        assert_eq!(target.unread(), 0);
        assert_eq!(self.moves[vm].unpacker.waiting(), 0);
    }

    /// The source agent reads some of the stream, and sends what it makes.
    fn read_stream(&mut self, vm: usize) {
        let m = &mut self.moves[vm];
        let left = m.source.stream.len() - m.read;
        if left == 0 || !m.window.is_open() {
            return;
        }
        let most = if self.rng.chance(50) { 40 } else { 40_000 };
        let count = 1 + self.rng.below(most.min(left));
        m.buffer
            .extend_from_slice(&m.source.stream[m.read..m.read + count]);
        m.read += count;
        if self.rng.chance(30) {
            let marked = self.faults.sharing.marked_percent;
            m.packer.set_shared(marks(&m.source, marked, &mut self.rng));
        }
        let used = m.packer.scan(&m.buffer, 0).expect("QEMU's stream");
        if !m.packer.has_pieces() {
            m.buffer.drain(..used);
            return;
        }
        let scan = m.packer.take();
        let packed = scan.resolve(&m.buffer, &mut self.table, &[]);
        let mut body = packed.front.clone();
        for at in &packed.pages {
            body.extend_from_slice(&m.buffer[*at as usize..][..PAGE_SIZE]);
        }
        assert_eq!(body.len(), packed.raw_len());
        m.buffer.drain(..used);
        let page_bytes = (packed.pages.len() * PAGE_SIZE) as u64;
        m.window
            .sent(packed.position, body.len() as u64, page_bytes);
        self.count_literals(&body);
        self.send(vm, FrameKind::Pages, body);
    }

    fn count_literals(&mut self, body: &[u8]) {
        let parts = split_pages_body(body).unwrap();
        let mut pages = parts.pages.chunks_exact(PAGE_SIZE);
        let mut block = BlockIndex(0);
        for op in OpReader::new(parts.ops).map(Result::unwrap) {
            let bytes: Vec<_> = pages
                .by_ref()
                .take(op.pages_with_bytes() as usize)
                .collect();
            match op {
                Op::Block(b) => block = b,
                Op::Literal(..) => {
                    assert_ne!(block, NOT_REPAIRABLE);
                    for page in bytes {
                        let content = content_of(page.try_into().unwrap());
                        *self.literals.entry(content).or_default() += 1;
                    }
                }
                Op::Reference(..) => assert_ne!(block, NOT_REPAIRABLE),
                _ => {}
            }
        }
        assert!(pages.next().is_none());
    }

    fn send(&mut self, vm: usize, kind: FrameKind, body: Vec<u8>) {
        let vm = u16::try_from(vm).unwrap();
        let len = u32::try_from(body.len()).unwrap();
        let body = Body::from(body);
        self.frames.push((vm, kind, Arc::clone(&body)));
        let header = FrameHeader::new(kind, vm, len, len);
        self.wire.push_back((header.to_bytes(), body));
    }

    /// The source agent reads pages that were asked for from the source QEMU's memory.
    fn read_memory(&mut self, vm: usize) {
        let m = &mut self.moves[vm];
        let Some((block, run)) = m.requests.pop_front() else {
            return;
        };
        assert_ne!(block, NOT_REPAIRABLE);
        let pages: Vec<_> = run.pages().collect();
        let mut body = repair_front(m.packer.position(), block, &pages);
        for page in pages {
            let row = m.source.layout.row(block, page);
            body.extend_from_slice(&bytes_of(m.source.read(row)));
        }
        m.answers.push_back(body);
        self.repaired_pages += u64::from(run.count);
    }

    /// Between the reading and the sending of a repair, anything may happen.
    fn send_repair(&mut self, vm: usize) {
        if let Some(body) = self.moves[vm].answers.pop_front() {
            self.send(vm, FrameKind::Repair, body);
        }
    }

    /// The target agent's receiver takes a frame off the connection.
    fn receive(&mut self, _vm: usize) {
        let Some((header, body)) = self.wire.pop_front() else {
            return;
        };
        let header = FrameHeader::parse(header).unwrap();
        assert_eq!(header.body_len(), body.len());
        self.recent.push(literals(&body), &body, body.len());
        let vm = usize::from(header.vm());
        self.moves[vm].inbox.push_back((header.kind(), body));
    }

    /// The VM's thread at the target turns a frame into stream.
    fn unpack(&mut self, vm: usize) {
        let m = &mut self.moves[vm];
        let Some((kind, body)) = m.inbox.pop_front() else {
            return;
        };
        let mut batch = Batch::default();
        let mut store = Store {
            recent: &self.recent,
            places: &self.places,
            targets: &self.targets,
            key: self.key.as_ref(),
            faults: self.faults,
            rng: &mut self.rng,
        };
        m.unpacker
            .apply(&body, kind == FrameKind::Repair, &mut store, &mut batch)
            .expect("an honest frame");
        self.map(vm, &mut batch, &body);
        let position = split_pages_body(&body).unwrap().position;
        let repair_as_of = (kind == FrameKind::Repair).then_some(position);
        self.targets[vm].write(&bytes_written(&batch, &body), repair_as_of);
        self.remember_places(vm, &batch, &body);
        self.ask_for(vm, &batch, position);
        match batch.ack {
            None => {}
            Some(Ack::OnPong { ping, reached }) => {
                self.moves[vm].pings.push_back((ping, reached));
            }
            Some(Ack::OnWrite { reached }) => {
                self.targets[vm].load(usize::MAX, &self.moves[vm].source);
                self.acknowledge(vm, reached);
            }
        }
    }

    /// Maps the pages that are to be mapped, but for some.
    fn map(&mut self, vm: usize, batch: &mut Batch<Body>, body: &[u8]) {
        if batch.shared.is_empty() {
            return;
        }
        let refused = self.faults.sharing.refused_percent;
        let (m, target) = (&mut self.moves[vm], &mut self.targets[vm]);
        let mut is_mapped = Vec::new();
        for shared in &batch.shared {
            let bytes = bytes_of_segment(&shared.bytes, batch, body);
            let content = content_of(bytes.try_into().unwrap());
            assert!(shared.entry.is_some() || is_fill(content));
            let row = m.source.layout.row(shared.block, shared.page);
            let is_marked = self.faults.sharing.marked_percent > 0;
            assert!(is_marked || (is_alike(content) && !is_left_out(row)));
            is_mapped.push(!self.rng.chance(refused));
            if is_mapped.last() == Some(&true) {
                target.map(row, content, &m.source);
                self.mapped_pages += 1;
            }
            if let (Some(entry), Some(key)) = (shared.entry, &self.key) {
                let id = key.id_of(bytes.try_into().unwrap());
                let vm = u16::try_from(vm).unwrap();
                let (block, page) = (shared.block, shared.page);
                self.places.put(entry, id, Place { vm, block, page });
            }
        }
        m.unpacker.shared_done(&is_mapped, batch);
    }

    fn remember_places(&mut self, vm: usize, batch: &Batch<Body>, body: &[u8]) {
        for placed in &batch.placed {
            let id = match (placed.literal_at, &self.key) {
                (Some(at), Some(key)) => key.id_of(body[at..][..PAGE_SIZE].try_into().unwrap()),
                _ => match self.places.find(placed.entry) {
                    Some((id, _)) => id,
                    None => continue,
                },
            };
            let place = Place {
                vm: u16::try_from(vm).unwrap(),
                block: placed.block,
                page: placed.page,
            };
            self.places.put(placed.entry, id, place);
        }
    }

    /// The repair request of a batch reaches the source.
    fn ask_for(&mut self, vm: usize, batch: &Batch<Body>, position: u64) {
        if batch.repair.is_empty() {
            return;
        }
        let m = &mut self.moves[vm];
        let mut message = Vec::new();
        BackMessage::RepairRequest(batch.repair.clone()).encode(&mut message);
        let Ok(BackMessage::RepairRequest(runs)) = BackMessage::decode(&message) else {
            panic!("not what was encoded");
        };
        for (block, run) in runs {
            for page in run.pages() {
                let row = m.source.layout.row(block, page);
                let version = m.source.version_at(row, position).unwrap();
                m.asked.insert(row, version);
            }
            m.requests.push_back((block, run));
        }
    }

    /// The target QEMU loads some of what was written, and answers pings.
    fn load(&mut self, vm: usize) {
        let most = self.rng.below(20_000);
        let m = &mut self.moves[vm];
        let target = &mut self.targets[vm];
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
        for reached in positions {
            self.acknowledge(vm, reached);
        }
    }

    /// Checks that everything up to `position` is in the target QEMU, but for pages that the
    /// source was asked to send again.
    fn acknowledge(&mut self, vm: usize, reached: Reached) {
        let position = reached.complete;
        assert!(position <= reached.received);
        let (m, target) = (&mut self.moves[vm], &self.targets[vm]);
        assert!(position <= m.read as u64);
        let tail_at = m.source.tail_at.filter(|at| *at <= position);
        for row in 0..m.source.layout.len() {
            let Some(version) = m.source.version_at(row, position) else {
                continue;
            };
            let is_asked = m.asked.get(&row).is_some_and(|asked| *asked >= version);
            if tail_at.is_some() || !is_asked {
                let content = target.content(row).expect("acknowledged and not there");
                let newer = m.source.versions_from(row, version);
                assert!(
                    newer.contains(&content),
                    "page {row} is {content}, not in {newer:?}"
                );
            }
        }
        if let Some(tail_at) = tail_at {
            assert_eq!(position - tail_at, target.tail.len() as u64);
        }
        m.window.acknowledged(reached, self.now);
    }
}

impl Move {
    fn new(key: &Option<ContentKey>, sharing: Sharing, rng: &mut Rng) -> Self {
        let source = SourceQemu::new(rng);
        let blocks = source.layout.blocks.iter();
        let repairable: HashSet<_> = blocks
            .filter(|(index, _)| *index != NOT_REPAIRABLE)
            .map(|(_, block)| block.name.to_string())
            .collect();
        let mut packer = Packer::new(key.clone(), repairable);
        if sharing.only {
            packer = packer.shared_only();
        }
        if let Some(key) = key.as_ref().filter(|_| sharing.identical) {
            packer = packer.share_identical(alike(&source, key));
        }
        // Main memory is as large at the target; of another block that may be wrong.
        let pages = |name: &str| {
            let index = source.layout.blocks.index_of(name).unwrap();
            let block = source.layout.blocks.get(index).unwrap();
            u32::try_from(block.used_len.pages()).unwrap()
        };
        let mappable = HashMap::from([
            ("pc.ram".to_owned(), pages("pc.ram")),
            (
                "dimm0".to_owned(),
                pages("dimm0") + u32::from(rng.chance(30)),
            ),
        ]);
        Self {
            source,
            read: 0,
            buffer: Vec::new(),
            packer,
            window: Window::new(50_000 + rng.next() % 1_000_000),
            requests: VecDeque::new(),
            answers: VecDeque::new(),
            inbox: VecDeque::new(),
            unpacker: Unpacker::mapping(mappable),
            pings: VecDeque::new(),
            pongs_seen: 0,
            asked: HashMap::new(),
        }
    }
}

/// Runs of literals as the stores take them.
pub(crate) fn literals(body: &[u8]) -> impl Iterator<Item = (EntryId, u32, usize)> {
    let runs = literal_runs(body).expect("an honest frame");
    runs.into_iter().map(|run| (run.first, run.count, run.at))
}

/// The bytes of a batch in the order in which they are written.
pub(crate) fn bytes_written(batch: &Batch<Body>, own: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for segment in &batch.segments {
        out.extend_from_slice(bytes_of_segment(segment, batch, own));
    }
    out
}

pub(crate) fn bytes_of_segment<'a>(
    segment: &'a Segment<Body>,
    batch: &'a Batch<Body>,
    own: &'a [u8],
) -> &'a [u8] {
    match segment {
        Segment::Head(range) => &batch.head[range.clone()],
        Segment::Own(at) => &own[*at..][..PAGE_SIZE],
        Segment::Held(body, at) => &body[*at..][..PAGE_SIZE],
        Segment::Scratch(at) => &batch.scratch[*at..][..PAGE_SIZE],
    }
}

/// The contents of the target host, which loses some.
struct Store<'a> {
    recent: &'a Recent<Body>,
    places: &'a Places,
    targets: &'a [TargetQemu],
    key: Option<&'a ContentKey>,
    faults: Faults,
    rng: &'a mut Rng,
}

impl Store<'_> {
    fn find_one(&mut self, entry: EntryId, scratch: &mut Vec<u8>) -> Found<Body> {
        if self.rng.chance(self.faults.lost_percent) {
            return Found::Missing;
        }
        if let Some(page) = self.recent.find(entry) {
            return Found::Held(Arc::clone(page.body), page.offset);
        }
        let (Some((id, place)), Some(key)) = (self.places.find(entry), self.key) else {
            return Found::Missing;
        };
        let mut bytes = self.targets[usize::from(place.vm)].read(place.block, place.page);
        if self.rng.chance(self.faults.corrupt_percent) {
            bytes[self.rng.below(PAGE_SIZE)] ^= 1;
        }
        if key.id_of(&bytes) != id {
            return Found::Missing;
        }
        scratch.extend_from_slice(&bytes);
        Found::Scratch(scratch.len() - PAGE_SIZE)
    }
}

impl Contents<Body> for Store<'_> {
    fn find(
        &mut self,
        (first, count): (EntryId, u32),
        _remote: Option<&Remote<'_>>,
        scratch: &mut Vec<u8>,
        found: &mut Vec<Found<Body>>,
    ) {
        for index in 0..count {
            let one = self.find_one(first.plus(index), scratch);
            found.push(one);
        }
    }
}
