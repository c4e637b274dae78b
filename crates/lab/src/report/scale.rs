//! From racks that were measured to racks that do not fit on this machine: a model.
//!
//! What is measured of the scenario `irlm-fig4`, which is also called `scale`, is how many distinct
//! contents a rack's guests have, how many bytes each of them costs on the core link, and what the
//! hosts of a rack say to each other. The model carries that to more hosts and VMs: contents grow
//! along a straight line through the smallest and the largest rack that was measured, all other costs
//! in proportion. So it gives the bytes of these two back; only racks between them test it. Every link
//! carries what it must at its rate, all at once; the one that takes longest is the limit. Processors are
//! not in it.

use maud::{Markup, html};

use super::lines::{self, Series};
use super::metric::Unit;
use super::spread::Spread;
use super::text;
use crate::results::{Point, Results, Run};

/// Scenario that the model is fed with.
const SCENARIO: &str = "irlm-fig4";
const TECHNIQUE: &str = "full";
/// VMs on each host of the racks that are modelled, and their numbers of hosts.
const VMS_PER_HOST: u32 = 50;
const HOSTS: [u32; 7] = [1, 2, 5, 10, 20, 30, 40];

/// What the runs of one rack have shown, in the mean.
#[derive(Clone, Copy, Debug)]
struct Measured {
    point: Point,
    vms: f64,
    nonfill: f64,
    contents: f64,
    core: f64,
    between_targets: f64,
    index: f64,
    seconds: Option<f64>,
}

impl Measured {
    /// Of all racks that were measured, smallest first.
    fn all(results: &Results) -> Vec<Self> {
        let mut points = results.points();
        points.sort_by_key(Point::vms);
        let of = |point| Self::of(results, point);
        points.into_iter().filter_map(of).collect()
    }

    fn of(results: &Results, point: Point) -> Option<Self> {
        let runs = || {
            let runs = results.runs.iter();
            runs.filter(|run| run.technique == TECHNIQUE && run.failure.is_none())
                .filter(move |run| results.point(run) == point && run.bounds.is_some())
        };
        let mean = |read: fn(&Run) -> Option<u64>| {
            let values = runs().filter_map(read).map(|value| value as f64);
            Some(Spread::of(values)?.mean)
        };
        Some(Self {
            point,
            vms: f64::from(runs().next()?.vms),
            nonfill: mean(|run| Some(run.bounds?.nonfill_pages))?,
            contents: mean(|run| Some(run.bounds?.rack_contents))?,
            core: mean(|run| run.core_bytes)?,
            between_targets: mean(|run| run.target_to_target_bytes)?,
            index: mean(|run| run.index_bytes)?,
            seconds: Spread::of(runs().filter_map(|run| run.total_migration_time_s))
                .map(|spread| spread.mean),
        })
    }
}

/// Costs that grow in proportion, and the line of the contents.
#[derive(Clone, Copy, Debug)]
struct Model {
    nonfill_per_vm: f64,
    /// Contents that all guests have, and those that each adds.
    contents: (f64, f64),
    /// Bytes on the core link for each content, and for each page that is a reference.
    core_per_content: f64,
    core_per_page: f64,
    between_per_page: f64,
    index_per_page: f64,
    core_bits: f64,
    edge_bits: f64,
}

/// What a rack comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Predicted {
    core_bytes: f64,
    index_bytes: f64,
    /// Received by a target host, from its source and from other targets.
    edge_bytes: f64,
    seconds: f64,
    limit: &'static str,
}

impl Model {
    /// From the technique's smallest and largest rack.
    fn of(results: &Results) -> Option<Self> {
        let all = Measured::all(results);
        let (small, large) = (*all.first()?, *all.last()?);
        if large.vms <= small.vms {
            return None;
        }
        let each = (large.contents - small.contents) / (large.vms - small.vms);
        let common = (large.contents - each * large.vms).max(0.0);
        // Two racks tell what a content and what a page costs; where they do not, all is contents.
        let determinant = small.contents * large.nonfill - large.contents * small.nonfill;
        let per_page = (small.contents * large.core - large.contents * small.core) / determinant;
        let core_per_page = if per_page.is_finite() {
            per_page.clamp(0.0, large.core / large.nonfill)
        } else {
            0.0
        };
        Some(Self {
            nonfill_per_vm: large.nonfill / large.vms,
            contents: (common, each),
            core_per_content: (large.core - core_per_page * large.nonfill) / large.contents,
            core_per_page,
            between_per_page: large.between_targets / large.nonfill,
            index_per_page: large.index / large.nonfill,
            core_bits: results.topology.core_bits_per_second? as f64,
            edge_bits: results.topology.edge_bits_per_second? as f64,
        })
    }

    fn predict(&self, hosts: u32, vms_per_host: u32) -> Predicted {
        let hosts = f64::from(hosts);
        let vms = hosts * f64::from(vms_per_host);
        let pages = self.nonfill_per_vm * vms;
        let contents = (self.contents.0 + self.contents.1 * vms).min(pages);
        let core_bytes = self.core_per_content * contents + self.core_per_page * pages;
        let index_bytes = self.index_per_page * pages;
        let between = if hosts > 1.0 {
            self.between_per_page * pages
        } else {
            0.0
        };
        let edge_bytes = (core_bytes + between) / hosts;
        let (seconds, limit) = [
            (core_bytes * 8.0 / self.core_bits, "the core link"),
            (edge_bytes * 8.0 / self.edge_bits, "the hosts' edge links"),
            // All that is said in the source rack goes to or comes from the index's host.
            (
                index_bytes * 8.0 / self.edge_bits,
                "the edge link of the index's host",
            ),
        ]
        .into_iter()
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap_or((0.0, "nothing"));
        Predicted {
            core_bytes,
            index_bytes,
            edge_bytes,
            seconds,
            limit,
        }
    }
}

/// Table and plot, where the scenario was run.
pub(super) fn section(all: &[Results]) -> Markup {
    let Some(results) = all.iter().find(|one| one.scenario == SCENARIO) else {
        return Markup::default();
    };
    let Some(model) = Model::of(results) else {
        return Markup::default();
    };
    let predicted = HOSTS.map(|hosts| (hosts, model.predict(hosts, VMS_PER_HOST)));
    let line = Series {
        technique: TECHNIQUE.to_owned(),
        end: Some("model"),
        points: predicted
            .iter()
            .filter_map(|(hosts, one)| Some((f64::from(*hosts), Spread::of([one.core_bytes])?)))
            .collect(),
    };
    html! {
        section {
            h2 { "Scale: what was measured, carried to more hosts" }
            @if let Some(sentence) = sentence(&predicted) { p { (sentence) } }
            p.source {
                "A model, no measurement: contents on a straight line through the smallest and the \
                 largest rack of " code { (SCENARIO) } ", other costs in proportion, links of the \
                 same rates, the processors' time left out. "
                code { "runs[].bounds, core_bytes, target_to_target_bytes, index_bytes" }
            }
            (against_measured(results, &model))
            div.scroll { table {
                thead { tr {
                    th { "hosts × VMs, model" } th { "core" } th { "inside the source rack" }
                    th { "into a target host" } th { "time" } th { "limit" }
                } }
                tbody { @for (hosts, one) in &predicted { tr {
                    th scope="row" { (hosts) " × " (VMS_PER_HOST) }
                    td { (text::wire_bytes(one.core_bytes)) }
                    td { (text::wire_bytes(one.index_bytes)) }
                    td { (text::wire_bytes(one.edge_bytes)) }
                    td { (text::seconds(one.seconds)) }
                    td { (one.limit) }
                } } }
            } }
            @if let Some(drawing) =
                lines::draw("Bytes on the core link, model", "hosts", Unit::WireBytes, &[line])
            {
                div.cards { figure { h3 { "Bytes on the core link, model" } (drawing) } }
            }
        }
    }
}

/// The model beside the racks that were measured, and which of them it was made from.
fn against_measured(results: &Results, model: &Model) -> Markup {
    let all = Measured::all(results);
    html! {
        p { (tested(all.len())) }
        div.scroll { table {
            thead { tr {
                th { "hosts × VMs, measured" } th { "core" } th { "core, model" } th { "time" }
                th { "time, model" }
            } }
            tbody { @for (nth, rack) in all.iter().enumerate() {
                @let one = model.predict(rack.point.hosts, rack.point.vms_per_host);
                @let is_source = nth == 0 || nth + 1 == all.len();
                tr {
                    th scope="row" { (rack.point.hosts) " × " (rack.point.vms_per_host) }
                    td { (text::wire_bytes(rack.core)) }
                    td { (text::wire_bytes(one.core_bytes)) @if is_source { " (made from it)" } }
                    td { (rack.seconds.map_or("–".to_owned(), text::seconds)) }
                    td { (text::seconds(one.seconds)) }
                }
            } }
        } }
    }
}

/// What the comparison with so many racks is worth.
fn tested(racks: usize) -> String {
    let between = match racks.saturating_sub(2) {
        0 => "no rack between them was measured, so that nothing here tests it".to_owned(),
        1 => "1 rack between them tests it".to_owned(),
        racks => format!("{racks} racks between them test it"),
    };
    format!(
        "Means of the runs. The model is made from the bytes of the smallest and the largest rack, and gives \
         these back by construction; {between}. Its times are of links alone."
    )
}

fn sentence(predicted: &[(u32, Predicted)]) -> Option<String> {
    let (hosts, last) = predicted.last()?;
    let change = predicted
        .windows(2)
        .find(|pair| pair[0].1.limit != pair[1].1.limit);
    let limit = match change {
        Some(pair) => format!(
            "the limit is {} up to {} hosts and {} from {} on",
            pair[0].1.limit, pair[0].0, pair[1].1.limit, pair[1].0
        ),
        None => format!("the limit is {} throughout", last.limit),
    };
    Some(format!(
        "By the model {hosts} hosts with {VMS_PER_HOST} VMs each send {} over the core link in {} at \
         best; {limit}.",
        text::wire_bytes(last.core_bytes),
        text::seconds(last.seconds)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Bounds, Topology};

    /// Guests of 10000 pages, 2000 of them common to all and 1000 their own; a content costs 1000
    /// bytes, a page 10.
    fn measured() -> Results {
        let run = |hosts: u32| {
            let vms = u64::from(hosts) * 4;
            let (pages, contents) = (10_000 * vms, 2_000 + 1_000 * vms);
            Run {
                technique: "full".into(),
                compression: "zstd".into(),
                source_hosts: Some(hosts),
                vms_per_host: Some(4),
                vms: hosts * 4,
                core_bytes: Some(1000 * contents + 10 * pages),
                target_to_target_bytes: Some(20 * pages),
                index_bytes: Some(2 * pages),
                bounds: Some(Bounds {
                    nonfill_pages: pages,
                    rack_contents: contents,
                    ..Bounds::default()
                }),
                ..Run::default()
            }
        };
        Results {
            scenario: SCENARIO.into(),
            topology: Topology {
                core_bits_per_second: Some(1_000_000_000),
                edge_bits_per_second: Some(100_000_000),
                ..Topology::default()
            },
            runs: vec![run(1), run(6)],
            ..Results::default()
        }
    }

    #[test]
    fn the_model_gives_back_what_it_was_fed_with_and_carries_it_on() {
        let results = measured();
        let model = Model::of(&results).unwrap();
        for run in &results.runs {
            let hosts = run.source_hosts.unwrap();
            let predicted = model.predict(hosts, 4).core_bytes;
            let core = run.core_bytes.unwrap() as f64;
            assert!((predicted / core - 1.0).abs() < 1e-6, "{hosts} hosts");
        }
        let far = model.predict(40, 50);
        let contents = 2_000.0 + 1_000.0 * 2_000.0;
        let core = 1_000.0 * contents + 10.0 * 10_000.0 * 2_000.0;
        assert!((far.core_bytes / core - 1.0).abs() < 1e-6);
        // 2.2 GB over 1 Gbit/s, against 65 MB for each edge and 40 MB for the index.
        assert_eq!(far.limit, "the core link");
        assert_eq!(model.predict(1, 4).limit, "the hosts' edge links");
    }

    #[test]
    fn the_model_is_made_from_the_mean_of_all_repeats() {
        let mut results = measured();
        let mut again = results.runs[1].clone();
        again.repeat = 1;
        again.core_bytes = again.core_bytes.map(|bytes| bytes * 3);
        results.runs.push(again);
        let core = results.runs[1].core_bytes.unwrap() as f64;
        let predicted = Model::of(&results).unwrap().predict(6, 4).core_bytes;
        assert!((predicted / (2.0 * core) - 1.0).abs() < 1e-6, "{predicted}");
    }

    #[test]
    fn what_agrees_by_construction_is_said_to() {
        let page = section(&[measured()]).into_string();
        assert_eq!(page.matches("(made from it)").count(), 2);
        assert!(page.contains("by construction; no rack between them was measured"));
        assert!(tested(3).contains("1 rack between them tests it"));
    }

    #[test]
    fn the_sentence_says_where_the_limit_changes() {
        let page = section(&[measured()]).into_string();
        assert!(
            page.contains("hosts and the core link from 20 on")
                || page.contains("hosts and the core link from 10 on")
        );
        assert!(
            section(&[Results::default()]).into_string().is_empty(),
            "nothing was measured"
        );
    }
}
