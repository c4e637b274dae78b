//! The baseline: QEMU to QEMU over TCP between the hosts, driven by the lab, without Gangway.
//!
//! As a careful manager does it: the target is started paused, the return path is open so that the
//! source is given up only after the target has loaded, and there is no bandwidth limit. All VMs of
//! the scenario move at once.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::clock::UnixMs;
use crate::guest::{self, Vm};
use crate::memory::{GuestMemory, compare};
use crate::net::bytes_per_s;
use crate::outcome::{EventLog, Hold, Moved, Outcome};
use crate::postcopy;
use crate::qmp::Qmp;
use crate::results::{Pages, Sample};
use crate::scenario::{Scenario, Stock};

/// Port of the first VM; each has one of its own.
const FIRST_PORT: u32 = 4000;
/// Interval between looks at the source's progress.
const LOOK: Duration = Duration::from_millis(250);
/// How long a source that has sent everything may take to hear that the target has loaded.
const RETURN_PATIENCE: Duration = Duration::from_secs(30);
/// Name of the figure that says what QEMU was told to use.
pub const SETTINGS: &str = "qemu_settings";
/// Channels of multifd: QEMU's default, and one for each processor of a small machine.
const MULTIFD_CHANNELS: u32 = 2;
/// QEMU's default level, which keeps up with a link of 1 Gbit/s.
const MULTIFD_ZSTD_LEVEL: u32 = 1;
/// Percent of a processor's time that auto-converge takes at first, and more with each round that
/// does not converge: QEMU's defaults.
const THROTTLE_INITIAL: u32 = 20;
const THROTTLE_INCREMENT: u32 = 10;

/// Moves all VMs of the bench.
pub fn migrate(bench: &Bench<'_>, stock: Stock, log: &EventLog) -> Outcome {
    let started = UnixMs::now();
    let moved = thread::scope(|scope| {
        let moves: Vec<_> = bench
            .vms
            .iter()
            .map(|vm| {
                scope.spawn(move || {
                    Move {
                        bench,
                        vm,
                        stock,
                        log,
                        started,
                    }
                    .run()
                })
            })
            .collect();
        moves
            .into_iter()
            .zip(&bench.vms)
            .map(|(handle, vm)| {
                handle.join().unwrap_or_else(|_| {
                    let remark = Some("the lab's thread panicked".into());
                    Moved {
                        remark,
                        ..Moved::begin(&vm.name)
                    }
                })
            })
            .collect()
    });
    let settings = Settings::of(stock, bench.scenario).text();
    let mut figures = vec![(SETTINGS.to_owned(), json!(settings))];
    if stock.is_postcopy() {
        figures.extend(postcopy::figures(bench, &[], log));
    }
    Outcome {
        started,
        moved,
        figures,
        cpu_seconds: Vec::new(),
        agent_peak: None,
        unexpected: None,
    }
}

/// What both ends are told before a migration.
struct Settings {
    capabilities: Vec<&'static str>,
    parameters: Value,
}

impl Settings {
    /// The best that suits every scenario: no limit of the bandwidth, the scenario's own limits, and what
    /// the technique is named after.
    fn of(stock: Stock, scenario: &Scenario) -> Self {
        // 0 lifts QEMU's own limit of 128 MiB/s.
        let mut parameters = json!({"max-bandwidth": 0});
        if let Some(limit) = scenario.downtime_limit_ms {
            parameters["downtime-limit"] = limit.into();
        }
        let mut capabilities = Vec::new();
        match stock {
            Stock::Plain => {}
            Stock::Xbzrle => {
                capabilities.push("xbzrle");
                // Room for every page of the guest: what is not in the cache cannot be a difference.
                parameters["xbzrle-cache-size"] =
                    (scenario.vm.memory_mb.next_power_of_two() << 20).into();
            }
            Stock::Multifd | Stock::MultifdZstd => {
                capabilities.push("multifd");
                parameters["multifd-channels"] = MULTIFD_CHANNELS.into();
                if stock == Stock::MultifdZstd {
                    parameters["multifd-compression"] = "zstd".into();
                    parameters["multifd-zstd-level"] = MULTIFD_ZSTD_LEVEL.into();
                }
            }
            Stock::Postcopy | Stock::PostcopyPreempt => {
                capabilities.push("postcopy-ram");
                if stock == Stock::PostcopyPreempt {
                    capabilities.push("postcopy-preempt");
                }
                if let Some(mbit) = scenario.push_mbit {
                    parameters["max-postcopy-bandwidth"] = bytes_per_s(mbit).into();
                }
            }
            Stock::AutoConverge => {
                capabilities.push("auto-converge");
                parameters["cpu-throttle-initial"] = THROTTLE_INITIAL.into();
                parameters["cpu-throttle-increment"] = THROTTLE_INCREMENT.into();
            }
        }
        Self {
            capabilities,
            parameters,
        }
    }

    /// As the report shows it.
    fn text(&self) -> String {
        let on = self.capabilities.iter().map(|name| format!("{name}=on"));
        let set = self.parameters.as_object().into_iter().flatten();
        let set = set.map(|(name, value)| format!("{name}={value}").replace('"', ""));
        on.chain(set).collect::<Vec<_>>().join(" ")
    }
}

struct Move<'a> {
    bench: &'a Bench<'a>,
    vm: &'a Vm,
    stock: Stock,
    log: &'a EventLog,
    started: UnixMs,
}

impl Move<'_> {
    fn run(&self) -> Moved {
        let mut moved = Moved::begin(&self.vm.name);
        if let Err(error) = self.go(&mut moved) {
            moved.remark = Some(format!("{error:#}"));
            self.log.note(
                &self.vm.name,
                "failed",
                json!({"message": format!("{error:#}")}),
            );
        }
        moved
    }

    fn go(&self, moved: &mut Moved) -> anyhow::Result<()> {
        self.log
            .note(&self.vm.name, "phase", json!({"phase": "preparing"}));
        let mut target = self.start_target()?;
        let mut source = self.vm.qmp(&self.vm.source)?;
        self.configure(&mut source, "source")?;
        self.configure(&mut target, "target")?;
        let uri = format!(
            "tcp:{}:{}",
            self.vm.target.address.ip,
            FIRST_PORT + self.vm.number
        );
        target.execute("migrate-incoming", json!({"uri": uri}))?;
        source.execute("migrate", json!({"uri": uri}))?;
        if self.stock.is_postcopy() {
            source.execute("migrate-start-postcopy", json!({}))?;
        }
        self.log
            .note(&self.vm.name, "phase", json!({"phase": "bulk"}));
        let loaded = self.follow(&mut source, &mut target, moved)?;
        moved.ended = Some(loaded);
        moved.pages = wait_for_source(&mut source)?;
        // In post-copy it runs already, and has written to its memory.
        if !self.stock.is_postcopy() {
            self.hand_over(&mut source, &mut target, moved)?;
        }
        source
            .execute("quit", json!({}))
            .context("ending the source")?;
        Ok(())
    }

    fn start_target(&self) -> anyhow::Result<Qmp> {
        let (vm, host) = (self.vm, &self.vm.target);
        let image = self.bench.programs.image_of(vm);
        let arguments = vm.arguments(host, self.bench.scenario, image);
        let extra: &[&str] = match self.stock.is_postcopy() {
            true => &["-incoming", "defer"],
            false => &["-S", "-incoming", "defer"],
        };
        guest::start(vm, host, &self.bench.programs.target, &arguments, extra)?;
        vm.qmp(host)
    }

    fn configure(&self, qmp: &mut Qmp, side: &str) -> anyhow::Result<()> {
        let settings = Settings::of(self.stock, self.bench.scenario);
        let mut on = vec!["events"];
        if side == "source" {
            on.push("return-path");
        }
        on.extend(settings.capabilities);
        if side == "target" && self.stock.is_postcopy() {
            on.push("postcopy-blocktime");
        }
        let capabilities: Vec<Value> = on
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        qmp.execute(
            "migrate-set-capabilities",
            json!({"capabilities": capabilities}),
        )
        .and_then(|_| qmp.execute("migrate-set-parameters", settings.parameters))
        .with_context(|| format!("configuring the {side} of {}", self.vm.name))?;
        Ok(())
    }

    /// Watches both ends until the target has loaded everything; returns when that was.
    fn follow(
        &self,
        source: &mut Qmp,
        target: &mut Qmp,
        moved: &mut Moved,
    ) -> anyhow::Result<UnixMs> {
        let patience = Duration::from_secs(self.bench.scenario.patience_s);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            let event = target.next_event(Instant::now() + LOOK)?;
            if let Some(event) = event.filter(|event| event.name == "MIGRATION") {
                match event.data["status"].as_str() {
                    Some("completed") => return Ok(event.at),
                    Some("failed") => bail!("the target failed to load {}", self.vm.name),
                    _ => {}
                }
            }
            let info = source.execute("query-migrate", json!({}))?;
            if info["status"] == "failed" {
                bail!("the source reports: {}", info["error-desc"]);
            }
            if let Some(sample) = self.sample(&info) {
                moved.samples.push(sample);
            }
        }
        bail!("{} did not arrive within {patience:?}", self.vm.name)
    }

    fn sample(&self, info: &Value) -> Option<Sample> {
        let ram = info.get("ram")?;
        Some(Sample {
            t_s: UnixMs::now().s_since(self.started),
            wire_bytes: ram["transferred"].as_u64()?,
            remaining_bytes: ram["remaining"].as_u64(),
            phase: if info["status"] == "device" {
                "switch-over"
            } else {
                "bulk"
            }
            .into(),
        })
    }

    /// Compares, lets the target run, and notes how long that held the VM up: not what passed until the
    /// source was done, which a manager must wait for, too.
    fn hand_over(
        &self,
        source: &mut Qmp,
        target: &mut Qmp,
        moved: &mut Moved,
    ) -> anyhow::Result<()> {
        let from = UnixMs::now();
        if !self.bench.scenario.compare {
            target
                .execute("cont", json!({}))
                .context("letting the target run")?;
            let fields = json!({"phase": "released"});
            self.log.note(&self.vm.name, "phase", fields);
            return Ok(());
        }
        let compared = compare(&GuestMemory::of(source)?, &GuestMemory::of(target)?)?;
        moved.compared = Some(compared);
        let to = UnixMs::now();
        target
            .execute("cont", json!({}))
            .context("letting the target run")?;
        moved.hold = Some(Hold { from, to });
        let fields = json!({
            "phase": "released",
            "compared_pages": compared.pages,
            "mismatched_pages": compared.mismatched,
            "hold_ms": to.ms_since(from),
        });
        self.log.note(&self.vm.name, "phase", fields);
        Ok(())
    }
}

/// The source is done when it has the target's word over the return path; only then is its memory
/// final and its process free to go. Returns what QEMU says of the pages that it has sent.
fn wait_for_source(source: &mut Qmp) -> anyhow::Result<Option<Pages>> {
    let deadline = Instant::now() + RETURN_PATIENCE;
    loop {
        let info = source.execute("query-migrate", json!({}))?;
        match info["status"].as_str() {
            Some("completed") => return Ok(pages(&info["ram"])),
            Some("failed") => bail!("the source reports: {}", info["error-desc"]),
            _ if Instant::now() >= deadline => bail!("the source does not hear of its success"),
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// QEMU knows pages of zeros, which it calls `duplicate`, and others; none that it looks up.
fn pages(ram: &Value) -> Option<Pages> {
    let (zero, normal) = (ram["duplicate"].as_u64()?, ram["normal"].as_u64()?);
    Some(Pages {
        total: zero + normal,
        zero: Some(zero),
        literal: Some(normal),
        ..Pages::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_of_a_baseline_are_said() {
        let said = |stock, memory_mb: u64| {
            let setting = format!("vm.memory_mb={memory_mb}");
            let settings = [setting, "push_mbit=8".to_owned()];
            let scenario = Scenario::load("pair", &settings, false).unwrap();
            Settings::of(stock, &scenario).text()
        };
        assert_eq!(said(Stock::Plain, 128), "max-bandwidth=0");
        assert_eq!(
            said(Stock::Xbzrle, 144),
            "xbzrle=on max-bandwidth=0 xbzrle-cache-size=268435456"
        );
        assert!(said(Stock::MultifdZstd, 128).contains("multifd-compression=zstd"));
        assert!(said(Stock::Postcopy, 128).contains("max-postcopy-bandwidth=1000000"));
        assert!(
            said(Stock::PostcopyPreempt, 128).starts_with("postcopy-ram=on postcopy-preempt=on ")
        );
        assert!(said(Stock::AutoConverge, 128).starts_with("auto-converge=on"));
    }

    #[test]
    fn a_baseline_has_the_scenarios_limit_of_the_downtime() {
        let scenario = Scenario::load("slm-fig7", &[], false).unwrap();
        let limit = scenario.downtime_limit_ms.unwrap();
        let said = Settings::of(Stock::Plain, &scenario).text();
        let wanted = format!("downtime-limit={limit}");
        assert!(said.split(' ').any(|word| word == wanted), "{said}");
    }

    #[test]
    fn pages_are_counted_as_qemu_counts_them() {
        let ram = json!({"duplicate": 40, "normal": 25, "transferred": 102_400});
        let pages = pages(&ram).unwrap();
        assert_eq!(
            (pages.total, pages.zero, pages.literal),
            (65, Some(40), Some(25))
        );
        assert_eq!(pages.reference, None);
        assert_eq!(super::pages(&json!({})), None);
    }
}
