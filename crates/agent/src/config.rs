//! The configuration files: TOML, unknown keys are errors, every number is bounded.

mod index;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate::handover::RESUME_PATIENCE;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::plan::position;

pub use index::IndexConfig;

const MIB: u64 = 1024 * 1024;

/// Shorter would call a busy host dead, whose event streams show life once a second; longer leaves
/// a person without news for minutes.
const PEER_TIMEOUT_S: RangeInclusive<u64> = 3..=300;
/// The guest is stopped meanwhile: half a minute is the most that its own peers tolerate.
const SWITCHOVER_STALL_LIMIT_S: RangeInclusive<u64> = 1..=30;
/// A second helps only a test; in a day somebody has looked.
const RECOVERY_LIMIT_S: RangeInclusive<u64> = 1..=86_400;
/// A group of 64 MiB guests profits from 1 MiB; above 4 GiB the store competes with the guests.
const STORE_BYTES: RangeInclusive<u64> = MIB..=4096 * MIB;
/// zstd's window: both agents hold it once for each host pair.
const COMPRESSION_WINDOW_BYTES: RangeInclusive<u64> = MIB..=128 * MIB;
/// At least a few compressed blocks; at most 64 MiB, which a 10 Gbit/s link drains in 50 ms.
const WINDOW_BYTES_MAX: RangeInclusive<u64> = MIB / 4..=64 * MIB;
/// One is all that a network needs which is not shared with others; a dozen takes it from them.
const SESSION_CONNECTIONS_MAX: RangeInclusive<u64> = 1..=16;
/// A unix socket's path ends in a kernel buffer of 108 bytes; the run directory's sockets add a
/// name of a group and a VM to it.
const RUN_DIR_BYTES_MAX: usize = 40;

/// Configuration of one agent, checked.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this host, for messages.
    pub name: String,
    /// What must survive a restart: journal, groups being coordinated.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Sockets of the running agent.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Address of the control API for other agents; without it this agent serves its unix
    /// socket only, and no group that involves this host can be coordinated.
    #[serde(default)]
    pub control: Option<SocketAddr>,
    /// Address on which moves arrive.
    pub bulk: SocketAddr,
    /// Directory of `ca-cert.pem`, `server-cert.pem`, `server-key.pem`, `client-cert.pem` and
    /// `client-key.pem`.
    #[serde(default)]
    pub tls_dir: Option<PathBuf>,
    /// Runs both listeners without TLS: whoever reaches them can read guest memory, and move and
    /// stop every VM of this host. For labs on networks of their own.
    #[serde(default)]
    pub insecure_plaintext: bool,
    /// A peer that is silent for so long counts as unreachable.
    #[serde(default = "default_peer_timeout_s")]
    pub peer_timeout_s: u64,
    /// A switch-over that makes no progress for so long is undone.
    #[serde(default = "default_switchover_stall_limit_s")]
    pub switchover_stall_limit_s: u64,
    /// A post-copy that was interrupted is resumed for so long before a person is asked.
    #[serde(default = "default_recovery_limit_s")]
    pub recovery_limit_s: u64,
    /// Content store of the target role, for each host pair.
    #[serde(default = "default_store_bytes")]
    pub store_bytes: u64,
    /// The library that maps shared pages into target QEMUs; if absent `libgangway_cow.so` beside
    /// the program, in `../lib/gangway` from there, or in `/usr/lib/gangway`.
    #[serde(default)]
    pub cow_library: Option<PathBuf>,
    /// Most memory that the shared pages of a trust domain may take here; what does not fit is copied.
    #[serde(default = "default_pool_bytes_max")]
    pub pool_bytes_max: u64,
    /// What becomes of the kernel's merging of identical pages while VMs arrive.
    #[serde(default)]
    pub ksm: Ksm,
    /// zstd window, for each host pair; a power of two.
    #[serde(default = "default_compression_window_bytes")]
    pub compression_window_bytes: u64,
    /// Most logical bytes of a VM that its QEMU has written and the target has not loaded.
    #[serde(default = "default_window_bytes_max")]
    pub window_bytes_max: u64,
    /// Most connections to a target host that share the frames of a group's moves: one for each VM, as
    /// stock QEMU has, up to this.
    #[serde(default = "default_session_connections_max")]
    pub session_connections_max: u64,
    /// Test aid: a move waits at instant NAME while a file `NAME.VM` exists in this directory.
    #[serde(default)]
    pub hold_dir: Option<PathBuf>,
}

/// The kernel's merging of identical pages (KSM), which is one for the whole host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ksm {
    /// It is left alone.
    #[default]
    Keep,
    /// It is driven as hard as a core allows while VMs arrive and until they were scanned, and then set
    /// back to what was found. It merges the pages of all processes that asked for it, of whatever
    /// trust domain.
    Boost,
}

fn default_state_dir() -> PathBuf {
    PathBuf::from("/var/lib/gangway")
}
fn default_run_dir() -> PathBuf {
    PathBuf::from("/run/gangway")
}
fn default_peer_timeout_s() -> u64 {
    15
}
fn default_switchover_stall_limit_s() -> u64 {
    5
}
fn default_recovery_limit_s() -> u64 {
    RESUME_PATIENCE.as_secs()
}
// As much as its VMs have memory: that it can never exceed.
fn default_pool_bytes_max() -> u64 {
    i64::MAX.cast_unsigned()
}
fn default_store_bytes() -> u64 {
    32 * MIB
}
// With it, an agent that moves four VMs of 1 GiB stays well below 150 MB. Twice as much saved 0.7 %
// of the bytes in the lab's racks-small.
fn default_compression_window_bytes() -> u64 {
    32 * MIB
}
fn default_window_bytes_max() -> u64 {
    8 * MIB
}

// With four a move takes a fair share of a link that as many guests fill.
fn default_session_connections_max() -> u64 {
    4
}

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// It is not TOML, or a key is unknown, missing or of the wrong type.
    #[error("{at}: {message}")]
    Syntax {
        /// `file:line:column`.
        at: String,
        /// What is wrong there.
        message: String,
    },
    /// A value is out of its range.
    #[error("{}: `{key}` is {value}: it must be {must}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        must: String,
    },
}

/// A value out of its range: key, value, what it must be.
type Problem = (&'static str, String, String);

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })
}

/// Parses the text of the file `path`, and refuses what has a problem.
fn parse<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    problem: impl FnOnce(&T) -> Option<Problem>,
) -> Result<T, ConfigError> {
    let config: T = toml::from_str(text).map_err(|error| ConfigError::Syntax {
        at: position(path, text, error.span()),
        message: error.message().to_owned(),
    })?;
    match problem(&config) {
        None => Ok(config),
        Some((key, value, must)) => Err(ConfigError::Value {
            path: path.to_owned(),
            key,
            value,
            must,
        }),
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(path, &read(path)?)
    }

    /// Parses and checks the text of the file `path`.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        parse(path, text, Self::problem)
    }

    /// The unix socket of the control API.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir.join("control.sock")
    }

    /// [`Self::peer_timeout_s`] as a duration.
    #[must_use]
    pub fn peer_timeout(&self) -> Duration {
        Duration::from_secs(self.peer_timeout_s)
    }

    /// The first value out of its range.
    fn problem(&self) -> Option<Problem> {
        let numbers = [
            ("peer_timeout_s", self.peer_timeout_s, PEER_TIMEOUT_S),
            (
                "switchover_stall_limit_s",
                self.switchover_stall_limit_s,
                SWITCHOVER_STALL_LIMIT_S,
            ),
            ("recovery_limit_s", self.recovery_limit_s, RECOVERY_LIMIT_S),
            ("store_bytes", self.store_bytes, STORE_BYTES),
            (
                "compression_window_bytes",
                self.compression_window_bytes,
                COMPRESSION_WINDOW_BYTES,
            ),
            ("window_bytes_max", self.window_bytes_max, WINDOW_BYTES_MAX),
            (
                "session_connections_max",
                self.session_connections_max,
                SESSION_CONNECTIONS_MAX,
            ),
        ];
        for (key, value, range) in numbers {
            if !range.contains(&value) {
                let must = format!("{} to {}", range.start(), range.end());
                return Some((key, value.to_string(), must));
            }
        }
        if !self.compression_window_bytes.is_power_of_two() {
            let value = self.compression_window_bytes.to_string();
            return Some((
                "compression_window_bytes",
                value,
                "a power of two".to_owned(),
            ));
        }
        problem_of_name(&self.name)
            .or_else(|| self.problem_of_paths())
            .or_else(|| problem_of_tls(self.tls_dir.as_deref(), self.insecure_plaintext))
    }

    fn problem_of_paths(&self) -> Option<Problem> {
        let paths = [
            ("state_dir", Some(&self.state_dir)),
            ("run_dir", Some(&self.run_dir)),
            ("tls_dir", self.tls_dir.as_ref()),
            ("hold_dir", self.hold_dir.as_ref()),
            ("cow_library", self.cow_library.as_ref()),
        ];
        for (key, path) in paths {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                return Some((
                    key,
                    path.display().to_string(),
                    "an absolute path".to_owned(),
                ));
            }
        }
        let length = self.run_dir.as_os_str().len();
        (length > RUN_DIR_BYTES_MAX).then(|| {
            let must = format!("at most {RUN_DIR_BYTES_MAX} bytes long, for the sockets in it");
            ("run_dir", self.run_dir.display().to_string(), must)
        })
    }
}

fn problem_of_name(name: &str) -> Option<Problem> {
    let must = crate::plan::check_name(name).err()?;
    Some(("name", format!("{name:?}"), must.to_owned()))
}

fn problem_of_tls(dir: Option<&Path>, insecure_plaintext: bool) -> Option<Problem> {
    match (dir, insecure_plaintext) {
        (None, false) => {
            let must = "given, unless `insecure_plaintext = true` says that anyone who reaches \
                        this host's ports may read and move its VMs";
            Some(("tls_dir", "absent".to_owned(), must.to_owned()))
        }
        (Some(_), true) => {
            let must = "false if `tls_dir` is given: use TLS or not, not both";
            Some(("insecure_plaintext", "true".to_owned(), must.to_owned()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = "name = \"a\"\nbulk = \"127.0.0.1:7001\"\ntls_dir = \"/etc/pki\"\n";

    fn parse(extra: &str) -> Result<Config, String> {
        Config::parse(Path::new("agent.toml"), &format!("{SMALLEST}{extra}"))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_smallest_file_gets_the_documented_defaults() {
        let config = parse("").unwrap();
        assert_eq!(
            config.control_socket(),
            Path::new("/run/gangway/control.sock")
        );
        assert_eq!(config.state_dir, Path::new("/var/lib/gangway"));
        assert_eq!(
            (config.peer_timeout_s, config.switchover_stall_limit_s),
            (15, 5)
        );
        assert_eq!(config.recovery_limit_s, 600);
        assert_eq!(config.store_bytes, 32 << 20);
        assert_eq!(config.ksm, Ksm::Keep);
        assert_eq!(parse("ksm = \"boost\"\n").unwrap().ksm, Ksm::Boost);
        assert_eq!(config.compression_window_bytes, 32 << 20);
        assert_eq!(config.window_bytes_max, 8 << 20);
        assert_eq!(config.session_connections_max, 4);
        assert_eq!((config.control, config.insecure_plaintext), (None, false));
    }

    #[test]
    fn an_unknown_key_is_named_with_its_place() {
        let error = parse("bandwith = 1\n").unwrap_err();
        assert!(error.starts_with("agent.toml:4:1: "), "{error}");
        assert!(error.contains("bandwith"), "{error}");
    }

    #[test]
    fn a_number_out_of_range_is_named_with_its_range() {
        for (line, expected) in [
            (
                "peer_timeout_s = 0",
                "`peer_timeout_s` is 0: it must be 3 to 300",
            ),
            (
                "recovery_limit_s = 0",
                "`recovery_limit_s` is 0: it must be 1 to 86400",
            ),
            (
                "store_bytes = 1",
                "`store_bytes` is 1: it must be 1048576 to 4294967296",
            ),
            (
                "compression_window_bytes = 3145728",
                "`compression_window_bytes` is 3145728: it must be a power of two",
            ),
            (
                "window_bytes_max = 0",
                "`window_bytes_max` is 0: it must be 262144 to 67108864",
            ),
            (
                "session_connections_max = 17",
                "`session_connections_max` is 17: it must be 1 to 16",
            ),
            (
                "hold_dir = \"x\"",
                "`hold_dir` is x: it must be an absolute path",
            ),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.ends_with(expected), "{line}: {error}");
        }
    }

    #[test]
    fn plaintext_is_only_by_explicit_choice_and_never_beside_tls() {
        let without = "name = \"a\"\nbulk = \"127.0.0.1:7001\"\n";
        let parse_text = |text: &str| Config::parse(Path::new("a.toml"), text);
        let error = parse_text(without).unwrap_err().to_string();
        assert!(error.contains("`tls_dir` is absent"), "{error}");
        assert!(parse_text(&format!("{without}insecure_plaintext = true")).is_ok());
        let error = parse("insecure_plaintext = true").unwrap_err();
        assert!(error.contains("not both"), "{error}");
    }

    #[test]
    fn a_name_that_could_leave_a_directory_is_refused() {
        let text = SMALLEST.replace("\"a\"", "\"../a\"");
        let error = Config::parse(Path::new("a.toml"), &text)
            .unwrap_err()
            .to_string();
        assert!(error.contains("`name`"), "{error}");
    }

    #[test]
    fn a_missing_file_names_itself() {
        let error = Config::load(Path::new("/nonexistent/agent.toml")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/agent.toml"));
    }
}
