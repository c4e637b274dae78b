//! Memory that guests share at the source, on real VMs: kept over several hosts, private once written,
//! and copied where it cannot be mapped.
//!
//! Needs the `gangway` binary and the mapping library of the same target directory (`make test` builds
//! them first).

use std::path::{Path, PathBuf};

use lab::footprint::Footprint;
use lab::results::{Results, Run};
use lab::run;
use lab::scenario::Scenario;
use serde_json::Value;

/// Two copies of one template.
const SMALL: [&str; 3] = ["hosts.vms_per_host=2", "vm.memory_mb=128", "settle_s=1"];
const PAGES: u64 = (128 << 20) / 4096;

fn results_of(settings: &[&str]) -> Results {
    let settings = SMALL.iter().chain(settings);
    let settings: Vec<String> = settings.map(|&setting| setting.to_owned()).collect();
    let scenario = Scenario::load("slm-template", &settings, false).expect("the scenario is valid");
    let out = tempfile::tempdir().expect("a directory for results");
    run::scenario("slm-template", &scenario, out.path()).expect("the lab works")
}

fn slm(settings: &[&str]) -> Run {
    let mut results = results_of(&[&["techniques=slm"], settings].concat());
    let run = results.runs.pop().expect("one run");
    assert_intact(&run);
    run
}

fn assert_intact(run: &Run) {
    assert_eq!(run.failure, None, "{}", run.name());
    assert_eq!(run.vms_lost, Some(0), "{}", run.name());
    assert_eq!(run.mismatched_pages, Some(0), "{}", run.name());
}

fn mapped(run: &Run) -> u64 {
    let pages = run.pages.expect("the events count pages");
    pages.mapped.expect("and mapped ones")
}

fn notes(run: &Run) -> String {
    run.application
        .get("notes")
        .map(Value::to_string)
        .unwrap_or_default()
}

#[test]
fn real_vms_that_share_memory_share_it_at_the_target_and_send_it_once() {
    let results = results_of(&["techniques=stock,slm"]);
    let [stock, slm] = &results.runs[..] else {
        panic!("two techniques, {} runs", results.runs.len())
    };
    for run in [stock, slm] {
        assert_intact(run);
        assert_eq!(run.compared_pages, Some(2 * PAGES));
    }
    assert!(mapped(slm) > 10_000);
    assert!(slm.core_bytes.unwrap() < stock.core_bytes.unwrap());
    let target = |run: &Run| run.target_footprint.unwrap().guest_pss_bytes.unwrap();
    let (shared, private) = (target(slm), target(stock));
    assert!(shared * 10 < private * 8, "{shared} of {private} bytes");
    // Pages of a template lie in its order, whoever brings them.
    let mappings = slm.application["pool_mappings_max"].as_u64().unwrap();
    assert!((1..=200).contains(&mappings), "{mappings} mappings");
}

#[test]
fn real_vms_that_run_before_their_memory_share_it_at_the_target() {
    let results = results_of(&["techniques=slm+postcopy-held,full+postcopy"]);
    let [held, running] = &results.runs[..] else {
        panic!("two techniques, {} runs", results.runs.len())
    };
    for run in [held, running] {
        assert_eq!(run.failure, None, "{}", run.name());
        assert_eq!(run.vms_lost, Some(0), "{}", run.name());
        assert_eq!(notes(run), "");
        assert!(mapped(run) > 10_000, "{} pages", mapped(run));
        let shared = run.target_footprint.unwrap().guest_pss_bytes.unwrap();
        let pages = run.pages.unwrap();
        let private = (pages.total - pages.zero.unwrap()) * 4096;
        assert!(shared * 10 < private * 8, "{shared} of {private} bytes");
    }
    assert_eq!(held.mismatched_pages, Some(0));
    assert_eq!(held.compared_pages, Some(2 * PAGES));
    assert!(running.application["faults"].as_u64() > Some(0));
}

#[test]
fn real_sharing_is_kept_on_a_third_host_and_back_and_no_guest_sees_what_another_writes() {
    let run = slm(&[
        "hosts.target=2",
        "after.hops=[\"t2\", \"s1\"]",
        "after.write_shared=true",
    ]);
    let hops = run.application["hops"].as_array().unwrap();
    assert_eq!(hops.len(), 2);
    for hop in hops {
        assert_eq!(hop["mismatched_pages"], 0, "{hop}");
        assert_eq!(hop["compared_pages"], 2 * PAGES, "{hop}");
        let kept = hop["mapped_pages"].as_u64().unwrap();
        assert!(
            kept * 10 > mapped(&run) * 9,
            "{hop}: {} before",
            mapped(&run)
        );
    }
    let isolation = &run.application["isolation"];
    assert_eq!(isolation["pages_changed_by_others"], 0);
    assert!(
        isolation["pages_written"].as_u64().unwrap() > 10_000,
        "{isolation}"
    );
    let sizes = isolation["pool_bytes_after_each_half"].as_array().unwrap();
    let used = isolation["still_shared_bytes_after_each_half"]
        .as_array()
        .unwrap();
    assert!(used[0].as_u64() > Some(0), "{isolation}");
    assert!(sizes[0].as_u64() <= used[0].as_u64(), "{isolation}");
    assert_eq!((&sizes[1], &used[1]), (&0.into(), &0.into()), "{isolation}");
}

#[test]
fn real_vms_arrive_as_copies_when_their_pages_cannot_be_mapped_and_that_is_said() {
    let cases = [
        // No library.
        (
            "agent.cow_library=/nonexistent/libgangway_cow.so",
            "not installed",
            0,
        ),
        // One that is not Gangway's.
        (
            "agent.cow_library=/lib/x86_64-linux-gnu/libm.so.6",
            "did not answer",
            0,
        ),
        // No memory for the pool but 1 MiB.
        (
            "agent.pool_bytes_max=1048576",
            "pool of shared pages is full",
            1024,
        ),
    ];
    for (setting, said, mapped_max) in cases {
        let run = slm(&[setting]);
        assert_eq!(run.application["exit_code"], 0, "{setting}");
        assert_eq!(run.compared_pages, Some(2 * PAGES), "{setting}");
        assert!(notes(&run).contains(said), "{setting}: {}", notes(&run));
        assert!(
            mapped(&run) <= mapped_max,
            "{setting}: {} pages",
            mapped(&run)
        );
    }
}

/// What the tests of `cow-shim` are built with (`make test` builds all): it fails as it is called.
fn stand_in(failure: &str, dir: &Path) -> PathBuf {
    let test = std::env::current_exe().expect("the program of this test");
    let built = test.ancestors().nth(2).expect("the target directory");
    let built = built.join("examples/libstand_in.so");
    assert!(built.is_file(), "{} was not built", built.display());
    let file = dir.join(format!("{failure}.so"));
    std::fs::copy(built, &file).expect("a copy of it");
    file
}

#[test]
fn real_vms_arrive_as_copies_when_the_mapping_library_fails_and_that_is_said() {
    let dir = tempfile::tempdir().unwrap();
    for (failure, said) in [
        ("version", "speaks version"),
        ("memory", "could not be mapped"),
        ("thread", "its thread has ended"),
    ] {
        let library = stand_in(failure, dir.path());
        let run = slm(&[&format!("agent.cow_library={}", library.display())]);
        assert_eq!(run.application["exit_code"], 0, "{failure}");
        assert_eq!(run.compared_pages, Some(2 * PAGES), "{failure}");
        assert!(notes(&run).contains(said), "{failure}: {}", notes(&run));
        assert_eq!(mapped(&run), 0, "{failure}");
    }
}

/// Two pairs of hosts. Contents that go to both cross once, and are mapped wherever they come from.
#[test]
fn real_vms_of_two_hosts_share_their_memory_where_each_content_crosses_once_for_all() {
    let run = &results_of(&["techniques=full", "hosts.source=2", "hosts.target=2"]).runs[0];
    assert_intact(run);
    assert_eq!(run.compared_pages, Some(4 * PAGES));
    assert_eq!(notes(run), "");
    let pages = run.pages.unwrap();
    assert!(pages.remote_reference.unwrap() > 1000, "{pages:?}");
    assert!(mapped(run) > 20_000, "{pages:?}");
}

#[test]
fn real_vm_whose_mapping_library_is_cut_off_in_its_move_arrives_as_copies_from_then_on() {
    let run = slm(&[
        "links.core_mbit=100",
        "fault.at={ phase = \"bulk\" }",
        "fault.after_s=0.5",
        "fault.action=cut-library",
        "fault.on=target-qemu",
    ]);
    assert_eq!(run.application["exit_code_under_fault"], 0);
    assert_eq!(run.application["vms_moved_under_fault"], 2);
    assert_eq!(run.application["exit_code"], 0);
    assert!(
        notes(&run).contains("are copied there from now on"),
        "{}",
        notes(&run)
    );
    // The way back was held and compared.
    assert_eq!(run.compared_pages, Some(2 * PAGES));
}

/// Guests that share nothing at their source, in one trust domain and in two.
#[test]
fn real_vms_that_hold_the_same_share_it_at_the_target_inside_their_trust_domain_only() {
    let run = |domains: u32| {
        let settings = [
            "techniques=gang+identical",
            "vm.template=false",
            &format!("vm.domains={domains}"),
        ];
        let run = results_of(&settings).runs.pop().expect("one run");
        assert_intact(&run);
        assert_eq!(run.compared_pages, Some(2 * PAGES));
        assert_eq!(notes(&run), "");
        run
    };
    let pss = |run: &Run| {
        let at = |footprint: Option<Footprint>| footprint.unwrap().guest_pss_bytes.unwrap();
        (at(run.source_footprint), at(run.target_footprint))
    };
    let together = run(1);
    let (source, target) = pss(&together);
    assert!(target * 10 < source * 8, "{target} of {source} bytes");
    assert!(mapped(&together) > 10_000, "{:?}", together.pages);
    // What one guest has twice is shared by it alone.
    let apart = run(2);
    let (_, alone) = pss(&apart);
    assert!(mapped(&apart) < mapped(&together), "{:?}", apart.pages);
    assert!(target * 10 < alone * 8, "{target} of {alone} bytes");
}
