//! The real agents and the real command line on a real rack, beside stock QEMU on the same rack.
//!
//! Needs the `gangway` binary of the same target directory (`make test` builds it first).

use lab::results::{Results, Run};
use lab::run;
use lab::scenario::Scenario;

fn results_of(name: &str, settings: &[&str]) -> Results {
    let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    let scenario = Scenario::load(name, &settings, false).expect("the scenario is valid");
    let out = tempfile::tempdir().expect("a directory for results");
    run::scenario(name, &scenario, out.path()).expect("the lab works")
}

fn assert_intact(run: &Run) {
    assert_eq!(run.failure, None, "{}", run.name());
    assert_eq!(run.vms_lost, Some(0), "{}", run.name());
    assert_eq!(run.mismatched_pages, Some(0), "{}", run.name());
    assert_eq!(run.stamp_errors, Some(0), "{}", run.name());
}

#[test]
fn real_gang_needs_fewer_bytes_than_stock_and_every_page_arrives() {
    let results = results_of("pair", &["techniques=stock,gang+zstd", "settle_s=1"]);
    let [stock, gang] = &results.runs[..] else {
        panic!("two techniques, {} runs", results.runs.len())
    };
    for run in [stock, gang] {
        assert_intact(run);
        assert_eq!(run.compared_pages, Some(2 * (256 << 20) / 4096));
    }
    let pages = gang.pages.expect("the events count pages");
    assert!(pages.reference.unwrap() > 0);
    assert_eq!(gang.application["exit_code"], 0);
    let (stock_bytes, gang_bytes) = (stock.core_bytes.unwrap(), gang.core_bytes.unwrap());
    assert!(
        gang_bytes * 4 < stock_bytes,
        "{gang_bytes} of {stock_bytes} bytes"
    );
}

#[test]
fn real_vms_run_before_their_memory_and_find_all_of_it_right() {
    let techniques = "techniques=gang+postcopy,gang+zstd+postcopy-held";
    let results = results_of("pair", &[techniques, "settle_s=1"]);
    let [running, held] = &results.runs[..] else {
        panic!("two techniques, {} runs", results.runs.len())
    };
    let bytes = |run: &Run| run.core_bytes.unwrap();
    assert!(
        bytes(held) * 2 < bytes(running),
        "compressed: {}",
        bytes(held)
    );
    for run in [running, held] {
        assert_eq!(run.failure, None, "{}", run.name());
        assert_eq!(run.vms_lost, Some(0), "{}", run.name());
        assert_eq!(run.stamp_errors, Some(0), "{}", run.name());
        assert_eq!(run.application["exit_code"], 0);
        let pages = run.pages.expect("the events count pages");
        assert!(pages.reference.unwrap() > 0, "{}", run.name());
    }
    // Guests checked their stamps while memory came, and after it.
    let figure = |name: &str| running.application[name].as_u64().unwrap_or(0);
    assert!(figure("stamped_pages_checked") > 0 && figure("faults") > 0);
    // The guests stood still until all memory had come.
    assert_eq!(held.mismatched_pages, Some(0));
    assert_eq!(held.compared_pages, Some(2 * (256 << 20) / 4096));
}

/// Two pairs of hosts: what one VM is the first to send, the other one's host gets from there.
#[test]
fn real_vms_of_two_hosts_run_before_their_memory_of_which_each_content_crosses_once() {
    let techniques = "techniques=irlm+postcopy-held,irlm+zstd+postcopy";
    let smaller = ["vm.memory_mb=128", "hosts.vms_per_host=1", "settle_s=1"];
    let results = results_of("racks-small", &[&[techniques], &smaller[..]].concat());
    let [held, running] = &results.runs[..] else {
        panic!("two techniques, {} runs", results.runs.len())
    };
    for run in [held, running] {
        assert_eq!(run.failure, None, "{}", run.name());
        assert_eq!(run.vms_lost, Some(0), "{}", run.name());
        assert_eq!(run.stamp_errors, Some(0), "{}", run.name());
        assert_eq!(run.application["exit_code"], 0);
        let pages = run.pages.expect("the events count pages");
        assert!(pages.remote_reference > Some(1000), "{pages:?}");
    }
    assert_eq!(held.mismatched_pages, Some(0));
    assert_eq!(held.compared_pages, Some(2 * (128 << 20) / 4096));
    assert!(running.application["faults"].as_u64() > Some(0));
}

#[test]
fn real_vm_runs_on_at_its_source_when_the_target_agent_dies_and_then_moves() {
    let results = results_of("fault", &[]);
    let [run] = &results.runs[..] else {
        panic!("one run")
    };
    assert_intact(run);
    assert_eq!(run.application["exit_code_under_fault"], 1);
    assert_eq!(run.application["vms_moved_under_fault"], 0);
    assert_eq!(run.application["exit_code"], 0);
    assert_eq!(run.compared_pages, Some((192 << 20) / 4096));
}

/// What `gangway-lab run faults` does with all of them.
#[test]
fn real_vm_survives_the_faults_that_strike_where_it_could_be_lost_or_doubled() {
    let cells = [
        "kill-source-agent@committed",
        "kill-source-agent@released",
        "kill-target-agent@committed",
        "kill-target-qemu@loaded",
        "kill-cli@switch-over",
        "cut-2s@switch-over",
        "cancel@loaded",
    ];
    let results = results_of("faults", &[&format!("matrix.only={}", cells.join(","))]);
    assert_eq!(results.runs.len(), cells.len());
    for run in &results.runs {
        assert_intact(run);
        assert_eq!(run.application["exit_code"], 0, "{}", run.name());
        assert_eq!(run.compared_pages, Some((192 << 20) / 4096));
    }
}

/// A cell of `gangway-lab run postcopy-faults`, over a faster link.
fn assert_memory_follows_to_the_end(cell: &str) {
    let cell = format!("matrix.only={cell}");
    let smaller = ["vm.memory_mb=128", "vm.stamp_mb=8", "links.edge_mbit=200"];
    let settings = [&[cell.as_str()], &smaller[..]].concat();
    let results = results_of("postcopy-faults", &settings);
    let [run] = &results.runs[..] else {
        panic!("one cell, {} runs", results.runs.len())
    };
    assert_intact(run);
    assert_eq!(run.application["exit_code_under_fault"], 0);
    assert_eq!(run.application["vms_moved_under_fault"], 1);
    assert_eq!(run.application["exit_code"], 0);
    assert_eq!(run.compared_pages, Some((128 << 20) / 4096));
}

#[test]
fn real_memory_follows_its_vm_to_the_end_when_the_source_agent_dies_and_comes_back() {
    assert_memory_follows_to_the_end("kill-source-agent@post-copy");
}

#[test]
fn real_memory_follows_its_vm_to_the_end_when_the_target_agent_dies_and_comes_back() {
    assert_memory_follows_to_the_end("kill-target-agent@post-copy");
}

/// A cell of `gangway-lab run postcopy-rack-faults`, with fewer hosts over faster links. The guests stand still, so
/// that every page is compared under the fault, too.
#[test]
fn real_memory_follows_from_several_hosts_when_one_of_them_loses_its_agent() {
    let settings = [
        "techniques=irlm+postcopy-held",
        "matrix.only=kill-target-agent",
        "matrix.still=true",
        "matrix.into_phase_s=0.5",
        "hosts.source=2",
        "hosts.target=2",
        "links.edge_mbit=200",
    ];
    let results = results_of("postcopy-rack-faults", &settings);
    let [run] = &results.runs[..] else {
        panic!("one cell, {} runs", results.runs.len())
    };
    assert_intact(run);
    assert_eq!(run.application["exit_code_under_fault"], 0);
    assert_eq!(run.application["vms_moved_under_fault"], 2);
    assert_eq!(run.application["exit_code"], 0);
    assert_eq!(run.compared_pages, Some(4 * (128 << 20) / 4096));
}

/// Two cells of `gangway-lab run rack-faults`.
#[test]
fn real_group_goes_on_without_its_index_and_without_one_of_its_carriers() {
    let cells = "matrix.only=kill-index@bulk,kill-target-agent@bulk";
    let smaller = ["hosts.source=2", "hosts.target=2"];
    let results = results_of("rack-faults", &[cells, smaller[0], smaller[1]]);
    let [index, carrier] = &results.runs[..] else {
        panic!("two cells, {} runs", results.runs.len())
    };
    for (run, exit_code, moved) in [(index, 0, 2), (carrier, 1, 1)] {
        assert_intact(run);
        let figure = |name: &str| run.application[name].clone();
        assert_eq!(figure("exit_code_under_fault"), exit_code, "{}", run.name());
        assert_eq!(figure("vms_moved_under_fault"), moved, "{}", run.name());
        assert_eq!(figure("exit_code"), 0, "{}", run.name());
        // Under the fault and after it; a VM that stayed was held after it only.
        let compared = (2 + moved) * (128 << 20) / 4096;
        assert_eq!(run.compared_pages, Some(compared), "{}", run.name());
        let pages = run.pages.expect("the events count pages");
        assert!(pages.remote_reference > Some(0), "{}", run.name());
    }
}
