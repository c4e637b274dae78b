//! What the index answers.

use page::{EntryId, HostNo, HostSet};

use super::MAX_IDS;
use super::frames::put_frame;
use super::request::{nothing_after, too_long};
use super::runs::RunCode;
use crate::{WireError, varint};

/// Answer to the claim of one content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nobody carries it: the asker does, and its target host is the carrier from now on.
    Carry {
        /// The content's entry.
        entry: EntryId,
        /// The other target hosts that are known to need it: the carrier forwards it to them.
        hosts: HostSet,
    },
    /// It is at, or under way to, a target host: perhaps the asker's own.
    At {
        /// The content's entry.
        entry: EntryId,
        /// The target host that has it or gets it.
        carrier: HostNo,
        /// Whether the carrier was told to forward it to the asker's target host.
        pushed: bool,
    },
    /// The table is full: the content goes without an entry.
    Full,
}

/// What a table holds, for reports.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Contents that `n + 1` target hosts need, at position `n`; as long as the largest number
    /// of hosts. Hosts beyond [`HostSet::CAPACITY`] do not count.
    pub by_hosts: Vec<u64>,
    /// Pages registered.
    pub pages: u64,
    /// Contents that nobody has claimed.
    pub unclaimed: u64,
    /// Contents that are under way to their carrier.
    pub in_flight: u64,
    /// Contents that their carrier has.
    pub present: u64,
    /// Contents that were claimed, and are at no target host.
    pub lost: u64,
}

impl Summary {
    /// All entries: also of contents that no host is registered to need.
    #[must_use]
    pub fn entries(&self) -> u64 {
        [self.unclaimed, self.in_flight, self.present, self.lost]
            .into_iter()
            .fold(0, u64::saturating_add)
    }

    /// Distinct contents that are registered: what crosses the core link if each crosses once.
    #[must_use]
    pub fn contents(&self) -> u64 {
        self.by_hosts
            .iter()
            .fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Of these, the contents that two or more target hosts need.
    #[must_use]
    pub fn shared(&self) -> u64 {
        let shared = self.by_hosts.iter().skip(1);
        shared.fold(0, |sum, n| sum.saturating_add(*n))
    }

    /// Contents counted once for each host: what crosses if each crosses once for a host.
    #[must_use]
    pub fn contents_of_hosts(&self) -> u64 {
        let hosts = (1_u64..).zip(&self.by_hosts);
        hosts.fold(0, |sum, (n, contents)| {
            sum.saturating_add(contents.saturating_mul(n))
        })
    }

    /// Adds another shard's summary.
    pub fn add(&mut self, other: &Self) {
        let length = self.by_hosts.len().max(other.by_hosts.len());
        self.by_hosts.resize(length, 0);
        for (sum, n) in self.by_hosts.iter_mut().zip(&other.by_hosts) {
            *sum = sum.saturating_add(*n);
        }
        for (sum, n) in [
            (&mut self.pages, other.pages),
            (&mut self.unclaimed, other.unclaimed),
            (&mut self.in_flight, other.in_flight),
            (&mut self.present, other.present),
            (&mut self.lost, other.lost),
        ] {
            *sum = sum.saturating_add(n);
        }
    }
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// To `Join`.
    Welcome {
        /// Entry ids mean something only in this epoch: another one is another table.
        epoch: u64,
        /// Number of this server's shard, below [`EntryId::MAX_SHARDS`].
        shard: u8,
    },
    /// To `Register` and `Seed`: the entry of each content; none if the table is full. To
    /// `Shared`: the entry of each content that another host needs.
    Entries(Vec<Option<EntryId>>),
    /// To `Claim`: one for each content.
    Verdicts(Vec<Verdict>),
    /// To `Summary`.
    Summary(Summary),
}

/// The table in the page of [`super`].
mod kind {
    pub(super) const WELCOME: u8 = 33;
    pub(super) const ENTRIES: u8 = 34;
    pub(super) const VERDICTS: u8 = 35;
    pub(super) const SUMMARY: u8 = 36;
}

impl Answer {
    /// Appends the answer as a frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Welcome { epoch, shard } => put_frame(out, kind::WELCOME, |out| {
                out.extend_from_slice(&epoch.to_le_bytes());
                out.push(*shard);
            }),
            Self::Entries(entries) => put_frame(out, kind::ENTRIES, |out| {
                put_entries(entries, out);
            }),
            Self::Verdicts(verdicts) => Self::encode_verdicts(verdicts, out),
            Self::Summary(summary) => put_frame(out, kind::SUMMARY, |out| {
                let Summary {
                    by_hosts,
                    pages,
                    unclaimed,
                    in_flight,
                    present,
                    lost,
                } = summary;
                for n in [pages, unclaimed, in_flight, present, lost] {
                    varint::put(out, *n);
                }
                by_hosts.iter().for_each(|n| varint::put(out, *n));
            }),
        }
    }

    /// Appends `Verdicts`, without a vector of its own.
    pub fn encode_verdicts(verdicts: &[Verdict], out: &mut Vec<u8>) {
        put_frame(out, kind::VERDICTS, |out| put_verdicts(verdicts, out));
    }

    /// Reads the body of a frame of this kind.
    ///
    /// # Errors
    /// Whatever a hostile peer can put there; nothing is allocated beyond [`MAX_IDS`] answers.
    pub fn decode(kind: u8, body: &[u8]) -> Result<Self, WireError> {
        match kind {
            kind::WELCOME => take_welcome(body),
            kind::ENTRIES => take_entries(body).map(Self::Entries),
            kind::VERDICTS => take_verdicts(body).map(Self::Verdicts),
            kind::SUMMARY => take_summary(body).map(Self::Summary),
            other => Err(WireError::UnexpectedKind(other)),
        }
    }
}

fn take_welcome(body: &[u8]) -> Result<Answer, WireError> {
    let (epoch, rest) = body.split_first_chunk().ok_or(WireError::Truncated)?;
    let (&shard, rest) = rest.split_first().ok_or(WireError::Truncated)?;
    if shard >= EntryId::MAX_SHARDS {
        return Err(WireError::NumberTooLarge);
    }
    let epoch = u64::from_le_bytes(*epoch);
    nothing_after(rest).map(|()| Answer::Welcome { epoch, shard })
}

fn take_summary(mut body: &[u8]) -> Result<Summary, WireError> {
    let rest = &mut body;
    let mut summary = Summary {
        pages: varint::take(rest)?,
        unclaimed: varint::take(rest)?,
        in_flight: varint::take(rest)?,
        present: varint::take(rest)?,
        lost: varint::take(rest)?,
        by_hosts: Vec::new(),
    };
    while !rest.is_empty() {
        if summary.by_hosts.len() == usize::from(HostSet::CAPACITY) {
            return Err(WireError::NumberTooLarge);
        }
        summary.by_hosts.push(varint::take(rest)?);
    }
    Ok(summary)
}

/// Runs of entries: length times two, plus one if they have ids; then the start.
fn put_entries(entries: &[Option<EntryId>], out: &mut Vec<u8>) {
    let mut code = RunCode::default();
    for run in entries.chunk_by(|a, b| match (a, b) {
        (Some(a), Some(b)) => follows(*a, *b),
        (a, b) => a.is_none() && b.is_none(),
    }) {
        let has_ids = run[0].is_some();
        varint::put(out, (run.len() as u64) << 1 | u64::from(has_ids));
        if let Some(first) = run[0] {
            code.put_start(first, length(run), out);
        }
    }
}

fn take_entries(mut rest: &[u8]) -> Result<Vec<Option<EntryId>>, WireError> {
    let (mut code, mut entries) = (RunCode::default(), Vec::new());
    while !rest.is_empty() {
        let head = varint::take(&mut rest)?;
        let count = checked_count(head >> 1, entries.len())?;
        if head & 1 == 0 {
            entries.resize(entries.len() + count as usize, None);
        } else {
            let run = code.take_start(count, &mut rest)?;
            entries.extend(run.entries().map(Some));
        }
    }
    Ok(entries)
}

/// Kinds of runs of verdicts; 0 is invalid.
mod tag {
    pub(super) const CARRY: u64 = 1;
    pub(super) const PUSHED: u64 = 2;
    pub(super) const PULLED: u64 = 3;
    pub(super) const FULL: u64 = 4;
    pub(super) const BITS: u32 = 3;
}

/// Runs of consecutive entries with the same answer: length times eight, plus the tag; then
/// the start of the run, unless full; then the hosts, as the difference to those of the `Carry`
/// before (exclusive or), or the carrier.
fn put_verdicts(verdicts: &[Verdict], out: &mut Vec<u8>) {
    let (mut code, mut last_hosts) = (RunCode::default(), 0);
    for run in verdicts.chunk_by(is_same_run) {
        let head = |tag| (run.len() as u64) << tag::BITS | tag;
        match run[0] {
            Verdict::Carry { entry, hosts } => {
                varint::put(out, head(tag::CARRY));
                code.put_start(entry, length(run), out);
                varint::put(out, hosts.bits() ^ last_hosts);
                last_hosts = hosts.bits();
            }
            Verdict::At {
                entry,
                carrier,
                pushed,
            } => {
                let tag = if pushed { tag::PUSHED } else { tag::PULLED };
                varint::put(out, head(tag));
                code.put_start(entry, length(run), out);
                varint::put(out, carrier.0.into());
            }
            Verdict::Full => varint::put(out, head(tag::FULL)),
        }
    }
}

fn is_same_run(a: &Verdict, b: &Verdict) -> bool {
    match (*a, *b) {
        (
            Verdict::Carry { entry, hosts },
            Verdict::Carry {
                entry: next,
                hosts: others,
            },
        ) => follows(entry, next) && hosts == others,
        (
            Verdict::At {
                entry,
                carrier,
                pushed,
            },
            Verdict::At {
                entry: next,
                carrier: other,
                pushed: also,
            },
        ) => follows(entry, next) && carrier == other && pushed == also,
        (a, b) => a == Verdict::Full && b == Verdict::Full,
    }
}

fn take_verdicts(mut body: &[u8]) -> Result<Vec<Verdict>, WireError> {
    let rest = &mut body;
    let (mut code, mut last_hosts, mut verdicts) = (RunCode::default(), 0, Vec::new());
    while !rest.is_empty() {
        let head = varint::take(rest)?;
        let count = checked_count(head >> tag::BITS, verdicts.len())?;
        match head & ((1 << tag::BITS) - 1) {
            tag::CARRY => {
                let run = code.take_start(count, rest)?;
                last_hosts ^= varint::take(rest)?;
                let hosts = HostSet::from_bits(last_hosts);
                verdicts.extend(run.entries().map(|entry| Verdict::Carry { entry, hosts }));
            }
            tag @ (tag::PUSHED | tag::PULLED) => {
                let run = code.take_start(count, rest)?;
                let carrier = super::request::take_host(rest)?;
                let pushed = tag == tag::PUSHED;
                verdicts.extend(run.entries().map(|entry| Verdict::At {
                    entry,
                    carrier,
                    pushed,
                }));
            }
            tag::FULL => verdicts.resize(verdicts.len() + count as usize, Verdict::Full),
            other => return Err(WireError::UnknownOp(u8::try_from(other).unwrap_or(0))),
        }
    }
    Ok(verdicts)
}

fn follows(entry: EntryId, next: EntryId) -> bool {
    next.0.checked_sub(entry.0) == Some(1) && entry.shard() == next.shard()
}

fn length<T>(run: &[T]) -> u32 {
    u32::try_from(run.len()).unwrap_or(u32::MAX)
}

/// A run's length, checked together with what came before it.
fn checked_count(count: u64, before: usize) -> Result<u32, WireError> {
    let limit = (MAX_IDS - before) as u64;
    match u32::try_from(count) {
        Ok(0) => Err(WireError::NumberTooLarge),
        Ok(n) if count <= limit => Ok(n),
        _ => Err(too_long(
            "a batch of answers",
            usize::try_from(count).unwrap_or(usize::MAX),
            MAX_IDS,
        )),
    }
}
