//! What the event stream of a migration says of each VM.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::clock::UnixMs;
use crate::fault;
use crate::guest::Vm;
use crate::memory::Compared;
use crate::outcome::{EventLog, Hold, Moved};
use crate::results::{Pages, Sample};

/// A VM that its agent holds.
#[derive(Debug)]
pub(super) struct Held {
    /// Id of its move.
    pub(super) id: String,
    /// Its name.
    pub(super) vm: String,
    /// When the agent began to hold it.
    pub(super) since: UnixMs,
}

/// What the events have said so far of all VMs.
#[derive(Debug)]
pub(super) struct Record<'a> {
    started: UnixMs,
    log: &'a EventLog,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    moved: Vec<Moved>,
    phases: HashMap<String, String>,
    /// By phase, the VMs that have entered it.
    entered: HashMap<String, HashSet<String>>,
    over: bool,
    /// Length of the preparation phase, of which the group's stream tells if there was one.
    prepare_s: Option<f64>,
    notes: Vec<String>,
    /// What the agents said last of the page faults of each VM.
    faults: HashMap<String, Value>,
}

impl State {
    fn of(&mut self, vm: &str) -> Option<&mut Moved> {
        self.moved.iter_mut().find(|moved| moved.vm == vm)
    }
}

impl<'a> Record<'a> {
    /// Of a migration of `vms` that is about to start.
    pub(super) fn new(vms: &[&Vm], started: UnixMs, log: &'a EventLog) -> Self {
        let moved = vms.iter().map(|vm| Moved::begin(&vm.name)).collect();
        let state = State {
            moved,
            phases: HashMap::new(),
            entered: HashMap::new(),
            over: false,
            prepare_s: None,
            notes: Vec::new(),
            faults: HashMap::new(),
        };
        Self {
            started,
            log,
            state: Mutex::new(state),
        }
    }

    /// Notes an event; returns the VM if it is held from now on.
    pub(super) fn take(&self, event: Value) -> Option<Held> {
        self.log.record(event.clone());
        if event["event"] == "prepared" {
            self.state().prepare_s = event["seconds"].as_f64();
        }
        let vm = event["vm"].as_str()?;
        let at = UnixMs(event["at_unix_ms"].as_f64()?);
        match event["event"].as_str()? {
            "phase" => self.enter(&event, vm, at),
            "note" => {
                let said = event["message"].as_str().unwrap_or_default();
                self.state().notes.push(format!("{vm}: {said}"));
                None
            }
            "progress" => {
                self.sample(&event["progress"], vm, at);
                None
            }
            _ => None,
        }
    }

    fn enter(&self, event: &Value, vm: &str, at: UnixMs) -> Option<Held> {
        let phase = event["phase"].as_str()?;
        let mut state = self.state();
        state.phases.insert(vm.to_owned(), phase.to_owned());
        let entered = state.entered.entry(phase.to_owned()).or_default();
        entered.insert(vm.to_owned());
        let moved = state.of(vm)?;
        match phase {
            "preparing" => moved.started = at,
            "moved" => moved.ended = Some(at),
            "stayed" | "needs-person" => {
                moved.remark = event["message"].as_str().map(str::to_owned);
            }
            _ => {}
        }
        let id = event["id"].as_str()?.to_owned();
        (phase == "held").then(|| Held {
            id,
            vm: vm.to_owned(),
            since: at,
        })
    }

    fn sample(&self, progress: &Value, vm: &str, at: UnixMs) {
        let mut state = self.state();
        let phase = state.phases.get(vm).cloned().unwrap_or_default();
        if progress["faults"].is_object() {
            let faults = progress["faults"].clone();
            state.faults.insert(vm.to_owned(), faults);
        }
        let Some(moved) = state.of(vm) else { return };
        moved.pages = pages(&progress["pages"]).or(moved.pages);
        moved.samples.push(Sample {
            t_s: at.s_since(self.started),
            wire_bytes: progress["wire_bytes"].as_u64().unwrap_or_default(),
            remaining_bytes: progress["remaining_bytes"].as_u64(),
            phase,
        });
    }

    /// Notes the comparison of a VM that was held.
    pub(super) fn compared(&self, vm: &str, hold: Hold, compared: anyhow::Result<Compared>) {
        let fields = match &compared {
            Ok(compared) => json!({
                "compared_pages": compared.pages,
                "mismatched_pages": compared.mismatched,
                "hold_ms": hold.ms(),
            }),
            Err(error) => json!({"message": format!("{error:#}"), "hold_ms": hold.ms()}),
        };
        self.log.note(vm, "compared", fields);
        if let Some(moved) = self.state().of(vm) {
            moved.hold = Some(hold);
            match compared {
                Ok(compared) => moved.compared = Some(compared),
                Err(error) => {
                    moved.remark = Some(format!("its memory was not compared: {error:#}"));
                }
            }
        }
    }

    /// What was said of VMs beside their phases.
    pub(super) fn notes(&self) -> Vec<String> {
        self.state().notes.clone()
    }

    /// Notes what else a person should know of a VM.
    pub(super) fn remark(&self, vm: &str, text: String) {
        if let Some(moved) = self.state().of(vm) {
            moved.remark = Some(text);
        }
    }

    /// The event stream has ended.
    pub(super) fn finish(&self) {
        self.state().over = true;
    }

    /// How far the move of `vm` is.
    pub(super) fn progress_of(&self, vm: &str) -> fault::Progress {
        let state = self.state();
        fault::Progress {
            over: state.over,
            prepared: state.prepare_s.is_some(),
            phase: state.phases.get(vm).cloned(),
            entered_by_all: state
                .entered
                .iter()
                .filter(|(_, vms)| vms.len() == state.moved.len())
                .map(|(phase, _)| phase.clone())
                .collect(),
        }
    }

    /// How long the preparation phase took, if there was one.
    pub(super) fn prepare_s(&self) -> Option<f64> {
        self.state().prepare_s
    }

    /// How long page faults took, of each VM in post-copy that had some.
    pub(super) fn faults(&self) -> Vec<Value> {
        self.state().faults.values().cloned().collect()
    }

    /// A VM of which no event said that it moved has not, whatever the reason.
    pub(super) fn into_moved(self, exit_code: Option<i32>, said: &str) -> Vec<Moved> {
        let state = self
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let State {
            mut moved, phases, ..
        } = state;
        for moved in &mut moved {
            let phase = phases.get(&moved.vm).map_or("none", String::as_str);
            if moved.remark.is_none() && phase != "moved" {
                let code = exit_code.map_or("a signal".into(), |code| code.to_string());
                moved.remark = Some(format!(
                    "in phase `{phase}` when the CLI ended with {code}: {said}"
                ));
            }
        }
        moved
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pages(counts: &Value) -> Option<Pages> {
    let count = |key: &str| counts[key].as_u64();
    Some(Pages {
        total: count("total")?,
        zero: count("zero"),
        fill: count("fill"),
        literal: count("literal"),
        reference: count("reference"),
        remote_reference: count("remote_reference"),
        mapped: count("mapped"),
    })
}
