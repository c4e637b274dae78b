//! Real QEMUs on a real rack, moved without Gangway: the lab measures what it says it measures.

use lab::run;
use lab::scenario::Scenario;

#[test]
fn real_stock_pair_arrives_whole_and_every_page_is_compared() {
    let settings = ["techniques=stock", "vm.memory_mb=128", "settle_s=1"].map(str::to_owned);
    let scenario = Scenario::load("pair", &settings, false).unwrap();
    let out = tempfile::tempdir().unwrap();
    let results = run::scenario("pair", &scenario, out.path()).unwrap();

    let [run] = &results.runs[..] else {
        panic!("one technique, one run")
    };
    assert_eq!(run.failure, None);
    assert_eq!(run.vms_lost, Some(0));
    assert_eq!(run.compared_pages, Some(2 * (128 << 20) / 4096));
    assert_eq!(run.mismatched_pages, Some(0));
    assert_eq!(run.stamp_errors, Some(0));
    // The guests' own checks went on at the target.
    assert!(run.application["stamped_pages_checked"].as_u64().unwrap() > 0);

    // An independent bound for the bytes: not less than the pages that are not zero need after
    // the best compression there is, not more than all memory with QEMU's and TCP's headers.
    let core = run.core_bytes.unwrap();
    assert!((8 << 20..2 * (160 << 20)).contains(&core), "{core} bytes");
    assert_eq!(run.target_to_target_bytes, Some(0));
    let down = run.downtime_ms.unwrap();
    assert!(down.mean > 0.0 && down.max / 1e3 < run.total_migration_time_s.unwrap());
    assert!(run.eviction_time_s.unwrap() > 0.0);
    assert!(run.source_footprint_bytes.unwrap() > 2 * (20 << 20));

    // Nothing stays behind.
    let mine = format!("gw{}", std::process::id());
    let names = std::fs::read_dir("/run/netns").unwrap().flatten();
    assert_eq!(
        names
            .filter(|e| e.file_name().to_string_lossy().starts_with(&mine))
            .count(),
        0
    );
    assert!(!std::path::Path::new("/tmp").join(mine).exists());
}
