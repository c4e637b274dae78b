//! What the kernel command line asks of this guest.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};

/// What the guest does with its memory and processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Nothing beyond its heartbeat.
    Idle,
    /// Writes `dirty_rate_mb` MB/s into an area of `dirty_mb`.
    Dirty,
    /// As `Dirty`, with the same bytes in every guest.
    Alike,
    /// Burns one processor.
    Cpu,
    /// Has filled `dirty_mb` with data that is unique and cannot be compressed.
    Random,
    /// Counts subsets with a given sum, round after round: nothing but computing.
    SubsetSum,
    /// Writes at random into an area of `dirty_mb`, round after round.
    RandomWrites,
    /// Has filled `dirty_mb` of page cache with files that every guest has.
    Cache,
    /// Exchanges single bytes with a partner over TCP, or answers one.
    TcpRr,
    /// Writes files of 100 MB to an NFS server.
    Nfs,
    /// Sends as much as TCP takes.
    Iperf3,
    /// A Redis server.
    Redis,
    /// A node of a Redis cluster.
    RedisCluster,
    /// Checks and writes pages of `dirty_mb` at random, at `dirty_rate_mb` MB/s.
    Stress,
    /// Takes `dirty_mb` from the kernel, stamps and checks it, and gives it back, again and again.
    Churn,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// `lab.id`: name of the VM.
    pub(crate) id: String,
    /// `lab.ip`: its own address, in a network of 16 bits.
    pub(crate) ip: Ipv4Addr,
    /// `lab.observer`: where heartbeats go.
    pub(crate) observer: SocketAddrV4,
    /// `lab.heartbeat_ms`
    pub(crate) heartbeat: Duration,
    /// `lab.mode`
    pub(crate) mode: Mode,
    /// `lab.dirty_mb`
    pub(crate) dirty_mb: usize,
    /// `lab.dirty_rate_mb`
    pub(crate) dirty_rate_mb: usize,
    /// `lab.stamp_mb`: area that is stamped and checked all the time, in every mode.
    pub(crate) stamp_mb: usize,
    /// `lab.stamp_still`: that area is checked slowly and never written.
    pub(crate) stamp_still: bool,
    /// `lab.touch_mb`: area that is stamped once and whose pages are touched one by one, in every mode.
    pub(crate) touch_mb: usize,
    /// `lab.work_log2`: a round of work has 2 to the power of this many steps, of writing a sixteenth of them.
    pub(crate) work_log2: u32,
    /// `lab.number`: of the VM, from 1.
    pub(crate) number: u32,
    /// `lab.rack_ip`: address of its second card, in a network of 16 bits.
    pub(crate) rack_ip: Option<Ipv4Addr>,
    /// `lab.server`: where servers for the guests are, in that network.
    pub(crate) server: Option<Ipv4Addr>,
    /// `lab.peer`: a guest that this one talks to.
    pub(crate) peer: Option<Ipv4Addr>,
    /// `lab.template`: the guest is told who it is when it has booted.
    pub(crate) template: bool,
}

impl Settings {
    /// Reads `/proc/cmdline`.
    pub(crate) fn from_command_line() -> anyhow::Result<Self> {
        let text = std::fs::read_to_string("/proc/cmdline").context("reading /proc/cmdline")?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let words = Words(text);
        let mode = match words.find("mode").unwrap_or("idle") {
            // `stamp` is idle with an area to stamp.
            "idle" | "stamp" => Mode::Idle,
            "dirty" => Mode::Dirty,
            "alike" => Mode::Alike,
            "cpu" => Mode::Cpu,
            "random" => Mode::Random,
            "subset-sum" => Mode::SubsetSum,
            "random-writes" => Mode::RandomWrites,
            "cache" => Mode::Cache,
            "tcp-rr" => Mode::TcpRr,
            "nfs" => Mode::Nfs,
            "iperf3" => Mode::Iperf3,
            "redis" => Mode::Redis,
            "redis-cluster" => Mode::RedisCluster,
            "stress" => Mode::Stress,
            "churn" => Mode::Churn,
            other => bail!("lab.mode={other} is none that this guest knows"),
        };
        Ok(Self {
            id: words.find("id").context("lab.id is missing")?.to_owned(),
            ip: words.required("ip")?,
            observer: words.required("observer")?,
            heartbeat: Duration::from_millis(words.or("heartbeat_ms", 10)?),
            mode,
            dirty_mb: words.or("dirty_mb", 0)?,
            dirty_rate_mb: words.or("dirty_rate_mb", 0)?,
            stamp_mb: words.or("stamp_mb", 0)?,
            stamp_still: words.or("stamp_still", 0u8)? == 1,
            touch_mb: words.or("touch_mb", 0)?,
            // More than that would not end.
            work_log2: words.or("work_log2", 0)?.min(40),
            number: words.or("number", 0)?,
            rack_ip: words.optional("rack_ip")?,
            server: words.optional("server")?,
            peer: words.optional("peer")?,
            template: words.or("template", 0u8)? == 1,
        })
    }
}

/// The words `lab.KEY=VALUE` of a kernel command line.
struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    fn find(&self, key: &str) -> Option<&'a str> {
        self.0.split_whitespace().find_map(|word| {
            word.strip_prefix("lab.")?
                .strip_prefix(key)?
                .strip_prefix('=')
        })
    }

    fn required<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
        &self,
        key: &str,
    ) -> anyhow::Result<T> {
        let value = self
            .find(key)
            .with_context(|| format!("lab.{key} is missing"))?;
        value
            .parse()
            .with_context(|| format!("lab.{key}={value} makes no sense"))
    }

    fn optional<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
        &self,
        key: &str,
    ) -> anyhow::Result<Option<T>> {
        self.find(key).map(|_| self.required(key)).transpose()
    }

    fn or<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
        &self,
        key: &str,
        default: T,
    ) -> anyhow::Result<T> {
        match self.find(key) {
            Some(_) => self.required(key),
            None => Ok(default),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_configures_the_guest() {
        let settings = Settings::parse(
            "quiet lab.id=vm1 lab.ip=10.78.1.1 lab.observer=10.78.0.1:7000 lab.mode=dirty \
             lab.dirty_mb=64 lab.dirty_rate_mb=20 lab.rack_ip=10.77.128.1\n",
        )
        .unwrap();
        assert_eq!(settings.id, "vm1");
        assert_eq!(settings.mode, Mode::Dirty);
        assert_eq!(
            (settings.dirty_mb, settings.dirty_rate_mb, settings.stamp_mb),
            (64, 20, 0)
        );
        assert_eq!(settings.heartbeat, Duration::from_millis(10));
        assert!(!settings.stamp_still);
        assert_eq!(settings.rack_ip, Some(Ipv4Addr::new(10, 77, 128, 1)));
        assert_eq!(settings.peer, None);
    }

    #[test]
    fn what_is_missing_or_makes_no_sense_is_named() {
        let missing = Settings::parse("lab.id=vm1").unwrap_err();
        assert!(missing.to_string().contains("lab.ip"));
        let wrong = Settings::parse("lab.id=a lab.ip=10.0.0.1 lab.observer=x").unwrap_err();
        assert!(wrong.to_string().contains("lab.observer=x"));
        let wrong = Settings::parse("lab.id=a lab.ip=10.0.0.1 lab.observer=10.0.0.1:1 lab.mode=x");
        assert!(wrong.unwrap_err().to_string().contains("lab.mode=x"));
    }
}
