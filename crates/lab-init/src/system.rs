//! What any PID 1 does: file systems, modules, the network, a few daemons, orphans.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::mount::{MountFlags, mount};

use crate::settings::Settings;

/// Names of the modules of every guest.
pub(crate) const MODULE_LIST: &str = "/lib/modules/load";

/// The card that leads into the rack's network; the first one leads to the observer.
const RACK_CARD: &str = "eth1";

/// Mounts what programs expect to find.
pub(crate) fn mount_all() -> anyhow::Result<()> {
    for (kind, path) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
    ] {
        std::fs::create_dir_all(path).with_context(|| format!("making {path}"))?;
        mount(kind, path, kind, MountFlags::empty(), None)
            .with_context(|| format!("mounting {path}"))?;
    }
    Ok(())
}

/// Loads the modules that `list` names, one a line, in the order of their dependencies.
pub(crate) fn load_modules(list: &str) -> anyhow::Result<()> {
    let list = std::fs::read_to_string(list).with_context(|| list.to_owned())?;
    for path in list.lines() {
        let file = File::open(path).with_context(|| format!("opening {path}"))?;
        rustix::system::finit_module(&file, c"", 0).with_context(|| format!("loading {path}"))?;
    }
    Ok(())
}

/// Makes the programs of the image callable by their names.
pub(crate) fn install() -> anyhow::Result<()> {
    run("busybox", &["--install", "-s"])
}

/// Gives the guest its name and address.
pub(crate) fn join_network(settings: &Settings) -> anyhow::Result<()> {
    run("hostname", &[&settings.id])?;
    run("ip", &["link", "set", "lo", "up"])?;
    run(
        "ip",
        &["addr", "add", &format!("{}/16", settings.ip), "dev", "eth0"],
    )?;
    run("ip", &["link", "set", "eth0", "up"])?;
    if let Some(ip) = settings.rack_ip {
        run(
            "ip",
            &["addr", "add", &format!("{ip}/16"), "dev", RACK_CARD],
        )?;
        run("ip", &["link", "set", RACK_CARD, "up"])?;
    }
    Ok(())
}

/// Gives the network card another address than the one that the guest booted with.
pub(crate) fn set_mac(mac: &str) -> anyhow::Result<()> {
    run("ip", &["link", "set", "eth0", "address", mac])
}

/// Starts the daemons that a small server has running.
pub(crate) fn start_userland() -> anyhow::Result<()> {
    run("syslogd", &[])?;
    run("klogd", &[])?;
    std::fs::create_dir_all("/var/spool/cron/crontabs").context("making crond's directory")?;
    run("crond", &[])?;
    // Pages of a distribution's programs and libraries, loaded as they are on any machine.
    if Path::new("/bin/bash").exists() {
        run("bash", &["-c", "ls -lR /lib /usr > /run/inventory"])?;
    }
    Ok(())
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let path = "/bin:/sbin:/usr/bin:/usr/sbin";
    let status = Command::new("/bin/busybox")
        .args(["env", program])
        .args(arguments)
        .env("PATH", path)
        .status()
        .with_context(|| format!("starting {program}"))?;
    ensure!(
        status.success(),
        "{program} {} ended with {status}",
        arguments.join(" ")
    );
    Ok(())
}

/// Collects the orphans that the kernel hands to PID 1, which must never end.
pub(crate) fn reap_for_ever() -> ! {
    loop {
        let waited = rustix::process::wait(rustix::process::WaitOptions::empty());
        if !matches!(waited, Ok(Some(_))) {
            std::thread::sleep(Duration::from_secs(1));
        }
    }
}
