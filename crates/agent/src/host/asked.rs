//! What a host looks at before a VM moves, beside its memory: whether the VM is the one that the plan
//! means, and whether the target has its machine type.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use guest::SourceGuest;

use crate::api::mover::{MoveCheck, Refusal, RefusalCode};
use crate::types::MoveSpec;

/// A QEMU lists its machine types in a tenth of a second; the coordinator waits for some more.
const LIST_TIME_MAX: Duration = Duration::from_secs(3);
/// The longest list, of the QEMU for ARM, has 15 kB.
const LIST_BYTES_MAX: u64 = 1 << 20;

/// Refuses a VM whose QEMU has the name of another.
pub(super) fn refuse_other_vm(spec: &MoveSpec, guest: &SourceGuest) -> Result<(), Refusal> {
    if !is_other(&spec.vm, guest.name(), guest.pid()) {
        return Ok(());
    }
    let message = format!(
        "{} was not touched: the QEMU at {} is that of a VM `{}`, which would move in its place; correct \
         `vm` or `qmp` in the plan",
        spec.vm,
        spec.qmp.display(),
        guest.name(),
    );
    Err(Refusal::of_vm(RefusalCode::UnknownVm, &spec.vm, message))
}

/// Whether a QEMU that calls itself `named` is another than VM `vm`. One without a name may be any;
/// so may one with a name that no plan can write.
fn is_other(vm: &str, named: &str, pid: u32) -> bool {
    let has_name = named != format!("qemu-{pid}") && crate::plan::check_name(named).is_ok();
    has_name && named != vm
}

/// Refuses VMs with a machine type that their program does not have on this host. What cannot be
/// asked is not refused: the target QEMU says it when it starts.
pub(super) fn refuse_unknown_machines(vms: &[MoveCheck], host: &str) -> Result<(), Refusal> {
    let mut lists: BTreeMap<&Path, Option<BTreeSet<String>>> = BTreeMap::new();
    for vm in vms {
        // Neither `-machine accel=kvm` nor no `-machine` at all names one.
        if vm.machine.is_empty() || vm.machine.contains('=') {
            continue;
        }
        let list = lists
            .entry(&vm.program)
            .or_insert_with(|| list_of(&vm.program));
        if list.as_ref().is_none_or(|list| list.contains(&vm.machine)) {
            continue;
        }
        let message = format!(
            "{} has the machine type {}, which {} on host `{host}` does not have; it runs at its source as \
             before. Install a QEMU there that has it, or choose another target",
            vm.vm,
            vm.machine,
            vm.program.display(),
        );
        return Err(Refusal::of_vm(RefusalCode::NoQemu, &vm.vm, message));
    }
    Ok(())
}

/// The machine types of a program, aliases among them; none if it does not list them.
fn list_of(program: &Path) -> Option<BTreeSet<String>> {
    let mut command = Command::new(program);
    command.args(["-machine", "help"]).stdin(Stdio::null());
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let output = child.stdout.take();
    let (sender, answer) = channel();
    // Ends with the program, at the latest.
    std::thread::spawn(move || {
        let mut text = String::new();
        let mut output = output?.take(LIST_BYTES_MAX);
        output.read_to_string(&mut text).ok()?;
        sender.send(text).ok()
    });
    let text = answer.recv_timeout(LIST_TIME_MAX);
    // Whether it has answered or not; both fail only if it has gone.
    let _ = child.kill();
    let _ = child.wait();
    machines_in(&text.ok()?)
}

fn machines_in(text: &str) -> Option<BTreeSet<String>> {
    let (_, list) = text.split_once("Supported machines are:")?;
    let names = list
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let names: BTreeSet<String> = names.map(str::to_owned).collect();
    (!names.is_empty()).then_some(names)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use std::time::Instant;

    use super::*;

    const LIST: &str = "\
Supported machines are:
microvm              microvm (i386)
pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)
pc-i440fx-10.0       Standard PC (i440FX + PIIX, 1996) (default)
none                 empty machine
";

    /// A program that answers so, whatever it is asked.
    fn program(dir: &Path, script: &str) -> PathBuf {
        let path = dir.join("qemu");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn vm(program: &Path, machine: &str) -> MoveCheck {
        MoveCheck {
            vm: "web".into(),
            memory_bytes: 1,
            shared_bytes: None,
            expanded_bytes: None,
            program: program.into(),
            machine: machine.into(),
            qemu_version: "10.0.2".into(),
        }
    }

    #[test]
    fn a_machine_type_that_the_target_does_not_have_is_refused_with_the_names() {
        let dir = tempfile::tempdir().unwrap();
        let program = program(dir.path(), &format!("cat << 'END'\n{LIST}END"));
        let ask = |machine| refuse_unknown_machines(&[vm(&program, machine)], "b");
        for known in ["pc", "pc-i440fx-10.0", "", "accel=kvm"] {
            ask(known).unwrap();
        }
        let refusal = ask("pc-i440fx-10.1").unwrap_err();
        assert_eq!(refusal.code, RefusalCode::NoQemu);
        for said in ["web", "pc-i440fx-10.1", "host `b`", "at its source"] {
            assert!(refusal.message.contains(said), "{refusal}");
        }
    }

    #[test]
    fn a_program_that_lists_nothing_or_hangs_refuses_nothing_and_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let begin = Instant::now();
        for script in ["exit 1", "exec sleep 60"] {
            let program = program(dir.path(), script);
            refuse_unknown_machines(&[vm(&program, "pc")], "b").unwrap();
        }
        refuse_unknown_machines(&[vm(Path::new("/nowhere"), "pc")], "b").unwrap();
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_qemu_with_another_name_is_another_vm() {
        assert!(is_other("web", "db", 7));
        assert!(!is_other("web", "web", 7));
        assert!(!is_other("web", "qemu-7", 7), "it has no name");
        assert!(is_other("web", "qemu-8", 7), "that is its name");
        assert!(!is_other("web", "Web server 1", 7), "no plan can say so");
    }
}
