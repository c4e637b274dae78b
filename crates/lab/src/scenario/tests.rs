use std::path::Path;

use super::*;

#[test]
fn what_runs_beside_the_moves_has_runs_of_its_own() {
    let load = |name: &str, settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        Scenario::load(name, &settings, false)
    };
    let plain = load("pair", &[]).unwrap();
    assert_eq!(plain.each_beside(), [(None, plain.clone())]);
    assert_eq!(plain.beside(), Beside::default());
    let shaped = ["links.edge_mbit=100", "background=[\"none\",\"udp\"]"];
    let beside = load("pair", &shaped).unwrap().each_beside();
    let names: Vec<_> = beside.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, [None, Some("udp")]);
    let pairs: Vec<_> = beside.iter().map(|(_, one)| one.beside().pairs).collect();
    assert_eq!(pairs, [0, 7]);
    let busy = load("pair", &["workloads=[\"nfs\",\"subset-sum\"]"]).unwrap();
    let each = busy.each_beside();
    assert!(each[0].1.guests_share_links() && !each[1].1.guests_share_links());
    assert_eq!(each[0].1.vm.mode, "nfs");
    assert!(load("pair", &["links.core_mbit=10", "background=[\"udp\"]"]).is_err());
}

#[test]
fn settings_change_a_scenario_and_wrong_ones_are_named() {
    let load = |settings: &[&str]| {
        let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
        Scenario::load("pair", &settings, false)
    };
    let changed = load(&[
        "repeats=3",
        "vm.memory_mb=512",
        "techniques=stock,gang+zstd",
        "qemu.target=7.2",
        "qemu.source=7.2",
        "qemu.machine=7.2",
        "gangway=/x/gangway",
    ])
    .unwrap();
    assert_eq!((changed.repeats, changed.vm.memory_mb), (3, 512));
    let names: Vec<_> = changed.techniques.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["stock", "gang+zstd"]);
    assert_eq!(changed.gangway.as_deref(), Some(Path::new("/x/gangway")));
    let fault = Scenario::load("fault", &["fault.for_s=-1".to_owned()], false).unwrap_err();
    assert!(fault.to_string().contains("0 to 600"), "{fault}");
    for wrong in [
        "hosts.sweep=[0]",
        "techniques=full+zstd",
        "repeats=0",
        "vm.size=1",
        "techniques=magic",
        "vm.memory_mb=16",
        "repeats",
    ] {
        let error = format!("{:#}", load(&[wrong]).unwrap_err());
        let word = wrong.split(['=', '.']).next_back().unwrap();
        let key = wrong
            .split('=')
            .next()
            .unwrap()
            .split('.')
            .next_back()
            .unwrap();
        assert!(
            error.contains(word) || error.contains(key),
            "{wrong}: {error}"
        );
    }
}

#[test]
fn a_sweep_runs_every_topology_in_every_repeat() {
    let rounds = |once| {
        let settings = ["hosts.sweep=1,3", "repeats=2", once].map(str::to_owned);
        let scenario = Scenario::load("irlm-fig4", &settings, false).unwrap();
        assert_eq!(scenario.largest().hosts.source, 3);
        let each = |(repeat, one): (u32, Scenario)| {
            (repeat, one.hosts.source, one.hosts.target, one.vms())
        };
        scenario.rounds().map(each).collect::<Vec<_>>()
    };
    assert_eq!(
        rounds("hosts.sweep_once=false"),
        [(0, 1, 1, 4), (0, 3, 3, 12), (1, 1, 1, 4), (1, 3, 3, 12)]
    );
    assert_eq!(
        rounds("hosts.sweep_once=true"),
        [(0, 1, 1, 4), (0, 3, 3, 12), (1, 3, 3, 12)]
    );
    let plain = Scenario::load("pair", &[], false).unwrap();
    assert_eq!(plain.points(), std::slice::from_ref(&plain));
}
