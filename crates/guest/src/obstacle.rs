//! Guests whose memory cannot be mapped copy-on-write from a pool: they get plain copies.
//!
//! The command line says most of it before QEMU runs, the monitor what was plugged since. The
//! library in the target QEMU has the last word: it looks at the memory itself.

use std::fmt;

use page::PAGE_SIZE;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::argv::{options, setting, split_settings};
use crate::ram::ram_blocks;
use crate::{GuestError, Qmp, QmpError};

/// What stands in the way of mapping, in words for the user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingObstacle {
    /// The option, device or block, as QEMU names it.
    pub what: String,
    /// Why its memory is not mapped.
    pub why: &'static str,
}

impl fmt::Display for MappingObstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

const LOCKED: &str = "locked memory is copied as soon as it is mapped";
const OF_FILE: &str = "guest memory is a file already, or huge pages";
const SHARED: &str = "guest memory is shared with another process";
const PINNED: &str = "a device reads guest memory directly, and does not follow a new mapping";
const ENCRYPTED: &str = "guest memory is encrypted with a key of its own";
const HUGE: &str = "its memory is of huge pages";

/// Beginnings of the names of devices that pin guest memory, or hand it to another process.
const DEVICES: [(&str, &str); 6] = [
    ("vfio-", PINNED),
    ("vhost-vdpa", PINNED),
    ("vdpa", PINNED),
    ("pvrdma", PINNED),
    ("vhost-user", SHARED),
    ("x-vfio-user", SHARED),
];

/// The first thing on a command line that keeps the VM's memory from being mapped.
#[must_use]
pub fn mapping_obstacle(argv: &[String]) -> Option<MappingObstacle> {
    options(argv).find_map(|option| {
        let value = option.value.unwrap_or_default();
        let why = match option.name {
            "overcommit" | "realtime" => is_locked(value).then_some(LOCKED),
            "mem-path" => Some(OF_FILE),
            "object" => of_object(&Settings::read(value, "qom-type")),
            "device" => of_device(Settings::read(value, "driver").name()?),
            "netdev" => of_device(Settings::read(value, "type").name()?),
            "machine" | "M" => of_machine(value),
            _ => None,
        }?;
        let what = format!("-{} {value}", option.name);
        Some(MappingObstacle { what, why })
    })
}

/// What a running QEMU has that keeps its memory from being mapped: shared backends, huge pages,
/// devices that were plugged.
pub(crate) fn mapping_obstacle_now(qmp: &Qmp) -> Result<Option<MappingObstacle>, GuestError> {
    let blocks = ram_blocks(qmp)?;
    let huge = blocks
        .iter()
        .find(|block| block.page_size > PAGE_SIZE as u64);
    if let Some(block) = huge.filter(|block| block.used_len.0 >= block.page_size) {
        let what = format!("memory block {}", block.name);
        return Ok(Some(MappingObstacle { what, why: HUGE }));
    }
    if let Some(backend) = shared_backend(qmp)? {
        return Ok(Some(backend));
    }
    for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
        if let Some(device) = plugged_device(qmp, path)? {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

fn shared_backend(qmp: &Qmp) -> Result<Option<MappingObstacle>, QmpError> {
    #[derive(Deserialize)]
    struct Backend {
        id: Option<String>,
        #[serde(default)]
        share: bool,
    }
    let backends: Vec<Backend> = qmp.query("query-memdev")?;
    let shared = backends.into_iter().find(|backend| backend.share);
    Ok(shared.map(|backend| MappingObstacle {
        what: format!("memory backend {}", backend.id.unwrap_or_default()),
        why: SHARED,
    }))
}

fn plugged_device(qmp: &Qmp, path: &str) -> Result<Option<MappingObstacle>, QmpError> {
    #[derive(Deserialize)]
    struct Property {
        name: String,
        #[serde(rename = "type")]
        kind: String,
    }
    let children: Vec<Property> = qmp.query_with("qom-list", json!({ "path": path }))?;
    Ok(children.into_iter().find_map(|child| {
        let kind = child.kind.strip_prefix("child<")?.strip_suffix('>')?;
        let what = || format!("device {} ({kind})", child.name);
        of_device(kind).map(|why| MappingObstacle { what: what(), why })
    }))
}

fn is_locked(value: &str) -> bool {
    let settings = split_settings(value);
    let locked = ["mem-lock", "mlock"]
        .into_iter()
        .filter_map(|key| setting(&settings, key));
    locked.into_iter().any(|value| !is_off(value))
}

fn is_off(value: &str) -> bool {
    matches!(value, "off" | "no" | "n" | "false")
}

fn of_object(object: &Settings) -> Option<&'static str> {
    match object.name()? {
        "memory-backend-ram" => {
            let share = object.get("share");
            share.is_some_and(|share| !is_off(&share)).then_some(SHARED)
        }
        backend if backend.starts_with("memory-backend-") => Some(OF_FILE),
        "sev-guest" | "sev-snp-guest" | "tdx-guest" => Some(ENCRYPTED),
        _ => None,
    }
}

fn of_device(name: &str) -> Option<&'static str> {
    let known = DEVICES.iter().find(|(start, _)| name.starts_with(start));
    known.map(|(_, why)| *why)
}

fn of_machine(value: &str) -> Option<&'static str> {
    let settings = split_settings(value);
    let encrypted = ["memory-encryption", "confidential-guest-support"];
    let is_set = encrypted
        .iter()
        .any(|key| setting(&settings, key).is_some());
    is_set.then_some(ENCRYPTED)
}

/// The settings of an option, in either of QEMU's notations.
enum Settings {
    /// `name,key=value`; the first may be `key=name`, too.
    Keys {
        settings: Vec<String>,
        first: &'static str,
    },
    Json {
        json: Value,
        first: &'static str,
    },
}

impl Settings {
    fn read(value: &str, first: &'static str) -> Self {
        match serde_json::from_str(value) {
            Ok(json) if value.starts_with('{') => Self::Json { json, first },
            _ => Self::Keys {
                settings: split_settings(value),
                first,
            },
        }
    }

    /// The value of the key whose name may be left out.
    fn name(&self) -> Option<&str> {
        match self {
            Self::Keys { settings, first } => {
                let implied = settings.first().filter(|setting| !setting.contains('='));
                implied
                    .map(String::as_str)
                    .or_else(|| setting(settings, first))
            }
            Self::Json { json, first } => json.get(first)?.as_str(),
        }
    }

    fn get(&self, key: &str) -> Option<String> {
        match self {
            Self::Keys { settings, .. } => {
                let alone = settings.iter().any(|setting| setting == key);
                let alone = alone.then(|| "on".to_owned());
                setting(settings, key).map(str::to_owned).or(alone)
            }
            Self::Json { json, .. } => match json.get(key)? {
                Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
                other => other.as_str().map(str::to_owned),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn obstacle(line: &str) -> Option<MappingObstacle> {
        let argv: Vec<_> = format!("qemu -m 1G {line} -display none")
            .split(' ')
            .map(str::to_owned)
            .collect();
        mapping_obstacle(&argv)
    }

    #[test]
    fn each_option_that_keeps_memory_from_being_mapped_is_named() {
        let refused = [
            ("-overcommit mem-lock=on,cpu-pm=on", LOCKED),
            ("-overcommit mem-lock=on-fault", LOCKED),
            ("-realtime mlock=on", LOCKED),
            ("-mem-path /dev/hugepages", OF_FILE),
            (
                "-object memory-backend-file,id=m,mem-path=/x,size=1G,share=off",
                OF_FILE,
            ),
            (
                "-object qom-type=memory-backend-memfd,id=m,size=1G",
                OF_FILE,
            ),
            ("-object memory-backend-ram,id=m,size=1G,share=on", SHARED),
            (
                "-object {\"qom-type\":\"memory-backend-ram\",\"id\":\"m\",\"share\":true}",
                SHARED,
            ),
            (
                "-object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"m\"}",
                OF_FILE,
            ),
            ("-object sev-guest,id=s", ENCRYPTED),
            ("-machine q35,confidential-guest-support=s", ENCRYPTED),
            ("-device vfio-pci,host=01:00.0", PINNED),
            ("-device driver=vfio-pci-nohotplug,host=01:00.0", PINNED),
            (
                "-device {\"driver\":\"vfio-pci\",\"host\":\"01:00.0\"}",
                PINNED,
            ),
            ("-netdev vhost-user,id=n,chardev=c", SHARED),
            ("-netdev type=vhost-vdpa,id=n", PINNED),
            ("-device vhost-user-fs-pci,chardev=c,tag=t", SHARED),
        ];
        for (line, why) in refused {
            let expected = MappingObstacle {
                what: line.to_owned(),
                why,
            };
            assert_eq!(obstacle(line), Some(expected), "{line}");
        }
    }

    #[test]
    fn what_is_mapped_is_not_refused() {
        for line in [
            "-overcommit mem-lock=off,cpu-pm=on",
            "-object memory-backend-ram,id=m,size=1G,share=off",
            "-object {\"qom-type\":\"memory-backend-ram\",\"id\":\"m\",\"share\":false}",
            "-netdev tap,id=n,vhost=on",
            "-device virtio-net-pci,netdev=n",
            "-object iothread,id=i",
            "-machine q35,memory-backend=m",
            "-append mem-path=/x",
        ] {
            assert_eq!(obstacle(line), None, "{line}");
        }
    }

    #[test]
    fn the_text_names_the_option() {
        let text = obstacle("-overcommit mem-lock=on").unwrap().to_string();
        assert_eq!(text, format!("-overcommit mem-lock=on: {LOCKED}"));
    }

    proptest! {
        #[test]
        fn any_command_line_is_read_without_panic(words in proptest::collection::vec("(-object|-device|-netdev|-machine|-overcommit|[{}\":,=a-z-]{0,20})", 0..8)) {
            let _ = mapping_obstacle(&words);
        }
    }
}
