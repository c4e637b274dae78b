//! All hosts, the index, and what happens between them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use content::Place;
use index::{ClientNo, Table};
use migrate::exchange::{Action, Came, Waiter};
use migrate::pack::{repair_front, urgent_front};
use migrate::unpack::{Ack, Batch, literal_runs, remotes};
use page::{ContentId, ContentKey, EntryId, FrameSharing, HostNo, PAGE_SIZE, PageBytes};
use wire::index::{EntryRun, Item, Verdict};
use wire::{Reached, split_pages_body};

use crate::arrival::{TargetContents, expect, map, read_checked, remember};
use crate::faults::Faults;
use crate::guest::{NOT_REPAIRABLE, bytes_of, is_fill, marks};
use crate::host::{Asked, Body, Crossed, Host, Inbox, Kind, bytes_written};
use crate::rng::Rng;

/// More steps than any run takes: a run that gets here waits for something that never comes.
const MAX_STEPS: u64 = 2_000_000;

enum Message {
    Contents(Vec<EntryId>, Vec<u8>),
    Pull(EntryId),
    Missing(EntryId),
}

/// A claim on its way to the index, or the answer on its way back.
struct Claim {
    host: usize,
    vm: usize,
    ids: Vec<ContentId>,
}

type Step = fn(&mut World, usize, usize);

const STEPS: [Step; 12] = [
    World::guest_writes,
    World::qemu_writes,
    World::read_stream,
    World::index_answers,
    World::resolve,
    World::read_memory,
    World::send_repair,
    World::receive,
    World::guest_waits,
    World::unpack,
    World::load,
    World::peers_talk,
];

pub(crate) struct World {
    rng: Rng,
    faults: Faults,
    key: ContentKey,
    now: Duration,
    step: u64,
    hosts: Vec<Host>,
    index: Option<Table>,
    claims: VecDeque<Claim>,
    peers: HashMap<(usize, usize), VecDeque<Message>>,
    pub(crate) carried: Crossed,
    /// Contents that the first rounds brought over the core link.
    crossed: HashSet<ContentId>,
    pub(crate) doubled: u64,
    pub(crate) remote_pages: u64,
    pub(crate) repaired_pages: u64,
    /// Pages that were mapped when their contents came, after they were named.
    pub(crate) mapped_late: u64,
    /// Pages named by what others bring, after the VM went ahead.
    pub(crate) remote_behind: u64,
    /// Pages that may be mapped when QEMU places them.
    pub(crate) expected: u64,
    /// Pages that were sent because a processor waited for them.
    pub(crate) urgent_pages: u64,
}

impl World {
    pub(crate) fn new(seed: u64, hosts: usize, faults: Faults) -> Self {
        let mut rng = Rng::new(seed);
        let key = ContentKey::new([7; 32]);
        let host = |no: usize, rng: &mut Rng| {
            let vms = 1 + rng.below(2);
            let no = HostNo(u16::try_from(no).unwrap());
            Host::new(
                no,
                vms,
                (&key, faults.shelf_pages * PAGE_SIZE, faults.postcopy),
                rng,
            )
        };
        let hosts: Vec<_> = (0..hosts).map(|no| host(no, &mut rng)).collect();
        let mut world = Self {
            rng,
            faults,
            key,
            now: Duration::ZERO,
            step: 0,
            hosts,
            index: Some(Table::new(seed, 0)),
            claims: VecDeque::new(),
            peers: HashMap::new(),
            carried: HashMap::new(),
            crossed: HashSet::new(),
            doubled: 0,
            remote_pages: 0,
            repaired_pages: 0,
            mapped_late: 0,
            remote_behind: 0,
            expected: 0,
            urgent_pages: 0,
        };
        if faults.prepared {
            world.prepare();
        }
        world
    }

    /// Registers what is in memory now; the guests write on.
    fn prepare(&mut self) {
        let Some(index) = &mut self.index else { return };
        for host in &self.hosts {
            let rows = |m: &crate::host::Move| (0..m.source.layout.len()).collect::<Vec<_>>();
            let contents = host
                .moves
                .iter()
                .flat_map(|m| rows(m).into_iter().map(|row| m.source.read(row)));
            let items: Vec<_> = contents
                .filter(|content| !is_fill(*content))
                .map(|content| Item {
                    id: self.key.id_of(&bytes_of(content)),
                    pages: 1,
                })
                .collect();
            index.register(host.no, &items, &mut Vec::new());
        }
    }

    pub(crate) fn dead_hosts(&self) -> u64 {
        self.hosts.iter().filter(|host| host.is_dead).count() as u64
    }

    pub(crate) fn run(&mut self, seed: u64) {
        let mut likely = Vec::new();
        for step in STEPS {
            let weight = [1, 4, 16][self.rng.below(3)];
            likely.resize(likely.len() + weight, step);
        }
        while self.step < MAX_STEPS {
            self.step += 1;
            self.now += self.faults.step;
            self.misfortunes();
            let host = self.rng.below(self.hosts.len());
            let vm = self.rng.below(self.hosts[host].moves.len());
            if !self.hosts[host].is_dead {
                likely[self.rng.below(likely.len())](self, host, vm);
            }
            if self.step.is_multiple_of(20) {
                self.tick();
            }
            if self.hosts.iter().all(Host::is_done) {
                let living = self.hosts.iter_mut().filter(|host| !host.is_dead);
                return living.for_each(Host::check_arrived);
            }
        }
        panic!("seed {seed}: stuck");
    }

    fn misfortunes(&mut self) {
        if self.faults.index_dies_at == Some(self.step) {
            self.index = None;
        }
        if self.faults.host_dies_at == Some(self.step) && !self.hosts[0].is_done() {
            self.hosts[0].is_dead = true;
            if let Some(index) = &mut self.index {
                index.carrier_gone(HostNo(0));
                index.client_gone(ClientNo(0));
            }
            self.claims.retain(|claim| claim.host != 0);
            self.gone(0, &(1..self.hosts.len()).collect::<Vec<_>>());
        }
        if self.faults.cut_at == Some(self.step) {
            self.gone(0, &[1]);
            self.gone(1, &[0]);
        }
    }

    /// The connections between `host` and `others` break, and `others` notice.
    fn gone(&mut self, host: usize, others: &[usize]) {
        for other in others {
            self.peers.remove(&(host, *other));
            self.peers.remove(&(*other, host));
            let no = self.hosts[host].no;
            let actions = self.hosts[*other].store.host_gone(no, self.now);
            self.act(*other, actions);
        }
    }

    fn tick(&mut self) {
        for host in 0..self.hosts.len() {
            let actions = self.hosts[host].store.tick(self.now);
            self.act(host, actions);
        }
    }

    fn guest_writes(&mut self, host: usize, vm: usize) {
        let m = &mut self.hosts[host].moves[vm];
        m.source.guest_writes(&mut self.rng);
    }

    fn qemu_writes(&mut self, host: usize, vm: usize) {
        self.hosts[host].moves[vm].source.writes(&mut self.rng);
    }

    fn read_stream(&mut self, host: usize, vm: usize) {
        let host_no = host;
        let host = &mut self.hosts[host];
        let m = &mut host.moves[vm];
        if m.packer.awaits_switch(&m.buffer, 0) {
            if m.window.backlog() > 0 || !m.scans.is_empty() {
                // What others owe is not waited for in full: the guest is stopped.
                let wanted: Vec<_> = m.unpacker.wanted().collect();
                return host.store.hurry(wanted.into_iter(), self.now);
            }
            m.packer.pass_switch();
            m.window.set_guest_ahead();
        } else {
            let left = m.source.stream.len() - m.read;
            if left == 0 || !m.window.is_open() || m.scans.len() >= 4 {
                return;
            }
            let most = if self.rng.chance(50) { 40 } else { 40_000 };
            let count = 1 + self.rng.below(most.min(left));
            m.buffer
                .extend_from_slice(&m.source.stream[m.read..m.read + count]);
            m.read += count;
        }
        if self.rng.chance(30) {
            let marks = marks(&m.source, self.faults.marked, &mut self.rng);
            m.packer.set_shared(marks);
        }
        let used = m.packer.scan(&m.buffer, 0).expect("QEMU's stream");
        let buffer: Vec<u8> = m.buffer.drain(..used).collect();
        if !m.packer.has_pieces() {
            return;
        }
        let milestones = m.packer.milestones();
        let is_first_round = m.source.is_first_round() || milestones.switched;
        let scan = m.packer.take();
        let asks = is_first_round && !milestones.end_begun;
        let ids: Vec<_> = if asks {
            scan.unknown(&host.table).collect()
        } else {
            Vec::new()
        };
        let verdicts = ids.is_empty().then(Vec::new);
        if !ids.is_empty() {
            let ids = ids.clone();
            let host = host_no;
            self.claims.push_back(Claim { host, vm, ids });
        }
        m.scans.push_back(Asked {
            scan,
            buffer,
            ids,
            verdicts,
            is_first_round: asks,
        });
    }

    /// The index answers the oldest claim of a host.
    fn index_answers(&mut self, host: usize, _vm: usize) {
        let Some(at) = self.claims.iter().position(|claim| claim.host == host) else {
            return;
        };
        let claim = self.claims.remove(at).unwrap();
        let no = self.hosts[host].no;
        let mut verdicts = Vec::new();
        match &mut self.index {
            Some(index) => index.claim(no, ClientNo(no.0), &claim.ids, &mut verdicts),
            None => verdicts.resize(claim.ids.len(), Verdict::Full),
        }
        let mut scans = self.hosts[host].moves[claim.vm].scans.iter_mut();
        let asked = scans.find(|asked| asked.verdicts.is_none()).unwrap();
        assert_eq!(asked.ids, claim.ids);
        asked.verdicts = Some(verdicts);
    }

    fn resolve(&mut self, host: usize, vm: usize) {
        let host = &mut self.hosts[host];
        let m = &mut host.moves[vm];
        let Some(asked) = m.scans.pop_front_if(|asked| asked.verdicts.is_some()) else {
            return;
        };
        let verdicts = asked.verdicts.unwrap();
        let answers: Vec<_> = asked.ids.into_iter().zip(verdicts).collect();
        let packed = asked.scan.resolve(&asked.buffer, &mut host.table, &answers);
        let mut body = packed.front.clone();
        for at in &packed.pages {
            body.extend_from_slice(&asked.buffer[*at as usize..][..PAGE_SIZE]);
        }
        m.window.sent(packed.position, body.len() as u64, 0);
        m.carried.push_back((packed.position, packed.carried));
        self.remote_pages += packed.counts.remote;
        if m.packer.milestones().switched {
            self.remote_behind += packed.counts.remote;
        }
        for run in literal_runs(&body).unwrap() {
            for (entry, at) in run.contents() {
                if !entry.is_local() {
                    *self.carried.entry(entry).or_default() += 1;
                }
                let page: &PageBytes = body[at..][..PAGE_SIZE].try_into().unwrap();
                // Later rounds and the end do not ask the index.
                if asked.is_first_round && !self.crossed.insert(self.key.id_of(page)) {
                    self.doubled += 1;
                }
            }
        }
        host.wire.push_back((vm, Kind::Pages, Arc::new(body)));
    }

    fn read_memory(&mut self, host: usize, vm: usize) {
        let m = &mut self.hosts[host].moves[vm];
        let Some((block, run)) = m.requests.pop_front() else {
            return;
        };
        // As of what was handed to the wire: what is scanned and waits may be newer.
        let as_of = m.window.acked() + m.window.backlog();
        let pages: Vec<_> = run.pages().collect();
        let mut body = repair_front(as_of, block, &pages);
        for page in pages {
            let row = m.source.layout.row(block, page);
            body.extend_from_slice(&bytes_of(m.source.read(row)));
        }
        m.answers.push_back(body);
        self.repaired_pages += u64::from(run.count);
    }

    fn send_repair(&mut self, host: usize, vm: usize) {
        let host = &mut self.hosts[host];
        if let Some(body) = host.moves[vm].answers.pop_front() {
            host.wire.push_back((vm, Kind::Repair, Arc::new(body)));
        }
    }

    /// A processor of a VM that went ahead waits for a page: it is read from the source's memory, and
    /// overtakes everything.
    fn guest_waits(&mut self, host: usize, vm: usize) {
        let host = &mut self.hosts[host];
        let (m, target) = (&mut host.moves[vm], &host.targets[vm]);
        if !target.has_switched() || target.forgotten.is_empty() {
            return;
        }
        let nth = self.rng.below(target.forgotten.len());
        let row = *target.forgotten.iter().nth(nth).unwrap();
        let (block, page) = m.source.layout.address(row);
        if block == NOT_REPAIRABLE {
            return;
        }
        let as_of = m.window.acked() + m.window.backlog();
        let sharing = match self.rng.chance(self.faults.marked) {
            true => FrameSharing::Merged,
            false => FrameSharing::No,
        };
        let mut body = urgent_front(as_of, block, [(page, sharing)].into_iter());
        body.extend_from_slice(&bytes_of(m.source.read(row)));
        host.wire.push_front((vm, Kind::Urgent, Arc::new(body)));
        self.urgent_pages += 1;
        if self.rng.chance(70) {
            m.packer.sent_ahead([(block, page)]);
        }
    }

    fn receive(&mut self, host: usize, _vm: usize) {
        let Some((vm, kind, body)) = self.hosts[host].wire.pop_front() else {
            return;
        };
        if kind == Kind::Urgent {
            return self.hosts[host].moves[vm].urgent.push_back(body);
        }
        let is_repair = kind == Kind::Repair;
        if !is_repair {
            let runs = literal_runs(&body).unwrap();
            let local = runs.iter().filter(|run| run.first.is_local());
            let local = local.map(|run| (run.first, run.count, run.at));
            self.hosts[host].recent.push(local, &body, body.len());
            let came = self.hosts[host].store.brought(&runs, &body, self.now);
            self.hand_out(host, came, &body);
            for remote in remotes(&body).unwrap() {
                let actions = self.hosts[host].store.named(&remote, self.now);
                self.act(host, actions);
            }
        }
        let inbox = &mut self.hosts[host].moves[vm].inbox;
        inbox.push_back(Inbox::Frame(body, is_repair));
    }

    fn hand_out(&mut self, host: usize, came: Came<Body>, body: &Body) {
        for (waiter, arrived) in came.arrived {
            let inbox = &mut self.hosts[host].moves[waiter.0 as usize].inbox;
            inbox.push_back(Inbox::Arrived(arrived));
        }
        for (to, entry, at) in came.send {
            self.send_contents(host, to, vec![entry], body[at..][..PAGE_SIZE].to_vec());
        }
        self.act(host, came.actions);
    }

    fn send_contents(
        &mut self,
        from: usize,
        to: HostNo,
        entries: Vec<EntryId>,
        mut bytes: Vec<u8>,
    ) {
        if self.rng.chance(self.faults.forward_lost) {
            return;
        }
        if self.rng.chance(self.faults.forward_wrong) {
            let at = self.rng.below(bytes.len());
            bytes[at] ^= 1;
        }
        self.send(from, to, Message::Contents(entries, bytes));
    }

    fn send(&mut self, from: usize, to: HostNo, message: Message) {
        let to = usize::from(to.0);
        let is_cut = self.faults.cut_at.is_some_and(|at| at <= self.step) && from + to == 1;
        if !is_cut && !self.hosts[to].is_dead {
            self.peers.entry((from, to)).or_default().push_back(message);
        }
    }

    fn act(&mut self, host: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Pull { to, entry } if !self.rng.chance(self.faults.pull_lost) => {
                    self.send(host, to, Message::Pull(entry));
                }
                Action::Pull { .. } => {}
                Action::Missing { to, entry } => self.send(host, to, Message::Missing(entry)),
                Action::GiveUp {
                    entry,
                    carrier,
                    waiters,
                } => {
                    for waiter in waiters {
                        let inbox = &mut self.hosts[host].moves[waiter.0 as usize].inbox;
                        inbox.push_back(Inbox::NotComing(carrier, vec![entry]));
                    }
                }
            }
        }
    }

    /// A message from this host arrives at another one.
    fn peers_talk(&mut self, from: usize, _vm: usize) {
        let to = self.rng.below(self.hosts.len());
        let queue = self.peers.get_mut(&(from, to));
        let Some(message) = queue.and_then(VecDeque::pop_front) else {
            return;
        };
        let from_no = self.hosts[from].no;
        match message {
            Message::Contents(entries, bytes) => {
                let body = Arc::new(bytes);
                let store = &mut self.hosts[to].store;
                let came = store.pushed(from_no, (&entries, 0), &body, self.now);
                self.hand_out(to, came, &body);
            }
            Message::Missing(entry) => {
                let actions = self.hosts[to].store.missing(from_no, &[entry]);
                self.act(to, actions);
            }
            Message::Pull(entry) => {
                let pulled = self.hosts[to].store.pulled(from_no, &[entry], self.now);
                for (entry, body, at) in pulled.here {
                    let bytes = body[at..][..PAGE_SIZE].to_vec();
                    self.send_contents(to, from_no, vec![entry], bytes);
                }
                for (entry, id, place) in pulled.placed {
                    match self.read_place(to, id, place) {
                        Some(bytes) => {
                            self.send_contents(to, from_no, vec![entry], bytes.to_vec());
                        }
                        None => self.send(to, from_no, Message::Missing(entry)),
                    }
                }
                self.act(to, pulled.actions);
            }
        }
    }

    fn read_place(&mut self, host: usize, id: ContentId, place: Place) -> Option<PageBytes> {
        let target = &self.hosts[host].targets[usize::from(place.vm)];
        read_checked(target, &self.key, (id, place), self.faults, &mut self.rng)
    }

    /// The VM's thread at the target turns what came into stream.
    fn unpack(&mut self, at: usize, vm: usize) {
        let host = &mut self.hosts[at];
        let m = &mut host.moves[vm];
        let urgent = m.urgent.pop_front().map(|body| Inbox::Frame(body, true));
        let Some(inbox) = urgent.or_else(|| m.inbox.pop_front()) else {
            return;
        };
        let mut batch = Batch::default();
        let mut actions = Vec::new();
        let (mut own, mut repair_as_of) = (Body::default(), None);
        let is_late = matches!(inbox, Inbox::Arrived(_));
        match inbox {
            Inbox::Frame(body, is_repair) => {
                let mut contents = TargetContents {
                    recent: &host.recent,
                    places: &host.places,
                    store: &mut host.store,
                    targets: &host.targets,
                    waiter: Waiter(u32::try_from(vm).unwrap()),
                    key: &self.key,
                    now: self.now,
                    faults: self.faults,
                    rng: &mut self.rng,
                    actions: &mut actions,
                };
                m.unpacker
                    .apply(&body, is_repair, &mut contents, &mut batch)
                    .expect("an honest frame");
                let position = split_pages_body(&body).unwrap().position;
                repair_as_of = is_repair.then_some(position);
                own = body;
            }
            Inbox::Arrived(contents) => m.unpacker.arrived(contents, &mut batch),
            Inbox::NotComing(carrier, entries) => {
                m.unpacker.not_coming(&entries, &mut batch);
                host.table.forget(&entries);
                if let Some(index) = &mut self.index {
                    let run = |first: &EntryId| EntryRun {
                        first: *first,
                        count: 1,
                    };
                    entries
                        .iter()
                        .for_each(|entry| index.lost(carrier, run(entry)));
                }
            }
        }
        let mapped = map(
            host,
            vm,
            (&mut batch, &own),
            (&self.key, &mut self.rng, self.faults.unmappable),
        );
        self.expected += expect(&self.hosts[at], vm, &batch, &own);
        let host = &mut self.hosts[at];
        self.mapped_late += if is_late { mapped } else { 0 };
        host.targets[vm].write(&bytes_written(&batch, &own), repair_as_of);
        let m = &mut host.moves[vm];
        m.requests.extend(batch.repair.iter().copied());
        let last: Vec<_> = m.unpacker.last_wanted().collect();
        host.store.hurry(last.into_iter(), self.now);
        remember(host, vm, &batch, &own, &self.key);
        self.act(at, actions);
        match batch.ack {
            None => {}
            Some(Ack::OnPong { ping, reached }) => {
                self.hosts[at].moves[vm].pings.push_back((ping, reached));
            }
            Some(Ack::OnWrite { reached }) => {
                self.hosts[at].load(vm, usize::MAX);
                self.acknowledge(at, vm, reached);
            }
        }
    }

    fn load(&mut self, host: usize, vm: usize) {
        let most = self.rng.below(20_000);
        for reached in self.hosts[host].load(vm, most) {
            self.acknowledge(host, vm, reached);
        }
    }

    fn acknowledge(&mut self, host: usize, vm: usize, reached: Reached) {
        let position = reached.complete;
        let host = &mut self.hosts[host];
        host.check_acknowledged(vm, position);
        let no = host.no;
        let m = &mut host.moves[vm];
        m.window.acknowledged(reached, self.now);
        while let Some((_, entries)) = m.carried.pop_front_if(|(end, _)| *end <= position) {
            if let Some(index) = &mut self.index {
                for first in entries {
                    index.carried(ClientNo(no.0), EntryRun { first, count: 1 });
                }
            }
        }
    }
}
