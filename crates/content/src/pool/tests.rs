use std::collections::{BTreeMap as Map, BTreeSet};

use proptest::prelude::*;

use super::*;

const GIB: ByteLen = ByteLen(1 << 30);

fn content(n: u8) -> ContentId {
    ContentId([n; 16])
}

fn user(vm: u32, page: u32) -> PoolUser {
    PoolUser {
        vm: PoolVm(vm),
        block: BlockIndex(0),
        page: PageNo(page),
    }
}

fn pages(count: u64) -> ByteLen {
    ByteLen(count * PAGE_SIZE as u64)
}

fn two_vms() -> Pool {
    let mut pool = Pool::new(GIB);
    assert_eq!(
        pool.add_vm(PoolVm(1), &[pages(10), pages(6)]),
        Ok(PoolPage(0))
    );
    assert_eq!(pool.add_vm(PoolVm(2), &[pages(16)]), Ok(PoolPage(16)));
    pool
}

#[test]
fn a_content_lies_at_the_page_that_brought_it_and_once() {
    let mut pool = two_vms();
    let at = pool.place(content(1), user(2, 3)).unwrap();
    assert_eq!((at.at, at.new), (PoolPage(19), true));
    let second = PoolUser {
        block: BlockIndex(1),
        ..user(1, 2)
    };
    let same = pool.place(content(1), second).unwrap();
    assert_eq!((same.at, same.new), (PoolPage(19), false));
    let own = pool
        .place(
            content(2),
            PoolUser {
                page: PageNo(5),
                ..second
            },
        )
        .unwrap();
    assert_eq!((own.at, own.new), (PoolPage(15), true));
    assert_eq!((pool.live(), pool.users()), (pages(2), 3));
    let beyond = PoolUser {
        page: PageNo(6),
        ..second
    };
    assert_eq!(pool.place(content(3), beyond), Err(PoolError::Outside));
    assert_eq!(
        pool.place(content(3), user(3, 0)),
        Err(PoolError::UnknownVm)
    );
}

#[test]
fn a_content_never_changes_while_a_page_uses_it() {
    let mut pool = two_vms();
    pool.place(content(1), user(1, 0)).unwrap();
    pool.place(content(1), user(2, 0)).unwrap();
    // The page that brought it has a newer content: its place is taken by what the other uses.
    assert_eq!(pool.place(content(2), user(1, 0)), Err(PoolError::Occupied));
    assert_eq!(pool.release(user(1, 0)), None);
    assert_eq!(pool.place(content(2), user(1, 0)), Err(PoolError::Occupied));
    assert_eq!(pool.release(user(2, 0)), Some(PoolPage(0)));
    assert!(pool.place(content(2), user(1, 0)).unwrap().new);
    assert_eq!(pool.find(content(1)), None);
}

#[test]
fn a_page_that_changes_its_content_gives_the_old_one_back() {
    let mut pool = two_vms();
    pool.place(content(1), user(1, 0)).unwrap();
    pool.place(content(2), user(2, 0)).unwrap();
    let moved = pool.place(content(2), user(1, 0)).unwrap();
    assert_eq!(
        (moved.at, moved.new, moved.freed),
        (PoolPage(16), false, Some(PoolPage(0)))
    );
    let again = pool.place(content(2), user(1, 0)).unwrap();
    assert_eq!((again.new, again.freed, pool.users()), (false, None, 2));
}

#[test]
fn a_full_pool_takes_known_contents_only() {
    let mut pool = Pool::new(pages(1));
    pool.add_vm(PoolVm(1), &[pages(4)]).unwrap();
    pool.place(content(1), user(1, 0)).unwrap();
    assert_eq!(pool.place(content(2), user(1, 1)), Err(PoolError::Full));
    assert!(!pool.place(content(1), user(1, 1)).unwrap().new);
}

#[test]
fn pages_of_a_file_lie_in_its_order_whoever_brings_them_and_twice_if_the_file_has_them_twice() {
    let mut pool = two_vms();
    let space = PoolSpace {
        owner: 1,
        number: 0,
    };
    let mut place = |page, n, user| {
        let placed = pool.place_at(PoolSpot { space, page }, content(n), user);
        (placed, pool.file_pages())
    };
    let (first, file_pages) = place(100, 1, user(2, 3));
    let start = first.unwrap().at.0 - 100;
    assert!(start >= 32 && file_pages >= start + SPACE_PAGES);
    let at = |page, new| {
        Ok(Placed {
            at: PoolPage(start + page),
            new,
            freed: None,
        })
    };
    assert_eq!(place(101, 1, user(1, 4)).0, at(101, true));
    assert_eq!(place(100, 1, user(1, 3)).0, at(100, false));
    // The hint is stale: the content decides.
    assert_eq!(place(100, 2, user(1, 7)).0.unwrap().at, PoolPage(7));
    assert_eq!(place(SPACE_PAGES, 3, user(1, 8)).0.unwrap().at, PoolPage(8));
    assert_eq!(
        pool.place(content(1), user(2, 9)).unwrap().at.0,
        start + 100
    );
    pool.remove_vm(PoolVm(2));
    pool.release(user(1, 3));
    assert_eq!(pool.find(content(1)), None, "only named places are left");
    assert_eq!(pool.release(user(1, 4)), Some(PoolPage(start + 101)));
    assert!(pool.spaces.is_empty() && pool.regions.len() == 1);
}

#[test]
fn a_vm_that_ends_gives_back_what_only_it_used_and_its_region_when_nobody_needs_it() {
    let mut pool = two_vms();
    for page in [2, 3, 4, 7] {
        pool.place(content(u8::try_from(page).unwrap()), user(1, page))
            .unwrap();
    }
    pool.place(content(3), user(2, 9)).unwrap();
    let freed = pool.remove_vm(PoolVm(1));
    let run = |start, pages| PoolRun {
        start: PoolPage(start),
        pages,
    };
    assert_eq!(freed, [run(2, 1), run(4, 1), run(7, 1)]);
    // Page 3 is used: a new VM must not own that place.
    assert_eq!(pool.add_vm(PoolVm(3), &[pages(16)]), Ok(PoolPage(32)));
    assert_eq!(pool.release(user(2, 9)), Some(PoolPage(3)));
    assert_eq!(pool.add_vm(PoolVm(4), &[pages(16)]), Ok(PoolPage(0)));
    assert_eq!(pool.file_pages(), 48);
    assert_eq!(pool.add_vm(PoolVm(4), &[]), Err(PoolError::KnownVm));
}

#[test]
fn a_sweep_returns_contents_that_every_sharer_has_written() {
    let mut pool = two_vms();
    for page in 0..3 {
        let id = content(u8::try_from(page).unwrap());
        pool.place(id, user(1, page)).unwrap();
        pool.place(id, user(2, page)).unwrap();
    }
    assert_eq!(pool.sweep(PoolVm(1), |_, page| page.0 == 2), []);
    let freed = pool.sweep(PoolVm(2), |_, page| page.0 == 2);
    let run = PoolRun {
        start: PoolPage(0),
        pages: 2,
    };
    assert_eq!(freed, [run]);
    assert_eq!((run.start.offset(), run.len()), (0, pages(2)));
    assert_eq!((pool.live(), pool.users()), (pages(1), 2));
}

#[test]
fn only_a_page_that_was_written_has_left_the_pool() {
    assert!(uses_pool(false, false, false), "not even read");
    assert!(uses_pool(true, false, true), "read");
    assert!(!uses_pool(true, false, false), "written");
    assert!(!uses_pool(false, true, false), "written and swapped out");
    assert!(uses_pool(false, true, true), "its frame is being moved");
}

#[test]
fn a_region_beyond_the_files_end_is_refused() {
    let mut pool = Pool::new(GIB);
    let half = pages(FILE_PAGES_MAX / 2 + 1);
    pool.add_vm(PoolVm(1), &[half]).unwrap();
    assert_eq!(pool.add_vm(PoolVm(2), &[half]), Err(PoolError::NoRoom));
    assert_eq!(
        pool.add_vm(
            PoolVm(2),
            &[ByteLen(u64::MAX), ByteLen(u64::MAX), ByteLen(u64::MAX)]
        ),
        Err(PoolError::NoRoom)
    );
}

#[derive(Clone, Debug)]
enum Step {
    Place(u8, u32, u32),
    PlaceAt(u64, u8, u32, u32),
    Release(u32, u32),
    Sweep(u32, u32),
    Remove(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let (vm, page) = (0_u32..3, 0_u32..6);
    prop_oneof![
        6 => (0_u8..8, vm.clone(), page.clone()).prop_map(|(c, v, p)| Step::Place(c, v, p)),
        4 => (0_u64..9, 0_u8..8, vm.clone(), page.clone()).prop_map(|(s, c, v, p)| Step::PlaceAt(s, c, v, p)),
        2 => (vm.clone(), page.clone()).prop_map(|(v, p)| Step::Release(v, p)),
        1 => (vm.clone(), page).prop_map(|(v, p)| Step::Sweep(v, p)),
        1 => vm.prop_map(Step::Remove),
    ]
}

proptest! {
    /// Against a model that has only the bytes: each page reads what it was said to have, as long
    /// as it uses the pool, and what is given back is used by nobody.
    #[test]
    fn pages_always_read_their_content(steps in proptest::collection::vec(step(), 1..80)) {
        let mut pool = Pool::new(pages(7));
        let mut file: Map<PoolPage, u8> = Map::new();
        let mut expected: Map<PoolUser, (u8, PoolPage)> = Map::new();
        for vm in 0..3 {
            pool.add_vm(PoolVm(vm), &[pages(6)]).unwrap();
        }
        for step in steps {
            let mut freed = Vec::new();
            match step {
                Step::Place(c, vm, page) | Step::PlaceAt(_, c, vm, page) => {
                    let placed = match step {
                        Step::PlaceAt(spot, ..) => {
                            let space = PoolSpace { owner: 1, number: spot % 2 };
                            pool.place_at(PoolSpot { space, page: spot / 2 }, content(c), user(vm, page))
                        }
                        _ => pool.place(content(c), user(vm, page)),
                    };
                    if let Ok(placed) = placed {
                        prop_assert!(placed.at.0 < pool.file_pages());
                        if placed.new {
                            prop_assert_eq!(file.insert(placed.at, c), None);
                        }
                        expected.insert(user(vm, page), (c, placed.at));
                        freed.extend(placed.freed);
                    }
                }
                Step::Release(vm, page) => {
                    expected.remove(&user(vm, page));
                    freed.extend(pool.release(user(vm, page)));
                }
                Step::Sweep(vm, page) => {
                    let runs = pool.sweep(PoolVm(vm), |_, p| p.0 > page);
                    expected.retain(|user, _| user.vm != PoolVm(vm) || user.page.0 > page);
                    freed.extend(runs.iter().flat_map(|r| r.start.0..r.start.0 + r.pages).map(PoolPage));
                }
                Step::Remove(vm) => {
                    let runs = pool.remove_vm(PoolVm(vm));
                    expected.retain(|user, _| user.vm != PoolVm(vm));
                    freed.extend(runs.iter().flat_map(|r| r.start.0..r.start.0 + r.pages).map(PoolPage));
                    pool.add_vm(PoolVm(vm), &[pages(6)]).unwrap();
                }
            }
            for page in freed {
                prop_assert!(file.remove(&page).is_some());
            }
            for (c, at) in expected.values() {
                prop_assert_eq!(file.get(at), Some(c));
            }
            let used: BTreeSet<_> = expected.values().map(|(_, at)| *at).collect();
            prop_assert_eq!(used, file.keys().copied().collect());
            prop_assert_eq!(pool.live(), pages(file.len() as u64));
            prop_assert_eq!(pool.users(), expected.len() as u64);
            let listed = (0..3).flat_map(|vm| pool.users_of(PoolVm(vm)).map(move |(_, page, at)| (user(vm, page.0), at)));
            prop_assert!(listed.eq(expected.iter().map(|(user, (_, at))| (*user, *at))));
        }
    }

    /// Within the limits, each page once, and no content in the pool that fewer than two or than
    /// half of its pages map.
    #[test]
    fn a_plan_keeps_its_limits_and_decides_for_each_content(
        vms in proptest::collection::vec((proptest::collection::vec((0_u32..3, 0_u64..12), 0..30), 0_usize..8), 1..4),
    ) {
        let lists: Vec<Vec<Candidate>> = vms.iter().map(|(steps, _)| {
            let mut page = 0;
            steps.iter().map(|(gap, at)| {
                page += gap + 1;
                Candidate { block: BlockIndex(0), page: PageNo(page), at: PoolPage(*at) }
            }).collect()
        }).collect();
        let candidates: Vec<_> = lists.iter().zip(&vms).map(|(pages, (_, runs_max))| VmCandidates { pages, runs_max: *runs_max }).collect();
        let plans = plan_runs(&candidates);
        let mut mapped: Map<u64, usize> = Map::new();
        let mut sharers: Map<u64, usize> = Map::new();
        for (vm, plan) in candidates.iter().zip(&plans) {
            prop_assert!(plan.runs.len() <= vm.runs_max);
            let mut all: Vec<_> = plan.plain.iter().map(|c| (c.page.0, c.at.0)).collect();
            for run in &plan.runs {
                for i in 0..run.pages {
                    let at = run.pool_page + u64::from(i);
                    all.push((run.page + i, at));
                    *mapped.entry(at).or_default() += 1;
                }
            }
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(vm.pages.iter().map(|c| (c.page.0, c.at.0))));
            vm.pages.iter().for_each(|c| *sharers.entry(c.at.0).or_default() += 1);
        }
        for (at, count) in mapped {
            prop_assert!(count >= 2 && count * 2 >= sharers[&at]);
        }
    }
}

#[test]
fn the_longest_runs_come_first_and_short_ones_take_their_content_along() {
    let list = |runs: &[(u32, u64, u32)]| -> Vec<Candidate> {
        let pages = runs.iter().flat_map(|&(page, at, count)| {
            (0..count).map(move |i| Candidate {
                block: BlockIndex(0),
                page: PageNo(page + i),
                at: PoolPage(at + u64::from(i)),
            })
        });
        pages.collect()
    };
    let one = list(&[(0, 100, 2), (10, 200, 50), (100, 300, 1)]);
    let two = list(&[(5, 300, 1), (7, 200, 50), (90, 100, 2)]);
    let plans = plan_runs(&[
        VmCandidates {
            pages: &one,
            runs_max: 2,
        },
        VmCandidates {
            pages: &two,
            runs_max: 1,
        },
    ]);
    let run = |page, pages, pool_page| cow_abi::MapRun {
        block: 0,
        page,
        pages,
        pool_page,
    };
    // The two pages at 100 would fit into the first VM; the second has no room for them.
    assert_eq!(plans[0].runs, [run(10, 50, 200)]);
    assert_eq!(plans[1].runs, [run(7, 50, 200)]);
    assert_eq!((plans[0].plain.len(), plans[1].plain.len()), (3, 3));
}

#[test]
fn a_plan_for_eight_vms_with_scattered_pages_takes_moments() {
    let list: Vec<Candidate> = (0..65_536_u32)
        .map(|page| Candidate {
            block: BlockIndex(0),
            page: PageNo(page),
            at: PoolPage(u64::from(page.wrapping_mul(2_654_435_761) >> 16)),
        })
        .collect();
    let vm = VmCandidates {
        pages: &list,
        runs_max: mapping_budget(65_530, 500),
    };
    let start = std::time::Instant::now();
    let plans = plan_runs(&[vm; 8]);
    println!("{:?} for 8 VMs of 256 MiB", start.elapsed());
    assert!(
        plans
            .iter()
            .all(|plan| plan.runs.len() <= 30_467 && !plan.runs.is_empty())
    );
}
