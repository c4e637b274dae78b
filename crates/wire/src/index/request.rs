//! What clients ask.

use std::borrow::Cow;

use page::{ContentId, HostNo};

use super::frames::put_frame;
use super::runs::{EntryRun, put_runs, take_runs};
use crate::frame::take_u32;
use crate::{WireError, varint};

/// Most contents in one message: 64 KiB of ids, a read buffer's worth.
pub const MAX_IDS: usize = 4096;

/// Longest name of a group, bytes: long enough for a prefix and a UUID.
pub const MAX_GROUP_NAME: usize = 128;

/// Which table a connection is about: contents are compared only inside one trust domain.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TableKey {
    /// Name of the group, at most [`MAX_GROUP_NAME`] bytes.
    pub group: String,
    /// Names the trust domain without telling its secret.
    pub domain: [u8; 16],
}

/// A content to register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Item {
    /// The content.
    pub id: ContentId,
    /// Pages of the target host's VMs with this content, at least one.
    pub pages: u32,
}

/// A request. Lists are at most [`MAX_IDS`] long; the sender's business to keep.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request<'a> {
    /// First of a connection: everything after is about this table.
    Join(TableKey),
    /// These contents are in VMs that will run on `target`.
    Register {
        /// The host that will need them.
        target: HostNo,
        /// What is there, in the order of the scan.
        items: Cow<'a, [Item]>,
    },
    /// Forget all that was registered for `target`; a new registration follows, or none.
    Withdraw {
        /// The host.
        target: HostNo,
    },
    /// Pages with these contents are about to go to `target`.
    Claim {
        /// Where they go.
        target: HostNo,
        /// The contents, in stream order.
        ids: Cow<'a, [ContentId]>,
    },
    /// These entries, which this client claimed, have reached their carrier.
    Carried {
        /// The entries.
        entries: Cow<'a, [EntryRun]>,
    },
    /// `carrier` does not have these entries.
    Lost {
        /// The host that was asked for them.
        carrier: HostNo,
        /// The entries.
        entries: Cow<'a, [EntryRun]>,
    },
    /// Nothing is at `host` any more.
    CarrierGone {
        /// The host.
        host: HostNo,
    },
    /// VMs that run on `target` already hold these contents.
    Seed {
        /// The host.
        target: HostNo,
        /// The contents.
        ids: Cow<'a, [ContentId]>,
    },
    /// Which of these contents is any other host than `target` registered to need?
    Shared {
        /// The host that is known to need them.
        target: HostNo,
        /// The contents.
        ids: Cow<'a, [ContentId]>,
    },
    /// What is in the table?
    Summary,
    /// The group is done: its tables go, those of all domains.
    EndGroup,
}

/// The table in the page of [`super`].
mod kind {
    pub(super) const JOIN: u8 = 1;
    pub(super) const REGISTER: u8 = 2;
    pub(super) const WITHDRAW: u8 = 3;
    pub(super) const CLAIM: u8 = 4;
    pub(super) const CARRIED: u8 = 5;
    pub(super) const LOST: u8 = 6;
    pub(super) const CARRIER_GONE: u8 = 7;
    pub(super) const SEED: u8 = 8;
    pub(super) const SUMMARY: u8 = 9;
    pub(super) const END_GROUP: u8 = 10;
    pub(super) const SHARED: u8 = 11;
}

impl Request<'_> {
    /// Appends the request as a frame.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_frame(out, self.kind(), |out| match self {
            Self::Join(key) => {
                out.extend_from_slice(&key.domain);
                out.extend_from_slice(key.group.as_bytes());
            }
            Self::Register { target, items } => {
                put_host(*target, out);
                varint::put(out, items.len() as u64);
                items.iter().for_each(|i| out.extend_from_slice(&i.id.0));
                items.iter().for_each(|i| varint::put(out, i.pages.into()));
            }
            Self::Claim { target, ids }
            | Self::Seed { target, ids }
            | Self::Shared { target, ids } => {
                put_host(*target, out);
                ids.iter().for_each(|id| out.extend_from_slice(&id.0));
            }
            Self::Carried { entries } => put_runs(entries, out),
            Self::Lost { carrier, entries } => {
                put_host(*carrier, out);
                put_runs(entries, out);
            }
            Self::Withdraw { target: host } | Self::CarrierGone { host } => put_host(*host, out),
            Self::Summary | Self::EndGroup => {}
        });
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Join(_) => kind::JOIN,
            Self::Register { .. } => kind::REGISTER,
            Self::Withdraw { .. } => kind::WITHDRAW,
            Self::Claim { .. } => kind::CLAIM,
            Self::Carried { .. } => kind::CARRIED,
            Self::Lost { .. } => kind::LOST,
            Self::CarrierGone { .. } => kind::CARRIER_GONE,
            Self::Seed { .. } => kind::SEED,
            Self::Summary => kind::SUMMARY,
            Self::EndGroup => kind::END_GROUP,
            Self::Shared { .. } => kind::SHARED,
        }
    }

    /// Reads the body of a frame of this kind.
    ///
    /// # Errors
    /// Whatever a hostile peer can put there; nothing is allocated beyond a small multiple of
    /// the body's length.
    pub fn decode(kind: u8, body: &[u8]) -> Result<Request<'static>, WireError> {
        let mut rest = body;
        Ok(match kind {
            kind::JOIN => Request::Join(take_key(body)?),
            kind::REGISTER => Request::Register {
                target: take_host(&mut rest)?,
                items: take_items(rest)?.into(),
            },
            kind::WITHDRAW => Request::Withdraw {
                target: take_last_host(rest)?,
            },
            kind::CLAIM => Request::Claim {
                target: take_host(&mut rest)?,
                ids: take_ids(rest)?.into(),
            },
            kind::CARRIED => Request::Carried {
                entries: take_runs(rest)?.into(),
            },
            kind::LOST => Request::Lost {
                carrier: take_host(&mut rest)?,
                entries: take_runs(rest)?.into(),
            },
            kind::CARRIER_GONE => Request::CarrierGone {
                host: take_last_host(rest)?,
            },
            kind::SEED => Request::Seed {
                target: take_host(&mut rest)?,
                ids: take_ids(rest)?.into(),
            },
            kind::SHARED => Request::Shared {
                target: take_host(&mut rest)?,
                ids: take_ids(rest)?.into(),
            },
            kind::SUMMARY => nothing_after(rest).map(|()| Request::Summary)?,
            kind::END_GROUP => nothing_after(rest).map(|()| Request::EndGroup)?,
            other => return Err(WireError::UnexpectedKind(other)),
        })
    }
}

fn put_host(host: HostNo, out: &mut Vec<u8>) {
    varint::put(out, host.0.into());
}

pub(super) fn take_host(rest: &mut &[u8]) -> Result<HostNo, WireError> {
    let number = varint::take(rest)?;
    u16::try_from(number)
        .map(HostNo)
        .map_err(|_| WireError::NumberTooLarge)
}

fn take_last_host(mut rest: &[u8]) -> Result<HostNo, WireError> {
    let host = take_host(&mut rest)?;
    nothing_after(rest).map(|()| host)
}

pub(super) fn nothing_after(rest: &[u8]) -> Result<(), WireError> {
    if rest.is_empty() {
        Ok(())
    } else {
        Err(WireError::Control("bytes after the end".into()))
    }
}

fn take_key(body: &[u8]) -> Result<TableKey, WireError> {
    let (domain, name) = body.split_first_chunk().ok_or(WireError::Truncated)?;
    if name.len() > MAX_GROUP_NAME {
        return Err(too_long("the name of a group", name.len(), MAX_GROUP_NAME));
    }
    let group = str::from_utf8(name).map_err(|e| WireError::Control(e.to_string()))?;
    Ok(TableKey {
        group: group.to_owned(),
        domain: *domain,
    })
}

fn take_ids(rest: &[u8]) -> Result<Vec<ContentId>, WireError> {
    let (ids, partial) = rest.as_chunks::<16>();
    if !partial.is_empty() {
        return Err(WireError::Truncated);
    }
    if ids.len() > MAX_IDS {
        return Err(too_long("a batch of contents", ids.len(), MAX_IDS));
    }
    Ok(ids.iter().copied().map(ContentId).collect())
}

fn take_items(mut rest: &[u8]) -> Result<Vec<Item>, WireError> {
    let count = take_u32(&mut rest)? as usize;
    if count > MAX_IDS {
        return Err(too_long("a batch of contents", count, MAX_IDS));
    }
    let (ids, mut rest) = rest
        .split_at_checked(count * 16)
        .ok_or(WireError::Truncated)?;
    let mut items = Vec::with_capacity(count);
    for id in take_ids(ids)? {
        let pages = take_u32(&mut rest)?;
        if pages == 0 {
            return Err(WireError::NumberTooLarge);
        }
        items.push(Item { id, pages });
    }
    nothing_after(rest).map(|()| items)
}

pub(super) fn too_long(what: &'static str, length: usize, limit: usize) -> WireError {
    WireError::TooLong {
        what,
        length: length as u64,
        limit: limit as u64,
    }
}
