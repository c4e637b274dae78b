//! A stand-alone index in the source rack, if the scenario has one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use toml::Table;

use crate::bench::Bench;
use crate::guest::Host;
use crate::net::Rack;
use crate::process;
use crate::session::making;
use crate::shell::say;

/// Port of the first shard; the others follow.
const PORT: u16 = 7710;
/// From its start to its being ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// All processes of the index, in the order of their shards. They end when it is dropped.
#[derive(Debug)]
pub struct Index {
    shards: Vec<Shard>,
}

#[derive(Debug)]
struct Shard {
    number: u8,
    host: Host,
    /// Replaced when it is started again.
    child: Mutex<Child>,
}

/// Number and host of each shard: on the last source hosts, since the first coordinates.
fn places<'a>(bench: &'a Bench<'_>) -> Vec<(u8, &'a Host)> {
    let mut hosts: Vec<&Host> = bench.rack(Rack::Source).collect();
    hosts.reverse();
    let count = usize::try_from(bench.scenario.index).unwrap_or(0);
    (0..).zip(hosts.into_iter().cycle().take(count)).collect()
}

fn address(number: u8, host: &Host) -> String {
    format!("{}:{}", host.address.ip, PORT + u16::from(number))
}

/// Addresses of all shards, as a plan names them.
pub(super) fn addresses(bench: &Bench<'_>) -> Vec<String> {
    let places = places(bench).into_iter();
    places.map(|(number, host)| address(number, host)).collect()
}

impl Index {
    /// Starts all shards and waits until they are ready. Their hosts have certificates already.
    pub(super) fn start(bench: &Bench<'_>, program: &Path) -> anyhow::Result<Self> {
        let mut shards = Vec::new();
        for (number, host) in places(bench) {
            say(&format!("starting index {number} on {}", host.name()));
            let mut config = Table::new();
            let mut set = |key: &str, value: toml::Value| config.insert(key.into(), value);
            set("name", format!("index{number}").into());
            set("bulk", address(number, host).into());
            set("tls_dir", host.dir.join("tls").display().to_string().into());
            set("shard", i64::from(number).into());
            std::fs::write(file(host, number, "toml"), config.to_string())
                .context("writing an index's configuration")?;
            shards.push(Shard {
                number,
                host: host.clone(),
                child: Mutex::new(spawn(host, number, program)?),
            });
        }
        let index = Self { shards };
        index.shards.iter().try_for_each(Shard::wait_until_ready)?;
        Ok(index)
    }

    /// Its processes.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.shards.iter().map(|shard| shard.child().id()).collect()
    }

    /// Starts the shards that have died again; they know nothing then.
    pub(super) fn restart_dead(&self, program: &Path) -> anyhow::Result<()> {
        for shard in &self.shards {
            let ended = shard.child().try_wait();
            if ended.context("looking after an index")?.is_some() {
                say(&format!("starting index {} again", shard.number));
                *shard.child() = spawn(&shard.host, shard.number, program)?;
                shard.wait_until_ready()?;
            }
        }
        Ok(())
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        for shard in &self.shards {
            // It may have been the victim of a fault.
            let _ = shard.child().kill();
            let _ = shard.child().wait();
        }
    }
}

impl Shard {
    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until_ready(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = std::fs::read_to_string(file(&self.host, self.number, "log"));
            let log = log.unwrap_or_default();
            if log.contains("the index is ready") {
                return Ok(());
            }
            if Instant::now() >= deadline || !process::is_alive(self.child().id()) {
                bail!("index {} does not start; it says: {log}", self.number);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn file(host: &Host, number: u8, extension: &str) -> PathBuf {
    host.dir.join(format!("index{number}.{extension}"))
}

/// Starts a shard with a new log.
fn spawn(host: &Host, number: u8, program: &Path) -> anyhow::Result<Child> {
    let log = File::create(file(host, number, "log")).context("creating an index's log")?;
    let _making = making();
    host.command(program)
        .args(["index", "--config"])
        .arg(file(host, number, "toml"))
        .stdout(log.try_clone().context("sharing the log")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting index {number} on {}", host.name()))
}
