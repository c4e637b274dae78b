//! PID 1 of the lab's guests.
//!
//! The kernel command line says what the guest is (`lab.*`, see [`settings`]). The guest tells
//! an observer outside, with a UDP datagram every few milliseconds, that it is alive, which
//! instance it is, and whether the memory and disk it has stamped still hold what it wrote.

#![forbid(unsafe_code)]

mod application;
mod disk;
mod heartbeat;
mod settings;
mod stress;
mod system;
mod template;
mod touch;
mod workload;

use std::sync::Arc;

use anyhow::Context;

use crate::heartbeat::Health;
use crate::settings::Settings;

fn main() -> ! {
    if let Err(error) = bring_up() {
        // The serial console is the only place left to say it.
        eprintln!("lab-init: {error:#}");
    }
    system::reap_for_ever()
}

fn bring_up() -> anyhow::Result<()> {
    system::mount_all().context("mounting the kernel's file systems")?;
    system::load_modules(system::MODULE_LIST).context("loading modules")?;
    let mut settings = Settings::from_command_line().context("reading the kernel command line")?;
    system::install().context("installing programs")?;
    if settings.template {
        system::start_userland().context("starting the userland")?;
        let identity = template::wait_for_identity()?;
        system::set_mac(&identity.mac).context("taking its network address")?;
        settings.id = identity.id;
        settings.ip = identity.ip;
        system::join_network(&settings).context("joining the network")?;
    } else {
        system::join_network(&settings).context("joining the network")?;
        system::start_userland().context("starting the userland")?;
    }
    let health = Arc::new(Health::default());
    let gate =
        heartbeat::start(&settings, Arc::clone(&health)).context("starting the heartbeat")?;
    workload::start(&settings, &health, &gate).context("starting the workload")?;
    println!("lab-init: {} is up", settings.id);
    Ok(())
}
