//! One run's surroundings: networks, hosts, the observer, and booted guests.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::cgroup;
use crate::clock::UnixMs;
use crate::guest::{self, Host, Running, Vm};
use crate::install::{Image, Qemu};
use crate::load;
use crate::meter::Meter;
use crate::net::{Counters, Net, Rack};
use crate::observer::Observer;
use crate::saved::{self, Saved};
use crate::scenario::Scenario;
use crate::session::Session;
use crate::shell::say;
use crate::template::Template;

/// How long one guest may take to boot and to fill its memory. Emulated guests that boot on a
/// machine that also compiles were seen to take 40 s.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);
/// How often a boot is checked for having failed.
const BOOT_STEP: Duration = Duration::from_secs(2);

/// Guests that were kept have settled before.
const SETTLE_SAVED_S: u64 = 2;

/// Programs of a scenario.
#[derive(Clone, Debug)]
pub struct Programs {
    /// QEMU of the source hosts.
    pub source: Qemu,
    /// QEMU of the target hosts.
    pub target: Qemu,
    /// What guests boot, in turn.
    pub images: Vec<Image>,
}

impl Programs {
    /// What this guest boots.
    #[must_use]
    pub fn image_of(&self, vm: &Vm) -> &Image {
        // A template is in front of the first guest, and like it.
        &self.images[vm.number.saturating_sub(1) as usize % self.images.len()]
    }

    /// Releases of the guests' kernels.
    #[must_use]
    pub fn kernels(&self) -> String {
        let releases = self.images.iter().map(|image| image.release.as_str());
        releases.collect::<Vec<_>>().join(", ")
    }
}

/// What a VM begins as.
enum Origin<'a> {
    /// A machine that has just been switched on.
    Boot,
    /// The guest that was booted for all.
    Template(&'a Template),
    /// Itself, as it was kept.
    Saved(&'a Path),
}

/// Fresh racks with running guests.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The experiment.
    pub scenario: &'a Scenario,
    /// What runs in it.
    pub programs: &'a Programs,
    /// The networks.
    pub net: Net,
    /// What guests talk to from their boot on.
    pub servers: Vec<Meter>,
    /// Receives heartbeats.
    pub observer: Observer,
    /// All hosts, sources first.
    pub hosts: Vec<Host>,
    /// All VMs, by number.
    pub vms: Vec<Vm>,
    /// Their source QEMUs, in the same order.
    pub running: Vec<Running>,
    /// VMs that run on target hosts already, and stay.
    pub residents: Vec<Vm>,
}

impl<'a> Bench<'a> {
    /// Builds the racks and starts every VM on its source host: as it was kept, or by booting it.
    pub fn start(
        session: &Session,
        scenario: &'a Scenario,
        programs: &'a Programs,
        saved: Option<&Saved>,
    ) -> anyhow::Result<Self> {
        let mut bench = Self::racks(session, scenario, programs)?;
        bench.running = bench.boot(&bench.vms, saved)?;
        // They end with the session, as everything on the hosts does.
        bench.boot(&bench.residents, saved)?;
        bench.start_applications()?;
        bench.settle(match saved {
            Some(_) => scenario.settle_s.min(SETTLE_SAVED_S),
            None => scenario.settle_s,
        });
        Ok(bench)
    }

    /// Builds the racks.
    pub fn racks(
        session: &Session,
        scenario: &'a Scenario,
        programs: &'a Programs,
    ) -> anyhow::Result<Self> {
        session.clear()?;
        let counts = &scenario.hosts;
        say(&format!(
            "building racks of {} and {} hosts",
            counts.source, counts.target
        ));
        let racks = [counts.source, counts.target];
        let net = Net::build(session, racks, scenario.links, scenario.beside())
            .context("building the networks")?;
        cgroup::make_parts(session.prefix());
        let observer = Observer::start(&net.observer_namespace_file(), net.hosts())?;
        let hosts = net
            .hosts()
            .iter()
            .map(|address| {
                let dir = session.dir().join(&address.name);
                std::fs::create_dir_all(&dir)
                    .with_context(|| format!("making {}", dir.display()))?;
                let limit = counts
                    .target_memory_mb
                    .filter(|_| address.rack == Rack::Target);
                if let Some(mb) = limit {
                    address.cgroup.limit_memory(mb << 20)?;
                }
                Ok(Host {
                    address: address.clone(),
                    dir,
                })
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let storage = session.dir().join("storage");
        std::fs::create_dir_all(&storage).context("making the shared storage")?;
        let vms = place(&hosts, scenario, &storage);
        let residents = residents(&hosts, scenario, &storage);
        let servers = load::servers(&net, scenario, session.prefix())
            .context("starting the guests' servers")?;
        Ok(Self {
            scenario,
            programs,
            servers,
            net,
            observer,
            hosts,
            vms,
            running: Vec::new(),
            residents,
        })
    }

    /// Lets the guests come to rest.
    pub fn settle(&self, seconds: u64) {
        say(&format!("letting the guests settle for {seconds} s"));
        thread::sleep(Duration::from_secs(seconds));
    }

    /// Those that move and those that stay.
    pub fn all_vms(&self) -> impl Iterator<Item = &Vm> {
        self.vms.iter().chain(&self.residents)
    }

    /// QEMU of the hosts of a rack.
    #[must_use]
    pub fn qemu(&self, rack: Rack) -> &Qemu {
        match rack {
            Rack::Source => &self.programs.source,
            Rack::Target => &self.programs.target,
        }
    }

    /// Hosts of one rack.
    pub fn rack(&self, rack: Rack) -> impl Iterator<Item = &Host> {
        self.hosts
            .iter()
            .filter(move |host| host.address.rack == rack)
    }

    /// Memory held by all hosts of a rack.
    #[must_use]
    pub fn footprint_bytes(&self, rack: Rack) -> Option<u64> {
        self.rack(rack)
            .map(|host| host.address.cgroup.footprint_bytes())
            .sum()
    }

    /// Processor time used by all hosts of a rack.
    #[must_use]
    pub fn processor_s(&self, rack: Rack) -> Option<f64> {
        self.rack(rack)
            .map(|host| host.address.cgroup.processor_s())
            .sum()
    }

    /// Bytes that have crossed the links.
    pub fn counters(&self) -> anyhow::Result<Counters> {
        self.net.counters()
    }

    /// Starts the QEMUs of these VMs at their sources and waits until their guests have filled their memory.
    pub fn boot(&self, vms: &[Vm], saved: Option<&Saved>) -> anyhow::Result<Vec<Running>> {
        if vms.is_empty() {
            return Ok(Vec::new());
        }
        let template = self.template()?;
        say(&format!("starting {} VMs", vms.len()));
        self.each(vms, |vm| {
            let origin = match (saved, &template) {
                (Some(saved), _) => {
                    let state = saved.state_of(&vm.name, self.scenario);
                    Origin::Saved(state.with_context(|| format!("{} was not kept", vm.name))?)
                }
                (None, Some(template)) => Origin::Template(template),
                (None, None) => Origin::Boot,
            };
            self.start_vm(vm, &origin)
        })
    }

    /// Does `work` for each of these VMs, as many at a time as there are processors.
    pub fn each<T: Send>(
        &self,
        vms: &[Vm],
        work: impl Fn(&Vm) -> anyhow::Result<T> + Sync,
    ) -> anyhow::Result<Vec<T>> {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let next = AtomicUsize::new(0);
        let done = thread::scope(|scope| {
            let share = || {
                let mut done = Vec::new();
                loop {
                    let nth = next.fetch_add(1, Ordering::Relaxed);
                    let Some(vm) = vms.get(nth) else {
                        return anyhow::Ok(done);
                    };
                    done.push((nth, work(vm)?));
                }
            };
            let workers: Vec<_> = (0..workers).map(|_| scope.spawn(share)).collect();
            let joined = workers.into_iter().map(|worker| {
                worker
                    .join()
                    .map_err(|_| anyhow::anyhow!("a thread that starts VMs panicked"))?
            });
            joined.collect::<anyhow::Result<Vec<Vec<_>>>>()
        })?;
        let mut done: Vec<(usize, T)> = done.into_iter().flatten().collect();
        done.sort_by_key(|(nth, _)| *nth);
        Ok(done.into_iter().map(|(_, one)| one).collect())
    }

    /// The guest that all others begin as, if the scenario has one.
    fn template(&self) -> anyhow::Result<Option<Template>> {
        let Some(first) = self.vms.first().filter(|_| self.scenario.vm.template) else {
            return Ok(None);
        };
        let start = |vm: &Vm, extra: &[&str]| {
            self.net.add_tap(&vm.source.address, &vm.tap())?;
            self.start_qemu(vm, extra)
        };
        Template::make(first, start)
            .context("making the template")
            .map(Some)
    }

    fn start_qemu(&self, vm: &Vm, extra: &[&str]) -> anyhow::Result<Running> {
        let image = self.programs.image_of(vm);
        let arguments = vm.arguments(&vm.source, self.scenario, image);
        guest::start(vm, &vm.source, &self.programs.source, &arguments, extra)
    }

    fn start_vm(&self, vm: &Vm, origin: &Origin<'_>) -> anyhow::Result<Running> {
        let began = UnixMs::now();
        vm.make_disk(self.scenario)?;
        for host in [&vm.source, &vm.target] {
            self.net.ensure_tap(&host.address, &vm.tap())?;
            if self.scenario.guests_share_links() {
                self.net.add_rack_tap(&host.address, &vm.rack_tap())?;
            }
        }
        let extra: &[&str] = match origin {
            Origin::Boot => &[],
            Origin::Template(_) | Origin::Saved(_) => &saved::WAITS,
        };
        let running = self.start_qemu(vm, extra)?;
        match origin {
            Origin::Boot => Ok(()),
            Origin::Template(template) => template.wake(vm),
            Origin::Saved(state) => saved::wake(vm, state),
        }
        .with_context(|| self.last_words(vm))?;
        self.wait_until_filled(vm, &running)
            .with_context(|| self.last_words(vm))?;
        let took = UnixMs::now().s_since(began);
        say(&format!(
            "{} runs on {} ({took:.1} s)",
            vm.name,
            vm.source.name()
        ));
        Ok(running)
    }

    /// All at once: a guest starts slowly beside others that are at work already.
    fn start_applications(&self) -> anyhow::Result<()> {
        self.observer.answer();
        for vm in self.all_vms() {
            let ready = self
                .observer
                .wait_for(&vm.name, BOOT_PATIENCE, |beat| beat.ready);
            ready.with_context(|| self.last_words(vm))?;
        }
        Ok(())
    }

    /// Until its memory is filled.
    fn wait_until_filled(&self, vm: &Vm, running: &Running) -> anyhow::Result<()> {
        let deadline = Instant::now() + BOOT_PATIENCE;
        loop {
            let heard = self
                .observer
                .wait_for(&vm.name, BOOT_STEP, |beat| beat.ready || beat.waits);
            match heard {
                Ok(_) => return Ok(()),
                Err(_) if running.gone_at().is_some() => bail!("its QEMU has ended"),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => {}
            }
        }
    }

    /// What QEMU and the guest said last, for the error message.
    fn last_words(&self, vm: &Vm) -> String {
        let read = |name: String| {
            let text = std::fs::read(vm.source.dir.join(name)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().rev().take(5).collect();
            lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
        };
        let (log, console) = (read(format!("{}.log", vm.name)), read(vm.name.clone()));
        format!(
            "booting {}; QEMU says: {log}; the guest says: {console}",
            vm.name
        )
    }
}

/// Names of all VMs of a scenario.
pub fn names(scenario: &Scenario) -> impl Iterator<Item = String> {
    let (moved, hosts) = (scenario.vms(), &scenario.hosts);
    let stay = hosts.target * hosts.residents_per_host;
    (1..=moved)
        .map(moving)
        .chain((moved + 1..=moved + stay).map(staying))
}

fn moving(number: u32) -> String {
    format!("vm{number}")
}

fn staying(number: u32) -> String {
    format!("stays{number}")
}

/// VMs of source host n go to target host n, round and round if there are fewer targets.
fn place(hosts: &[Host], scenario: &Scenario, storage: &Path) -> Vec<Vm> {
    let of = |rack| {
        hosts
            .iter()
            .filter(move |host: &&Host| host.address.rack == rack)
    };
    let targets: Vec<&Host> = of(Rack::Target).collect();
    of(Rack::Source)
        .zip(targets.into_iter().cycle())
        .flat_map(|pair| (0..scenario.hosts.vms_per_host).map(move |_| pair))
        .zip(1..)
        .map(|((source, target), number)| Vm {
            name: moving(number),
            number,
            source: source.clone(),
            target: target.clone(),
            storage: storage.to_owned(),
        })
        .collect()
}

/// VMs that stay where they are.
fn residents(hosts: &[Host], scenario: &Scenario, storage: &Path) -> Vec<Vm> {
    let targets = hosts
        .iter()
        .filter(|host| host.address.rack == Rack::Target);
    targets
        .flat_map(|host| (0..scenario.hosts.residents_per_host).map(move |_| host))
        .zip(scenario.vms() + 1..)
        .map(|(host, number)| Vm {
            name: staying(number),
            number,
            source: host.clone(),
            target: host.clone(),
            storage: storage.to_owned(),
        })
        .collect()
}
