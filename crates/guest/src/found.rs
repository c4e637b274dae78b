//! The QEMUs that run on this host, as `/proc` shows them. None is asked anything.

use std::fs;
use std::path::PathBuf;

use page::ByteLen;

use crate::argv::{options, qmp_socket, setting, split_settings};
use crate::obstacle::{MappingObstacle, mapping_obstacle};

/// What the programs are called; `exe` shows them under this name whatever they were started as.
const PROGRAM: &str = "qemu-system-";

/// QEMU's own if its command line says nothing of memory.
const DEFAULT_MEMORY: ByteLen = ByteLen(128 << 20);

/// A running QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundVm {
    /// Process id.
    pub pid: u32,
    /// From `-name`; empty if there is none.
    pub name: String,
    /// The first QMP socket that its command line has.
    pub qmp: Option<PathBuf>,
    /// From `-m`: the guest's memory at its start.
    pub memory: ByteLen,
    /// What on its command line keeps its memory from being shared where it goes.
    pub mapping_obstacle: Option<MappingObstacle>,
}

impl FoundVm {
    fn of(pid: u32, argv: &[String]) -> Self {
        Self {
            pid,
            name: name(argv).unwrap_or_default(),
            qmp: qmp_socket(argv),
            memory: memory(argv).unwrap_or(DEFAULT_MEMORY),
            mapping_obstacle: mapping_obstacle(argv),
        }
    }
}

/// The QEMUs that run in this process's network, by process id. Those of other network namespaces
/// are other hosts', or in containers whose paths mean nothing here.
#[must_use]
pub fn running_vms() -> Vec<FoundVm> {
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let own = network("self");
    let mut found: Vec<FoundVm> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.ok()?.file_name().into_string().ok()?;
            let number = pid.parse().ok()?;
            let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            let is_qemu = program.file_name()?.to_str()?.starts_with(PROGRAM);
            let argv = (is_qemu && network(&pid) == own).then(|| argv_of(&pid))??;
            Some(FoundVm::of(number, &argv))
        })
        .collect();
    found.sort_by_key(|vm| vm.pid);
    found
}

fn argv_of(pid: &str) -> Option<Vec<String>> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let arguments = bytes
        .strip_suffix(&[0])
        .unwrap_or(&bytes)
        .split(|b| *b == 0);
    Some(
        arguments
            .map(|argument| String::from_utf8_lossy(argument).into_owned())
            .collect(),
    )
}

fn name(argv: &[String]) -> Option<String> {
    let value = options(argv).filter(|option| option.name == "name").last();
    let settings = split_settings(value?.value?);
    let implied = settings.first().filter(|first| !first.contains('='));
    let name = setting(&settings, "guest").or(implied.map(String::as_str))?;
    Some(name.to_owned())
}

fn memory(argv: &[String]) -> Option<ByteLen> {
    let value = options(argv).filter(|option| option.name == "m").last();
    let settings = split_settings(value?.value?);
    let implied = settings.first().filter(|first| !first.contains('='));
    let size = setting(&settings, "size").or(implied.map(String::as_str))?;
    // QEMU's units; megabytes if there is none.
    let (number, shift) = match size.char_indices().last()? {
        (at, 'b' | 'B') => (&size[..at], 0),
        (at, 'k' | 'K') => (&size[..at], 10),
        (at, 'm' | 'M') => (&size[..at], 20),
        (at, 'g' | 'G') => (&size[..at], 30),
        (at, 't' | 'T') => (&size[..at], 40),
        _ => (size, 20),
    };
    let number: u64 = number.parse().ok()?;
    number.checked_mul(1 << shift).map(ByteLen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(line: &str) -> FoundVm {
        let argv: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        FoundVm::of(7, &argv)
    }

    #[test]
    fn a_command_line_says_name_socket_and_memory() {
        let vm = found("qemu-system-x86_64 -name web -m 2G -qmp unix:/run/web.qmp,server=on");
        assert_eq!(vm.name, "web");
        assert_eq!(vm.memory, ByteLen(2 << 30));
        assert_eq!(vm.qmp, Some("/run/web.qmp".into()));
        let vm = found("/usr/bin/kvm -name guest=db,debug-threads=on -m size=524288k,slots=2");
        assert_eq!((vm.name.as_str(), vm.qmp), ("db", None));
        assert_eq!(vm.memory, ByteLen(512 << 20));
        assert_eq!(vm.mapping_obstacle, None);
        let locked = found("/usr/bin/kvm -overcommit mem-lock=on").mapping_obstacle;
        assert_eq!(locked.unwrap().what, "-overcommit mem-lock=on");
    }

    #[test]
    fn memory_without_a_unit_is_in_megabytes_and_none_is_qemus_default() {
        assert_eq!(found("q -m 300").memory, ByteLen(300 << 20));
        assert_eq!(found("q").memory, DEFAULT_MEMORY);
        assert_eq!(found("q -m 99999999999999999999G").memory, DEFAULT_MEMORY);
    }

    #[test]
    fn a_process_that_is_no_qemu_is_not_found() {
        let own = std::process::id();
        assert!(running_vms().iter().all(|vm| vm.pid != own));
    }
}
