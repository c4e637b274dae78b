//! What a technique reports of the VMs that it moved, and the record of everything that happened.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use serde_json::{Value, json};

use crate::clock::UnixMs;
use crate::memory::Compared;
use crate::results::{AgentPeak, Pages, Sample};

/// The time that a VM stood still, loaded at the target, while the lab compared its memory.
///
/// Neither QEMU nor Gangway needs this pause, so it is taken off every measured time. It begins
/// when the technique would have let the VM run: for stock QEMU when its source has the target's word
/// that all is loaded, for Gangway when the agent reports `held`. It ends when the lab says
/// `cont` or `continue`. All that comes after, until the guest's first heartbeat, is the
/// technique's own time again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hold {
    /// When the VM could have run.
    pub from: UnixMs,
    /// When it was let go.
    pub to: UnixMs,
}

impl Hold {
    /// Its length.
    #[must_use]
    pub fn ms(self) -> f64 {
        self.to.ms_since(self.from)
    }
}

/// One VM, after its move.
#[derive(Clone, Debug)]
pub struct Moved {
    /// Its name.
    pub vm: String,
    /// When its move began.
    pub started: UnixMs,
    /// The lab's own pause.
    pub hold: Option<Hold>,
    /// Pages compared during the pause.
    pub compared: Option<Compared>,
    /// Progress over time.
    pub samples: Vec<Sample>,
    /// How its pages crossed, where that is known.
    pub pages: Option<Pages>,
    /// Why it did not arrive, or what else a person should know.
    pub remark: Option<String>,
    /// When it was all at its target.
    pub ended: Option<UnixMs>,
    /// Host that it must run on now, if that does not follow from the above.
    pub runs_on: Option<String>,
}

impl Moved {
    /// A move that begins now.
    #[must_use]
    pub fn begin(vm: &str) -> Self {
        Self {
            vm: vm.to_owned(),
            started: UnixMs::now(),
            hold: None,
            compared: None,
            samples: Vec::new(),
            pages: None,
            remark: None,
            ended: None,
            runs_on: None,
        }
    }
}

/// Name of the figure with the length of the preparation phase, in seconds.
pub const PREPARE_TIME: &str = "prepare_time_s";

/// Further measures, for `application` in the results.
pub type Figures = Vec<(String, Value)>;

/// What a technique did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// When the whole group's migration was asked for.
    pub started: UnixMs,
    /// Every VM of the scenario.
    pub moved: Vec<Moved>,
    /// What only this technique can tell.
    pub figures: Figures,
    /// Processor time of single kinds of process.
    pub cpu_seconds: Vec<(String, f64)>,
    /// Memory of the agents, if there are any.
    pub agent_peak: Option<AgentPeak>,
    /// What came otherwise than the scenario wants it.
    pub unexpected: Option<String>,
}

impl Outcome {
    /// When the first VM's move began: what comes before it (the preparation phase, for one) is no
    /// migration. With nothing moved, when it was asked for.
    #[must_use]
    pub fn first_start(&self) -> UnixMs {
        let starts = self.moved.iter().map(|moved| moved.started);
        let first = starts.min_by(|a, b| a.0.total_cmp(&b.0));
        first.map_or(self.started, |first| first.later(self.started))
    }
}

/// `events.jsonl`: what happened in all runs, one object a line, each with the technique and
/// repeat that it belongs to.
#[derive(Debug)]
pub struct EventLog {
    file: Mutex<File>,
    technique: String,
    repeat: u32,
}

impl EventLog {
    /// Appends to `events.jsonl` in `dir`.
    pub fn open(dir: &Path, technique: String, repeat: u32) -> anyhow::Result<Self> {
        let path = dir.join("events.jsonl");
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        Ok(Self {
            file: Mutex::new(file),
            technique,
            repeat,
        })
    }

    /// Records an event as it came from Gangway.
    pub fn record(&self, mut event: Value) {
        if let Some(fields) = event.as_object_mut() {
            fields.insert("technique".into(), self.technique.as_str().into());
            fields.insert("repeat".into(), self.repeat.into());
        }
        let mut line = event.to_string();
        line.push('\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // The record is for people: a full disk must not fail a run whose measures are good.
        if let Err(error) = file.write_all(line.as_bytes()) {
            crate::shell::say(&format!("writing events.jsonl: {error}"));
        }
    }

    /// Records an event of the lab's own.
    pub fn note(&self, vm: &str, event: &str, fields: Value) {
        let mut object = json!({"at_unix_ms": UnixMs::now().0, "vm": vm, "event": event});
        if let (Some(object), Value::Object(fields)) = (object.as_object_mut(), fields) {
            object.extend(fields);
        }
        self.record(object);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn migration_time_begins_with_the_first_move_and_not_with_the_preparation() {
        let started_at = |started: f64| Moved {
            started: UnixMs(started),
            ..Moved::begin("vm1")
        };
        let outcome = |moved| Outcome {
            started: UnixMs(1_000.0),
            moved,
            figures: Vec::new(),
            cpu_seconds: Vec::new(),
            agent_peak: None,
            unexpected: None,
        };
        let prepared = outcome(vec![started_at(9_500.0), started_at(9_000.0)]);
        assert_eq!(prepared.first_start(), UnixMs(9_000.0));
        assert_eq!(outcome(Vec::new()).first_start(), UnixMs(1_000.0));
    }
}
