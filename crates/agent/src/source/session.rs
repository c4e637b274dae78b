//! Sessions: the connections to one target agent that a group's moves share.

use std::collections::HashMap;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use migrate::pack::{Packed, repair_front};
use page::{BlockIndex, ContentKey, HostAddr, HostNo, PAGE_SIZE, PageNo, PageRun};
use wire::{
    BackMessage, Channel, ControlReply, FrameHeader, FrameKind, HEADER_LEN, Hello,
    PROTOCOL_VERSION, RackHello, WireCompression, WireError,
};

use crate::link::{Bucket, Compressor, Hold, Link, LinkError, Pool, Security, keep_short, pack};

use crate::target::store_name;
use crate::types::RackSpec;

use super::index_link::IndexLink;
use super::kept::Kept;
use super::lanes::{Lanes, Load, Loads, Way};
use super::outbox::{OutFrame, Outbox, pieces};
use super::reader::{BUFFER, RackWay};
use super::right_of_way::RightOfWay;
use super::run::Input;
use super::shared::FrameScan;
use super::stream::Stream;
use super::urgent;

/// How often a silent side says that it lives.
pub(crate) const HEARTBEAT: Duration = Duration::from_secs(1);

/// Pages of one repair frame: a buffer full.
const REPAIR_PAGES: usize = BUFFER / PAGE_SIZE;

/// Moves with the same key share a session.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct SessionKey {
    pub(crate) group: String,
    pub(crate) target_bulk: String,
    /// Secret of the trust domain, 64 hex digits.
    pub(crate) domain_key: String,
    /// Logarithm of the zstd window; absent without compression.
    pub(crate) window_log: Option<u8>,
    /// Addresses of the index, with scope `rack`.
    pub(crate) index: Option<Vec<String>>,
    /// Whether pages that share frames are looked for.
    pub(crate) is_sharing: bool,
}

/// The sessions under way, kept by the moves that use them.
#[derive(Default)]
pub(crate) struct Sessions {
    open: Kept<SessionKey, Session>,
}

impl Sessions {
    /// The session for `key`; connects if there is none.
    pub(crate) fn get(
        &self,
        key: &SessionKey,
        rack: Option<SessionRack>,
        context: &SessionContext,
    ) -> Result<Arc<Session>, LinkError> {
        self.open.get(
            key,
            |session| !session.is_over(),
            || Session::connect(key, rack, context),
        )
    }
}

/// What a session needs of its group.
pub(crate) struct SessionRack {
    pub(crate) way: RackWay,
    pub(crate) hello: RackHello,
}

impl SessionRack {
    pub(crate) fn new(
        spec: &RackSpec,
        group: &str,
        secret: &ContentKey,
        index: Arc<IndexLink>,
    ) -> Self {
        let store = store_name(secret, group, index.epoch);
        let peers = spec.peers.iter().map(|p| (p.host, p.bulk.clone()));
        let hello = RackHello {
            store,
            host: spec.target,
            peers: peers.collect(),
        };
        let target = HostNo(spec.target);
        Self {
            way: RackWay { index, target },
            hello,
        }
    }
}

/// What a session needs of its agent.
#[derive(Clone)]
pub(crate) struct SessionContext {
    pub(crate) host: String,
    pub(crate) security: Security,
    pub(crate) peer_timeout: Duration,
    pub(crate) hold: Hold,
    /// Most connections that share the frames of a session.
    pub(crate) connections_max: usize,
    /// The group's share of this agent.
    pub(crate) budget: Arc<Bucket>,
}

/// One session. Ends when the last move that uses it lets go, or when a connection fails: then
/// every move of it is told.
pub(crate) struct Session {
    pub(crate) id: String,
    pub(crate) outbox: Arc<Outbox>,
    /// Absent: contents are compared inside the session only.
    pub(crate) rack: Option<RackWay>,
    /// Which pages of its VMs share frames; absent if nobody wants to know.
    pub(crate) frames: Option<FrameScan>,
    pub(crate) right_of_way: Arc<RightOfWay>,
    shared: Arc<Shared>,
    next_vm: AtomicU16,
    sockets: [TcpStream; 2],
    lanes: Arc<Lanes>,
}

struct Shared {
    streams: Mutex<HashMap<u16, Arc<Stream>>>,
    over: Mutex<Option<String>>,
    rack: Option<RackWay>,
}

impl Session {
    /// Connects a session of its own.
    pub(crate) fn connect(
        key: &SessionKey,
        rack: Option<SessionRack>,
        context: &SessionContext,
    ) -> Result<Arc<Self>, LinkError> {
        let id = random_id()?;
        let compression = match key.window_log {
            Some(window_log) => WireCompression::Zstd { window_log },
            None => WireCompression::None,
        };
        let hello = |channel, domain_key| Hello {
            version: PROTOCOL_VERSION,
            session: id.clone(),
            channel,
            source: context.host.clone(),
            compression,
            domain_key,
            rack: None,
        };
        let mut forward_hello = hello(Channel::Forward, Some(key.domain_key.clone()));
        let (rack, rack_hello) = rack.map(|rack| (rack.way, rack.hello)).unzip();
        forward_hello.rack = rack_hello;
        let forward = open(&key.target_bulk, context, &forward_hello)?;
        let back = open(&key.target_bulk, context, &hello(Channel::Back, None))?;
        let sockets = [forward.socket()?, back.socket()?];
        let shared = Arc::new(Shared {
            streams: Mutex::default(),
            over: Mutex::default(),
            rack: rack.clone(),
        });
        let outbox = Arc::new(Outbox::default());
        let (lanes, loads) = Lanes::new(Way {
            address: key.target_bulk.clone(),
            context: context.clone(),
            hello: hello(Channel::Lane, None),
        });
        let session = Arc::new(Self {
            id,
            outbox: Arc::clone(&outbox),
            rack,
            frames: key.is_sharing.then(FrameScan::default),
            right_of_way: Arc::default(),
            shared: Arc::clone(&shared),
            next_vm: AtomicU16::new(0),
            sockets,
            lanes,
        });
        let budget = Arc::clone(&context.budget);
        let sender = Sender::new(forward, loads, compression, budget)?;
        spawn("gw-send", {
            let (outbox, shared) = (Arc::clone(&outbox), Arc::clone(&shared));
            move || {
                let result = sender.run(&outbox);
                shared.end(&outbox, result.err().map(|e| describe(&e)));
            }
        })?;
        let hold = context.hold.clone();
        spawn("gw-receive", move || {
            let result = receive(back, &shared, &outbox, &hold);
            shared.end(&outbox, Some(describe(&result)));
        })?;
        Ok(session)
    }

    /// A number for one more VM; numbers are not used again in a session.
    pub(crate) fn number(&self) -> u16 {
        self.next_vm.fetch_add(1, Ordering::Relaxed)
    }

    /// Adds a VM's stream. If the session is over, it is told at once.
    pub(crate) fn add(&self, stream: &Arc<Stream>) {
        let vms = {
            let mut streams = self.shared.streams();
            streams.insert(stream.vm, Arc::clone(stream));
            streams.len()
        };
        self.lanes.grow(vms, {
            let (shared, outbox) = (Arc::clone(&self.shared), Arc::clone(&self.outbox));
            move |error| shared.end(&outbox, Some(describe(&error)))
        });
        if let Some(frames) = &self.frames {
            frames.add(stream);
        }
        let over = self
            .shared
            .over
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(reason) = over {
            stream.tell(Input::Failed(reason));
        }
    }

    /// Takes a VM's stream out; the target forgets what it holds for it.
    pub(crate) fn remove(&self, stream: &Arc<Stream>) {
        self.shared.streams().remove(&stream.vm);
        if let Some(frames) = &self.frames {
            frames.remove(stream.vm);
        }
        self.outbox.push(OutFrame {
            kind: FrameKind::Close,
            stream: Arc::clone(stream),
            packed: Packed::default(),
            buffer: None,
        });
    }

    /// From here on frames are urgent now and then.
    pub(crate) fn expect_urgent(&self) {
        self.lanes.close_to_more();
        if let Err(error) = keep_short(&self.sockets[0]) {
            tracing::debug!(%error, "urgent pages wait for what the kernel holds");
        }
    }

    fn is_over(&self) -> bool {
        self.shared
            .over
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.end(&self.outbox, None);
        for socket in &self.sockets {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        self.lanes.cut();
    }
}

impl Shared {
    fn streams(&self) -> std::sync::MutexGuard<'_, HashMap<u16, Arc<Stream>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first to call says why.
    fn end(&self, outbox: &Outbox, reason: Option<String>) {
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        if over.is_some() {
            return;
        }
        if let Some(rack) = self.rack.as_ref().filter(|_| reason.is_some()) {
            // What it carried may be gone with it; if not, it costs bytes.
            rack.index.carrier_gone(rack.target);
        }
        let reason = reason.unwrap_or_else(|| "the session has ended".into());
        *over = Some(reason.clone());
        drop(over);
        outbox.close();
        for stream in self.streams().values() {
            stream.tell(Input::Failed(reason.clone()));
        }
    }
}

pub(crate) fn open(
    address: &str,
    context: &SessionContext,
    hello: &Hello,
) -> Result<Link, LinkError> {
    let mut link = Link::connect(address, &context.security, context.peer_timeout)?;
    link.send_hello(hello)?;
    match link.receive()? {
        ControlReply::Welcome => Ok(link),
        ControlReply::Refused { reason } => Err(LinkError::Refused(reason)),
        other => Err(WireError::Control(format!("unexpected answer {other:?}")).into()),
    }
}

pub(crate) fn describe(error: &LinkError) -> String {
    let mut text = format!("the connection to the target agent is lost: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn random_id() -> Result<String, LinkError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| std::io::Error::other(e.to_string()))?;
    Ok(hex::encode(bytes))
}

pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map(drop)
}

/// The thread that packs and numbers frames, and owns the forward connection.
struct Sender {
    link: Link,
    loads: Loads,
    /// Number of the last frame.
    order: u32,
    compressor: Option<Compressor>,
    /// A body, compressed.
    compressed: Vec<u8>,
    budget: Arc<Bucket>,
}

impl Sender {
    fn new(
        link: Link,
        loads: Loads,
        compression: WireCompression,
        budget: Arc<Bucket>,
    ) -> Result<Self, LinkError> {
        Ok(Self {
            link,
            loads,
            order: 0,
            compressor: Compressor::new(compression)?,
            compressed: Vec::with_capacity(2 * BUFFER),
            budget,
        })
    }

    fn run(mut self, outbox: &Outbox) -> Result<(), LinkError> {
        while let Ok(frame) = outbox.pop(HEARTBEAT) {
            let Some(frame) = frame else {
                self.link
                    .write_all(&FrameHeader::new(FrameKind::Heartbeat, 0, 0, 0).to_bytes())?;
                continue;
            };
            let raw = frame.packed.raw_len();
            let stream = Arc::clone(&frame.stream);
            let sent = self.send(frame)?;
            outbox.learn_ratio(raw, sent);
            stream.wire_bytes.fetch_add(sent as u64, Ordering::Relaxed);
            let now = Instant::now();
            stream.bucket.take(sent as u64, now);
            let wait = self.budget.take(sent as u64, now);
            if !wait.is_zero() {
                outbox.rest(wait);
            }
        }
        Ok(())
    }

    /// Sends a frame, or gives it to a lane. Returns its bytes on the wire, before encryption.
    fn send(&mut self, frame: OutFrame) -> Result<usize, LinkError> {
        let OutFrame {
            kind,
            stream,
            packed,
            buffer,
        } = frame;
        // Urgent pages are packed, too: 32 KiB take the compressor a tenth of a millisecond, and much of
        // them has crossed before.
        let header = pack(
            (kind, stream.vm),
            pieces(&packed, buffer.as_ref()),
            self.compressor.as_mut(),
            &mut self.compressed,
        )?;
        // 0 is no number.
        self.order = self.order.wrapping_add(1).max(1);
        let header = header.with_order(self.order);
        let sent = HEADER_LEN + header.body_len();
        let mut load = Load {
            header,
            packed,
            buffer,
            compressed: std::mem::take(&mut self.compressed),
        };
        if header.is_compressed() {
            // While it waits the reader can use its buffer again.
            load.packed = Packed::default();
            load.buffer = None;
        }
        if !self.link.has_room() {
            let Some(back) = self.loads.give(load) else {
                self.compressed = self.loads.spare();
                return Ok(sent);
            };
            load = back;
        }
        load.send(&mut self.link)?;
        self.compressed = load.compressed;
        Ok(sent)
    }
}

/// The thread that owns the back connection; returns why it ended.
fn receive(mut link: Link, shared: &Shared, outbox: &Outbox, hold: &Hold) -> LinkError {
    let mut body = Vec::new();
    let pool = Pool::new(BUFFER);
    loop {
        let result = receive_one(&mut link, &mut body);
        let (vm, message) = match result {
            Ok(Some(received)) => received,
            Ok(None) => continue,
            Err(error) => return error,
        };
        let Some(stream) = shared.streams().get(&vm).cloned() else {
            continue;
        };
        match message {
            BackMessage::Ack(reached) => {
                stream.acknowledged(reached);
                if let Some(rack) = &shared.rack {
                    let carried = stream.take_carried();
                    if !carried.is_empty() {
                        rack.index.carried(carried);
                    }
                }
            }
            BackMessage::ReturnPath(message) => {
                urgent::serve(&stream, &message, outbox, &pool);
                stream.write_return_path(&message);
            }
            BackMessage::RepairRequest(runs) => repair(&stream, &runs, outbox, &pool),
            BackMessage::Mapped { pages } => stream.mapped.store(pages, Ordering::Relaxed),
            BackMessage::Switched => {
                hold.at("switched", &stream.name);
                stream.tell(Input::Switched);
            }
            BackMessage::Resumed => {
                hold.at("resumed", &stream.name);
                stream.tell(Input::Resumed);
            }
            BackMessage::Faults(times) => stream.set_faults(times),
            BackMessage::Loaded => {
                hold.at("sent", &stream.name);
                stream.tell(Input::Loaded);
            }
            BackMessage::Note(message) => stream.tell(Input::Note(message)),
            BackMessage::LoadFailed(reason) => stream.tell(Input::Failed(reason)),
            BackMessage::Lost { carrier, entries } => {
                outbox.forget(&entries);
                if let Some(rack) = &shared.rack {
                    rack.index.lost(carrier, entries);
                }
            }
        }
    }
}

fn receive_one(
    link: &mut Link,
    body: &mut Vec<u8>,
) -> Result<Option<(u16, BackMessage)>, LinkError> {
    let mut header = [0; HEADER_LEN];
    link.read_exact(&mut header)?;
    let header = FrameHeader::parse(header)?;
    body.resize(header.body_len(), 0);
    link.read_exact(body)?;
    match header.kind() {
        FrameKind::BackHeartbeat => Ok(None),
        FrameKind::Back => Ok(Some((header.vm(), BackMessage::decode(body)?))),
        other => Err(WireError::UnexpectedKind(other as u8).into()),
    }
}

/// Reads pages again from the source QEMU and queues them. A page that changes meanwhile is
/// dirty, and QEMU sends it again.
fn repair(stream: &Arc<Stream>, runs: &[(BlockIndex, PageRun)], outbox: &Outbox, pool: &Arc<Pool>) {
    for (block, run) in runs {
        let Some(base) = stream.memory.base(*block) else {
            stream.tell(Input::Failed(format!(
                "block {} cannot be read again at the source",
                block.0
            )));
            return;
        };
        let len = stream.memory.len(*block);
        if run.end().is_none_or(|end| end > len) {
            stream.tell(Input::Failed(format!(
                "the target asks for pages beyond the end of block {}",
                block.0
            )));
            return;
        }
        let mut pages = run.pages();
        loop {
            let chunk: Vec<PageNo> = pages.by_ref().take(REPAIR_PAGES).collect();
            if chunk.is_empty() {
                break;
            }
            if let Err(reason) = repair_chunk(stream, *block, &chunk, base, (outbox, pool)) {
                stream.tell(Input::Failed(format!(
                    "a page could not be read again at the source: {reason}"
                )));
                return;
            }
        }
        stream.count_repaired(run.count.into());
    }
}

fn repair_chunk(
    stream: &Arc<Stream>,
    block: BlockIndex,
    pages: &[PageNo],
    base: HostAddr,
    (outbox, pool): (&Outbox, &Arc<Pool>),
) -> std::io::Result<()> {
    // Before the pages are read: they are at least as new as the stream up to here.
    let as_of = stream.flow().0;
    let mut buffer = pool.take(BUFFER);
    let addresses: Vec<HostAddr> = pages
        .iter()
        .filter_map(|page| base.of_page(*page))
        .collect();
    let read = stream
        .memory
        .memory
        .read_pages(&addresses, &mut buffer[..addresses.len() * PAGE_SIZE])?;
    if read < pages.len() {
        return Err(std::io::Error::other("unmapped memory"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a buffer is far below 4 GiB"
    )]
    let offsets = (0..pages.len()).map(|i| (i * PAGE_SIZE) as u32).collect();
    let packed = Packed {
        front: repair_front(as_of, block, pages),
        pages: offsets,
        ..Packed::default()
    };
    let buffer = Some(Arc::new(buffer));
    outbox.push(OutFrame {
        kind: FrameKind::Repair,
        stream: Arc::clone(stream),
        packed,
        buffer,
    });
    Ok(())
}
