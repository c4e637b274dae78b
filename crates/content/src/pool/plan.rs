//! Which runs are mapped, when there are more than a process may have mappings.

use std::collections::{HashMap, HashSet};

use cow_abi::MapRun;
use page::{BlockIndex, PageNo};

use super::PoolPage;

/// Mappings that QEMU may need for itself after the migration: threads, plugged memory, devices.
const MAPPINGS_RESERVED: u64 = 4096;

/// Attempts until the choice is stable. Each leaves out every content that the one before has found
/// unfit; a handful is usual. If that many do not do, nothing is mapped.
const PASSES_MAX: usize = 64;

/// A page of a VM, and the page of the pool with its content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Block of the VM.
    pub block: BlockIndex,
    /// Page of the block.
    pub page: PageNo,
    /// Where the content lies, or will lie.
    pub at: PoolPage,
}

/// The candidates of one VM.
#[derive(Clone, Copy, Debug)]
pub struct VmCandidates<'a> {
    /// In the order of blocks and pages, each page once.
    pub pages: &'a [Candidate],
    /// Most runs, from [`mapping_budget`].
    pub runs_max: usize,
}

/// What is done with the candidates of one VM.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VmPlan {
    /// To be mapped, in the order of blocks and pages.
    pub runs: Vec<MapRun>,
    /// To be sent plainly, in the same order.
    pub plain: Vec<Candidate>,
}

/// How many runs a process may get that has `mappings` now, where the kernel allows
/// `max_map_count`: each run in the middle of plain memory makes two mappings more.
#[must_use]
pub fn mapping_budget(max_map_count: u64, mappings: u64) -> usize {
    let free = max_map_count.saturating_sub(mappings);
    usize::try_from(free.saturating_sub(MAPPINGS_RESERVED) / 2).unwrap_or(usize::MAX)
}

/// How many runs these candidates of one VM make, which come in order.
pub fn runs_in(candidates: impl Iterator<Item = Candidate>) -> usize {
    let mut last: Option<Candidate> = None;
    let begins_run = |next: &Candidate| {
        let before = last.replace(*next);
        before.is_none_or(|last| !follows(&last, next))
    };
    candidates.filter(begins_run).count()
}

fn follows(last: &Candidate, next: &Candidate) -> bool {
    last.block == next.block
        && last.page.0.checked_add(1) == Some(next.page.0)
        && last.at.0.checked_add(1) == Some(next.at.0)
}

/// Chooses the runs that are mapped: the longest of each VM, within its limit.
///
/// Decided for each content, not for each page: KSM can merge the pages of a content that is not
/// in the pool, but never a plain page with a page of the pool. So a content stays only if two
/// pages or more map it, and at least half of those that have it.
#[must_use]
pub fn plan_runs(vms: &[VmCandidates<'_>]) -> Vec<VmPlan> {
    let mut sharers: HashMap<PoolPage, u32> = HashMap::new();
    for candidate in vms.iter().flat_map(|vm| vm.pages) {
        *sharers.entry(candidate.at).or_default() += 1;
    }
    let mut out: HashSet<PoolPage> = HashSet::new();
    out.extend(
        sharers
            .iter()
            .filter(|(_, count)| **count < 2)
            .map(|(at, _)| *at),
    );
    for _ in 0..PASSES_MAX {
        let chosen: Vec<Vec<MapRun>> = vms.iter().map(|vm| longest_runs(vm, &out)).collect();
        let unfit = unfit_contents(&chosen, &sharers, &out);
        if unfit.is_empty() {
            return vms
                .iter()
                .zip(chosen)
                .map(|(vm, runs)| finish(vm, runs))
                .collect();
        }
        out.extend(unfit);
    }
    vms.iter().map(|vm| finish(vm, Vec::new())).collect()
}

/// The longest runs of one VM without the contents in `out`, in the order of pages.
fn longest_runs(vm: &VmCandidates<'_>, out: &HashSet<PoolPage>) -> Vec<MapRun> {
    let mut runs: Vec<MapRun> = Vec::new();
    for candidate in vm
        .pages
        .iter()
        .filter(|candidate| !out.contains(&candidate.at))
    {
        match runs.last_mut() {
            Some(run) if continues(run, candidate) => run.pages += 1,
            _ => runs.push(MapRun {
                block: candidate.block.0,
                page: candidate.page.0,
                pages: 1,
                pool_page: candidate.at.0,
            }),
        }
    }
    if runs.len() > vm.runs_max {
        runs.sort_by_key(|run| std::cmp::Reverse(run.pages));
        runs.truncate(vm.runs_max);
        runs.sort_by_key(|run| (run.block, run.page));
    }
    runs
}

fn continues(run: &MapRun, candidate: &Candidate) -> bool {
    run.block == candidate.block.0
        && run.page.checked_add(run.pages) == Some(candidate.page.0)
        && run.pool_page.checked_add(u64::from(run.pages)) == Some(candidate.at.0)
}

/// Contents that too few of their sharers map.
fn unfit_contents(
    chosen: &[Vec<MapRun>],
    sharers: &HashMap<PoolPage, u32>,
    out: &HashSet<PoolPage>,
) -> Vec<PoolPage> {
    let mut mapped: HashMap<PoolPage, u32> = HashMap::new();
    for run in chosen.iter().flatten() {
        for i in 0..u64::from(run.pages) {
            *mapped.entry(PoolPage(run.pool_page + i)).or_default() += 1;
        }
    }
    let unfit = |at: &PoolPage, count: u32| {
        let mapped = mapped.get(at).copied().unwrap_or(0);
        mapped < 2 || u64::from(mapped) * 2 < u64::from(count)
    };
    let unfit = sharers
        .iter()
        .filter(|(at, count)| !out.contains(*at) && unfit(at, **count));
    unfit.map(|(at, _)| *at).collect()
}

/// Adds what is left over.
fn finish(vm: &VmCandidates<'_>, runs: Vec<MapRun>) -> VmPlan {
    let mut rest = runs.iter().peekable();
    let mut plain = Vec::new();
    for candidate in vm.pages {
        let place = (candidate.block.0, candidate.page.0);
        while rest
            .next_if(|run| (run.block, run.page.saturating_add(run.pages - 1)) < place)
            .is_some()
        {}
        let in_run = rest
            .peek()
            .is_some_and(|run| (run.block, run.page) <= place);
        if !in_run {
            plain.push(*candidate);
        }
    }
    VmPlan { runs, plain }
}
