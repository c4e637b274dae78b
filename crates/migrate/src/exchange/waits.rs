//! Who waits for which entry of whom: the machine.

use std::collections::HashMap;
use std::time::Duration;

use page::{ContentId, EntryId, HostNo};

/// How long a push may take before it is asked for, since anything came from its carrier: what a link of
/// 100 Mbit/s needs for the 8 MiB of a VM's window and as much of pushes, twice. What else the carrier
/// sends is in front of it, and to ask for it would have it sent twice.
const PUSH_PATIENCE: Duration = Duration::from_secs(3);

/// How long anything may take, since anything came from its carrier, before the page is read again from
/// the source. A carrier that lives and is slow gets there; one that died is noticed by its
/// connection. A push is asked for after this time whatever else comes.
const PATIENCE: Duration = Duration::from_secs(8);

/// How long anything may take whatever else comes.
const PATIENCE_IN_ALL: Duration = Duration::from_secs(32);

/// How long a pull is parked, since anything came from a source: less than the asker's patience, so
/// that it hears a word.
const PARK: Duration = Duration::from_secs(5);

/// How long the last contents of a stopped guest may take: they are on their way, or it is quicker
/// to read them again.
const HURRY: Duration = Duration::from_millis(50);

/// How long a host counts as gone after its connection failed.
const GONE: Duration = Duration::from_secs(2);

/// Most pulls that are parked: 64 bytes each. What comes beyond is said to be missing.
const MAX_PARKED: usize = 1 << 17;

/// Most entries that are waited for, some 100 bytes each: what 128 VMs have named whose windows of 8 MiB are full of
/// nothing else. What comes beyond is read again from the sources.
const MAX_WANTED: usize = 1 << 18;

/// Somebody of this host who waits: a VM's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Waiter(pub u32);

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the carrier for the entry.
    Pull {
        /// The carrier.
        to: HostNo,
        /// The entry.
        entry: EntryId,
    },
    /// Tell the host that its pull cannot be answered.
    Missing {
        /// Who asked.
        to: HostNo,
        /// The entry.
        entry: EntryId,
    },
    /// The entry does not come: those who wait ask their sources for the pages.
    GiveUp {
        /// The entry.
        entry: EntryId,
        /// The host that should have provided it.
        carrier: HostNo,
        /// Who waits.
        waiters: Vec<Waiter>,
    },
}

struct Wanted {
    id: ContentId,
    carrier: HostNo,
    waiters: Vec<Waiter>,
    since: Duration,
    /// Whether the carrier pushes it and has not been asked.
    is_pushed: bool,
    /// When it is given up because a stopped guest waits.
    hurried: Option<Duration>,
}

impl Wanted {
    fn pull_at(&self, heard: Duration) -> Option<Duration> {
        let at = (self.since.max(heard) + PUSH_PATIENCE).min(self.since + PATIENCE);
        self.is_pushed.then_some(at)
    }

    fn give_up_at(&self, heard: Duration) -> Duration {
        let at = (self.since.max(heard) + PATIENCE).min(self.since + PATIENCE_IN_ALL);
        self.hurried.map_or(at, |hurried| hurried.min(at))
    }
}

struct Parked {
    hosts: Vec<HostNo>,
    since: Duration,
}

impl Parked {
    fn until(&self, heard: Duration) -> Duration {
        (self.since.max(heard) + PARK).min(self.since + PATIENCE_IN_ALL)
    }
}

/// The machine; see the module above.
pub(super) struct Waits {
    me: HostNo,
    wanted: HashMap<EntryId, Wanted>,
    parked: HashMap<EntryId, Parked>,
    gone_until: HashMap<HostNo, Duration>,
    /// When contents last came from a host, or to this one from its sources.
    heard: HashMap<HostNo, Duration>,
}

impl Waits {
    /// For the target host of this number.
    pub(super) fn new(me: HostNo) -> Self {
        Self {
            me,
            wanted: HashMap::new(),
            parked: HashMap::new(),
            gone_until: HashMap::new(),
            heard: HashMap::new(),
        }
    }

    /// Contents came from a host; from this one's sources, if it is this one.
    pub(super) fn heard(&mut self, from: HostNo, now: Duration) {
        self.heard.insert(from, now);
    }

    /// Contents came from sources of this host.
    pub(super) fn heard_sources(&mut self, now: Duration) {
        self.heard(self.me, now);
    }

    /// A page waits for an entry that is not here, or will (without a waiter). False: it will not
    /// come, ask the source.
    pub(super) fn want(
        &mut self,
        (entry, id): (EntryId, ContentId),
        (carrier, pushed): (HostNo, bool),
        waiter: Option<Waiter>,
        now: Duration,
        actions: &mut Vec<Action>,
    ) -> bool {
        if self.joins(entry, Some(id), waiter) {
            return true;
        }
        let is_gone = |until: &Duration| *until > now;
        if self.gone_until.get(&carrier).is_some_and(is_gone) || self.wanted.contains_key(&entry) {
            // Or somebody waits for another content of this number: one of the two is wrong.
            return false;
        }
        if self.wanted.len() >= MAX_WANTED {
            return false;
        }
        // What this host itself carries comes from a source, which nobody can be asked for.
        let is_asked = carrier != self.me && !pushed;
        if is_asked {
            actions.push(Action::Pull { to: carrier, entry });
        }
        let wanted = Wanted {
            id,
            carrier,
            waiters: waiter.into_iter().collect(),
            since: now,
            is_pushed: carrier != self.me && pushed,
            hurried: None,
        };
        self.wanted.insert(entry, wanted);
        true
    }

    /// Whether this host is the carrier.
    pub(super) fn is_own(&self, carrier: HostNo) -> bool {
        carrier == self.me
    }

    /// One more waits for an entry, if somebody does (and for that content).
    pub(super) fn joins(
        &mut self,
        entry: EntryId,
        id: Option<ContentId>,
        waiter: Option<Waiter>,
    ) -> bool {
        match self.wanted.get_mut(&entry) {
            Some(wanted) if id.is_none_or(|id| id == wanted.id) => {
                let new = waiter.filter(|waiter| !wanted.waiters.contains(waiter));
                wanted.waiters.extend(new);
                true
            }
            _ => false,
        }
    }

    /// What the entry must hash to, if somebody waits for it.
    pub(super) fn wanted(&self, entry: EntryId) -> Option<ContentId> {
        self.wanted.get(&entry).map(|wanted| wanted.id)
    }

    /// Whether anybody waits, here or elsewhere.
    pub(super) fn is_idle(&self) -> bool {
        self.wanted.is_empty() && self.parked.is_empty()
    }

    /// The entry came, and is what it should be: who waits for it here.
    pub(super) fn came(&mut self, entry: EntryId) -> Vec<Waiter> {
        let wanted = self.wanted.remove(&entry);
        wanted.map(|wanted| wanted.waiters).unwrap_or_default()
    }

    /// The entry came with bytes that it should not have.
    pub(super) fn came_wrong(&mut self, entry: EntryId, actions: &mut Vec<Action>) {
        self.give_up(entry, actions);
    }

    /// Other hosts that wait for an entry that is here now.
    pub(super) fn owed(&mut self, entry: EntryId) -> Vec<HostNo> {
        if self.parked.is_empty() {
            return Vec::new();
        }
        let parked = self.parked.remove(&entry);
        parked.map(|parked| parked.hosts).unwrap_or_default()
    }

    /// Another host asks for an entry that is not here.
    pub(super) fn park(
        &mut self,
        from: HostNo,
        entry: EntryId,
        now: Duration,
        actions: &mut Vec<Action>,
    ) {
        if self.parked.len() >= MAX_PARKED && !self.parked.contains_key(&entry) {
            actions.push(Action::Missing { to: from, entry });
            return;
        }
        let parked = self.parked.entry(entry).or_insert_with(|| Parked {
            hosts: Vec::new(),
            since: now,
        });
        if !parked.hosts.contains(&from) {
            parked.hosts.push(from);
        }
    }

    /// A host says that it does not have an entry that it was asked for.
    pub(super) fn missing(&mut self, at: HostNo, entry: EntryId, actions: &mut Vec<Action>) {
        if self.wanted.get(&entry).is_some_and(|w| w.carrier == at) {
            self.give_up(entry, actions);
        }
    }

    /// The connection to or from a host is gone.
    pub(super) fn host_gone(&mut self, host: HostNo, now: Duration, actions: &mut Vec<Action>) {
        self.gone_until.insert(host, now + GONE);
        let of_host =
            |(entry, wanted): (&EntryId, &Wanted)| (wanted.carrier == host).then_some(*entry);
        let lost: Vec<_> = self.wanted.iter().filter_map(of_host).collect();
        for entry in lost {
            self.give_up(entry, actions);
        }
        self.parked.retain(|_, parked| {
            parked.hosts.retain(|waits| *waits != host);
            !parked.hosts.is_empty()
        });
    }

    /// Somebody of this host does not wait any more.
    pub(super) fn waiter_gone(&mut self, waiter: Waiter) {
        for wanted in self.wanted.values_mut() {
            wanted.waiters.retain(|waits| *waits != waiter);
        }
    }

    /// A stopped guest needs nothing but these.
    pub(super) fn hurry(&mut self, entries: impl Iterator<Item = EntryId>, now: Duration) {
        for entry in entries {
            if let Some(wanted) = self.wanted.get_mut(&entry) {
                let at = now + HURRY;
                wanted.hurried = Some(wanted.hurried.map_or(at, |earlier| earlier.min(at)));
            }
        }
    }

    /// Time passes.
    pub(super) fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let mut late = Vec::new();
        let heard = |host: HostNo| self.heard.get(&host).copied().unwrap_or_default();
        for (entry, wanted) in &mut self.wanted {
            let heard = heard(wanted.carrier);
            if wanted.give_up_at(heard) <= now {
                late.push(*entry);
            } else if wanted.pull_at(heard).is_some_and(|at| at <= now) {
                wanted.is_pushed = false;
                let (to, entry) = (wanted.carrier, *entry);
                actions.push(Action::Pull { to, entry });
            }
        }
        for entry in late {
            self.give_up(entry, actions);
        }
        let heard = self.heard.get(&self.me).copied().unwrap_or_default();
        self.parked.retain(|entry, parked| {
            let stays = parked.until(heard) > now;
            if !stays {
                let missing = |to: &HostNo| Action::Missing {
                    to: *to,
                    entry: *entry,
                };
                actions.extend(parked.hosts.iter().map(missing));
            }
            stays
        });
        self.gone_until.retain(|_, until| *until > now);
    }

    fn give_up(&mut self, entry: EntryId, actions: &mut Vec<Action>) {
        if let Some(wanted) = self.wanted.remove(&entry) {
            actions.push(Action::GiveUp {
                entry,
                carrier: wanted.carrier,
                waiters: wanted.waiters,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: HostNo = HostNo(0);
    const OTHER: HostNo = HostNo(1);
    const ID: ContentId = ContentId([7; 16]);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn want(exchange: &mut Waits, entry: u32, carrier: HostNo, pushed: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        let content = (EntryId(entry), ID);
        assert!(exchange.want(
            content,
            (carrier, pushed),
            Some(Waiter(1)),
            at(0),
            &mut actions
        ));
        actions
    }

    fn tick(exchange: &mut Waits, seconds: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        exchange.tick(at(seconds), &mut actions);
        actions
    }

    fn pull(entry: u32) -> Action {
        Action::Pull {
            to: OTHER,
            entry: EntryId(entry),
        }
    }

    fn given_up(entry: u32, carrier: HostNo) -> Action {
        Action::GiveUp {
            entry: EntryId(entry),
            carrier,
            waiters: vec![Waiter(1)],
        }
    }

    #[test]
    fn a_push_that_is_late_is_pulled_and_then_given_up() {
        let mut exchange = Waits::new(ME);
        assert_eq!(want(&mut exchange, 5, OTHER, true), []);
        assert_eq!(tick(&mut exchange, 1), []);
        assert_eq!(tick(&mut exchange, 4), [pull(5)]);
        assert_eq!(tick(&mut exchange, 5), []);
        assert_eq!(tick(&mut exchange, 9), [given_up(5, OTHER)]);
        assert!(exchange.is_idle());
    }

    #[test]
    fn while_the_carrier_sends_other_contents_there_is_patience_with_it_but_not_without_end() {
        let mut exchange = Waits::new(ME);
        want(&mut exchange, 5, OTHER, true);
        let mut done = Vec::new();
        for second in 1..=40 {
            exchange.heard(OTHER, at(second));
            done.extend(
                tick(&mut exchange, second)
                    .into_iter()
                    .map(|what| (second, what)),
            );
        }
        assert_eq!(done, [(8, pull(5)), (32, given_up(5, OTHER))]);
        want(&mut exchange, 6, OTHER, true);
        exchange.heard(OTHER, at(2));
        exchange.heard(HostNo(2), at(4));
        assert_eq!(tick(&mut exchange, 4), []);
        assert_eq!(tick(&mut exchange, 5), [pull(6)]);
        exchange.hurry([EntryId(6)].into_iter(), at(5));
        exchange.heard(OTHER, at(6));
        assert_eq!(
            tick(&mut exchange, 6),
            [given_up(6, OTHER)],
            "a guest stands still"
        );
    }

    #[test]
    fn what_nobody_pushes_is_pulled_at_once_and_once_for_all_who_wait() {
        let mut exchange = Waits::new(ME);
        assert_eq!(want(&mut exchange, 5, OTHER, false), [pull(5)]);
        assert_eq!(want(&mut exchange, 5, OTHER, false), []);
        assert!(exchange.joins(EntryId(5), None, Some(Waiter(2))));
        assert_eq!(exchange.came(EntryId(5)), [Waiter(1), Waiter(2)]);
        assert!(exchange.is_idle());
    }

    #[test]
    fn what_this_host_carries_itself_is_waited_for_and_never_pulled() {
        let mut exchange = Waits::new(ME);
        assert_eq!(want(&mut exchange, 5, ME, false), []);
        assert_eq!(tick(&mut exchange, 7), []);
        assert_eq!(tick(&mut exchange, 9), [given_up(5, ME)]);
    }

    #[test]
    fn a_dead_carrier_ends_all_waits_for_it_at_once_and_the_next_ones_for_a_while() {
        let mut exchange = Waits::new(ME);
        want(&mut exchange, 5, OTHER, true);
        want(&mut exchange, 6, HostNo(2), true);
        let mut actions = Vec::new();
        exchange.host_gone(OTHER, at(0), &mut actions);
        assert_eq!(actions, [given_up(5, OTHER)]);
        let again = |exchange: &mut Waits, now| {
            let content = (EntryId(9), ID);
            exchange.want(
                content,
                (OTHER, true),
                Some(Waiter(1)),
                now,
                &mut Vec::new(),
            )
        };
        assert!(!again(&mut exchange, at(1)));
        assert!(again(&mut exchange, at(3)));
        assert_eq!(exchange.came(EntryId(6)), [Waiter(1)]);
    }

    #[test]
    fn a_pull_for_what_comes_later_is_answered_then_or_said_to_be_missing() {
        let mut exchange = Waits::new(ME);
        let mut actions = Vec::new();
        for entry in [5, 6] {
            exchange.park(OTHER, EntryId(entry), at(0), &mut actions);
        }
        assert_eq!(exchange.owed(EntryId(5)), [OTHER]);
        assert_eq!(exchange.owed(EntryId(5)), []);
        assert_eq!(actions, []);
        let missing = Action::Missing {
            to: OTHER,
            entry: EntryId(6),
        };
        assert_eq!(tick(&mut exchange, 5), [missing]);
    }

    #[test]
    fn only_the_carrier_can_say_that_an_entry_is_missing() {
        let mut exchange = Waits::new(ME);
        want(&mut exchange, 5, OTHER, false);
        let mut actions = Vec::new();
        exchange.missing(HostNo(2), EntryId(5), &mut actions);
        assert_eq!(actions, []);
        exchange.missing(OTHER, EntryId(5), &mut actions);
        assert_eq!(actions, [given_up(5, OTHER)]);
    }

    #[test]
    fn a_stopped_guest_does_not_wait_long_for_its_last_contents() {
        let mut exchange = Waits::new(ME);
        want(&mut exchange, 5, OTHER, true);
        exchange.hurry([EntryId(5)].into_iter(), at(1));
        assert_eq!(tick(&mut exchange, 2), [given_up(5, OTHER)]);
    }

    #[test]
    fn no_more_is_waited_for_than_there_is_room_for_and_what_is_waited_for_can_be_joined() {
        let mut exchange = Waits::new(ME);
        let mut wants = |entry| {
            let content = (EntryId(entry), ID);
            let waiter = Some(Waiter(1));
            exchange.want(content, (OTHER, true), waiter, at(0), &mut Vec::new())
        };
        let most = u32::try_from(MAX_WANTED).unwrap();
        assert!((0..most).all(&mut wants));
        assert!(!wants(most));
        assert!(wants(most - 1));
        exchange.came(EntryId(7));
        want(&mut exchange, most, OTHER, true);
    }

    #[test]
    fn another_content_of_the_same_number_is_not_waited_for() {
        let mut exchange = Waits::new(ME);
        want(&mut exchange, 5, OTHER, true);
        let other = (EntryId(5), ContentId([8; 16]));
        assert!(!exchange.want(
            other,
            (OTHER, true),
            Some(Waiter(1)),
            at(0),
            &mut Vec::new()
        ));
    }
}
