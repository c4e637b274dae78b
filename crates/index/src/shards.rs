//! An index of several servers, each with a part of the contents.

use std::collections::VecDeque;

use page::{ContentId, EntryId, HostNo};
use wire::index::{Answer, EntryRun, Item, Summary, TableKey, Verdict};

use crate::client::{Asked, Client, ClientError, Ticket, empty_answer};

/// The shard, of `shards`, that serves this content. Uses the id's last byte, which the
/// servers' tables do not use.
#[must_use]
pub fn shard_of(id: ContentId, shards: u8) -> u8 {
    let [.., last] = id.0;
    let scaled = u16::from(last) * u16::from(shards) / 256;
    u8::try_from(scaled).unwrap_or(0)
}

/// One server, while it is there.
struct Shard {
    /// None once it is gone.
    client: Option<Client>,
    out: Vec<u8>,
    /// Requests that this shard has a part in and has not answered, oldest first.
    asked: VecDeque<Ticket>,
}

/// A request whose answer is not whole yet.
struct Gather {
    ticket: Ticket,
    asked: Asked,
    /// Which shard answers for each content of the batch, in its order.
    order: Vec<u8>,
    /// What each shard has answered.
    parts: Vec<Option<Answer>>,
    missing: usize,
}

/// The clients of all shards as one: splits batches by content, and puts the answers together
/// again, in the order of the requests. With one shard it is what a [`Client`] is.
///
/// A shard that is gone answers like a full table: its contents go without an entry.
pub struct Shards {
    shards: Vec<Shard>,
    next: Ticket,
    pending: VecDeque<Gather>,
}

impl Shards {
    /// Clients of `count` shards, 1 to [`EntryId::MAX_SHARDS`]; other numbers are brought into
    /// that range.
    #[must_use]
    pub fn new(count: u8) -> Self {
        let shard = |_| Shard {
            client: Some(Client::new()),
            out: Vec::new(),
            asked: VecDeque::new(),
        };
        let count = count.clamp(1, EntryId::MAX_SHARDS);
        Self {
            shards: (0..count).map(shard).collect(),
            next: Ticket::default(),
            pending: VecDeque::new(),
        }
    }

    /// Number of shards, also of those that are gone.
    #[must_use]
    pub fn count(&self) -> u8 {
        u8::try_from(self.shards.len()).unwrap_or(EntryId::MAX_SHARDS)
    }

    /// Whether an answer of this shard is missing: what was sent to it is worth waiting for.
    #[must_use]
    pub fn owes(&self, shard: u8) -> bool {
        let shard = self.shards.get(usize::from(shard));
        shard.is_some_and(|shard| !shard.asked.is_empty())
    }

    /// What is to be sent to this shard; the caller takes it out. `None` if the shard is gone.
    pub fn output(&mut self, shard: u8) -> Option<&mut Vec<u8>> {
        let shard = self.shards.get_mut(usize::from(shard))?;
        shard.client.as_ref().map(|_| &mut shard.out)
    }

    /// Joins the table of every shard. Answer: `Welcome` of shard 0, with an epoch made of
    /// those of all shards: it differs if one of theirs does.
    pub fn join(&mut self, key: &TableKey) -> Ticket {
        let all = self.all();
        self.ask(Asked::Welcome, all, |client, _, out| {
            client.join(key.clone(), out);
        })
    }

    /// As [`Client::register`].
    pub fn register(&mut self, target: HostNo, items: &[Item]) -> Ticket {
        let (order, parts) = self.split(items, |item| item.id);
        self.ask(Asked::Entries(items.len()), order, |client, shard, out| {
            client.register(target, &parts[usize::from(shard)], out);
        })
    }

    /// As [`Client::claim`].
    pub fn claim(&mut self, target: HostNo, ids: &[ContentId]) -> Ticket {
        let (order, parts) = self.split(ids, |id| *id);
        self.ask(Asked::Verdicts(ids.len()), order, |client, shard, out| {
            client.claim(target, &parts[usize::from(shard)], out);
        })
    }

    /// As [`Client::seed`].
    pub fn seed(&mut self, target: HostNo, ids: &[ContentId]) -> Ticket {
        let (order, parts) = self.split(ids, |id| *id);
        self.ask(Asked::Entries(ids.len()), order, |client, shard, out| {
            client.seed(target, &parts[usize::from(shard)], out);
        })
    }

    /// As [`Client::shared`].
    pub fn shared(&mut self, target: HostNo, ids: &[ContentId]) -> Ticket {
        let (order, parts) = self.split(ids, |id| *id);
        self.ask(Asked::Entries(ids.len()), order, |client, shard, out| {
            client.shared(target, &parts[usize::from(shard)], out);
        })
    }

    /// As [`Client::summary`], summed over the shards.
    pub fn summary(&mut self) -> Ticket {
        let all = self.all();
        self.ask(Asked::Summary, all, |client, _, out| {
            client.summary(out);
        })
    }

    /// As [`Client::withdraw`].
    pub fn withdraw(&mut self, target: HostNo) {
        self.tell_all(|client, out| client.withdraw(target, out));
    }

    /// As [`Client::carried`].
    pub fn carried(&mut self, entries: &[EntryRun]) {
        self.tell_each(entries, |client, entries, out| client.carried(entries, out));
    }

    /// As [`Client::lost`].
    pub fn lost(&mut self, carrier: HostNo, entries: &[EntryRun]) {
        self.tell_each(entries, |client, entries, out| {
            client.lost(carrier, entries, out);
        });
    }

    /// As [`Client::carrier_gone`].
    pub fn carrier_gone(&mut self, host: HostNo) {
        self.tell_all(|client, out| client.carrier_gone(host, out));
    }

    /// As [`Client::end_group`].
    pub fn end_group(&mut self) {
        self.tell_all(Client::end_group);
    }

    /// Takes what was received from a shard.
    ///
    /// # Errors
    /// This connection is of no use any more: close it, and call
    /// [`shard_gone`](Self::shard_gone).
    pub fn handle(&mut self, shard: u8, input: &[u8]) -> Result<(), ClientError> {
        let number = usize::from(shard);
        let Some(Shard {
            client: Some(client),
            asked,
            ..
        }) = self.shards.get_mut(number)
        else {
            return Ok(());
        };
        client.handle(input);
        while let Some((_, answer)) = client.poll_answer()? {
            if matches!(answer, Answer::Welcome { shard: actual, .. } if actual != shard) {
                return Err(ClientError::WrongShard);
            }
            let ticket = asked.pop_front().ok_or(ClientError::Unasked)?;
            if let Some(gather) = gather_of(&mut self.pending, ticket) {
                gather.parts[number] = Some(answer);
                gather.missing -= 1;
            }
        }
        Ok(())
    }

    /// The connection to the shard is over: what it has not answered, and all that it would be
    /// asked from now on, goes without an entry.
    pub fn shard_gone(&mut self, shard: u8) {
        let Some(shard) = self.shards.get_mut(usize::from(shard)) else {
            return;
        };
        shard.client = None;
        shard.out = Vec::new();
        for ticket in shard.asked.drain(..) {
            if let Some(gather) = gather_of(&mut self.pending, ticket) {
                gather.missing -= 1;
            }
        }
    }

    /// The next answer, in the order of the requests; `None` until more is received. To be
    /// called until then after each `handle` and `shard_gone`.
    pub fn poll_answer(&mut self) -> Option<(Ticket, Answer)> {
        let gather = self.pending.pop_front_if(|gather| gather.missing == 0)?;
        let ticket = gather.ticket;
        Some((ticket, gather.into_answer()))
    }

    /// Requests whose answers have not been given back.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.pending.len()
    }

    fn all(&self) -> Vec<u8> {
        (0..self.count()).collect()
    }

    /// The shard of each item, and the items of each shard.
    fn split<T: Copy>(&self, items: &[T], id: impl Fn(&T) -> ContentId) -> (Vec<u8>, Vec<Vec<T>>) {
        let count = self.count();
        let room = items.len() / self.shards.len() * 5 / 4;
        let mut parts = vec![Vec::with_capacity(room); self.shards.len()];
        let mut order = Vec::with_capacity(items.len());
        for item in items {
            let shard = shard_of(id(item), count);
            parts[usize::from(shard)].push(*item);
            order.push(shard);
        }
        (order, parts)
    }

    /// Asks the shards that occur in `order`.
    fn ask(
        &mut self,
        asked: Asked,
        order: Vec<u8>,
        send: impl Fn(&mut Client, u8, &mut Vec<u8>),
    ) -> Ticket {
        let ticket = self.next.take();
        let mut missing = 0;
        for (shard, number) in self.shards.iter_mut().zip(0..) {
            if let Some(client) = &mut shard.client
                && order.contains(&number)
            {
                send(client, number, &mut shard.out);
                shard.asked.push_back(ticket);
                missing += 1;
            }
        }
        self.pending.push_back(Gather {
            ticket,
            asked,
            order,
            parts: self.shards.iter().map(|_| None).collect(),
            missing,
        });
        ticket
    }

    fn tell_all(&mut self, send: impl Fn(&mut Client, &mut Vec<u8>)) {
        for shard in &mut self.shards {
            if let Some(client) = &mut shard.client {
                send(client, &mut shard.out);
            }
        }
    }

    fn tell_each(
        &mut self,
        entries: &[EntryRun],
        send: impl Fn(&mut Client, &[EntryRun], &mut Vec<u8>),
    ) {
        for (shard, number) in self.shards.iter_mut().zip(0..) {
            let of_shard = entries.iter().filter(|run| run.first.shard() == number);
            let of_shard: Vec<_> = of_shard.copied().collect();
            if let Some(client) = &mut shard.client
                && !of_shard.is_empty()
            {
                send(client, &of_shard, &mut shard.out);
            }
        }
    }
}

/// Tickets of what is pending follow each other without gaps.
fn gather_of(pending: &mut VecDeque<Gather>, ticket: Ticket) -> Option<&mut Gather> {
    let first = pending.front()?.ticket;
    let at = usize::try_from(ticket.0.checked_sub(first.0)?).ok()?;
    pending.get_mut(at)
}

impl Gather {
    /// Puts the parts together; whoever has not answered has nothing.
    fn into_answer(self) -> Answer {
        if let Some(empty) = empty_answer(self.asked) {
            return empty;
        }
        let parts = self.parts.into_iter();
        match self.asked {
            Asked::Welcome => welcome(parts.flatten()),
            Asked::Summary => Answer::Summary(summary(parts.flatten())),
            Asked::Entries(_) => {
                let parts = parts.map(|part| match part {
                    Some(Answer::Entries(entries)) => entries,
                    _ => Vec::new(),
                });
                Answer::Entries(weave(self.order, parts, None))
            }
            Asked::Verdicts(_) => {
                let parts = parts.map(|part| match part {
                    Some(Answer::Verdicts(verdicts)) => verdicts,
                    _ => Vec::new(),
                });
                Answer::Verdicts(weave(self.order, parts, Verdict::Full))
            }
        }
    }
}

fn weave<T: Copy>(order: Vec<u8>, parts: impl Iterator<Item = Vec<T>>, otherwise: T) -> Vec<T> {
    let mut parts: Vec<_> = parts.map(Vec::into_iter).collect();
    if let [only] = parts.as_mut_slice()
        && only.len() == order.len()
    {
        return only.collect();
    }
    let next = |shard: u8| parts.get_mut(usize::from(shard))?.next();
    order
        .into_iter()
        .map(next)
        .map(|answer| answer.unwrap_or(otherwise))
        .collect()
}

fn welcome(parts: impl Iterator<Item = Answer>) -> Answer {
    let epoch = parts.fold(0_u64, |all, part| match part {
        Answer::Welcome { epoch, .. } => all.rotate_left(1) ^ epoch,
        _ => all,
    });
    Answer::Welcome { epoch, shard: 0 }
}

fn summary(parts: impl Iterator<Item = Answer>) -> Summary {
    parts.fold(Summary::default(), |mut sum, part| {
        if let Answer::Summary(part) = part {
            sum.add(&part);
        }
        sum
    })
}
