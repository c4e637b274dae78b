//! Chooses what shares a page at a target host for what it holds (sharing `identical`): contents that
//! two or more pages have of those VMs of a trust domain that go from this host to that one.
//!
//! A mapping of a page of its own is worth having, but a process may have only so many: where a VM's
//! pages lie in more runs, the longest are chosen, and that is decided for each content.

use std::collections::HashMap;
use std::sync::Arc;

use content::Identical;
use content::pool::{Candidate, PoolPage, VmCandidates, plan_runs, runs_in};
use guest::scan::{PageKind, Scan};
use page::{BlockIndex, PageNo};

use crate::target::FILL_ROW;

/// A page with one byte all over lies at its target in as many places in a row as the mapper puts it
/// there ([`FILL_ROW`]): with twice as many pages of it there is less memory in use, wherever they are.
const FILL_SHARERS_MIN: u64 = 128;

/// What one VM has of it.
#[derive(Debug, Default)]
pub(crate) struct OfVm {
    /// How many of its pages share.
    pub(crate) pages: u64,
    /// Its pages that could, and do not: block by its position, and page.
    pub(crate) left_out: Vec<(u16, PageNo)>,
}

/// What shares at one target host.
#[derive(Debug)]
pub(crate) struct SharedAlike {
    pub(crate) contents: Arc<Identical>,
    /// By name of the VM.
    pub(crate) vms: HashMap<String, OfVm>,
}

/// Chooses for these VMs, each with at most `runs_max` runs.
pub(super) fn choose(scan: &Scan, names: &[&str], runs_max: usize) -> SharedAlike {
    let sharers = Sharers::count(scan, names);
    let mut vms: HashMap<String, OfVm> = HashMap::new();
    for name in names {
        let pages = sharers.candidates(scan, name).count() as u64;
        let left_out = Vec::new();
        vms.insert((*name).to_owned(), OfVm { pages, left_out });
    }
    let runs = |name: &&str| runs_in(sharers.candidates(scan, name));
    if names.iter().any(|name| runs(name) > runs_max) {
        let lists: Vec<Vec<Candidate>> = names
            .iter()
            .map(|name| sharers.candidates(scan, name).collect())
            .collect();
        let all = lists.iter().map(|pages| VmCandidates { pages, runs_max });
        let plans = plan_runs(&all.collect::<Vec<_>>());
        for (name, plan) in names.iter().zip(plans) {
            if let Some(vm) = vms.get_mut(*name) {
                vm.pages -= plan.plain.len() as u64;
                let left_out = plan.plain.iter().map(|one| (one.block.0, one.page));
                vm.left_out = left_out.collect();
            }
        }
    }
    let contents = Arc::new(sharers.identical(scan));
    SharedAlike { contents, vms }
}

/// How many pages have each content, and where the first of them is.
struct Sharers {
    /// By number of the content.
    contents: Vec<(u32, PoolPage)>,
    /// By byte.
    fills: Vec<u64>,
}

impl Sharers {
    fn count(scan: &Scan, names: &[&str]) -> Self {
        let mut contents = vec![(0_u32, PoolPage(0)); scan.contents().len()];
        let mut fills = vec![0; 256];
        for (vm, name) in (0_u64..).zip(names) {
            for (region, page, kind) in scan.pages_of(name) {
                match kind {
                    PageKind::Content(no) => {
                        let (pages, first) = &mut contents[no.0 as usize];
                        if *pages == 0 {
                            *first = place(vm, region, page);
                        }
                        *pages = pages.saturating_add(1);
                    }
                    PageKind::Fill(byte) => fills[usize::from(byte)] += 1,
                    PageKind::Untouched | PageKind::Zero | PageKind::Unknown => {}
                }
            }
        }
        Self { contents, fills }
    }

    /// The pages of a VM that can share, in order, and where they will lie, so far as it matters which
    /// lie beside each other.
    fn candidates<'a>(&'a self, scan: &'a Scan, name: &'a str) -> impl Iterator<Item = Candidate> {
        let candidate = |(region, page, kind): (u16, PageNo, PageKind)| {
            let at = match kind {
                PageKind::Content(no) => {
                    let (pages, first) = self.contents[no.0 as usize];
                    (pages > 1).then_some(first)?
                }
                PageKind::Fill(byte) if self.is_shared_fill(byte) => fill_place(byte, page),
                _ => return None,
            };
            let block = BlockIndex(region);
            Some(Candidate { block, page, at })
        };
        scan.pages_of(name).filter_map(candidate)
    }

    fn is_shared_fill(&self, byte: u8) -> bool {
        self.fills[usize::from(byte)] >= FILL_SHARERS_MIN
    }

    fn identical(&self, scan: &Scan) -> Identical {
        let mut identical = Identical::default();
        for (no, (pages, _)) in (0..).zip(&self.contents) {
            if *pages > 1
                && let Some(id) = scan.contents().id(guest::scan::ContentNo(no))
            {
                identical.add(id);
            }
        }
        (0..=u8::MAX)
            .filter(|byte| self.is_shared_fill(*byte))
            .for_each(|byte| identical.add_fill(byte));
        identical
    }
}

/// Pages of a block have 32 bits, blocks of a VM 16; a plan has fewer than 2^15 VMs.
fn place(vm: u64, region: u16, page: PageNo) -> PoolPage {
    PoolPage((vm & 0x7fff) << 48 | u64::from(region) << 32 | u64::from(page.0))
}

fn fill_place(byte: u8, page: PageNo) -> PoolPage {
    PoolPage(1 << 63 | (u64::from(byte) * u64::from(FILL_ROW) + u64::from(page.0 % FILL_ROW)))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::AtomicBool;

    use guest::scan::{Bounds, Pace, Region, ScanProgress, VmMemory};
    use page::{ContentKey, HostAddr, PAGE_SIZE};
    use sys::PagemapEntry;

    use super::*;

    type Pages = Vec<Option<(u8, u8)>>;

    /// A VM whose pages each have two bytes that make their content; with two that are the same, that
    /// byte all over; not touched where there are none.
    struct Fake(Pages);

    impl Fake {
        fn page(&self, addr: HostAddr) -> Option<(u8, u8)> {
            let at = usize::try_from(addr.0).unwrap() / PAGE_SIZE - 1;
            self.0[at]
        }
    }

    impl VmMemory for Fake {
        fn page_table(&self, start: HostAddr, out: &mut [PagemapEntry]) -> io::Result<()> {
            for (at, entry) in (0..).zip(out) {
                let addr = HostAddr(start.0 + at * PAGE_SIZE as u64);
                let touched = self.page(addr).is_some();
                *entry = PagemapEntry(if touched { 1 << 63 | 1 << 56 } else { 0 });
            }
            Ok(())
        }

        fn pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize> {
            for (addr, out) in addrs.iter().zip(out.chunks_mut(PAGE_SIZE)) {
                let (first, rest) = self.page(*addr).unwrap();
                out.fill(rest);
                out[0] = first;
            }
            Ok(addrs.len())
        }

        fn shared_pages(&self, addrs: &[HostAddr], out: &mut [u8]) -> io::Result<usize> {
            self.pages(addrs, out)
        }

        fn samples(&self, _: &[HostAddr], _: usize, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }
    }

    fn key() -> ContentKey {
        ContentKey::new([5; 32])
    }

    fn has(chosen: &SharedAlike, first: u8) -> bool {
        let mut bytes = [9; PAGE_SIZE];
        bytes[0] = first;
        chosen.contents.has(key().id_of(&bytes))
    }

    fn scan(vms: &[(&str, Pages)]) -> Scan {
        let mut scan = Scan::new(key());
        let (cancelled, progress) = (AtomicBool::new(false), ScanProgress::default());
        let mut pace = Pace::new(Bounds::default(), &cancelled, &progress);
        scan.begin();
        for ((name, pages), process) in vms.iter().zip(1..) {
            let region = Region {
                start: HostAddr(PAGE_SIZE as u64),
                pages: u32::try_from(pages.len()).unwrap(),
            };
            let memory = Fake(pages.clone());
            scan.scan_vm((name, process), &memory, &[region], &mut pace)
                .unwrap();
        }
        scan.end();
        scan
    }

    /// Pages with these contents, 0 for one that was not touched.
    fn pages(contents: &[u8]) -> Pages {
        let page = |n: &u8| (*n != 0).then_some((*n, 9));
        contents.iter().map(page).collect()
    }

    #[test]
    fn what_two_pages_of_the_vms_of_a_target_have_shares_there_and_nothing_else() {
        let scan = scan(&[
            ("a", pages(&[1, 2, 0, 3, 3])),
            ("b", pages(&[2, 4, 0])),
            ("elsewhere", pages(&[1, 4, 5])),
        ]);
        let chosen = choose(&scan, &["a", "b"], 100);
        let shared: Vec<u8> = (1..8).filter(|n| has(&chosen, *n)).collect();
        assert_eq!(shared, [2, 3]);
        assert_eq!((chosen.vms["a"].pages, chosen.vms["b"].pages), (3, 1));
        assert!(chosen.vms.values().all(|vm| vm.left_out.is_empty()));
        let all = choose(&scan, &["a", "b", "elsewhere"], 100);
        assert!(has(&all, 1) && has(&all, 4) && !has(&all, 5));
    }

    #[test]
    fn fill_pages_share_if_there_are_more_than_their_places() {
        let fill = |byte: u8, count: u64| vec![Some((byte, byte)); usize::try_from(count).unwrap()];
        let (few, many) = (63, 100);
        assert!(2 * few < FILL_SHARERS_MIN && 2 * many >= FILL_SHARERS_MIN);
        let vm = || [fill(7, few), fill(8, many), fill(0, 300)].concat();
        let chosen = choose(&scan(&[("a", vm()), ("b", vm())]), &["a", "b"], 1000);
        let shared: Vec<u8> = (0..20)
            .filter(|byte| chosen.contents.has_fill(*byte))
            .collect();
        assert_eq!(shared, [8]);
        assert_eq!(chosen.vms["a"].pages, 100);
    }

    #[test]
    fn with_more_runs_than_can_be_mapped_the_longest_are_chosen() {
        let long: Vec<u8> = (10..20).collect();
        let a = [&long[..], &[0, 30, 0, 31]].concat();
        let b = [&[31, 0, 30, 0][..], &long].concat();
        let chosen = choose(&scan(&[("a", pages(&a)), ("b", pages(&b))]), &["a", "b"], 1);
        for (name, left) in [("a", [11, 13]), ("b", [0, 2])] {
            let vm = &chosen.vms[name];
            assert_eq!(vm.pages, 10);
            assert_eq!(vm.left_out, left.map(|page| (0, PageNo(page))));
        }
    }
}
