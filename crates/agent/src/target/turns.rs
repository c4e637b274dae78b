//! The order of a session's frames, which come over several connections.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::link::Decompressor;

/// How often who waits looks whether the session is over.
const TICK: Duration = Duration::from_millis(250);

/// Lets frames in one by one, by their numbers. Who has a frame that is not due waits, and does not
/// read from its connection meanwhile: so no more is held here than a frame for each connection.
pub(crate) struct Turns {
    turn: Mutex<Turn>,
    moved: Condvar,
}

/// What only the frame that is due may use.
pub(crate) struct Turn {
    /// Number of the frame that is due.
    due: u32,
    /// All frames are pieces of one compressed stream.
    pub(crate) unpacker: Option<Decompressor>,
}

/// What waiting came to.
pub(crate) enum Waited<'a> {
    /// The frame is due: it must be [passed](Turns::pass) on.
    Due(MutexGuard<'a, Turn>),
    /// It was before.
    Passed,
    /// The session is over.
    Over,
}

impl Turns {
    pub(crate) fn new(unpacker: Option<Decompressor>) -> Self {
        Self {
            turn: Mutex::new(Turn { due: 1, unpacker }),
            moved: Condvar::new(),
        }
    }

    /// Waits until the frame of this number is due; 0 always is.
    pub(crate) fn wait(&self, order: u32, is_over: impl Fn() -> bool) -> Waited<'_> {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let ahead = order.wrapping_sub(turn.due);
            if order == 0 || ahead == 0 {
                return Waited::Due(turn);
            }
            if ahead > u32::MAX / 2 {
                return Waited::Passed;
            }
            if is_over() {
                return Waited::Over;
            }
            turn = self
                .moved
                .wait_timeout(turn, TICK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The frame of this number is done with.
    pub(crate) fn pass(&self, order: u32, mut turn: MutexGuard<'_, Turn>) {
        if order == 0 {
            return;
        }
        turn.due = order.wrapping_add(1).max(1);
        drop(turn);
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn frames_of_several_connections_come_in_the_order_of_their_numbers() {
        let turns = Turns::new(None);
        let came = Mutex::new(Vec::new());
        let bring = |order| match turns.wait(order, || false) {
            Waited::Due(turn) => {
                came.lock().unwrap().push(order);
                turns.pass(order, turn);
            }
            Waited::Passed | Waited::Over => panic!("frame {order} is not let in"),
        };
        let bring = &bring;
        std::thread::scope(|scope| {
            for lane in 0..4 {
                // The last connection begins with what is due last.
                scope.spawn(move || (1..=100).filter(|n| n % 4 == lane).for_each(bring));
            }
        });
        assert_eq!(*came.lock().unwrap(), (1..=100).collect::<Vec<u32>>());
    }

    #[test]
    fn a_number_that_was_there_is_refused_and_who_waits_in_vain_hears_of_the_end() {
        let turns = Turns::new(None);
        let over = AtomicBool::new(false);
        let wait = |order| turns.wait(order, || over.load(Ordering::Relaxed));
        let Waited::Due(turn) = wait(1) else {
            panic!("the first is due")
        };
        turns.pass(1, turn);
        assert!(matches!(wait(1), Waited::Passed));
        assert!(matches!(wait(0), Waited::Due(_)), "what is not numbered");
        over.store(true, Ordering::Relaxed);
        assert!(matches!(wait(3), Waited::Over));
        assert!(matches!(wait(2), Waited::Due(_)));
    }

    #[test]
    fn after_the_last_number_comes_the_first() {
        let turns = Turns::new(None);
        turns.turn.lock().unwrap().due = u32::MAX;
        for order in [u32::MAX, 1, 2] {
            let Waited::Due(turn) = turns.wait(order, || true) else {
                panic!("{order} is due")
            };
            turns.pass(order, turn);
        }
        assert!(matches!(turns.wait(u32::MAX, || true), Waited::Passed));
    }
}
