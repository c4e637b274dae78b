//! What changes from topology to topology: the plots of a sweep.

use maud::{Markup, html};

use super::lines::{self, Series};
use super::metric::Unit;
use super::spread::{Relation, Spread};
use super::text;
use crate::results::{Point, Results, Run};

/// A measure with its ends: one line for each technique and end.
struct Figure {
    title: &'static str,
    /// As it stands in a sentence: "the ... of gang".
    noun: &'static str,
    meaning: &'static str,
    /// Below `runs[]` in `results.json`.
    fields: &'static str,
    unit: Unit,
    ends: &'static [End],
}

struct End {
    /// Absent for the one that a figure is about.
    name: Option<&'static str>,
    read: fn(&Run) -> Option<f64>,
}

const fn one(read: fn(&Run) -> Option<f64>) -> [End; 1] {
    [End { name: None, read }]
}

/// Against the number of hosts: figures 4 and 5 of IRLM and what belongs to them.
const BY_HOSTS: &[Figure] = &[
    Figure {
        title: "Bytes on the core link",
        noun: "core traffic",
        meaning: "All VMs, both ways, headers included (IRLM figure 4)",
        fields: "core_bytes",
        unit: Unit::WireBytes,
        ends: &one(|run| Some(run.core_bytes? as f64)),
    },
    Figure {
        title: "Bytes on the core link for each VM",
        noun: "core traffic for each VM",
        meaning: "Core bytes divided by the number of VMs",
        fields: "core_bytes / vms",
        unit: Unit::WireBytes,
        ends: &one(|run| Some(run.core_bytes? as f64 / f64::from(run.vms.max(1)))),
    },
    Figure {
        title: "Mean migration time of a VM",
        noun: "mean migration time",
        meaning: "From a VM's start to the end of its move (IRLM figure 5)",
        fields: "mean_migration_time_s",
        unit: Unit::Seconds,
        ends: &one(|run| run.mean_migration_time_s),
    },
    Figure {
        title: "Total migration time",
        noun: "total migration time",
        meaning: "From the first start to the end of the last VM's move",
        fields: "total_migration_time_s",
        unit: Unit::Seconds,
        ends: &one(|run| run.total_migration_time_s),
    },
    Figure {
        title: "Bytes between the target hosts",
        noun: "traffic between target hosts",
        meaning: "What the target hosts' edge links sent that did not take the core link",
        fields: "target_to_target_bytes",
        unit: Unit::WireBytes,
        ends: &one(|run| Some(run.target_to_target_bytes? as f64)),
    },
];

/// Against the number of VMs on a host: figures 2, 4 and 5 of SLM and what belongs to them.
const BY_VMS: &[Figure] = &[
    Figure {
        title: "Memory of the hosts at rest",
        noun: "target footprint",
        meaning: "QEMUs and agents, from the memory cgroups, before and after (SLM figures 2, 4)",
        fields: "{source,target}_footprint.cgroup_bytes",
        unit: Unit::MemoryBytes,
        ends: &[
            End {
                name: None,
                read: |run| Some(run.target_footprint?.cgroup_bytes? as f64),
            },
            End {
                name: Some("source"),
                read: |run| Some(run.source_footprint?.cgroup_bytes? as f64),
            },
        ],
    },
    Figure {
        title: "Memory of the guests alone",
        noun: "guests' memory at the target",
        meaning: "PSS of the guests' memory in their QEMUs, before and after",
        fields: "{source,target}_footprint.guest_pss_bytes",
        unit: Unit::MemoryBytes,
        ends: &[
            End {
                name: None,
                read: |run| Some(run.target_footprint?.guest_pss_bytes? as f64),
            },
            End {
                name: Some("source"),
                read: |run| Some(run.source_footprint?.guest_pss_bytes? as f64),
            },
        ],
    },
    Figure {
        title: "Total migration time",
        noun: "total migration time",
        meaning: "From the first start to the last VM running at its target, and its source free of it where \
                  memory follows (SLM figure 5a)",
        fields: "total_migration_time_s",
        unit: Unit::Seconds,
        ends: &one(|run| run.total_migration_time_s),
    },
    Figure {
        title: "Pages sent with their bytes",
        noun: "number of pages sent with their bytes",
        meaning: "Pages sent again count again; zero pages do not (SLM figure 5b)",
        fields: "pages.literal",
        unit: Unit::Pages,
        ends: &one(|run| Some(run.pages?.literal? as f64)),
    },
    Figure {
        title: "Bytes on the core link",
        noun: "core traffic",
        meaning: "All VMs, both ways, headers included",
        fields: "core_bytes",
        unit: Unit::WireBytes,
        ends: &one(|run| Some(run.core_bytes? as f64)),
    },
    Figure {
        title: "Downtime, mean over the VMs",
        noun: "mean downtime",
        meaning: "Gap in the heartbeats that an observer sees",
        fields: "downtime_ms.mean",
        unit: Unit::Milliseconds,
        ends: &one(|run| Some(run.downtime_ms?.mean)),
    },
];

/// The plots of a sweep; nothing if there is none.
pub(crate) fn section(results: &Results) -> Markup {
    let points = results.points();
    let by_hosts = distinct(&points, |point| point.hosts) > 1;
    let by_vms = distinct(&points, |point| point.vms_per_host) > 1;
    let hosts_axis = (
        "hosts in each rack",
        "host",
        (|point: Point| point.hosts) as Axis,
    );
    let vms_axis = (
        "VMs on each source host",
        "VM",
        (|point: Point| point.vms_per_host) as Axis,
    );
    html! {
        @if by_hosts && !by_vms { (plots(results, "By the number of hosts", BY_HOSTS, hosts_axis)) }
        @if by_vms && !by_hosts { (plots(results, "By the number of VMs", BY_VMS, vms_axis)) }
    }
}

type Axis = fn(Point) -> u32;

fn distinct(points: &[Point], of: fn(&Point) -> u32) -> usize {
    let mut values: Vec<u32> = points.iter().map(of).collect();
    values.sort_unstable();
    values.dedup();
    values.len()
}

fn plots(
    results: &Results,
    title: &str,
    figures: &[Figure],
    (label, noun, axis): (&str, &str, Axis),
) -> Markup {
    let drawn: Vec<Markup> = figures
        .iter()
        .filter_map(|figure| {
            let all = series(results, figure, axis);
            let drawing = lines::draw(figure.title, label, figure.unit, &all)?;
            Some(html! {
                figure {
                    h3 { (figure.title) }
                    @if let Some(sentence) = sentence(figure, noun, &all) { p { (sentence) } }
                    (drawing)
                    figcaption { (figure.meaning) ". " code { "runs[]." (figure.fields) } }
                }
            })
        })
        .collect();
    html! {
        @if !drawn.is_empty() {
            section {
                h2 { (title) }
                div.cards { @for plot in &drawn { (plot) } }
                @if figures.iter().flat_map(|figure| figure.ends).any(|end| end.name.is_some()) {
                    p.source { "Dashed lines are the source's." }
                }
            }
        }
    }
}

/// The lines of a figure that have two points at least, in the order of the techniques.
fn series(results: &Results, figure: &Figure, axis: Axis) -> Vec<Series> {
    let mut names: Vec<String> = Vec::new();
    for name in results.runs.iter().map(Run::name) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut points = results.points();
    points.sort_unstable();
    let at = |name: &str, end: &End, point: Point| {
        let runs = results.runs.iter().filter(|run| run.failure.is_none());
        let of = runs.filter(|run| run.name() == name && results.point(run) == point);
        Some((f64::from(axis(point)), Spread::of(of.filter_map(end.read))?))
    };
    let mut all: Vec<Series> = Vec::new();
    for name in &names {
        all.extend(figure.ends.iter().map(|end| {
            Series {
                technique: name.clone(),
                end: end.name,
                points: points
                    .iter()
                    .filter_map(|point| at(name, end, *point))
                    .collect(),
            }
        }));
    }
    all.retain(|series| series.points.len() > 1);
    // A plot of nothing but zeros shows nothing.
    let points = all.iter().flat_map(|series| &series.points);
    if points.map(|(_, spread)| spread.max).all(|most| most == 0.0) {
        all.clear();
    }
    all
}

/// How the best and the worst technique of the last point got there.
fn sentence(figure: &Figure, noun: &str, all: &[Series]) -> Option<String> {
    if all.iter().any(|series| series.end.is_some()) {
        return expansion(noun, all);
    }
    let last = |series: &&Series| series.points.last().map_or(0.0, |(_, spread)| spread.mean);
    let by_last = |a: &&Series, b: &&Series| last(a).total_cmp(&last(b));
    let main = || all.iter().filter(|series| series.end.is_none());
    let best = main().min_by(by_last)?;
    let worst = main().max_by(by_last)?;
    let way = |series: &Series| {
        let (from, to) = (series.points.first()?.1, series.points.last()?.1);
        let steps = series.points.windows(2);
        let falls = steps
            .map(|pair| pair[1].1.relation_to(&pair[0].1))
            .all(|step| step == Relation::Below);
        let falls = if falls {
            ", falling with every step"
        } else {
            ""
        };
        let write = |spread: Spread| figure.unit.write(spread.mean);
        Some(format!("from {} to {}{falls}", write(from), write(to)))
    };
    let (from, to) = (best.points.first()?.0, best.points.last()?.0);
    let mut text = format!(
        "Between {from} and {to} {noun}s the {} of {} goes {}",
        figure.noun,
        best.name(),
        way(best)?
    );
    if worst.name() != best.name() {
        text += &format!("; that of {} {}", worst.name(), way(worst)?);
        let ratio = best.points.last()?.1.ratio_to(&worst.points.last()?.1)?;
        text += &format!(" ({} of it at the end)", text::percent(ratio));
    }
    Some(text + ".")
}

/// How much more the target holds than the source did, with each technique.
fn expansion(noun: &str, all: &[Series]) -> Option<String> {
    let ends = all.chunk_by(|a, b| a.technique == b.technique);
    let ratios: Vec<String> = ends
        .filter_map(|ends| {
            let end = |source: bool| ends.iter().find(|series| series.end.is_some() == source);
            let (target, source) = (end(false)?.points.last()?.1, end(true)?.points.last()?.1);
            let ratio = text::ratio(target.ratio_to(&source)?);
            Some(format!("{ratio} times with {}", ends.first()?.technique))
        })
        .collect();
    let most = all.first()?.points.last()?.0;
    (!ratios.is_empty()).then(|| {
        format!(
            "With {most} {noun}s the target holds, set against the source before, {}.",
            ratios.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{html, sample};

    fn swept(counts: &[(u32, u32)]) -> Results {
        let mut results = sample::results();
        let runs = std::mem::take(&mut results.runs);
        for &(hosts, vms) in counts {
            results.runs.extend(runs.iter().map(|run| {
                let mut run = run.clone();
                run.source_hosts = Some(hosts);
                run.vms_per_host = Some(vms);
                run.vms = hosts * vms;
                run.core_bytes = run.core_bytes.map(|bytes| bytes * u64::from(hosts));
                run
            }));
        }
        results
    }

    #[test]
    fn a_sweep_over_hosts_is_plotted_against_hosts() {
        let page = html(&swept(&[(1, 4), (2, 4), (3, 4)]));
        assert!(page.contains("By the number of hosts"));
        // Nothing went between the target hosts.
        assert!(!page.contains("Bytes between the target hosts") && !page.contains("NaN"));
        assert!(!page.contains("By the number of VMs"));
        assert!(
            page.contains(
                "Between 1 and 3 hosts the core traffic of gang+zstd goes from 98 MB to 294 MB; \
                 that of stock from 702 MB to 2.11 GB (14 % of it at the end)."
            ),
            "{page}"
        );
    }

    #[test]
    fn runs_of_one_topology_are_no_sweep() {
        let page = html(&sample::results());
        assert!(!page.contains("By the number of"));
    }

    #[test]
    fn both_ends_of_the_footprint_have_their_line() {
        let mut results = swept(&[(1, 1), (1, 8)]);
        for run in &mut results.runs {
            let bytes = |mib: u64| Some((mib << 20) * u64::from(run.vms));
            let footprint = |mib: u64| crate::footprint::Footprint {
                cgroup_bytes: bytes(mib),
                ..Default::default()
            };
            run.source_footprint = Some(footprint(50));
            run.target_footprint = Some(footprint(150));
        }
        let page = html(&results);
        assert!(page.contains("By the number of VMs"));
        assert!(page.contains("stock, source") && page.contains("series dashed"));
        let said = "With 8 VMs the target holds, set against the source before, 3.00 times \
                    with stock, 3.00 times with oc,";
        assert!(page.contains(said), "{page}");
    }

    #[test]
    fn falling_with_every_step_is_said_only_if_it_is_so() {
        let series = |means: &[f64]| {
            let at = |(value, mean): (u32, &f64)| (f64::from(value), Spread::of([*mean]).unwrap());
            vec![Series {
                technique: "irlm".into(),
                end: None,
                points: (1..).zip(means).map(at).collect(),
            }]
        };
        let said = |means: &[f64]| sentence(&BY_HOSTS[1], "host", &series(means)).unwrap();
        assert!(said(&[3e6, 2e6, 1e6]).ends_with("1 MB, falling with every step."));
        assert!(said(&[3e6, 3.1e6, 1e6]).ends_with("from 3 MB to 1 MB."));
    }
}
