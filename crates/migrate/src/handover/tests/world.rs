//! Both ends in one world, stopped, restarted and cut at every step.

mod target_end;

use std::collections::VecDeque;

use super::super::target::FoundQemu;
use super::*;

/// Splitmix64: the same seed makes the same world.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

/// What the source QEMU does, as QEMU-to-agent sockets and QMP show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SourceQemu {
    Running,
    /// Stopped inside its migration: resumes by itself when its socket closes.
    SwitchOver,
    /// In post-copy with a guest that was stopped by hand: does not resume by itself. Whether its
    /// socket is open.
    Post {
        open: bool,
    },
    /// Migration completed: stopped until `cont`.
    Completed,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TargetQemu {
    Stopped,
    Running,
    /// It ran, and a person stopped it.
    Paused,
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Release,
    Abort,
}

struct World {
    dice: Dice,
    now: Duration,
    /// Whether the VM goes before its memory.
    is_postcopy: bool,
    /// The target QEMU has all memory that it will get, and has said so.
    is_whole: bool,
    source_qemu: SourceQemu,
    target_qemu: TargetQemu,
    source: Option<SourceMove>,
    target: Option<TargetMove>,
    source_journal: Option<SourceJournal>,
    target_journal: Option<TargetJournal>,
    /// What the source agent still has to do, and to hear.
    source_todo: VecDeque<SourceAction>,
    source_heard: VecDeque<SourceEvent>,
    target_todo: VecDeque<TargetAction>,
    /// Requests under way to the target; they may be late, but they arrive in order.
    requests: VecDeque<Request>,
    link_up: bool,
    /// The connections that carry memory; made again when a post-copy is resumed.
    session_up: bool,
    /// Both QEMUs are connected anew, and have not agreed yet on what is missing.
    is_agreeing: bool,
    /// How often it will be lost then, whatever else happens, and how often it was.
    losses_left: u64,
    lost_agreeing: u32,
    faults: bool,
    /// The target agent can write nothing down.
    is_disk_full: bool,
    /// What it could not write: before the VM was told to run there, and after.
    unwritten: [u32; 2],
    /// How often the target QEMU did not say whether it obeyed.
    unreached: u32,
    vm_killed: bool,
    log: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            dice: Dice(seed),
            now: Duration::from_secs(1),
            is_postcopy: seed % 2 == 1,
            is_whole: false,
            source_qemu: SourceQemu::Running,
            target_qemu: TargetQemu::Stopped,
            source: Some(SourceMove::default()),
            target: Some(TargetMove::default()),
            source_journal: Some(SourceJournal::Begun),
            target_journal: Some(TargetJournal::Loading),
            source_todo: VecDeque::new(),
            source_heard: VecDeque::new(),
            target_todo: VecDeque::new(),
            requests: VecDeque::new(),
            link_up: true,
            session_up: true,
            is_agreeing: false,
            losses_left: seed / 2 % 3,
            lost_agreeing: 0,
            faults: true,
            is_disk_full: false,
            unwritten: [0; 2],
            unreached: 0,
            vm_killed: false,
            log: Vec::new(),
        };
        world.tell_source(SourceEvent::TargetReady);
        world
    }

    fn tell_source(&mut self, event: SourceEvent) {
        if let Some(machine) = &mut self.source {
            self.log.push(format!("source hears {event:?}"));
            self.source_todo.extend(machine.handle(event));
        }
    }

    fn tell_target(&mut self, event: TargetEvent) {
        if let Some(machine) = &mut self.target {
            self.log.push(format!("target hears {event:?}"));
            self.target_todo.extend(machine.handle(event));
        }
    }

    fn source_acts(&mut self) {
        let Some(action) = self.source_todo.pop_front() else {
            return;
        };
        self.log.push(format!("source does {action:?}"));
        match action {
            SourceAction::StartStream | SourceAction::AwaitConfirmation => {
                if action == SourceAction::AwaitConfirmation {
                    self.source_heard.push_back(SourceEvent::Confirmed);
                }
            }
            SourceAction::CompleteSource => {
                let is_open = SourceQemu::Post { open: true };
                if self.source_qemu == SourceQemu::SwitchOver || self.source_qemu == is_open {
                    self.source_qemu = SourceQemu::Completed;
                    self.source_heard.push_back(SourceEvent::SourceCompleted);
                }
            }
            SourceAction::Journal(journal) => self.source_journal = Some(journal),
            SourceAction::ForgetJournal => self.source_journal = None,
            SourceAction::Release | SourceAction::ReleaseAgain => {
                // Being sure that the journal is ahead is the point of the journal.
                let is_ahead = matches!(
                    self.source_journal,
                    Some(SourceJournal::Releasing | SourceJournal::Following)
                );
                assert!(is_ahead || self.source_qemu == SourceQemu::Gone);
                if self.link_up {
                    self.requests.push_back(Request::Release);
                } else {
                    self.source_heard.push_back(SourceEvent::NoAnswer {
                        reason: "cut".into(),
                        now: self.now,
                    });
                }
            }
            SourceAction::Resume { .. } => {
                let event = self.resume();
                self.source_heard.extend(event);
            }
            SourceAction::AbortTarget(_) => {
                if self.link_up {
                    self.requests.push_back(Request::Abort);
                }
            }
            SourceAction::BringBack => {
                let event = match self.source_qemu {
                    SourceQemu::Gone => SourceEvent::SourceGone {
                        reason: "gone".into(),
                        went_on: false,
                    },
                    _ => {
                        self.source_qemu = SourceQemu::Running;
                        SourceEvent::SourceRuns
                    }
                };
                self.source_heard.push_back(event);
            }
            SourceAction::QuitSource => self.source_qemu = SourceQemu::Gone,
        }
    }

    /// Has both QEMUs connect anew, if everybody is there; an event if that is all.
    fn resume(&mut self) -> Option<SourceEvent> {
        let not = |why: &str, now| {
            let reason = why.to_owned();
            Some(SourceEvent::NotResumed { reason, now })
        };
        match self.source_qemu {
            SourceQemu::Completed => return Some(SourceEvent::SourceCompleted),
            SourceQemu::Post { .. } => {}
            // The agent died after it had ended it, and before it forgot the move.
            SourceQemu::Gone => {
                let answer = self.target.as_ref().and_then(TargetMove::answer);
                return match answer.filter(|_| self.link_up) {
                    Some(MoveState::Following) => Some(SourceEvent::SourceLost("gone".into())),
                    Some(answer) => Some(SourceEvent::Answer(answer)),
                    None => not("cut", self.now),
                };
            }
            other => panic!("{other:?} is to be resumed\n{}", self.log.join("\n")),
        }
        // Its socket is closed first, whatever was in it.
        self.source_qemu = SourceQemu::Post { open: false };
        self.session_up = false;
        self.is_agreeing = false;
        if !self.link_up || self.target.is_none() || !self.target_todo.is_empty() {
            return not("cut", self.now);
        }
        let answer = self.target.as_ref().and_then(TargetMove::answer);
        if answer == Some(MoveState::Following) && self.target_qemu == TargetQemu::Gone {
            self.tell_target(TargetEvent::QemuGone("killed".into()));
        }
        match self.target.as_ref().and_then(TargetMove::answer) {
            Some(MoveState::Following) => {
                self.source_qemu = SourceQemu::Post { open: true };
                self.session_up = true;
                self.is_agreeing = true;
                None
            }
            Some(answer) => Some(SourceEvent::Answer(answer)),
            None => not("busy", self.now),
        }
    }

    /// QEMU to QEMU: the stream arrives, if everybody is there.
    fn stream_flows(&mut self) {
        let copying = self
            .source
            .as_ref()
            .is_some_and(|m| *m.state() == SourceState::Copying);
        let loading = self
            .target
            .as_ref()
            .is_some_and(|m| *m.state() == TargetState::Loading);
        let waits = self
            .target
            .as_ref()
            .is_some_and(|m| loading || *m.state() == TargetState::Switched);
        if copying && self.target.is_some() && !waits && self.source_heard.is_empty() {
            // The session is over: the source's end of it says so.
            self.source_heard
                .push_back(SourceEvent::Failed("session over".into()));
        }
        if self.is_postcopy {
            return self.postcopy_flows(copying, loading);
        }
        if !(copying && loading && self.link_up && self.target_qemu == TargetQemu::Stopped) {
            return;
        }
        if self.source_qemu == SourceQemu::Running {
            self.source_qemu = SourceQemu::SwitchOver;
        } else {
            self.tell_target(TargetEvent::LoadReported);
            if !self.faults || self.dice.roll(5) > 0 {
                self.source_heard.push_back(SourceEvent::TargetLoaded);
            } else {
                self.source_heard
                    .push_back(SourceEvent::Failed("cut".into()));
            }
        }
    }

    /// The same of post-copy: the VM first, and its memory when it will.
    fn postcopy_flows(&mut self, copying: bool, loading: bool) {
        if !self.link_up || self.target_qemu == TargetQemu::Gone {
            return;
        }
        match self.source_qemu {
            SourceQemu::Running if copying && loading => {
                self.source_qemu = SourceQemu::Post { open: true };
                self.tell_source(SourceEvent::SourceHeld);
            }
            SourceQemu::Post { open: true } if copying && loading => {
                self.tell_target(TargetEvent::SwitchReported);
                self.source_heard.push_back(SourceEvent::TargetSwitched);
            }
            SourceQemu::Post { open: true } if self.is_agreeing && self.losses_left > 0 => {
                self.losses_left -= 1;
                self.lose_session();
            }
            SourceQemu::Post { open: true } if self.is_agreeing => {
                self.is_agreeing = false;
                self.source_heard.push_back(SourceEvent::Resumed);
            }
            // Memory may be through before the VM is let go, and after.
            SourceQemu::Post { open: true } if !self.is_whole && self.dice.roll(4) == 0 => {
                self.is_whole = self.is_fed();
                if self.is_whole {
                    self.tell_target(TargetEvent::LoadReported);
                    // The source may not hear of it.
                    if !self.faults || self.dice.roll(4) > 0 {
                        self.source_heard.push_back(SourceEvent::TargetLoaded);
                    } else {
                        self.lose_session();
                    }
                }
            }
            _ => {}
        }
    }

    /// Whether memory goes from one QEMU to the other.
    fn is_fed(&self) -> bool {
        let has_switched = |state: &TargetState| {
            matches!(
                state,
                TargetState::Switched
                    | TargetState::Releasing { follows: true, .. }
                    | TargetState::Unheard { follows: true, .. }
                    | TargetState::Running { follows: true }
            )
        };
        self.source.is_some()
            && self.session_up
            && !self.is_agreeing
            && self
                .target
                .as_ref()
                .is_some_and(|m| has_switched(m.state()))
    }

    /// What both ends hear when their session ends.
    fn lose_session(&mut self) {
        self.session_up = false;
        let now = self.now;
        self.tell_target(TargetEvent::SessionLost { now });
        self.source_hears_of_loss("session lost");
    }

    /// A try to resume has come to nothing if the QEMUs had not agreed.
    fn source_hears_of_loss(&mut self, reason: &str) {
        let (reason, now) = (reason.to_owned(), self.now);
        let was_agreeing = std::mem::take(&mut self.is_agreeing);
        self.lost_agreeing += u32::from(was_agreeing);
        self.source_heard.push_back(if was_agreeing {
            SourceEvent::NotResumed { reason, now }
        } else {
            SourceEvent::Failed(reason)
        });
    }

    fn kill_source_agent(&mut self) {
        if self.source.take().is_some() {
            self.log.push("source agent dies".into());
            self.source_todo.clear();
            self.source_heard.clear();
            // Its socket closes: a QEMU that has not completed resumes.
            match self.source_qemu {
                SourceQemu::SwitchOver => self.source_qemu = SourceQemu::Running,
                SourceQemu::Post { .. } => self.source_qemu = SourceQemu::Post { open: false },
                _ => {}
            }
            self.session_up = false;
            self.lost_agreeing += u32::from(std::mem::take(&mut self.is_agreeing));
            let now = self.now;
            self.tell_target(TargetEvent::SessionLost { now });
        }
    }

    fn kill_target_agent(&mut self) {
        if self.target.take().is_some() {
            self.log.push("target agent dies".into());
            self.session_up = false;
            self.target_todo.clear();
            while self.requests.pop_front().is_some() {
                self.source_heard.push_back(SourceEvent::NoAnswer {
                    reason: "reset".into(),
                    now: self.now,
                });
            }
            self.source_hears_of_loss("target agent gone");
        }
    }

    fn restart_source_agent(&mut self) {
        // Without a journal there is no move to go on with.
        if let (None, Some(journal)) = (&self.source, self.source_journal) {
            self.log.push("source agent restarts".into());
            self.source = Some(SourceMove::default());
            self.tell_source(SourceEvent::Restarted(journal));
        }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(500);
        let now = self.now;
        match self.dice.roll(if self.faults { 18 } else { 8 }) {
            0 | 1 => self.source_acts(),
            2 | 3 => self.target_acts(),
            4 => self.target_serves(),
            5 => self.stream_flows(),
            6 => {
                if let Some(event) = self.source_heard.pop_front() {
                    self.tell_source(event);
                }
            }
            7 => self.tell_target(TargetEvent::Tick { now }),
            8 => self.kill_source_agent(),
            9 => self.kill_target_agent(),
            10 => self.restart_source_agent(),
            11 => self.restart_target_agent(),
            12 => self.link_up = !self.link_up,
            13 => self.tell_source(SourceEvent::Cancel),
            14 => self.lose_session(),
            15 => self.person_stops_it(),
            16 => self.is_disk_full = !self.is_disk_full,
            _ => self.kill_target_qemu(),
        }
    }

    /// Whether the VM runs at its target, or has run there.
    fn has_run(&self) -> bool {
        matches!(self.target_qemu, TargetQemu::Running | TargetQemu::Paused)
    }

    fn check(&self, seed: u64) {
        let both = self.source_qemu == SourceQemu::Running && self.has_run();
        assert!(!both, "seed {seed}: two VMs run\n{}", self.log.join("\n"));
        let none = self.source_qemu == SourceQemu::Gone && !self.has_run();
        assert!(!none, "seed {seed}: no VM is left\n{}", self.log.join("\n"));
        let memory_lost =
            self.source_qemu == SourceQemu::Gone && self.is_postcopy && !self.is_whole;
        assert!(
            !memory_lost,
            "seed {seed}: the source went with memory that is not at the target\n{}",
            self.log.join("\n")
        );
    }

    /// Everybody is back and the link is up: the move must end.
    fn heal(&mut self, seed: u64) {
        self.faults = false;
        self.link_up = true;
        self.is_disk_full = false;
        self.restart_source_agent();
        self.restart_target_agent();
        for _ in 0..4000 {
            self.step();
            self.check(seed);
        }
    }
}

#[test]
fn never_two_and_never_none_whatever_dies_whenever() {
    let (mut moved, mut stayed, mut person, mut resumed, mut paused) = (0, 0, 0, 0, 0);
    let (mut lost_again, mut unwritten, mut unreached) = (0, [0; 2], 0);
    for seed in 0..6_000 {
        let mut world = World::new(seed);
        // Some worlds get far before the first fault, some are in trouble from the start.
        world.faults = false;
        for _ in 0..world.dice.roll(60) {
            world.step();
            world.check(seed);
        }
        world.faults = true;
        for _ in 0..world.dice.roll(80) {
            world.step();
            world.check(seed);
        }
        world.heal(seed);
        let running =
            usize::from(world.source_qemu == SourceQemu::Running) + usize::from(world.has_run());
        let asked = matches!(
            world.source.as_ref().map(SourceMove::state),
            Some(SourceState::NeedsPerson { .. })
        );
        match (running, asked) {
            (1, _) if world.has_run() => moved += 1,
            (1, _) => stayed += 1,
            (_, true) => person += 1,
            _ => panic!("seed {seed}: {running} VMs run\n{}", world.log.join("\n")),
        }
        // A person is asked only when QEMU itself died in the moment of its release. What follows a VM
        // follows it to the end.
        assert!(
            !asked || world.vm_killed,
            "seed {seed}\n{}",
            world.log.join("\n")
        );
        let is_whole = world.is_whole || !world.is_postcopy;
        assert!(
            is_whole || !world.has_run(),
            "seed {seed}: memory does not follow\n{}",
            world.log.join("\n")
        );
        resumed += u32::from(world.log.iter().any(|line| line.contains("hears Resumed")));
        lost_again += world.lost_agreeing;
        paused += u32::from(world.target_qemu == TargetQemu::Paused);
        unreached += world.unreached;
        for (sum, count) in unwritten.iter_mut().zip(world.unwritten) {
            *sum += count;
        }
    }
    assert!(
        moved > 500 && stayed > 500 && resumed > 100 && lost_again > 50 && paused > 50,
        "{moved} moved, {paused} of them were stopped there, {stayed} stayed, {person} need a person; \
         {resumed} were resumed, \
         {lost_again} times it was lost again before both QEMUs had agreed"
    );
    assert!(
        unwritten[0] > 50 && unwritten[1] > 20 && unreached > 20,
        "{unwritten:?} entries could not be written before and after the start, {unreached} times it \
         was not known whether a VM was started"
    );
}
