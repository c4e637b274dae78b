//! What a target QEMU says: its return path, read to its end.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use migrate::unpack::Unpacker;
use page::{BlockIndex, PageNo};
use qstream::{ReturnDecoder, ReturnMessage, ReturnStep};
use wire::{BackMessage, FaultTimes, MAX_RETURN_MESSAGE, Reached};

use super::session::{TargetSession, lock};

/// Most faults whose times are kept: 4 GiB of memory, page by page.
const MAX_FAULTS: usize = 1 << 20;

/// What a target QEMU that goes on with its migration says.
const RESUMED: u32 = 1;

/// A ping of ours on its way.
pub(crate) struct Ping {
    pub(crate) value: u32,
    /// How far the stream is once it is answered.
    pub(crate) reached: Reached,
    /// Pages of post-copy that QEMU has then.
    pub(crate) given: Vec<(BlockIndex, PageNo)>,
}

/// What the thread that feeds QEMU and the one that hears it share.
#[derive(Default)]
pub(crate) struct Returns {
    pings: Mutex<VecDeque<Ping>>,
    faults: Mutex<Faults>,
    heard: Mutex<Heard>,
    news: Condvar,
}

/// What was heard of QEMU.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Heard {
    #[default]
    Nothing,
    /// A ping of ours was answered, and so were all before it.
    Answer,
    /// Nothing more comes.
    End,
}

/// Pages that QEMU has asked for.
#[derive(Default)]
struct Faults {
    /// Names of the stream's blocks.
    blocks: Vec<String>,
    /// Block of the last request that named one.
    block: Option<BlockIndex>,
    open: HashMap<(BlockIndex, PageNo), Instant>,
    /// Microseconds.
    took: Vec<u64>,
}

impl Returns {
    /// A ping is about to be written.
    pub(crate) fn expect(&self, ping: Ping) {
        lock(&self.pings).push_back(ping);
    }

    /// Waits until QEMU has answered a ping of ours, the first or a later one. False: it does not.
    pub(crate) fn wait_answer(&self, patience: Duration) -> bool {
        let heard = lock(&self.heard);
        let waits = |heard: &mut Heard| *heard == Heard::Nothing;
        let (heard, _) = self
            .news
            .wait_timeout_while(heard, patience, waits)
            .unwrap_or_else(PoisonError::into_inner);
        *heard == Heard::Answer
    }

    fn hears(&self, news: Heard) {
        *lock(&self.heard) = news;
        self.news.notify_all();
    }

    /// The stream's blocks are known.
    pub(crate) fn set_blocks(&self, names: Vec<String>) {
        lock(&self.faults).blocks = names;
    }

    /// Pages were written to QEMU.
    pub(crate) fn given(&self, pages: &[(BlockIndex, PageNo)]) {
        if pages.is_empty() {
            return;
        }
        let mut faults = lock(&self.faults);
        for page in pages {
            if let Some(since) = faults.open.remove(page)
                && faults.took.len() < MAX_FAULTS
            {
                let took = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
                faults.took.push(took);
            }
        }
    }

    /// Whether QEMU has asked for the page, and was not given it since.
    pub(crate) fn is_asked(&self, block: BlockIndex, page: PageNo) -> bool {
        lock(&self.faults).open.contains_key(&(block, page))
    }

    /// How long faults took, if there were any.
    pub(crate) fn fault_times(&self) -> Option<FaultTimes> {
        let mut took = std::mem::take(&mut lock(&self.faults).took);
        took.sort_unstable();
        let at = |percent: usize| took.get((took.len() * percent / 100).min(took.len() - 1));
        Some(FaultTimes {
            count: took.len() as u64,
            max_us: *took.last()?,
            median_us: *at(50)?,
            p99_us: *at(99)?,
        })
    }

    fn asked(&self, message: &ReturnMessage<'_>) {
        let mut faults = lock(&self.faults);
        let start = match message {
            ReturnMessage::ReqPagesId { start, block, .. } => {
                let index = faults.blocks.iter().position(|name| name == block);
                faults.block = index.and_then(|i| u16::try_from(i).ok()).map(BlockIndex);
                *start
            }
            ReturnMessage::ReqPages { start, .. } => *start,
            _ => return,
        };
        if let (Some(block), Some(page)) = (faults.block, PageNo::from_offset(start))
            && faults.open.len() < MAX_FAULTS
        {
            faults
                .open
                .entry((block, page))
                .or_insert_with(Instant::now);
        }
    }

    /// A ping was answered: what is before it is in QEMU.
    fn answered(&self, session: &TargetSession, vm: u16, value: u32) {
        let mut pings = lock(&self.pings);
        let (mut reached, mut given) = (None, Vec::new());
        while let Some(ping) = pings.pop_front() {
            reached = Some(ping.reached);
            given.extend(ping.given);
            if ping.value == value {
                break;
            }
        }
        drop(pings);
        if !given.is_empty()
            && let Some(memory) = session.memory(vm)
        {
            memory.has(&given);
        }
        if let Some(reached) = reached {
            self.hears(Heard::Answer);
            session.say(vm, BackMessage::Ack(reached));
        }
    }
}

/// How a target QEMU's return path ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReturnEnd {
    /// It said whether it has loaded everything.
    Shut(u32),
    /// It closed without a word.
    Closed,
    /// It said what it should not.
    Broken(String),
}

/// Reads a target QEMU's return path to its end; own pongs become acknowledgements.
pub(crate) fn read_return_path(
    socket: UnixStream,
    session: &TargetSession,
    vm: u16,
    returns: &Returns,
) -> ReturnEnd {
    let end = read_to_end(socket, session, vm, returns);
    returns.hears(Heard::End);
    end
}

fn read_to_end(
    mut socket: UnixStream,
    session: &TargetSession,
    vm: u16,
    returns: &Returns,
) -> ReturnEnd {
    let mut decoder = ReturnDecoder::new();
    let (mut buffer, mut filled) = (vec![0; 4096], 0);
    loop {
        match socket.read(&mut buffer[filled..]) {
            Ok(0) => return ReturnEnd::Closed,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return ReturnEnd::Closed,
        }
        let mut at = 0;
        while at < filled {
            match decoder.decode(&buffer[at..filled]) {
                Err(error) => return ReturnEnd::Broken(error.to_string()),
                Ok(ReturnStep::NeedMore { at_least }) => {
                    if at_least > buffer.len() {
                        buffer.resize(at_least, 0);
                    }
                    break;
                }
                Ok(ReturnStep::Message {
                    message: ReturnMessage::Shut(status),
                    ..
                }) => return ReturnEnd::Shut(status),
                Ok(ReturnStep::Message { message, raw }) => {
                    at += raw.len();
                    match message {
                        ReturnMessage::Pong(value) if Unpacker::is_our_ping(value) => {
                            returns.answered(session, vm, value);
                        }
                        _ => {
                            returns.asked(&message);
                            for piece in raw.chunks(MAX_RETURN_MESSAGE) {
                                session.say(vm, BackMessage::ReturnPath(piece.to_vec()));
                            }
                            if let ReturnMessage::ResumeAck(RESUMED) = message {
                                session.say(vm, BackMessage::Resumed);
                            }
                        }
                    }
                }
            }
        }
        buffer.copy_within(at..filled, 0);
        filled -= at;
    }
}
