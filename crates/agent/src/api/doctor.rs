//! Whether this host is ready for migrations, in words.

use std::path::{Path, PathBuf};

use guest::{FoundVm, HostReport, MemoryReading};
use page::ByteLen;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What `gangway doctor` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    /// The findings.
    pub findings: Vec<Finding>,
}

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// What was looked at.
    pub about: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do, if it is not fine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// How a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Fine,
    /// Migrations work, with less than they could have.
    Limited,
    /// Migrations from or to this host fail.
    Broken,
}

/// Looks at this host, whose mapping library may be configured to be at `cow_library`. Starts each
/// QEMU found, to ask for its version: some tens of milliseconds.
#[must_use]
pub fn examine(cow_library: Option<&Path>) -> DoctorReport {
    judge(
        &guest::host_report(),
        &guest::cow_library_places(cow_library),
        &guest::running_vms(),
    )
}

fn judge(host: &HostReport, library_places: &[PathBuf], vms: &[FoundVm]) -> DoctorReport {
    DoctorReport {
        findings: vec![
            qemu(host),
            memory(host),
            memory_reading(host),
            kvm(host),
            ksm(host),
            shared_at_source(host),
            shared_at_target(host, library_places),
            shared_by(vms),
        ],
    }
}

fn qemu(host: &HostReport) -> Finding {
    let found: Vec<_> = host
        .qemu
        .iter()
        .map(|qemu| format!("{} ({})", qemu.path.display(), qemu.version))
        .collect();
    if found.is_empty() {
        let advice = "install a QEMU system emulator; a target needs the program that a VM's \
                      command line names";
        return finding(
            "QEMU",
            Verdict::Broken,
            "no QEMU on the agent's PATH",
            Some(advice),
        );
    }
    finding("QEMU", Verdict::Fine, &found.join(", "), None)
}

fn memory(host: &HostReport) -> Finding {
    let for_guests = host.memory.for_guests();
    let found = format!("{for_guests} for guests");
    if for_guests == ByteLen(0) {
        let advice = "nothing can move to this host; check /proc/meminfo and the memory cgroup";
        return finding("memory", Verdict::Limited, &found, Some(advice));
    }
    finding("memory", Verdict::Fine, &found, None)
}

fn memory_reading(host: &HostReport) -> Finding {
    let (verdict, found) = match host.memory_reading {
        MemoryReading::Everybody => (Verdict::Fine, "of every process"),
        MemoryReading::SameUser => (Verdict::Limited, "of processes of the agent's user only"),
        MemoryReading::Descendants => (Verdict::Limited, "of the agent's own children only"),
        MemoryReading::Nobody => (Verdict::Limited, "of no process"),
    };
    let advice = "run the agent with CAP_SYS_PTRACE, so that a page can be repaired from the \
                  guest's memory; without it a move whose reference is lost is undone";
    let advice = (verdict != Verdict::Fine).then_some(advice);
    finding("reading guests' memory", verdict, found, advice)
}

fn kvm(host: &HostReport) -> Finding {
    if host.kvm {
        // Only a guest that boots shows more: a host was seen that opens it, creates processors and
        // stops in the guest's kernel.
        let found = "/dev/kvm can be opened; whether guests run with it was not tried";
        return finding("KVM", Verdict::Fine, found, None);
    }
    let advice = "guests are emulated; load the kvm module, or let the agent's user open /dev/kvm";
    finding(
        "KVM",
        Verdict::Limited,
        "/dev/kvm cannot be opened",
        Some(advice),
    )
}

fn ksm(host: &HostReport) -> Finding {
    let found = match &host.ksm {
        None => "the kernel has none".to_owned(),
        Some(ksm) => format!(
            "{}; {} frames serve {} more pages",
            if ksm.running { "runs" } else { "does not run" },
            ksm.pages_shared,
            ksm.pages_sharing
        ),
    };
    finding("kernel same-page merging", Verdict::Fine, &found, None)
}

fn shared_at_source(host: &HostReport) -> Finding {
    let about = "finding shared memory";
    if host.frame_numbers {
        return finding(
            about,
            Verdict::Fine,
            "the numbers of frames can be read",
            None,
        );
    }
    let advice = "run the agent with CAP_SYS_ADMIN, so that it sees which pages guests share here; \
                  without it they arrive as copies of their own";
    let found = "the numbers of frames cannot be read";
    finding(about, Verdict::Limited, found, Some(advice))
}

fn shared_at_target(host: &HostReport, places: &[PathBuf]) -> Finding {
    let about = "sharing memory again";
    let limit = host.max_map_count.map_or(String::new(), |limit| {
        format!("; a process may have {limit} mappings")
    });
    if let Some(library) = places.iter().find(|file| file.is_file()) {
        let found = format!("{}{limit}", library.display());
        return finding(about, Verdict::Fine, &found, None);
    }
    let places: Vec<_> = places
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    let found = format!("the mapping library is not there: {}", places.join(", "));
    let advice = "install it there, or say where it is with `cow_library`; without it, pages that \
                  guests share arrive here as copies of their own";
    finding(about, Verdict::Limited, &found, Some(advice))
}

/// Guests that run here and cannot share memory where they go, by their command lines.
fn shared_by(vms: &[FoundVm]) -> Finding {
    let about = "guests that share memory";
    let obstacle = |vm: &FoundVm| {
        let obstacle = vm.mapping_obstacle.as_ref()?;
        Some(format!("{} (process {}): {obstacle}", vm.name, vm.pid))
    };
    let cannot: Vec<String> = vms.iter().filter_map(obstacle).collect();
    if cannot.is_empty() {
        let found = format!(
            "nothing on the command lines of the {} that run here is in the way",
            vms.len()
        );
        return finding(about, Verdict::Fine, &found, None);
    }
    let advice = "their pages arrive as copies of their own, unless their command lines at the target \
                  (`definition`, `replace`) have no such thing";
    finding(about, Verdict::Limited, &cannot.join("; "), Some(advice))
}

fn finding(about: &str, verdict: Verdict, found: &str, advice: Option<&str>) -> Finding {
    Finding {
        about: about.to_owned(),
        verdict,
        found: found.to_owned(),
        advice: advice.map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_said_with_every_place_where_it_was_looked_for() {
        let report = examine(Some(Path::new("/nowhere/cow.so")));
        let found = |report: &DoctorReport| {
            let of = |finding: &&Finding| finding.about == "sharing memory again";
            report.findings.iter().find(of).cloned().unwrap()
        };
        let missing = found(&report);
        assert_eq!(missing.verdict, Verdict::Limited);
        assert!(missing.found.contains("/nowhere/cow.so") && missing.advice.is_some());
        let here = std::env::current_exe().unwrap();
        let present = found(&examine(Some(&here)));
        assert_eq!(present.verdict, Verdict::Fine);
        assert!(present.found.starts_with(&here.display().to_string()));
    }

    #[test]
    fn guests_that_cannot_share_are_named_with_the_reason() {
        let vm = |name: &str, argv: &[&str]| FoundVm {
            pid: 7,
            name: name.to_owned(),
            qmp: None,
            memory: ByteLen(1 << 30),
            mapping_obstacle: guest::mapping_obstacle(
                &argv.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>(),
            ),
        };
        let plain = vm("plain", &["qemu", "-m", "1024"]);
        let locked = vm("locked", &["qemu", "-overcommit", "mem-lock=on"]);
        assert_eq!(
            shared_by(std::slice::from_ref(&plain)).verdict,
            Verdict::Fine
        );
        let found = shared_by(&[plain, locked]);
        assert_eq!(found.verdict, Verdict::Limited);
        assert!(
            found
                .found
                .starts_with("locked (process 7): -overcommit mem-lock=on: ")
        );
    }
}
