//! What a migration of surveyed VMs would cost. Pure arithmetic.
//!
//! Bytes on the core link, both ways, as its interfaces count them: pages by technique, what
//! describes them, and what every layer below adds. Idle guests are assumed: memory that is
//! dirtied during the migration comes on top.

use std::collections::{HashMap, HashSet};

use page::PAGE_SIZE;

use crate::prepare::ids_of;
use crate::types::{CarriedElsewhere, Forecast, GroupSurvey, HostSurvey, PageKinds, PairSurvey};

const PAGE: u64 = PAGE_SIZE as u64;
/// QEMU's record of a page: 8 bytes before its bytes.
const STOCK_PAGE_BYTES: u64 = PAGE + 8;
/// QEMU's record of a zero page.
const STOCK_ZERO_BYTES: u64 = 9;
/// A page in our stream beside its bytes, in runs of a few pages.
const LITERAL_BYTES: u64 = 2;
/// A reference in runs of a few pages.
const REFERENCE_BYTES: u64 = 2;
/// Device state, and what an idle guest dirties meanwhile: in the lab, next to nothing with guests
/// that only send heartbeats, 520 pages with guests that check their memory all the time. The middle.
const VM_BYTES: u64 = 1100 << 10;
/// The same after compression. Most of a page that is sent again is in the window already.
const VM_ZSTD_BYTES: u64 = 150 << 10;
/// Beside each 1448 bytes of a TCP segment: 66 of Ethernet, IP and TCP, as much again for every
/// other segment as the acknowledgement that comes back, and 2 of TLS. In the lab a page of
/// `gang` and `irlm` took 1.071 times its bytes.
const WIRE_PERMILLE: u64 = 1070;
/// The same for stock QEMU, without TLS, whose larger writes are acknowledged more rarely.
const STOCK_WIRE_PERMILLE: u64 = 1057;

/// Puts the reports of a group's source hosts together. Their samples are used up.
pub(super) fn of_group(
    group: &str,
    mut hosts: Vec<HostSurvey>,
    bytes_per_s: Option<u64>,
) -> GroupSurvey {
    let rack = Rack::new(&hosts.iter().collect::<Vec<_>>());
    let forecast = forecast(&hosts, &rack, bytes_per_s);
    for pair in hosts.iter_mut().flat_map(|host| &mut host.pairs) {
        pair.sample = None;
    }
    let all = hosts.iter().map(|host| host.pages);
    let mut pages = all.fold(PageKinds::default(), PageKinds::plus);
    pages.distinct = rack.distinct.min(pages.distinct);
    GroupSurvey {
        group: group.to_owned(),
        cpu_seconds: hosts.iter().map(|host| host.cpu_seconds).sum(),
        hosts,
        rack: pages,
        exact: rack.zero_bits == 0,
        shared_by_targets: rack.shared,
        forecast,
        seconds: 0.0,
        failed: Vec::new(),
    }
}

/// For each host, what it need not carry to each target host: contents that another host pair
/// comes to first, if all pairs send at the same speed. Empty if the samples are not whole.
pub(super) fn carried_elsewhere(hosts: &[&HostSurvey]) -> Vec<Vec<CarriedElsewhere>> {
    let rack = Rack::new(hosts);
    let carried_by = |host: usize, pair: &PairSurvey| {
        let sample = pair.sample.as_ref();
        let ids = sample
            .into_iter()
            .flat_map(|sample| ids_of(&sample.contents));
        let others = ids.filter(|id| {
            let first = rack.first.get(id);
            first.is_some_and(|first| first.carrier != (host, pair.target))
        });
        CarriedElsewhere {
            target: pair.target,
            contents: others.map(|id| format!("{id:016x}")).collect(),
        }
    };
    let of_host = |(at, host): (usize, &&HostSurvey)| {
        let pairs = host.pairs.iter().filter(|_| rack.zero_bits == 0);
        pairs.map(|pair| carried_by(at, pair)).collect()
    };
    hosts.iter().enumerate().map(of_host).collect()
}

/// The contents of the samples of all hosts.
struct Rack {
    zero_bits: u8,
    first: HashMap<u64, First>,
    /// Estimates from the samples, exact if they are whole.
    distinct: u64,
    shared: u64,
}

/// Where a content is first in the order of the scans.
struct First {
    position: usize,
    /// Host and target host.
    carrier: (usize, u16),
    targets: HashSet<u16>,
}

impl Rack {
    fn new<'a>(hosts: &[&'a HostSurvey]) -> Self {
        let samples = || {
            hosts.iter().enumerate().flat_map(|(at, host)| {
                let of_pair = move |pair: &'a PairSurvey| Some(((at, pair), pair.sample.as_ref()?));
                host.pairs.iter().filter_map(of_pair)
            })
        };
        // What the smallest sample has, all have.
        let zero_bits = samples().map(|(_, sample)| sample.zero_bits.min(63)).max();
        let zero_bits = zero_bits.unwrap_or(0);
        let mut first: HashMap<u64, First> = HashMap::new();
        for ((at, pair), sample) in samples() {
            let ids = ids_of(&sample.contents);
            let common = ids.filter(|id| id.leading_zeros() >= u32::from(zero_bits));
            for (position, id) in common.enumerate() {
                let carrier = (at, pair.target);
                let known = first.entry(id).or_insert_with(|| First {
                    position,
                    carrier,
                    targets: HashSet::new(),
                });
                known.targets.insert(pair.target);
                if position < known.position {
                    (known.position, known.carrier) = (position, carrier);
                }
            }
        }
        let scaled = |count: usize| (count as u64).saturating_mul(1 << zero_bits);
        let shared = first.values().filter(|one| one.targets.len() > 1).count();
        Self {
            zero_bits,
            distinct: scaled(first.len()),
            shared: scaled(shared),
            first,
        }
    }
}

fn forecast(hosts: &[HostSurvey], rack: &Rack, bytes_per_s: Option<u64>) -> Vec<Forecast> {
    let vms: usize = hosts.iter().map(|host| host.vms.len()).sum();
    let pairs = || hosts.iter().flat_map(|host| &host.pairs);
    let sum = |of: fn(&PairSurvey) -> u64| pairs().map(of).sum::<u64>();
    let content = sum(|pair| pair.pages.content);
    let in_pairs = sum(|pair| pair.pages.distinct);
    let in_rack = rack.distinct.min(in_pairs);
    let fill = sum(|pair| pair.pages.fill);
    let zero = sum(|pair| pair.pages.zero + pair.pages.untouched);
    let whole = |pages: u64| pages * (PAGE + LITERAL_BYTES) + (content - pages) * REFERENCE_BYTES;
    let references = content * REFERENCE_BYTES;
    let stock = (content + fill) * STOCK_PAGE_BYTES + zero * STOCK_ZERO_BYTES;
    let mut bytes = vec![
        ("stock", stock),
        ("oc", whole(content)),
        ("gang", whole(in_pairs)),
        ("irlm", whole(in_rack)),
    ];
    let all = |of: fn(&PairSurvey) -> Option<u64>| pairs().map(of).sum::<Option<u64>>();
    if let Some(zstd) = all(|pair| pair.zstd_bytes) {
        bytes.push(("gang+zstd", zstd + references));
        // Without whole samples nobody was told what others carry.
        let share = |bytes: u64| {
            let share = u128::from(bytes) * u128::from(in_rack) / u128::from(in_pairs.max(1));
            u64::try_from(share).unwrap_or(u64::MAX)
        };
        let rack_zstd = all(|pair| pair.rack_zstd_bytes).filter(|_| rack.zero_bits == 0);
        bytes.push(("full", rack_zstd.unwrap_or(share(zstd)) + references));
    }
    let one = |(technique, bytes): (&str, u64)| {
        let wire = match technique {
            "stock" => STOCK_WIRE_PERMILLE,
            _ => WIRE_PERMILLE,
        };
        let of_vm = match technique {
            "gang+zstd" | "full" => VM_ZSTD_BYTES,
            _ => VM_BYTES,
        };
        let core_bytes = (bytes + vms as u64 * of_vm) * wire / 1000;
        Forecast {
            technique: technique.to_owned(),
            core_bytes,
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            seconds: bytes_per_s.map(|rate| core_bytes as f64 / rate as f64),
        }
    };
    bytes.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ContentSample;

    /// A host whose only pair has these contents on twice as many pages.
    fn host(target: u16, ids: &[u64], zero_bits: u8) -> HostSurvey {
        let pages = PageKinds {
            total: 1000,
            untouched: 1000 - 2 * ids.len() as u64,
            content: 2 * ids.len() as u64,
            distinct: ids.len() as u64,
            ..PageKinds::default()
        };
        let pair = PairSurvey {
            target,
            pages,
            zstd_bytes: None,
            rack_zstd_bytes: None,
            sample: Some(ContentSample {
                zero_bits,
                contents: ids.iter().map(|id| format!("{id:016x}")).collect(),
            }),
        };
        HostSurvey {
            host: format!("h{target}"),
            vms: Vec::new(),
            pages,
            pairs: vec![pair],
            seconds: 1.0,
            cpu_seconds: 0.5,
            pages_read: 0,
        }
    }

    #[test]
    fn each_content_counts_once_in_the_rack_and_the_pair_that_comes_to_it_first_carries_it() {
        let hosts = [host(0, &[1, 2, 3, 4], 0), host(1, &[4, 5, 1], 0)];
        let elsewhere = carried_elsewhere(&hosts.each_ref());
        let ids = |at: usize| ids_of(&elsewhere[at][0].contents).collect::<Vec<_>>();
        assert_eq!((ids(0), ids(1)), (vec![4], vec![1]));
        let survey = of_group("g", hosts.to_vec(), Some(1_000_000));
        assert_eq!((survey.rack.distinct, survey.shared_by_targets), (5, 2));
        assert!(survey.exact && survey.hosts[0].pairs[0].sample.is_none());
        let names: Vec<_> = survey.forecast.iter().map(|one| &*one.technique).collect();
        assert_eq!(names, ["stock", "oc", "gang", "irlm"]);
        let bytes: Vec<_> = survey.forecast.iter().map(|one| one.core_bytes).collect();
        let page = PAGE * WIRE_PERMILLE / 1000;
        assert!((14 * page..15 * page).contains(&bytes[1]), "{bytes:?}");
        assert!((7 * page..8 * page).contains(&bytes[2]), "{bytes:?}");
        assert!((5 * page..6 * page).contains(&bytes[3]), "{bytes:?}");
        let seconds = survey.forecast[1].seconds.unwrap();
        assert!((seconds - 0.06).abs() < 0.005, "{seconds}");
    }

    #[test]
    fn samples_of_different_depth_are_compared_by_what_both_have() {
        let ids: Vec<u64> = (0..64).map(|n| n << 58).collect();
        let deep: Vec<u64> = ids.iter().copied().filter(|id| id >> 62 == 0).collect();
        let survey = of_group("g", vec![host(0, &ids, 0), host(1, &deep, 2)], None);
        assert!(!survey.exact);
        // 16 of the sample, each standing for four.
        assert_eq!(survey.shared_by_targets, 64);
        assert_eq!(survey.forecast[0].seconds, None);
    }

    #[test]
    fn compression_is_forecast_from_what_it_gave() {
        let mut hosts = vec![host(0, &[1, 2], 0), host(1, &[1, 2], 0)];
        hosts[0].pairs[0].zstd_bytes = Some(4000);
        assert_eq!(of_group("g", hosts.clone(), None).forecast.len(), 4);
        for (host, rack) in hosts.iter_mut().zip([4000, 100]) {
            host.pairs[0].zstd_bytes = Some(4000);
            host.pairs[0].rack_zstd_bytes = Some(rack);
        }
        let forecast = of_group("g", hosts, None).forecast;
        assert_eq!(forecast[4].core_bytes, (8000 + 16) * WIRE_PERMILLE / 1000);
        assert_eq!(forecast[5].core_bytes, (4100 + 16) * WIRE_PERMILLE / 1000);
    }
}
