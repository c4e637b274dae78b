//! Preparation of real QEMUs with an index in memory, and samples.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use index::{Item, Table};
use page::{ContentId, ContentKey, EntryId, HostNo};

use super::report::sample;
use super::*;
use crate::target::{RackStores, store_name};
use crate::types::{PrepareBounds, PrepareVm};

/// The index in memory: one table, whatever the group.
#[derive(Clone)]
struct InMemory(Arc<Mutex<Table>>);

impl InMemory {
    fn new(epoch: u64) -> Self {
        Self(Arc::new(Mutex::new(Table::new(epoch, 0))))
    }
}

impl Connect for InMemory {
    fn connect(
        &self,
        _group: &str,
        _key: &ContentKey,
        _index: &[String],
    ) -> Result<Box<dyn Registrar>, RegisterError> {
        Ok(Box::new(self.clone()))
    }
}

impl Registrar for InMemory {
    fn epoch(&self) -> u64 {
        lock(&self.0).epoch()
    }

    fn register(
        &mut self,
        target: HostNo,
        batch: &[(ContentId, u32)],
    ) -> Result<Vec<Option<EntryId>>, RegisterError> {
        let items: Vec<_> = batch
            .iter()
            .map(|&(id, pages)| Item { id, pages })
            .collect();
        let mut entries = Vec::new();
        lock(&self.0).register(target, &items, &mut entries);
        Ok(entries)
    }

    fn seed(
        &mut self,
        target: HostNo,
        batch: &[ContentId],
    ) -> Result<Vec<Option<EntryId>>, RegisterError> {
        let mut entries = Vec::new();
        lock(&self.0).seed(target, batch, &mut entries);
        Ok(entries)
    }

    fn shared(
        &mut self,
        target: HostNo,
        batch: &[ContentId],
    ) -> Result<Vec<Option<EntryId>>, RegisterError> {
        let mut entries = Vec::new();
        lock(&self.0).shared(target, batch, &mut entries);
        Ok(entries)
    }
}

struct Vm(Child, PathBuf);

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A VM that does not run, with 200 pages that every VM has and 100 of its own.
fn vm(dir: &Path, name: &str, own: u8) -> Vm {
    let page = |number: u8| {
        let mut page = vec![if number < 200 { 1 } else { own }; 4096];
        page[0] = number;
        page
    };
    let data = dir.join(format!("{name}.data"));
    let pages = (0..200).chain(0..100).enumerate();
    let pages = pages.flat_map(|(at, n)| page(if at < 200 { n } else { 200 + n % 55 }));
    std::fs::write(&data, pages.collect::<Vec<u8>>()).unwrap();
    let qmp = dir.join(format!("{name}.qmp"));
    let command = format!(
        "-S -machine pc -accel tcg -nodefaults -display none -m 64 \
         -qmp unix:{},server=on,wait=off -device loader,file={},addr=0x1000000,force-raw=on",
        qmp.display(),
        data.display()
    );
    let child = Command::new("qemu-system-x86_64")
        .args(command.split_whitespace())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while guest::SourceGuest::attach(&qmp).is_err() {
        assert!(begin.elapsed() < Duration::from_secs(20), "QEMU starts");
        std::thread::sleep(Duration::from_millis(20));
    }
    Vm(child, qmp)
}

fn spec(group: &str, vms: &[(&str, &Vm, u16)], targets: u16) -> PrepareSpec {
    let one = |&(name, vm, target): &(&str, &Vm, u16)| PrepareVm {
        vm: name.to_owned(),
        qmp: vm.1.clone(),
        domain_key: "42".repeat(32),
        target,
    };
    PrepareSpec {
        group: group.to_owned(),
        vms: vms.iter().map(one).collect(),
        index: vec!["index:1".to_owned()],
        targets,
        bounds: PrepareBounds::default(),
        resident: false,
        seeded: false,
        identical: false,
    }
}

fn settled(host: &Preparations, group: &str) -> PrepareStatus {
    let begin = Instant::now();
    loop {
        let status = host.status(group).unwrap();
        if status.state.is_settled() {
            return status;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{status:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn id(first: u8, rest: u8) -> ContentId {
    let mut page = [rest; 4096];
    page[0] = first;
    ContentKey::new([0x42; 32]).id_of(&page)
}

#[test]
fn real_hosts_learn_which_contents_other_targets_need_and_prepare_again_cheaply() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (vm(dir.path(), "one", 7), vm(dir.path(), "two", 8));
    let index = InMemory::new(9);
    let host = |name| Preparations::new(name, 23, Some(Arc::new(index.clone())));
    let (a, b) = (host("a"), host("b"));
    let specs = [
        spec("g", &[("one", &one, 0)], 2),
        spec("g", &[("two", &two, 1)], 2),
    ];
    let wish = ResolveSpec {
        compress: true,
        carried_elsewhere: Vec::new(),
    };
    let mut efforts = Vec::new();
    for _ in 0..2 {
        for (host, spec) in [&a, &b].into_iter().zip(&specs) {
            host.start(spec.clone()).unwrap();
            assert!(host.start(spec.clone()).is_err(), "it is under way");
        }
        for host in [&a, &b] {
            let status = settled(host, "g");
            assert_eq!(status.state, PrepareState::Registered, "{status:?}");
            assert!(status.message.is_empty(), "{status:?}");
            efforts.push(status.report.unwrap().pages_read);
            host.resolve("g", wish.clone()).unwrap();
            assert_eq!(settled(host, "g").state, PrepareState::Ready);
        }
    }
    assert!(efforts[0] > 300 && efforts[2] == 0, "{efforts:?}");

    let prepared = a.prepared("g", &[0x42; 32]).unwrap();
    let entry = |n: u8| match prepared.lookup(id(n, 1)) {
        Some(Need::Several(entry)) => entry,
        other => panic!("content {n} is needed by both: {other:?}"),
    };
    // Neighbours have neighbouring entries.
    assert_eq!(entry(101).0, entry(100).0 + 1);
    assert_eq!(prepared.lookup(id(210, 7)), Some(Need::One(HostNo(0))));
    assert_eq!(prepared.lookup(id(210, 8)), None, "the other host's");
    assert!(a.prepared("g", &[0; 32]).is_none(), "another trust domain");

    let report = settled(&a, "g").report.unwrap();
    let zstd = report.pairs[0].zstd_bytes.unwrap();
    assert!(zstd > 0 && zstd < report.pages.distinct * 4096 / 2);
    assert_eq!(report.pairs[0].rack_zstd_bytes, Some(zstd));
    a.end("g").unwrap();
    assert!(a.prepared("g", &[0x42; 32]).is_none());
}

#[test]
fn real_contents_of_a_vm_that_stays_at_the_only_target_are_to_be_claimed_and_are_there() {
    let dir = tempfile::tempdir().unwrap();
    let (stays, moves) = (vm(dir.path(), "stays", 7), vm(dir.path(), "moves", 8));
    let index = InMemory::new(3);
    let stores = Arc::<RackStores>::default();
    let host = |name| Preparations::new(name, 23, Some(Arc::new(index.clone())));
    let (target, source) = (host("t").with_stores(Arc::clone(&stores)), host("s"));
    let resident = PrepareSpec {
        resident: true,
        seeded: true,
        ..spec("g", &[("stays", &stays, 0)], 1)
    };
    let moving = PrepareSpec {
        seeded: true,
        ..spec("g", &[("moves", &moves, 0)], 1)
    };
    target.start(resident).unwrap();
    let status = settled(&target, "g.resident");
    assert_eq!(status.state, PrepareState::Registered, "{status:?}");
    source.start(moving).unwrap();
    settled(&source, "g");
    source.resolve("g", ResolveSpec::default()).unwrap();
    settled(&source, "g");

    let prepared = source.prepared("g", &[0x42; 32]).unwrap();
    let both_have = prepared.lookup(id(100, 1));
    assert!(matches!(both_have, Some(Need::Several(_))), "{both_have:?}");
    assert_eq!(prepared.lookup(id(210, 8)), Some(Need::One(HostNo(0))));

    let key = ContentKey::new([0x42; 32]);
    let kept = || stores.seeds_of(&store_name(&key, "g", 3));
    let Some(Need::Several(entry)) = both_have else {
        unreachable!()
    };
    assert!(kept().contains(&(entry, id(100, 1))));
    target.end("g.resident").unwrap();
    assert!(kept().is_empty());
}

#[test]
fn real_an_index_that_lost_everything_is_told_again() {
    let dir = tempfile::tempdir().unwrap();
    let one = vm(dir.path(), "one", 7);
    let host = Preparations::new("a", 23, None);
    let spec = spec("g", &[("one", &one, 0)], 1);
    // Without an index: a single target host needs everything.
    host.start(spec.clone()).unwrap();
    settled(&host, "g");
    host.resolve("g", ResolveSpec::default()).unwrap();
    settled(&host, "g");
    let prepared = host.prepared("g", &[0x42; 32]).unwrap();
    assert_eq!(prepared.lookup(id(3, 1)), Some(Need::One(HostNo(0))));

    let restarted = InMemory::new(1);
    let host = Preparations::new("a", 23, Some(Arc::new(restarted.clone())));
    let mut counts = Vec::new();
    for epoch in [1, 1, 2] {
        if lock(&restarted.0).epoch() != epoch {
            *lock(&restarted.0) = Table::new(epoch, 0);
        }
        host.start(spec.clone()).unwrap();
        assert_eq!(settled(&host, "g").state, PrepareState::Registered);
        counts.push(lock(&restarted.0).summary().pages);
    }
    // Not twice to the same table.
    assert!(
        counts[0] > 300 && counts[0] == counts[1] && counts[1] == counts[2],
        "{counts:?}"
    );
}

/// Three VMs that are the same, the third in a trust domain of its own.
#[test]
fn real_vms_share_what_they_hold_in_common_inside_their_trust_domain_and_only_if_that_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let names = ["one", "two", "three"];
    let vms = names.map(|name| vm(dir.path(), name, 7));
    let host = Preparations::new("a", 23, None);
    let mut spec = spec(
        "g",
        &[
            ("one", &vms[0], 0),
            ("two", &vms[1], 0),
            ("three", &vms[2], 0),
        ],
        1,
    );
    spec.index.clear();
    spec.vms[2].domain_key = "43".repeat(32);
    let alike = |identical, secret, vm| {
        let spec = PrepareSpec {
            identical,
            ..spec.clone()
        };
        host.start(spec).unwrap();
        settled(&host, "g");
        host.resolve("g", ResolveSpec::default()).unwrap();
        settled(&host, "g");
        host.alike("g", &[secret; 32], vm)
    };
    assert!(alike(false, 0x42, "one").is_none());
    let shared = alike(true, 0x42, "one").unwrap();
    // The page whose first byte is 1, too, has one byte all over.
    let common = || (0..200).filter(|n| *n != 1);
    assert!(common().all(|n| shared.contents.has(id(n, 1))));
    assert!(shared.contents.has(id(210, 7)));
    assert!(shared.vms["one"].pages >= 300 && !shared.vms.contains_key("three"));
    // Of the contents that it has once, none: those of the other domain do not count.
    let alone = host.alike("g", &[0x43; 32], "three").unwrap();
    assert!(alone.vms["three"].pages < 200, "{:?}", alone.vms);
    let other = |n| {
        let mut page = [1; 4096];
        page[0] = n;
        ContentKey::new([0x43; 32]).id_of(&page)
    };
    assert!(common().all(|n| !alone.contents.has(other(n))));
    assert!(host.alike("g", &[0x43; 32], "one").is_none());
}

#[test]
fn a_vm_that_is_gone_fails_the_preparation_and_says_which() {
    let host = Preparations::new("a", 23, None);
    let vm = PrepareVm {
        vm: "gone".to_owned(),
        qmp: PathBuf::from("/nonexistent/qmp"),
        domain_key: "42".repeat(32),
        target: 0,
    };
    let spec = PrepareSpec {
        group: "g".to_owned(),
        vms: vec![vm],
        index: Vec::new(),
        targets: 1,
        bounds: PrepareBounds::default(),
        resident: false,
        seeded: false,
        identical: false,
    };
    host.start(spec.clone()).unwrap();
    let status = settled(&host, "g");
    assert_eq!(status.state, PrepareState::Failed);
    assert!(status.message.contains("VM `gone`"), "{status:?}");
    assert!(host.resolve("g", ResolveSpec::default()).is_err());
    assert!(host.status("other").is_err());
    let mut bad = spec;
    bad.vms[0].domain_key = "42".to_owned();
    assert!(host.start(bad).is_err());
}

#[test]
fn a_sample_is_the_same_choice_on_every_host() {
    let ids: Vec<u64> = (1..=4096_u64)
        .map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .collect();
    let whole = sample(ids.clone(), 4096);
    assert_eq!(whole.zero_bits, 0);
    assert_eq!(ids_of(&whole.contents).collect::<Vec<_>>(), ids);
    let some = sample(ids.clone(), 600);
    let chosen: Vec<_> = ids_of(&some.contents).collect();
    assert!(
        chosen.len() <= 600 && chosen.len() > 200,
        "{}",
        chosen.len()
    );
    assert!(
        chosen
            .iter()
            .all(|id| id.leading_zeros() >= u32::from(some.zero_bits))
    );
    let all = ids
        .iter()
        .filter(|id| id.leading_zeros() >= u32::from(some.zero_bits));
    assert_eq!(all.count(), chosen.len());
    assert_eq!(
        ids_of("00000000000000zz0000000000000001").collect::<Vec<_>>(),
        [1]
    );
}
