//! Hosts and the guests on them.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;

use crate::clock::UnixMs;
use crate::install::{Image, Qemu};
use crate::load;
use crate::net::{HostAddress, OBSERVER, SERVER};
use crate::observer;
use crate::qmp::Qmp;
use crate::scenario::{Accel, Machine, Scenario};
use crate::session::making;
use crate::template;

/// Translated code that an emulating QEMU keeps. Its default of 1 GiB would drown the footprint of
/// the small guests that the lab runs.
const TRANSLATION_CACHE_MB: u32 = 64;
/// A disk's size. It is a sparse file.
const DISK_BYTES: u64 = 64 << 20;
/// Mode of the guests that have nothing to do.
pub(crate) const IDLE: &str = "idle";
/// How long a QEMU may take from its start to listening on its QMP socket.
const QMP_PATIENCE: Duration = Duration::from_secs(20);

/// A host of a rack.
#[derive(Clone, Debug)]
pub struct Host {
    /// Names and address.
    pub address: HostAddress,
    /// Sockets, logs and configuration of what runs on it.
    pub dir: PathBuf,
}

impl Host {
    /// Name, as in plans and reports.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.address.name
    }

    /// A command that runs `program` on this host: in its network and its cgroups. The process id
    /// of the child is the program's.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let HostAddress {
            cgroup, namespace, ..
        } = &self.address;
        let mut command = cgroup.enter(namespace);
        command.arg(program).stdin(Stdio::null());
        command
    }
}

/// A VM of the scenario: its names and its way.
#[derive(Clone, Debug)]
pub struct Vm {
    /// `vm1`
    pub name: String,
    /// From 1.
    pub number: u32,
    /// Host that it boots on.
    pub source: Host,
    /// Host that it goes to.
    pub target: Host,
    /// Where disks lie, for both racks.
    pub storage: PathBuf,
}

impl Vm {
    /// The VM on its way back.
    #[must_use]
    pub fn back(&self) -> Self {
        Self {
            source: self.target.clone(),
            target: self.source.clone(),
            ..self.clone()
        }
    }

    /// The VM on another way.
    #[must_use]
    pub fn on_the_way(&self, from: &Host, to: &Host) -> Self {
        Self {
            source: from.clone(),
            target: to.clone(),
            ..self.clone()
        }
    }

    /// Name of its tap, the same on both hosts.
    #[must_use]
    pub fn tap(&self) -> String {
        format!("tap{}", self.number)
    }

    /// Name of the tap of its second card.
    #[must_use]
    pub fn rack_tap(&self) -> String {
        format!("rtap{}", self.number)
    }

    /// QMP socket on `host` that belongs to the lab.
    #[must_use]
    pub fn lab_socket(&self, host: &Host) -> PathBuf {
        host.dir.join(format!("{}.lab.qmp", self.name))
    }

    /// QMP socket on `host` that belongs to the agent.
    #[must_use]
    pub fn agent_socket(&self, host: &Host) -> PathBuf {
        host.dir.join(format!("{}.qmp", self.name))
    }

    /// Connects to the lab's QMP socket on `host`, if a QEMU of the VM listens there now.
    pub fn qmp_at_once(&self, host: &Host) -> anyhow::Result<Qmp> {
        Qmp::connect(&self.lab_socket(host), Duration::ZERO)
    }

    /// Connects to the lab's QMP socket on `host`.
    pub fn qmp(&self, host: &Host) -> anyhow::Result<Qmp> {
        Qmp::connect(&self.lab_socket(host), QMP_PATIENCE)
            .with_context(|| format!("talking to the QEMU of {} on {}", self.name, host.name()))
    }

    /// Creates its disk, if the scenario gives it one.
    pub fn make_disk(&self, scenario: &Scenario) -> anyhow::Result<()> {
        if scenario.vm.disk {
            let path = self.disk();
            let file = std::fs::File::create(&path)
                .with_context(|| format!("creating {}", path.display()))?;
            file.set_len(DISK_BYTES)
                .with_context(|| format!("sizing {}", path.display()))?;
        }
        Ok(())
    }

    fn disk(&self) -> PathBuf {
        self.storage.join(format!("{}.raw", self.name))
    }

    /// QEMU's arguments for this VM on `host`.
    #[must_use]
    pub fn arguments(&self, host: &Host, scenario: &Scenario, image: &Image) -> Vec<String> {
        let vm = &scenario.vm;
        let chipset = match vm.machine {
            Machine::Pc => "pc-i440fx",
            Machine::Q35 => "pc-q35",
        };
        let backend = if vm.template {
            ",memory-backend=pc.ram"
        } else {
            ""
        };
        let socket = |path: PathBuf| format!("unix:{},server=on,wait=off", path.display());
        let mut arguments: Vec<String> = [
            ("-name", format!("guest={},debug-threads=on", self.name)),
            (
                "-machine",
                format!("{chipset}-{}{backend}", scenario.qemu.machine),
            ),
            ("-accel", accelerator(vm.accel)),
            ("-cpu", "qemu64".into()),
            ("-m", vm.memory_mb.to_string()),
            ("-smp", vm.cpus.to_string()),
            ("-kernel", image.kernel.display().to_string()),
            ("-initrd", image.initrd.display().to_string()),
            ("-append", self.kernel_command_line(scenario)),
            ("-display", "none".into()),
            ("-vga", "std".into()),
            (
                "-serial",
                format!("file:{}", host.dir.join(&self.name).display()),
            ),
            (
                "-netdev",
                format!("tap,id=net0,ifname={},script=no,downscript=no", self.tap()),
            ),
            // Without a boot ROM, whose size differs between QEMU's versions.
            (
                "-device",
                format!("virtio-net-pci,netdev=net0,mac={},romfile=", self.mac()),
            ),
            ("-qmp", socket(self.agent_socket(host))),
            ("-qmp", socket(self.lab_socket(host))),
        ]
        .into_iter()
        .flat_map(|(option, value)| [option.to_owned(), value])
        .collect();
        if scenario.guests_share_links() {
            let (tap, mac) = (self.rack_tap(), self.rack_mac());
            arguments.extend([
                "-netdev".into(),
                format!("tap,id=net1,ifname={tap},script=no,downscript=no"),
                "-device".into(),
                format!("virtio-net-pci,netdev=net1,mac={mac},romfile="),
            ]);
        }
        if vm.disk {
            let file = self.disk().display().to_string();
            let drive = format!("file={file},format=raw,if=none,id=disk0,cache=none,aio=threads");
            let device = "virtio-blk-pci,drive=disk0".to_owned();
            arguments.extend(["-drive".into(), drive, "-device".into(), device]);
        }
        if vm.balloon {
            let device = "virtio-balloon-pci,id=balloon0,free-page-reporting=on";
            arguments.extend(["-device".into(), device.into()]);
        }
        if vm.template {
            arguments.extend(template::memory_arguments(self, host, scenario));
        }
        arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
        arguments
    }

    fn kernel_command_line(&self, scenario: &Scenario) -> String {
        let vm = &scenario.vm;
        let busy = self.number.is_multiple_of(vm.busy_every);
        // An emulated processor that gets no time looks to the kernel like a broken timer.
        format!(
            "console=ttyS0 quiet panic=-1 no_timer_check lab.id={} lab.ip={} lab.observer={OBSERVER}:{} \
             lab.heartbeat_ms={} lab.mode={} lab.stamp_mb={} lab.stamp_still={} lab.dirty_mb={} \
             lab.dirty_rate_mb={} lab.touch_mb={} lab.work_log2={} lab.template={}{}",
            self.name,
            self.ip(),
            observer::PORT,
            vm.heartbeat_ms,
            if busy { vm.mode.as_str() } else { IDLE },
            vm.stamp_mb,
            u8::from(vm.stamp_still),
            vm.dirty_mb,
            vm.dirty_rate_mb,
            vm.touch_mb,
            vm.work_log2,
            u8::from(vm.template),
            self.rack_words(scenario)
        )
    }

    /// What a guest must know that has a card in the rack's network.
    fn rack_words(&self, scenario: &Scenario) -> String {
        if !scenario.guests_share_links() {
            return String::new();
        }
        let peer = load::partner(self.number, scenario.vms())
            .map_or(String::new(), |peer| format!(" lab.peer={}", rack_ip(peer)));
        format!(
            " lab.number={} lab.rack_ip={} lab.server={SERVER}{peer}",
            self.number,
            self.rack_ip()
        )
    }

    /// Its address in the rack's network.
    #[must_use]
    pub fn rack_ip(&self) -> Ipv4Addr {
        rack_ip(self.number)
    }

    fn rack_mac(&self) -> String {
        let [high, low] = self.bytes();
        format!("52:54:00:68:{high:02x}:{low:02x}")
    }

    fn bytes(&self) -> [u8; 2] {
        // At most 64 x 64 VMs: the number fits into two bytes.
        let [.., high, low] = self.number.to_be_bytes();
        [high, low]
    }

    /// Its address in the observation network.
    #[must_use]
    pub fn ip(&self) -> Ipv4Addr {
        let [high, low] = self.bytes();
        // The third byte starts at 1 because 10.78.0.1 is the observer; the last must be neither
        // 0 nor 255 only where it is the network's first or last address, which it is not here.
        Ipv4Addr::new(10, 78, 1 + high, low)
    }

    /// Address of its network card.
    #[must_use]
    pub fn mac(&self) -> String {
        let [high, low] = self.bytes();
        format!("52:54:00:67:{high:02x}:{low:02x}")
    }
}

/// QEMU's accelerator, and what only that has.
fn accelerator(accel: Accel) -> String {
    match accel {
        Accel::Tcg => format!("{},tb-size={TRANSLATION_CACHE_MB}", accel.name()),
        Accel::Kvm => accel.name().to_owned(),
    }
}

/// Address of a VM in the rack's network, beyond those of hosts.
fn rack_ip(number: u32) -> Ipv4Addr {
    let [.., high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 77, 128 + high, low)
}

/// A running source QEMU.
#[derive(Clone, Debug)]
pub struct Running {
    /// Its process.
    pub pid: u32,
    gone: Arc<OnceLock<UnixMs>>,
}

impl Running {
    /// When its process ended.
    #[must_use]
    pub fn gone_at(&self) -> Option<UnixMs> {
        self.gone.get().copied()
    }
}

/// Starts a QEMU for `vm` on `host`; `extra` are further arguments. Its messages go to a file.
pub fn start(
    vm: &Vm,
    host: &Host,
    qemu: &Qemu,
    arguments: &[String],
    extra: &[&str],
) -> anyhow::Result<Running> {
    let log_path = host.dir.join(format!("{}.log", vm.name));
    let log = std::fs::File::create(&log_path)
        .with_context(|| format!("creating {}", log_path.display()))?;
    let _making = making();
    let child = host
        .command(&qemu.program)
        .args(arguments)
        .args(extra)
        .stdout(log.try_clone().context("sharing the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting the QEMU of {} on {}", vm.name, host.name()))?;
    let pid = child.id();
    Ok(Running {
        pid,
        gone: note_end(child)?,
    })
}

/// Waits for the child in a thread of its own: the moment of its end is a measure.
fn note_end(mut child: Child) -> anyhow::Result<Arc<OnceLock<UnixMs>>> {
    let gone = Arc::new(OnceLock::new());
    let noted = Arc::clone(&gone);
    std::thread::Builder::new()
        .name("wait".into())
        .spawn(move || {
            let waited = child.wait();
            if waited.is_ok() {
                noted.get_or_init(UnixMs::now);
            }
        })
        .context("watching QEMU")?;
    Ok(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_emulated_unless_the_scenario_wants_the_processor() {
        let accel = |settings: &[&str]| {
            let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
            accelerator(Scenario::load("pair", &settings, false).unwrap().vm.accel)
        };
        assert_eq!(accel(&[]), "tcg,tb-size=64");
        assert_eq!(accel(&["vm.accel=kvm"]), "kvm");
        assert!(Scenario::load("pair", &["vm.accel=xen".to_owned()], false).is_err());
    }
}
