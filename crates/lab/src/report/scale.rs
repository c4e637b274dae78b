//! From racks that were measured to racks that do not fit on this machine: a model.
//!
//! What is measured of the scenario `irlm-fig4`, which is also called `scale`, is how many distinct
//! contents a rack's guests have, how many bytes each of them costs on the core link, and what the
//! hosts of a rack say to each other. The model carries that to more hosts and VMs: contents grow
//! along a straight line through the smallest and the largest rack that was measured, all other costs
//! in proportion. Every link carries what it must at its rate, all at once; the one that takes longest
//! is the limit. Processors are not in it.

use maud::{Markup, html};

use super::lines::{self, Series};
use super::metric::Unit;
use super::spread::Spread;
use super::text;
use crate::results::{Results, Run};

/// Scenario that the model is fed with.
const SCENARIO: &str = "irlm-fig4";
const TECHNIQUE: &str = "full";
/// VMs on each host of the racks that are modelled, and their numbers of hosts.
const VMS_PER_HOST: u32 = 50;
const HOSTS: [u32; 7] = [1, 2, 5, 10, 20, 30, 40];

/// What one run has shown.
#[derive(Clone, Copy, Debug)]
struct Measured {
    vms: f64,
    nonfill: f64,
    contents: f64,
    core: f64,
    between_targets: f64,
    index: f64,
}

impl Measured {
    fn of(run: &Run) -> Option<Self> {
        let bounds = run.bounds?;
        Some(Self {
            vms: f64::from(run.vms),
            nonfill: bounds.nonfill_pages as f64,
            contents: bounds.rack_contents as f64,
            core: run.core_bytes? as f64,
            between_targets: run.target_to_target_bytes? as f64,
            index: run.index_bytes? as f64,
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
    /// From the runs of the technique, smallest rack first.
    fn of(results: &Results) -> Option<Self> {
        let mut all: Vec<Measured> = results
            .runs
            .iter()
            .filter(|run| run.technique == TECHNIQUE && run.failure.is_none())
            .filter_map(Measured::of)
            .collect();
        all.sort_by(|a, b| a.vms.total_cmp(&b.vms));
        let (small, large) = (*all.first()?, *all.last()?);
        if large.vms <= small.vms {
            return None;
        }
        let each = (large.contents - small.contents) / (large.vms - small.vms);
        let common = (large.contents - each * large.vms).max(0.0);
        // Two runs tell what a content and what a page costs; where they do not, all is contents.
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

/// The model beside the racks that were measured: how far it can be believed.
fn against_measured(results: &Results, model: &Model) -> Markup {
    let runs = results.runs.iter().filter(|run| {
        run.technique == TECHNIQUE && run.failure.is_none() && Measured::of(run).is_some()
    });
    html! {
        div.scroll { table {
            thead { tr {
                th { "hosts × VMs, measured" } th { "core" } th { "core, model" } th { "time" }
                th { "time, model" }
            } }
            tbody { @for run in runs {
                @let point = results.point(run);
                @let one = model.predict(point.hosts, point.vms_per_host);
                tr {
                    th scope="row" { (point.hosts) " × " (point.vms_per_host) }
                    td { (text::wire_bytes(run.core_bytes.unwrap_or(0) as f64)) }
                    td { (text::wire_bytes(one.core_bytes)) }
                    td { (run.total_migration_time_s.map_or("–".to_owned(), text::seconds)) }
                    td { (text::seconds(one.seconds)) }
                }
            } }
        } }
    }
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
