//! `results.json`: everything that a run of a scenario measured.
//!
//! The one source of the report, the terminal table and the comparison: nothing is shown that
//! does not stand here. A value that was not measured is `null`, never 0. Units stand in the
//! names; page counts are pages of 4 KiB.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use crate::bounds::Bounds;
pub use crate::footprint::Footprint;

/// Name of the file inside a run's output directory.
pub const FILE_NAME: &str = "results.json";
/// Figure in a run's `application`: stamped pages that guests have checked since the move began.
pub const STAMPS_CHECKED: &str = "stamped_pages_checked";

/// All runs of one invocation of `gangway-lab run`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Name of the scenario.
    pub scenario: String,
    /// What took part, by name (`gangway`, `qemu_source`, `qemu_target`, `guest_kernel`, ...).
    pub versions: BTreeMap<String, String>,
    /// Hosts, VMs and links.
    pub topology: Topology,
    /// One for each technique and repeat, in the order in which they ran.
    pub runs: Vec<Run>,
    /// The command line that made these results, program first.
    #[serde(default)]
    pub command: Vec<String>,
    /// Wall clock when the first run began, seconds since 1970.
    #[serde(default)]
    pub started_unix_s: Option<u64>,
}

/// Shape and speed of the lab that the runs took place in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Hosts in the source rack.
    pub source_hosts: u32,
    /// Hosts in the target rack.
    pub target_hosts: u32,
    /// VMs on each source host at the start.
    pub vms_per_host: u32,
    /// Memory of one VM.
    pub vm_memory_bytes: u64,
    /// Rate of the link between the racks, each way; `null` if it is not shaped.
    pub core_bits_per_second: Option<u64>,
    /// Rate of a host's link to its rack, each way; `null` if it is not shaped.
    pub edge_bits_per_second: Option<u64>,
}

/// One technique, once: guests that begin alike, moved together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// `stock`, `stock-xbzrle`, `stock-multifd-zstd`, `oc`, `gang`, ...
    pub technique: String,
    /// `pre-copy`, `post-copy`, `post-copy-held` or `hybrid`.
    pub mode: String,
    /// `none` or `zstd`: what gangway does with literals.
    pub compression: String,
    /// What gangway does with sharing, where the technique's name does not say it: `identical`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharing: Option<String>,
    /// Whether gangway gave requested pages a channel of their own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub preempt: bool,
    /// The fault that struck it, as a matrix of faults names it: `cut-2s@switch-over`.
    #[serde(default)]
    pub fault: Option<String>,
    /// What ran beside it: an application in the guests, or the traffic of other hosts.
    #[serde(default)]
    pub beside: Option<String>,
    /// Number of this repetition of the technique, from 0.
    pub repeat: u32,
    /// VMs that were to be moved.
    pub vms: u32,
    /// Hosts in the source rack of this run.
    #[serde(default)]
    pub source_hosts: Option<u32>,
    /// VMs on each source host at the start of this run.
    #[serde(default)]
    pub vms_per_host: Option<u32>,
    /// Bytes on the link between the racks, both ways, headers included.
    pub core_bytes: Option<u64>,
    /// Bytes between hosts of the target rack.
    pub target_to_target_bytes: Option<u64>,
    /// Bytes between hosts of the source rack, where an index is there: its traffic, and what the
    /// agents say to the one that coordinates.
    pub index_bytes: Option<u64>,
    /// From the start of the first VM's move to the end of the last one's, holds taken off: a VM runs at
    /// its target, and where its memory follows it the source host is free of it, too.
    pub total_migration_time_s: Option<f64>,
    /// From the start of the first VM's move to the last VM running at its target, holds taken off,
    /// whatever is still to follow.
    #[serde(default)]
    pub running_at_target_s: Option<f64>,
    /// Mean over the VMs of the time from the VM's start to the end of its move.
    pub mean_migration_time_s: Option<f64>,
    /// From the start of the first VM's move until the source hosts are free of the VMs.
    pub eviction_time_s: Option<f64>,
    /// Length of the preparation phase, where there is one.
    pub prepare_time_s: Option<f64>,
    /// The observer's gap between heartbeats, over the VMs, holds taken off.
    pub downtime_ms: Option<Downtime>,
    /// Largest memory of all source hosts together (QEMUs and agents) during the run.
    pub source_footprint_bytes: Option<u64>,
    /// As `source_footprint_bytes`, at the target.
    pub target_footprint_bytes: Option<u64>,
    /// Memory of the source hosts at rest, just before the migration.
    #[serde(default)]
    pub source_footprint: Option<Footprint>,
    /// Memory of the target hosts at rest, after it.
    #[serde(default)]
    pub target_footprint: Option<Footprint>,
    /// What the guests' memory comes to at best.
    #[serde(default)]
    pub bounds: Option<Bounds>,
    /// The most memory that an agent ever had resident, its program included.
    #[serde(default)]
    pub agent_peak_bytes: Option<AgentPeak>,
    /// How the pages crossed.
    pub pages: Option<Pages>,
    /// Guest pages compared between source and target at hand-over.
    pub compared_pages: Option<u64>,
    /// Of these, how many differed.
    pub mismatched_pages: Option<u64>,
    /// VMs that run nowhere, twice or elsewhere than they should at the end, those that stay included.
    pub vms_lost: Option<u32>,
    /// What the workloads in the guests said, by measure.
    #[serde(default)]
    pub application: BTreeMap<String, serde_json::Value>,
    /// Each VM by itself.
    #[serde(default)]
    pub per_vm: Vec<VmResult>,
    /// How far each VM was at which time.
    #[serde(default)]
    pub timeline: Vec<VmTimeline>,
    /// CPU time in seconds: of all that runs on the hosts of a rack (`all_source`, `all_target`), and of
    /// that what is the agents' (`agents_source`, `agents_target`).
    #[serde(default)]
    pub cpu_seconds: BTreeMap<String, f64>,
    /// Stamped pages that a guest found changed; absent if no guest has checked one.
    #[serde(default)]
    pub stamp_errors: Option<u64>,
    /// Why the run did not come to its end; absent if it did.
    #[serde(default)]
    pub failure: Option<String>,
}

/// Peak memory of the agents: the largest of each rack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentPeak {
    /// Of those that VMs left.
    pub source: u64,
    /// Of those that VMs came to.
    pub target: u64,
}

/// Downtime over the VMs of a run, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// Largest.
    pub max: f64,
}

/// Pages of the migration streams by how they crossed; pages sent again count again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// All of them.
    pub total: u64,
    /// All bytes zero.
    pub zero: Option<u64>,
    /// All bytes equal, not zero.
    pub fill: Option<u64>,
    /// With their bytes.
    pub literal: Option<u64>,
    /// As the name of a content that this target host has.
    pub reference: Option<u64>,
    /// As the name of a content that another host of the target rack has.
    pub remote_reference: Option<u64>,
    /// Mapped copy-on-write into the VM at the target.
    pub mapped: Option<u64>,
}

/// One VM of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmResult {
    /// Name of the VM.
    pub vm: String,
    /// Host that it ran on.
    pub source_host: String,
    /// Host that it went to.
    pub target_host: String,
    /// From its start to the end of its move, its hold taken off.
    pub migration_time_s: Option<f64>,
    /// The observer's gap, its hold taken off.
    pub downtime_ms: Option<f64>,
    /// How long the lab held it, stopped at both ends, to compare its memory.
    pub hold_ms: Option<f64>,
    /// Stamped pages that the guest found changed; absent if it has checked none.
    #[serde(default)]
    pub stamp_errors: Option<u64>,
    /// What the VM's end was, if it was not a clean move.
    #[serde(default)]
    pub remark: Option<String>,
}

/// Progress of one VM over time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmTimeline {
    /// Name of the VM.
    pub vm: String,
    /// In the order of time.
    pub samples: Vec<Sample>,
}

/// One reading of a VM's progress.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds since the start of the first VM's move.
    pub t_s: f64,
    /// Bytes sent for this VM so far.
    pub wire_bytes: u64,
    /// What QEMU still has to send.
    pub remaining_bytes: Option<u64>,
    /// Phase of the move (`bulk`, `switch-over`, ...).
    pub phase: String,
}

/// Reading or writing `results.json` failed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file could not be opened, read or written.
    #[error("{path} cannot be accessed")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a `results.json`.
    #[error("{path} does not hold results of the lab")]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl Results {
    /// Reads the results of an output directory, or of a `results.json` named directly.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        let path = if path.is_dir() {
            path.join(FILE_NAME)
        } else {
            path.to_owned()
        };
        let file = File::open(&path).map_err(|source| FileError::Io {
            path: path.clone(),
            source,
        })?;
        let mut results: Self = serde_json::from_reader(BufReader::new(file))
            .map_err(|source| FileError::Format { path, source })?;
        results.runs.iter_mut().for_each(Run::renew);
        Ok(results)
    }

    /// Writes `results.json` into `dir`. Replaces an older file only when the new one is whole.
    pub fn save(&self, dir: &Path) -> Result<PathBuf, FileError> {
        let path = dir.join(FILE_NAME);
        let part = dir.join(format!("{FILE_NAME}.part"));
        let io = |source| FileError::Io {
            path: path.clone(),
            source,
        };
        let mut out = BufWriter::new(File::create(&part).map_err(io)?);
        serde_json::to_writer_pretty(&mut out, self).map_err(|source| FileError::Format {
            path: path.clone(),
            source,
        })?;
        out.write_all(b"\n")
            .and_then(|()| out.flush())
            .map_err(io)?;
        std::fs::rename(&part, &path).map_err(io)?;
        Ok(path)
    }

    /// The runs by technique, in the order in which the techniques first ran; of a sweep, those of
    /// its largest topology, since others are not their repetitions.
    #[must_use]
    pub fn techniques(&self) -> Vec<Technique<'_>> {
        let largest = self.points().into_iter().max_by_key(Point::vms);
        largest.map_or_else(Vec::new, |point| self.techniques_at(point))
    }

    /// The topologies of the runs, in the order in which they first ran.
    #[must_use]
    pub fn points(&self) -> Vec<Point> {
        let mut points: Vec<Point> = Vec::new();
        for point in self.runs.iter().map(|run| self.point(run)) {
            if !points.contains(&point) {
                points.push(point);
            }
        }
        points
    }

    /// Topology that a run took place in.
    #[must_use]
    pub fn point(&self, run: &Run) -> Point {
        Point {
            hosts: run.source_hosts.unwrap_or(self.topology.source_hosts),
            vms_per_host: run.vms_per_host.unwrap_or(self.topology.vms_per_host),
        }
    }

    /// The runs of one topology by technique.
    #[must_use]
    pub fn techniques_at(&self, point: Point) -> Vec<Technique<'_>> {
        let mut found: Vec<Technique<'_>> = Vec::new();
        for run in self.runs.iter().filter(|run| self.point(run) == point) {
            let name = run.name();
            match found.iter_mut().find(|technique| technique.name == name) {
                Some(technique) => technique.runs.push(run),
                None => found.push(Technique {
                    name,
                    runs: vec![run],
                }),
            }
        }
        found
    }
}

/// What a sweep varies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Point {
    /// Hosts in the source rack.
    pub hosts: u32,
    /// VMs on each of them.
    pub vms_per_host: u32,
}

impl Point {
    /// VMs of the whole rack.
    #[must_use]
    pub fn vms(&self) -> u32 {
        self.hosts.saturating_mul(self.vms_per_host)
    }
}

/// The repetitions of one technique.
#[derive(Clone, Debug)]
pub struct Technique<'a> {
    /// As [`Run::name`].
    pub name: String,
    /// At least one.
    pub runs: Vec<&'a Run>,
}

impl<'a> Technique<'a> {
    /// Those that came to their end: what others measured says nothing of the technique.
    pub fn completed(&self) -> impl Iterator<Item = &'a Run> {
        let runs = self.runs.iter().copied();
        runs.filter(|run| run.failure.is_none())
    }
}

impl Run {
    /// The run as one of this technique.
    #[must_use]
    pub fn of(technique: crate::technique::Technique, run: Self) -> Self {
        Self {
            technique: technique.base().into(),
            mode: technique.mode().into(),
            compression: technique.compression().into(),
            sharing: technique.sharing().map(str::to_owned),
            preempt: technique.preempts(),
            ..run
        }
    }

    /// Brings a run of an older file to what the fields mean now. Then the total time of a VM in
    /// post-copy ended when it ran, and 0 stamps were broken where none was checked.
    fn renew(&mut self) {
        if self.running_at_target_s.is_none() && self.total_migration_time_s.is_some() {
            self.running_at_target_s = self.total_migration_time_s;
            if self.mode.starts_with("post-copy") {
                self.total_migration_time_s = self.eviction_time_s;
                self.mean_migration_time_s = None;
            }
        }
        let checked = self.application.get(STAMPS_CHECKED);
        if checked.and_then(serde_json::Value::as_u64) == Some(0) && self.stamp_errors == Some(0) {
            self.stamp_errors = None;
        }
    }

    /// Whether memory was compared, or stamps in it checked.
    #[must_use]
    pub fn is_checked(&self) -> bool {
        self.compared_pages.is_some() || self.stamp_errors.is_some()
    }

    /// The technique with the settings that set it apart: `gang+zstd`.
    #[must_use]
    pub fn name(&self) -> String {
        let mut name = self.technique.clone();
        // `full` is never without.
        if !["none", ""].contains(&self.compression.as_str()) && self.technique != "full" {
            name.push('+');
            name.push_str(&self.compression);
        }
        if let Some(sharing) = &self.sharing {
            name.push('+');
            name.push_str(sharing);
        }
        name.push_str(if self.preempt { "+preempt" } else { "" });
        // `stock-postcopy` and `stock-postcopy-preempt` say it already.
        let is_said = ["pre-copy", ""].contains(&self.mode.as_str());
        if !is_said && !self.technique.starts_with("stock-postcopy") {
            name.push(' ');
            name.push_str(&self.mode);
        }
        for more in [&self.beside, &self.fault].into_iter().flatten() {
            name.push_str(", ");
            name.push_str(more);
        }
        name
    }
}

impl Downtime {
    /// Over the VMs' downtimes; `None` if there is none.
    #[must_use]
    pub fn of(mut each_ms: Vec<f64>) -> Option<Self> {
        each_ms.sort_by(f64::total_cmp);
        let max = *each_ms.last()?;
        let middle = each_ms.len() / 2;
        let p50 = if each_ms.len() % 2 == 1 {
            each_ms[middle]
        } else {
            f64::midpoint(each_ms[middle - 1], each_ms[middle])
        };
        let mean = each_ms.iter().sum::<f64>() / each_ms.len() as f64;
        Some(Self { mean, p50, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_of_the_published_fields_do_not_change() {
        let results = Results {
            runs: vec![Run {
                downtime_ms: Some(Downtime::default()),
                pages: Some(Pages::default()),
                ..Run::default()
            }],
            ..Results::default()
        };
        let json = serde_json::to_value(&results).unwrap();
        let topology = "source_hosts target_hosts vms_per_host vm_memory_bytes \
                        core_bits_per_second edge_bits_per_second";
        let run = "technique mode compression repeat vms core_bytes target_to_target_bytes \
                   index_bytes total_migration_time_s mean_migration_time_s eviction_time_s \
                   prepare_time_s downtime_ms source_footprint_bytes target_footprint_bytes \
                   pages compared_pages mismatched_pages vms_lost application";
        let pages = "total zero fill literal reference remote_reference mapped";
        for (at, names) in [
            ("", "scenario versions topology runs"),
            ("/topology", topology),
            ("/runs/0", run),
            ("/runs/0/downtime_ms", "mean p50 max"),
            ("/runs/0/pages", pages),
        ] {
            let object = json.pointer(at).unwrap().as_object().unwrap();
            for name in names.split_whitespace() {
                assert!(object.contains_key(name), "{at}/{name} is missing");
            }
        }
    }

    #[test]
    fn what_was_not_measured_is_null() {
        let json = serde_json::to_value(Run::default()).unwrap();
        assert!(json["core_bytes"].is_null());
        assert!(json["vms_lost"].is_null());
        assert!(json["downtime_ms"].is_null());
    }

    #[test]
    fn saved_results_load_again_from_the_directory_and_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let results = Results {
            scenario: "pair".into(),
            ..Results::default()
        };
        let path = results.save(dir.path()).unwrap();
        assert_eq!(Results::load(dir.path()).unwrap(), results);
        assert_eq!(Results::load(&path).unwrap(), results);
    }

    #[test]
    fn an_older_file_is_read_with_the_meaning_that_its_fields_have_now() {
        let old = |mode: &str, checked: u64| Run {
            mode: mode.into(),
            total_migration_time_s: Some(2.0),
            mean_migration_time_s: Some(1.0),
            eviction_time_s: Some(9.0),
            stamp_errors: Some(0),
            application: [(STAMPS_CHECKED.to_owned(), checked.into())].into(),
            ..Run::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let results = Results {
            runs: vec![old("post-copy", 0), old("pre-copy", 5)],
            ..Results::default()
        };
        results.save(dir.path()).unwrap();
        let runs = Results::load(dir.path()).unwrap().runs;
        let times = |run: &Run| [run.total_migration_time_s, run.running_at_target_s];
        assert_eq!(times(&runs[0]), [Some(9.0), Some(2.0)]);
        assert_eq!(runs[0].mean_migration_time_s, None);
        assert_eq!(times(&runs[1]), [Some(2.0), Some(2.0)]);
        assert_eq!(runs[1].mean_migration_time_s, Some(1.0));
        let errors: Vec<_> = runs.iter().map(|run| run.stamp_errors).collect();
        assert_eq!(errors, [None, Some(0)]);
    }

    #[test]
    fn a_file_that_is_not_results_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE_NAME), "{}").unwrap();
        let error = Results::load(dir.path()).unwrap_err();
        assert!(matches!(error, FileError::Format { .. }));
        assert!(error.to_string().contains(FILE_NAME));
    }

    #[test]
    fn techniques_keep_the_order_of_their_first_run() {
        let run = |technique: &str, compression: &str| Run {
            technique: technique.into(),
            mode: "pre-copy".into(),
            compression: compression.into(),
            ..Run::default()
        };
        let results = Results {
            runs: vec![
                run("stock", "none"),
                run("gang", "zstd"),
                run("stock", "none"),
            ],
            ..Results::default()
        };
        let found = results.techniques();
        let names: Vec<_> = found
            .iter()
            .map(|t| (t.name.as_str(), t.runs.len()))
            .collect();
        assert_eq!(names, [("stock", 2), ("gang+zstd", 1)]);
    }

    #[test]
    fn a_sweep_is_told_apart_by_topology_and_headed_by_the_largest() {
        let run = |hosts: u32, repeat: u32| Run {
            technique: "full".into(),
            compression: "zstd".into(),
            source_hosts: Some(hosts),
            vms_per_host: Some(4),
            repeat,
            ..Run::default()
        };
        let results = Results {
            runs: vec![run(1, 0), run(6, 0), run(1, 1), run(6, 1), run(3, 0)],
            ..Results::default()
        };
        let hosts: Vec<u32> = results.points().iter().map(|point| point.hosts).collect();
        assert_eq!(hosts, [1, 6, 3]);
        let [full] = &results.techniques()[..] else {
            panic!("one technique")
        };
        assert_eq!((full.name.as_str(), full.runs.len()), ("full", 2));
        assert!(full.runs.iter().all(|run| run.source_hosts == Some(6)));
    }

    #[test]
    fn the_median_downtime_lies_in_the_middle() {
        let odd = Downtime::of(vec![30.0, 10.0, 20.0]).unwrap();
        assert_eq!((odd.mean, odd.p50, odd.max), (20.0, 20.0, 30.0));
        let even = Downtime::of(vec![40.0, 10.0, 20.0, 30.0]).unwrap();
        assert_eq!((even.p50, even.max), (25.0, 40.0));
        assert!(Downtime::of(Vec::new()).is_none());
    }
}
