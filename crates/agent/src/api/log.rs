//! A bounded log of events that any number of readers follow, each from where it wants.
//!
//! Events are numbered from 0 without gaps when written. *Lasting* events (phases) stay; *passing*
//! ones (progress, notes) make room for newer ones, so a reader that comes late sees gaps in the
//! numbers but never misses a phase.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Whether an event may be forgotten while its log lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Kept as long as the log has room for lasting events.
    Lasting,
    /// Dropped first.
    Passing,
}

/// Most events of one answer to [`EventLog::read`]: a reader's buffer stays small.
const BATCH: usize = 64;

/// The log; see the module's page.
#[derive(Debug)]
pub(crate) struct EventLog<E> {
    inner: Mutex<Inner<E>>,
    /// Changes with every event and with the end, to wake readers.
    news: watch::Sender<()>,
}

#[derive(Debug)]
struct Inner<E> {
    lasting: Ring<E>,
    passing: Ring<E>,
    next: u64,
    ended: bool,
}

#[derive(Debug)]
struct Ring<E> {
    events: VecDeque<(u64, E)>,
    capacity: usize,
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Batch<E> {
    /// The events from the position on, oldest first.
    pub(crate) events: Vec<E>,
    /// Where to read next.
    pub(crate) next: u64,
    /// Whether the log has ended and the reader has it all.
    pub(crate) ended: bool,
}

impl<E: Clone> EventLog<E> {
    /// An empty log with room for so many lasting and so many passing events.
    pub(crate) fn new(lasting: usize, passing: usize) -> Self {
        let ring = |capacity| Ring {
            events: VecDeque::new(),
            capacity,
        };
        let inner = Inner {
            lasting: ring(lasting),
            passing: ring(passing),
            next: 0,
            ended: false,
        };
        Self {
            inner: Mutex::new(inner),
            news: watch::Sender::new(()),
        }
    }

    /// Writes the event that `make` gives for its number.
    pub(crate) fn push(&self, life: Life, make: impl FnOnce(u64) -> E) {
        let mut inner = self.lock();
        let seq = inner.next;
        inner.next += 1;
        let ring = match life {
            Life::Lasting => &mut inner.lasting,
            Life::Passing => &mut inner.passing,
        };
        if ring.events.len() == ring.capacity {
            ring.events.pop_front();
        }
        ring.events.push_back((seq, make(seq)));
        drop(inner);
        self.news.send_replace(());
    }

    /// No more events come, until [`Self::reopen`].
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        self.news.send_replace(());
    }

    /// Events come again. Those that `was_end` names were no end after all: whoever reads from the
    /// start would stop at them.
    pub(crate) fn reopen(&self, was_end: impl Fn(&E) -> bool) {
        let mut inner = self.lock();
        inner.lasting.events.retain(|(_, event)| !was_end(event));
        inner.ended = false;
    }

    /// The events from number `from` on that are still there.
    pub(crate) fn read(&self, from: u64) -> Batch<E> {
        let inner = self.lock();
        let mut lasting = inner.lasting.since(from).peekable();
        let mut passing = inner.passing.since(from).peekable();
        let number = |event: Option<&&(u64, E)>| event.map_or(u64::MAX, |(seq, _)| *seq);
        let mut batch = Batch {
            events: Vec::new(),
            next: from,
            ended: false,
        };
        while batch.events.len() < BATCH {
            let oldest = if number(lasting.peek()) <= number(passing.peek()) {
                lasting.next()
            } else {
                passing.next()
            };
            let Some((seq, event)) = oldest else {
                batch.next = inner.next;
                batch.ended = inner.ended;
                break;
            };
            batch.events.push(event.clone());
            batch.next = seq + 1;
        }
        batch
    }

    /// Wakes after the next event or the end. Subscribe before reading.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Inner<E>> {
        // Every writer leaves the rings whole at each step, so a panic elsewhere spoils nothing.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<E> Ring<E> {
    fn since(&self, from: u64) -> impl Iterator<Item = &(u64, E)> {
        let start = self.events.partition_point(|(seq, _)| *seq < from);
        self.events.range(start..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(log: &EventLog<u64>, from: u64) -> Vec<u64> {
        log.read(from).events
    }

    #[test]
    fn lasting_events_outlive_any_number_of_passing_ones_in_order() {
        let log = EventLog::new(4, 8);
        for round in 0..100_u64 {
            let life = if round % 40 == 3 {
                Life::Lasting
            } else {
                Life::Passing
            };
            log.push(life, |seq| seq);
        }
        assert_eq!(
            numbers(&log, 0),
            [3, 43, 83, 92, 93, 94, 95, 96, 97, 98, 99]
        );
        assert_eq!(numbers(&log, 44), [83, 92, 93, 94, 95, 96, 97, 98, 99]);
        assert_eq!(numbers(&log, 100), [] as [u64; 0]);
    }

    #[test]
    fn a_reader_learns_the_end_only_with_the_last_event() {
        let log = EventLog::new(4, 200);
        for _ in 0..100 {
            log.push(Life::Passing, |seq| seq);
        }
        log.end();
        let first = log.read(0);
        assert!(!first.ended && first.events.len() < 100);
        let second = log.read(first.next);
        assert!(second.ended);
        assert_eq!(first.events.len() + second.events.len(), 100);
        log.reopen(|_| false);
        assert!(!log.read(100).ended);
    }

    #[test]
    fn an_end_that_was_none_is_forgotten_and_the_rest_stays() {
        let log = EventLog::new(4, 4);
        for _ in 0..3 {
            log.push(Life::Lasting, |seq| seq);
        }
        log.end();
        log.reopen(|event| *event == 1);
        log.push(Life::Lasting, |seq| seq);
        assert_eq!(numbers(&log, 0), [0, 2, 3]);
    }

    #[tokio::test]
    async fn a_reader_is_woken_by_an_event_and_by_the_end() {
        let log = std::sync::Arc::new(EventLog::new(4, 4));
        let mut news = log.subscribe();
        log.push(Life::Passing, |seq| seq);
        news.changed().await.unwrap();
        let writer = log.clone();
        let task = tokio::spawn(async move { writer.end() });
        news.changed().await.unwrap();
        task.await.unwrap();
        assert!(log.read(1).ended);
    }
}
