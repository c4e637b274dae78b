//! The scenarios that come with the lab, by name, and how settings change them.

use std::path::Path;

use anyhow::{Context, bail};
use toml::{Table, Value};

/// Those of the papers' evaluation, in its order: what `gangway-lab run papers` runs.
pub const PAPERS: &[&str] = &[
    "irlm-fig4",
    "irlm-table1",
    "irlm-fig6",
    "irlm-fig8",
    "irlm-table2",
    "slm-fig5",
    "slm-downtime",
    "slm-fig6",
    "slm-fig7",
    "peers",
    "unlike",
    "unlike-kernels",
];

/// Figures that are drawn from the runs of another one.
const SAME_RUNS: &[(&str, &str)] = &[
    ("irlm-fig5", "irlm-fig4"),
    ("irlm-fig7", "irlm-fig6"),
    ("irlm-fig9", "irlm-fig8"),
    ("slm-fig2", "slm-fig5"),
    ("slm-fig4", "slm-fig5"),
    ("scale", "irlm-fig4"),
];

const BUILT_IN: &[(&str, &str)] = &[
    ("pair", include_str!("../scenarios/pair.toml")),
    ("racks-small", include_str!("../scenarios/racks-small.toml")),
    (
        "racks-seeded",
        include_str!("../scenarios/racks-seeded.toml"),
    ),
    ("racks", include_str!("../scenarios/racks.toml")),
    ("pair-big", include_str!("../scenarios/pair-big.toml")),
    ("dirty", include_str!("../scenarios/dirty.toml")),
    ("versions", include_str!("../scenarios/versions.toml")),
    (
        "versions-old",
        include_str!("../scenarios/versions-old.toml"),
    ),
    ("fault", include_str!("../scenarios/fault.toml")),
    ("faults", include_str!("../scenarios/faults.toml")),
    (
        "postcopy-faults",
        include_str!("../scenarios/postcopy-faults.toml"),
    ),
    (
        "postcopy-rack-faults",
        include_str!("../scenarios/postcopy-rack-faults.toml"),
    ),
    (
        "postcopy-shared-faults",
        include_str!("../scenarios/postcopy-shared-faults.toml"),
    ),
    (
        "postcopy-given-up",
        include_str!("../scenarios/postcopy-given-up.toml"),
    ),
    (
        "postcopy-stress",
        include_str!("../scenarios/postcopy-stress.toml"),
    ),
    (
        "postcopy-balloon",
        include_str!("../scenarios/postcopy-balloon.toml"),
    ),
    ("rack-faults", include_str!("../scenarios/rack-faults.toml")),
    ("rack-stale", include_str!("../scenarios/rack-stale.toml")),
    (
        "agent-memory",
        include_str!("../scenarios/agent-memory.toml"),
    ),
    ("unshaped", include_str!("../scenarios/unshaped.toml")),
    (
        "racks-loaded",
        include_str!("../scenarios/racks-loaded.toml"),
    ),
    ("irlm-fig4", include_str!("../scenarios/irlm-fig4.toml")),
    ("irlm-fig6", include_str!("../scenarios/irlm-fig6.toml")),
    ("irlm-fig8", include_str!("../scenarios/irlm-fig8.toml")),
    ("irlm-table1", include_str!("../scenarios/irlm-table1.toml")),
    ("irlm-table2", include_str!("../scenarios/irlm-table2.toml")),
    ("slm-fig5", include_str!("../scenarios/slm-fig5.toml")),
    ("slm-fig6", include_str!("../scenarios/slm-fig6.toml")),
    ("slm-fig7", include_str!("../scenarios/slm-fig7.toml")),
    (
        "slm-template",
        include_str!("../scenarios/slm-template.toml"),
    ),
    (
        "slm-downtime",
        include_str!("../scenarios/slm-downtime.toml"),
    ),
    ("slm-hops", include_str!("../scenarios/slm-hops.toml")),
    (
        "slm-isolation",
        include_str!("../scenarios/slm-isolation.toml"),
    ),
    ("slm-dirty", include_str!("../scenarios/slm-dirty.toml")),
    ("slm-rest", include_str!("../scenarios/slm-rest.toml")),
    ("identical", include_str!("../scenarios/identical.toml")),
    ("slm-tight", include_str!("../scenarios/slm-tight.toml")),
    ("peers", include_str!("../scenarios/peers.toml")),
    ("unlike", include_str!("../scenarios/unlike.toml")),
    (
        "unlike-kernels",
        include_str!("../scenarios/unlike-kernels.toml"),
    ),
];

/// The key of a scenario's table with what its quick variant changes.
const QUICK: &str = "quick";

/// Names and texts of all.
pub fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    BUILT_IN.iter().copied()
}

/// Figures that have a name of their own, and the scenario whose runs they are drawn from.
pub fn same_runs() -> impl Iterator<Item = (&'static str, &'static str)> {
    SAME_RUNS.iter().copied()
}

/// The scenario that a name stands for.
#[must_use]
pub fn resolve(name: &str) -> &str {
    let same = SAME_RUNS.iter().find(|(figure, _)| *figure == name);
    same.map_or(name, |(_, scenario)| scenario)
}

/// Text of a scenario, by name or from a file.
pub fn text_of(name: &str) -> anyhow::Result<String> {
    let name = resolve(name);
    if let Some((_, text)) = BUILT_IN.iter().find(|(known, _)| *known == name) {
        return Ok((*text).to_owned());
    }
    if Path::new(name)
        .extension()
        .is_some_and(|extension| extension == "toml")
    {
        return std::fs::read_to_string(name).with_context(|| format!("reading {name}"));
    }
    let known: Vec<_> = BUILT_IN.iter().map(|(name, _)| *name).collect();
    bail!(
        "there is no scenario `{name}`; there are {} (or name a .toml file)",
        known.join(", ")
    )
}

/// Sets `a.b=value`. The value is TOML, or text if it is not; a comma makes a list of a list's key.
pub fn apply(table: &mut Table, setting: &str) -> anyhow::Result<()> {
    let (path, text) = setting.split_once('=').context("must be KEY=VALUE")?;
    let mut keys: Vec<&str> = path.split('.').collect();
    let last = keys.pop().context("must be KEY=VALUE")?;
    let mut place = table;
    for key in keys {
        place = place
            .entry(key)
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .with_context(|| format!("`{key}` is not a table"))?;
    }
    let value = match place.get(last) {
        Some(Value::Array(items)) if !text.starts_with('[') => {
            let numbers = items.iter().all(Value::is_integer) && !items.is_empty();
            let item = |item: &str| {
                if numbers {
                    parse_value(item)
                } else {
                    Value::String(item.to_owned())
                }
            };
            Value::Array(text.split(',').map(item).collect())
        }
        Some(Value::Array(_)) if !text.starts_with('[') => list(text),
        _ if path == "matrix.only" => list(text),
        Some(Value::String(_)) => Value::String(text.to_owned()),
        // Versions look like numbers, but are names.
        _ if path.starts_with("qemu.") => Value::String(text.to_owned()),
        _ => parse_value(text),
    };
    place.insert(last.to_owned(), value);
    Ok(())
}

fn list(text: &str) -> Value {
    let items = text.split(',');
    Value::Array(items.map(|item| Value::String(item.to_owned())).collect())
}

fn parse_value(text: &str) -> Value {
    let parsed = format!("value = {text}").parse::<Table>().ok();
    parsed
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

/// Takes the quick variant's changes out of a scenario's table, and makes them if `quick`.
pub fn shorten(table: &mut Table, quick: bool) -> anyhow::Result<()> {
    let changes = match table.remove(QUICK) {
        None => Table::new(),
        Some(Value::Table(changes)) => changes,
        Some(_) => bail!("`{QUICK}` is not a table"),
    };
    if quick {
        table.insert("repeats".to_owned(), Value::Integer(1));
        for (key, value) in changes {
            apply(table, &format!("{key}={value}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;

    #[test]
    fn every_scenario_that_comes_with_the_lab_is_valid_in_both_lengths() {
        for (name, _) in all() {
            for quick in [false, true] {
                Scenario::load(name, &[], quick).unwrap();
            }
        }
        for name in PAPERS {
            assert!(all().any(|(known, _)| known == *name), "{name}");
        }
        for (figure, scenario) in same_runs() {
            assert!(all().all(|(known, _)| known != figure), "{figure}");
            assert!(PAPERS.contains(&scenario), "{scenario}");
        }
    }

    #[test]
    fn guests_of_the_papers_have_stamps_where_their_memory_is_not_compared() {
        for name in PAPERS {
            let scenario = Scenario::load(name, &[], false).unwrap();
            let mut techniques = scenario.techniques.iter();
            let is_compared = scenario.compare && techniques.all(|one| one.can_be_compared());
            // They are to be as idle as the papers' guests, or as busy.
            let is_stamped = scenario.vm.stamp_mb > 0 && scenario.vm.stamp_still;
            assert!(is_compared || is_stamped, "{name}");
        }
    }

    #[test]
    fn quick_runs_once_with_the_changes_that_the_scenario_wants() {
        let full = Scenario::load("irlm-fig5", &[], false).unwrap();
        let quick = Scenario::load("irlm-fig5", &[], true).unwrap();
        assert!(full.repeats > 1 && quick.repeats == 1);
        assert!(quick.hosts.sweep.len() < full.hosts.sweep.len());
        let twice = Scenario::load("irlm-fig5", &["repeats=2".to_owned()], true).unwrap();
        assert_eq!(twice.repeats, 2);
    }
}
