//! What was found, as the control API tells it.

use std::collections::{BTreeMap, BTreeSet};

use guest::scan::Tally;
use page::ContentId;

use super::Secret;
use super::job::Domain;
use crate::types::{ContentSample, HostSurvey, PageKinds, PairSurvey, PrepareSpec, VmSurvey};

/// Contents of a host in its samples: 2 MiB of text, and 0.3 % of error in a count made from it.
/// Hosts with fewer distinct contents (512 MiB) are compared exactly.
const SAMPLE_MAX: usize = 1 << 17;

/// Reports what the domains' scans have found.
pub(super) fn of_host(
    host: &str,
    spec: &PrepareSpec,
    domains: &BTreeMap<Secret, Domain>,
) -> HostSurvey {
    let scanned: BTreeSet<&str> = domains.values().flat_map(|one| one.scan.names()).collect();
    let seen = spec
        .vms
        .iter()
        .filter(|vm| scanned.contains(vm.vm.as_str()));
    let targets: BTreeSet<u16> = seen.clone().map(|vm| vm.target).collect();
    let vms = seen.map(|vm| VmSurvey {
        vm: vm.vm.clone(),
        target: vm.target,
        pages: tally(domains, |name| name == vm.vm),
    });
    let room = SAMPLE_MAX / targets.len().max(1);
    let pair = |&target: &u16| PairSurvey {
        target,
        pages: tally(domains, |name| goes_to(spec, name, target)),
        zstd_bytes: None,
        rack_zstd_bytes: None,
        sample: Some(sample(ids(spec, domains, target), room)),
    };
    HostSurvey {
        host: host.to_owned(),
        vms: vms.collect(),
        pages: tally(domains, |_| true),
        pairs: targets.iter().map(pair).collect(),
        seconds: 0.0,
        cpu_seconds: 0.0,
        pages_read: 0,
    }
}

/// Whether the VM of this name goes to the target host `target`.
pub(super) fn goes_to(spec: &PrepareSpec, name: &str, target: u16) -> bool {
    spec.vms
        .iter()
        .any(|vm| vm.vm == name && vm.target == target)
}

fn tally(domains: &BTreeMap<Secret, Domain>, which: impl Fn(&str) -> bool) -> PageKinds {
    let of_domains = domains.values().map(|one| kinds(one.scan.tally(&which)));
    of_domains.fold(PageKinds::default(), PageKinds::plus)
}

fn kinds(tally: Tally) -> PageKinds {
    PageKinds {
        total: tally.total,
        untouched: tally.untouched,
        zero: tally.zero,
        fill: tally.fill,
        content: tally.content,
        distinct: tally.distinct,
        unknown: tally.unknown,
    }
}

/// Ids of the distinct contents that go to a target host, in scan order.
fn ids(spec: &PrepareSpec, domains: &BTreeMap<Secret, Domain>, target: u16) -> Vec<u64> {
    let of_domain = |one: &Domain| {
        let contents = one.scan.contents();
        let found = one.scan.distinct(|name| goes_to(spec, name, target));
        let ids = found.iter().filter_map(|one| contents.id(one.no));
        ids.map(leading_bits).collect::<Vec<_>>()
    };
    domains.values().flat_map(of_domain).collect()
}

/// Leading 64 bits of an id.
pub(super) fn leading_bits(id: ContentId) -> u64 {
    // The same bits as in the id's hash, in the order in which they are written.
    id.hash64().swap_bytes()
}

/// The largest sample of at most `room` contents.
pub(super) fn sample(mut ids: Vec<u64>, room: usize) -> ContentSample {
    let mut zero_bits = 0;
    while ids.len() > room && zero_bits < 63 {
        zero_bits += 1;
        ids.retain(|id| id.leading_zeros() >= zero_bits);
    }
    let mut contents = String::with_capacity(ids.len() * 16);
    for id in ids {
        push_hex(id, &mut contents);
    }
    ContentSample {
        // At most 63.
        zero_bits: u8::try_from(zero_bits).unwrap_or(63),
        contents,
    }
}

/// 16 digits, without the formatter: a host has up to a hundred thousand.
fn push_hex(id: u64, out: &mut String) {
    let digit = |at: u32| char::from_digit(u32::try_from(id >> (4 * at) & 15).unwrap_or(0), 16);
    out.extend((0..16).rev().filter_map(digit));
}

/// The ids of a sample; what is not 16 hex digits is left out.
pub(crate) fn ids_of(contents: &str) -> impl Iterator<Item = u64> + '_ {
    let digits = contents.as_bytes().chunks(16);
    digits.filter_map(|digits| u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok())
}
