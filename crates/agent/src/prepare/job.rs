//! The two steps of a preparation, each on a thread of its own.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use guest::scan::{Bounds, ContentNo, Distinct, Examined, Pace, Scan, ScanError, VmMemory};
use guest::{GuestError, SourceGuest};
use page::{BlockIndex, ContentId, ContentKey, EntryId, HostNo, HostSet, PAGE_SIZE};
use sys::ProcessMemory;
use wire::WireCompression;

use super::identical::{self, SharedAlike};
use super::registrar::BATCH;
use super::report::{goes_to, ids_of, leading_bits, of_host};
use super::{Connect, Need, Outcome, Preparation, Prepared, RegisterError, Registrar, Secret};
use crate::api::mover::{Refusal, RefusalCode};
use crate::link::{Compressor, SqueezeError};
use crate::source::RUNS_MAX;
use crate::target::{GuestMemory, RackStores, Seed, store_name};
use crate::types::{HostSurvey, PrepareSpec, PrepareState, PrepareVm, ResolveSpec};

/// Pages compressed before zstd is flushed: the agents' frames of 1 MiB.
const FRAME_PAGES: usize = 256;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JobError {
    /// No VM could be looked at.
    #[error("no VM could be hashed; {0}")]
    NoVm(String),
    /// It was told to end.
    #[error("it was cancelled")]
    Cancelled,
    /// Compression failed.
    #[error("compression failed")]
    Compression(#[source] SqueezeError),
    /// A VM's memory could not be read.
    #[error("the memory of a VM could not be read")]
    Memory(#[source] std::io::Error),
}

/// What is known of a trust domain from one preparation to the next.
pub(crate) struct Domain {
    key: ContentKey,
    pub(super) scan: Scan,
    /// Memory of the VMs of the scan, for a survey's compression.
    memory: HashMap<String, Examined>,
    registered: Registered,
}

/// What the index was told; by content.
#[derive(Default)]
struct Registered {
    epoch: u64,
    /// Of the scan, as its contents' numbers.
    generation: u64,
    entries: Vec<Option<EntryId>>,
    by_target: BTreeMap<u16, Vec<bool>>,
}

impl Domain {
    fn new(secret: Secret) -> Self {
        let key = ContentKey::new(secret);
        Self {
            scan: Scan::new(key.clone()),
            key,
            memory: HashMap::new(),
            registered: Registered::default(),
        }
    }
}

/// The secret of each VM.
pub(super) fn keys_of(spec: &PrepareSpec) -> Result<Vec<Secret>, Refusal> {
    let refuse = |vm: &PrepareVm, problem: &str| {
        let message = format!("preparation of VM `{}`: {problem}", vm.vm);
        Refusal::of_vm(RefusalCode::BadRequest, &vm.vm, message)
    };
    let key = |vm: &PrepareVm| {
        if crate::plan::check_name(&vm.vm).is_err() || !vm.qmp.is_absolute() {
            return Err(refuse(vm, "needs a plain name and an absolute `qmp`"));
        }
        let key = hex::decode(&vm.domain_key).ok();
        key.and_then(|key| key.try_into().ok())
            .ok_or_else(|| refuse(vm, "its `domain_key` must be 64 hex digits"))
    };
    spec.vms.iter().map(key).collect()
}

/// What a scan needs of its agent.
pub(super) struct With<'a> {
    pub(super) host: &'a str,
    pub(super) index: Option<&'a dyn Connect>,
    pub(super) stores: Option<&'a RackStores>,
}

/// Hashes the memory of the VMs and registers what they have.
pub(super) fn scan(
    one: &Preparation,
    domains: &mut BTreeMap<Secret, Domain>,
    keys: Vec<Secret>,
    with: &With<'_>,
) -> Result<Outcome, JobError> {
    let spec = &one.spec;
    let (begin, cpu) = (Instant::now(), sys::thread_cpu_time());
    domains.retain(|secret, _| keys.contains(secret));
    for domain in domains.values_mut() {
        domain.memory.clear();
    }
    // Before the priority is lowered: a monitor serves one client, and must not be kept long.
    let mut problems = Vec::new();
    for (vm, secret) in spec.vms.iter().zip(keys) {
        match examine(vm) {
            Ok(examined) => {
                let domain = domains.entry(secret).or_insert_with(|| Domain::new(secret));
                let pages = examined
                    .regions
                    .iter()
                    .map(|region| u64::from(region.pages));
                one.pages_total.fetch_add(pages.sum(), Ordering::Relaxed);
                domain.memory.insert(vm.vm.clone(), examined);
            }
            Err(error) => problems.push(format!("VM `{}`: {}", vm.vm, crate::host::chain(&error))),
        }
    }
    lower_priority();
    let bounds = Bounds {
        cpu_percent: spec.bounds.cpu_percent,
        read_bytes_per_s: spec.bounds.read_bytes_per_s,
    };
    let mut pace = Pace::new(bounds, &one.cancelled, &one.progress).of_idle_priority();
    for domain in domains.values_mut() {
        scan_domain(spec, domain, &mut pace, &mut problems)?;
    }
    if domains
        .values()
        .all(|domain| domain.scan.names().next().is_none())
    {
        return Err(JobError::NoVm(problems.join("; ")));
    }
    for domain in domains.values_mut() {
        let told = match with.stores.filter(|_| spec.resident) {
            Some(stores) => seed(spec, domain, with.index, stores),
            None => register(spec, domain, with.index),
        };
        if let Err(error) = told {
            problems.push(error.to_string());
            break;
        }
    }
    if let Some(stores) = with.stores.filter(|_| spec.resident)
        && one.cancelled.load(Ordering::Relaxed)
    {
        // Whoever ended it may have been here before the seeds were kept.
        stores.forget_seeds(&spec.key());
    }
    let mut report = of_host(with.host, spec, domains);
    report.pages_read = one.progress.read();
    report.seconds = begin.elapsed().as_secs_f64();
    report.cpu_seconds = sys::thread_cpu_time().saturating_sub(cpu).as_secs_f64();
    Ok(Outcome {
        state: PrepareState::Registered,
        message: problems.join("; "),
        report,
        prepared: HashMap::new(),
    })
}

fn examine(vm: &PrepareVm) -> Result<Examined, GuestError> {
    let (guest, _events) = SourceGuest::attach(&vm.qmp)?;
    guest.examine_memory()
}

fn lower_priority() {
    if let Err(error) = sys::set_idle_priority() {
        tracing::warn!("preparation runs at normal priority: {error}");
    }
}

fn scan_domain(
    spec: &PrepareSpec,
    domain: &mut Domain,
    pace: &mut Pace<'_>,
    problems: &mut Vec<String>,
) -> Result<(), JobError> {
    let Domain { scan, memory, .. } = domain;
    let names: Vec<&str> = memory.keys().map(String::as_str).collect();
    scan.retain(&names);
    scan.begin();
    for vm in &spec.vms {
        let Some(examined) = memory.get(&vm.vm) else {
            continue;
        };
        let who = (vm.vm.as_str(), examined.process);
        match scan.scan_vm(who, &examined.memory, &examined.regions, pace) {
            Ok(_effort) => {}
            Err(ScanError::Cancelled) => return Err(JobError::Cancelled),
            Err(error @ ScanError::Read(_)) => {
                problems.push(format!("VM `{}`: {}", vm.vm, crate::host::chain(&error)));
                memory.remove(&vm.vm);
            }
        }
    }
    scan.end();
    Ok(())
}

/// Tells the index what it has not been told yet.
fn register(
    spec: &PrepareSpec,
    domain: &mut Domain,
    index: Option<&dyn Connect>,
) -> Result<(), RegisterError> {
    let Some(mut index) = connect(spec, &domain.key, index)? else {
        return Ok(());
    };
    let Domain {
        scan, registered, ..
    } = domain;
    if (registered.epoch, registered.generation) != (index.epoch(), scan.generation()) {
        *registered = Registered {
            epoch: index.epoch(),
            generation: scan.generation(),
            ..Registered::default()
        };
    }
    let contents = scan.contents();
    registered.entries.resize(contents.len(), None);
    for target in targets(spec) {
        let known = registered.by_target.entry(target).or_default();
        known.resize(contents.len(), false);
        let mut fresh = scan.distinct(|name| goes_to(spec, name, target));
        fresh.retain(|one| !known[one.no.0 as usize]);
        for batch in fresh.chunks(BATCH) {
            let item = |one: &Distinct| Some((contents.id(one.no)?, one.pages));
            let items: Vec<_> = batch.iter().filter_map(item).collect();
            let entries = index.register(HostNo(target), &items)?;
            for (one, entry) in batch.iter().zip(entries) {
                registered.entries[one.no.0 as usize] = entry;
                known[one.no.0 as usize] = true;
            }
        }
    }
    Ok(())
}

/// Tells the index what VMs have that stay on this host, and keeps for those that come where it is.
fn seed(
    spec: &PrepareSpec,
    domain: &Domain,
    index: Option<&dyn Connect>,
    stores: &RackStores,
) -> Result<(), RegisterError> {
    let Some(mut index) = connect(spec, &domain.key, index)? else {
        return Ok(());
    };
    let Some(target) = spec.vms.first().map(|vm| HostNo(vm.target)) else {
        return Ok(());
    };
    let contents = domain.scan.contents();
    let names: Vec<&str> = domain.scan.names().collect();
    let mut places: BTreeMap<usize, Vec<_>> = BTreeMap::new();
    for batch in domain.scan.distinct(|_| true).chunks(BATCH) {
        let known = batch
            .iter()
            .filter_map(|one| Some((one, contents.id(one.no)?)));
        let (batch, ids): (Vec<&Distinct>, Vec<ContentId>) = known.unzip();
        let entries = index.seed(target, &ids)?;
        for ((one, id), entry) in batch.into_iter().zip(ids).zip(entries) {
            let vm = names.get(one.vm).and_then(|name| domain.memory.get(*name));
            let at = vm.and_then(|vm| vm.locate(one.addr));
            if let (Some(entry), Some((region, page))) = (entry, at)
                && let Ok(block) = u16::try_from(region)
            {
                let place = (entry, id, BlockIndex(block), page);
                places.entry(one.vm).or_default().push(place);
            }
        }
    }
    let mut seeds = Vec::new();
    for (vm, places) in places {
        let Some(vm) = names.get(vm).and_then(|name| domain.memory.get(*name)) else {
            continue;
        };
        // A VM that has ended since has nothing to take from.
        if let Ok(memory) = ProcessMemory::open(vm.pid()) {
            let bases = vm.regions.iter().map(|region| Some(region.start));
            let memory = Arc::new(GuestMemory::new(memory, bases.collect()));
            seeds.push(Seed { memory, places });
        }
    }
    let store = store_name(&domain.key, &spec.group, index.epoch());
    stores.keep_seeds(store, &spec.key(), seeds);
    Ok(())
}

fn connect(
    spec: &PrepareSpec,
    key: &ContentKey,
    index: Option<&dyn Connect>,
) -> Result<Option<Box<dyn Registrar>>, RegisterError> {
    match index {
        Some(index) if !spec.index.is_empty() => {
            index.connect(&spec.group, key, &spec.index).map(Some)
        }
        _ => Ok(None),
    }
}

fn targets(spec: &PrepareSpec) -> std::collections::BTreeSet<u16> {
    spec.vms.iter().map(|vm| vm.target).collect()
}

/// Learns what other hosts need, too; for a survey, tries compression.
pub(super) fn resolve(
    one: &Preparation,
    domains: &mut BTreeMap<Secret, Domain>,
    wish: &ResolveSpec,
    window_log: u8,
    index: Option<&dyn Connect>,
) -> Result<Outcome, JobError> {
    lower_priority();
    let (begin, cpu) = (Instant::now(), sys::thread_cpu_time());
    let (mut report, mut message) = {
        let inner = super::lock(&one.inner);
        let report = inner.report.clone();
        (report.ok_or(JobError::Cancelled)?, inner.message.clone())
    };
    let mut prepared = HashMap::new();
    for (secret, domain) in domains.iter() {
        match needs(&one.spec, domain, index) {
            Ok(needs) => {
                let contents = Arc::clone(domain.scan.contents());
                let alike = alike(&one.spec, &domain.scan);
                prepared.insert(*secret, Arc::new(Prepared::new(contents, needs, alike)));
            }
            Err(error) => message = error.to_string(),
        }
    }
    if wish.compress {
        try_compression(one, domains, wish, window_log, &mut report)?;
    }
    add_time(
        &mut report,
        begin.elapsed(),
        sys::thread_cpu_time().saturating_sub(cpu),
    );
    for domain in domains.values_mut() {
        domain.memory.clear();
    }
    Ok(Outcome {
        state: PrepareState::Ready,
        message,
        report,
        prepared,
    })
}

/// What shares at each target host for what it holds, if that is asked for.
fn alike(spec: &PrepareSpec, scan: &Scan) -> BTreeMap<u16, Arc<SharedAlike>> {
    let of_target = |target: u16| {
        let names = scan.names().filter(|name| goes_to(spec, name, target));
        let names: Vec<&str> = names.collect();
        let chosen = identical::choose(scan, &names, RUNS_MAX);
        tracing::debug!(target, contents = chosen.contents.len(), "identical");
        (target, Arc::new(chosen))
    };
    let targets = spec.identical.then(|| targets(spec));
    targets.into_iter().flatten().map(of_target).collect()
}

fn add_time(report: &mut HostSurvey, wall: Duration, cpu: Duration) {
    report.seconds += wall.as_secs_f64();
    report.cpu_seconds += cpu.as_secs_f64();
}

/// Who needs each content of a domain, as far as it can be known.
fn needs(
    spec: &PrepareSpec,
    domain: &Domain,
    index: Option<&dyn Connect>,
) -> Result<Vec<Option<Need>>, RegisterError> {
    let contents = domain.scan.contents();
    let mut needs = vec![None; contents.len()];
    if spec.targets == 1 && !spec.seeded {
        for one in domain.scan.distinct(|_| true) {
            needs[one.no.0 as usize] = Some(Need::One(HostNo(0)));
        }
        return Ok(needs);
    }
    let Some(mut index) = connect(spec, &domain.key, index)? else {
        return Ok(needs);
    };
    let registered = &domain.registered;
    if registered.epoch != index.epoch() {
        return Err(RegisterError("it has lost what was registered".to_owned()));
    }
    for target in targets(spec) {
        let found = domain.scan.distinct(|name| goes_to(spec, name, target));
        for batch in found.chunks(BATCH) {
            let ids: Vec<_> = batch.iter().filter_map(|one| contents.id(one.no)).collect();
            let shared = if spec.targets <= HostSet::CAPACITY {
                index.shared(HostNo(target), &ids)?
            } else {
                // The index does not remember the needs of so many hosts: all must be claimed.
                let entry = |one: &Distinct| registered.entries.get(one.no.0 as usize);
                batch
                    .iter()
                    .map(|one| entry(one).copied().flatten())
                    .collect()
            };
            for (one, entry) in batch.iter().zip(shared) {
                let alone = Need::One(HostNo(target));
                needs[one.no.0 as usize] = Some(entry.map_or(alone, Need::Several));
            }
        }
    }
    Ok(needs)
}

/// Compresses what would be sent to each target host.
fn try_compression(
    one: &Preparation,
    domains: &BTreeMap<Secret, Domain>,
    wish: &ResolveSpec,
    window_log: u8,
    report: &mut HostSurvey,
) -> Result<(), JobError> {
    let bounds = Bounds {
        cpu_percent: one.spec.bounds.cpu_percent,
        read_bytes_per_s: one.spec.bounds.read_bytes_per_s,
    };
    let mut pace = Pace::new(bounds, &one.cancelled, &one.progress).of_idle_priority();
    for pair in &mut report.pairs {
        let elsewhere: HashSet<u64> = wish
            .carried_elsewhere
            .iter()
            .filter(|carried| carried.target == pair.target)
            .flat_map(|carried| ids_of(&carried.contents))
            .collect();
        let (mut all, mut carried) = (0, 0);
        for domain in domains.values() {
            let goes = |name: &str| goes_to(&one.spec, name, pair.target);
            let found = domain.scan.distinct(goes);
            all += compressed(domain, &found, window_log, &mut pace)?;
            let contents = domain.scan.contents();
            let here = |no: ContentNo| {
                contents
                    .id(no)
                    .is_some_and(|id| !elsewhere.contains(&leading_bits(id)))
            };
            let kept: Vec<_> = found.into_iter().filter(|one| here(one.no)).collect();
            carried += compressed(domain, &kept, window_log, &mut pace)?;
        }
        (pair.zstd_bytes, pair.rack_zstd_bytes) = (Some(all), Some(carried));
    }
    Ok(())
}

/// Bytes of these contents after compression as a session would do it. They are read again: what
/// was written since has other bytes, which is as good for a forecast.
fn compressed(
    domain: &Domain,
    found: &[Distinct],
    window_log: u8,
    pace: &mut Pace<'_>,
) -> Result<u64, JobError> {
    let compression = WireCompression::Zstd { window_log };
    let compressor = Compressor::new(compression).map_err(JobError::Compression)?;
    let Some(mut compressor) = compressor else {
        return Ok(0);
    };
    let names: Vec<&str> = domain.scan.names().collect();
    let mut bytes = vec![0; FRAME_PAGES * PAGE_SIZE];
    let (mut out, mut total) = (Vec::new(), 0);
    for frame in found.chunks(FRAME_PAGES) {
        let mut filled = 0;
        for run in frame.chunk_by(|one, next| one.vm == next.vm) {
            let vm = names
                .get(run[0].vm)
                .and_then(|name| domain.memory.get(*name));
            let Some(vm) = vm else {
                continue;
            };
            let addrs: Vec<_> = run.iter().map(|one| one.addr).collect();
            let room = &mut bytes[filled..filled + addrs.len() * PAGE_SIZE];
            let read = vm
                .memory
                .shared_pages(&addrs, room)
                .map_err(JobError::Memory)?;
            filled += read * PAGE_SIZE;
        }
        let frame_bytes = std::iter::once(&bytes[..filled]);
        compressor
            .frame(frame_bytes, filled, &mut out)
            .map_err(JobError::Compression)?;
        total += out.len() as u64;
        pace.spent(filled as u64)
            .map_err(|_cancelled| JobError::Cancelled)?;
    }
    Ok(total)
}
