//! What a plot shows, said in one sentence that is computed from the data.

use super::kinds::Mix;
use super::metric::{BASELINE, Metric};
use super::spread::{Relation, Spread};
use super::text;
use super::timeline;
use crate::results::Technique;

/// What the bars of one measure say; `None` if no run has it.
pub(crate) fn of_metric(metric: &Metric, techniques: &[Technique<'_>]) -> Option<String> {
    let all: Vec<(&str, Spread)> = techniques
        .iter()
        .filter_map(|technique| Some((technique.name.as_str(), metric.spread(technique)?)))
        .collect();
    let less = |a: &&(&str, Spread), b: &&(&str, Spread)| a.1.mean.total_cmp(&b.1.mean);
    let baseline = all.iter().find(|(name, _)| *name == BASELINE);
    let best = all
        .iter()
        .filter(|(name, _)| *name != BASELINE)
        .min_by(less);
    let write = |spread: &Spread| metric.unit.write(spread.mean);
    if let Some((_, baseline)) = baseline
        && all.len() > 2
        && all
            .iter()
            .all(|(_, spread)| spread.relation_to(baseline) == Relation::Within)
    {
        let stock = write(baseline);
        return Some(format!(
            "No technique's {} can be told from stock's, {stock}.",
            metric.noun
        ));
    }
    Some(match (baseline, best) {
        (Some((_, baseline)), Some((name, best))) => against_stock(metric, name, best, baseline),
        (Some((name, only)), None) | (None, Some((name, only))) if all.len() == 1 => {
            format!("The {} of {name} is {}.", metric.noun, write(only))
        }
        (None, Some((name, best))) => {
            let (worst_name, worst) = all.iter().max_by(less)?;
            format!(
                "The {} of {name} is the smallest, {}; that of {worst_name} the largest, {}.",
                metric.noun,
                write(best),
                write(worst)
            )
        }
        _ => return None,
    })
}

fn against_stock(metric: &Metric, name: &str, best: &Spread, stock: &Spread) -> String {
    let noun = metric.noun;
    let (best_text, stock_text) = (metric.unit.write(best.mean), metric.unit.write(stock.mean));
    match (best.relation_to(stock), best.ratio_to(stock)) {
        (Relation::Within, _) => {
            format!("The {noun} of {name}, {best_text}, cannot be told from stock's, {stock_text}.")
        }
        (Relation::Below, Some(ratio)) => format!(
            "The {noun} of {name} is {} of stock's: {best_text} against {stock_text}.",
            text::percent(ratio)
        ),
        (Relation::Above, _) => format!(
            "Stock has the smallest {noun}, {stock_text}; {name} comes closest with {best_text}."
        ),
        (Relation::Below, None) => {
            format!("The {noun} of {name} is {best_text}, stock's {stock_text}.")
        }
    }
}

/// What the stacked pages say.
pub(crate) fn of_mixes(mixes: &[Mix]) -> Option<String> {
    let literal = |mix: &&Mix| mix.share("literal");
    let least = mixes
        .iter()
        .min_by(|a, b| literal(a).total_cmp(&literal(b)))?;
    let most = mixes
        .iter()
        .max_by(|a, b| literal(a).total_cmp(&literal(b)))?;
    let references = least.share("reference") + least.share("remote_reference");
    let uniform = least.share("zero") + least.share("fill");
    let mut sentence = format!(
        "With {} {} of the pages cross with their bytes, {} as references and {} as zero or \
         fill runs",
        least.technique,
        text::percent(least.share("literal")),
        text::percent(references),
        text::percent(uniform),
    );
    if literal(&most) > literal(&least) {
        sentence += &format!(
            "; with {} {} cross with their bytes",
            most.technique,
            text::percent(literal(&most))
        );
    }
    Some(sentence + ".")
}

/// How many of the pages are mapped, whichever way their contents crossed; `None` if none are.
pub(crate) fn of_mapped(mixes: &[Mix]) -> Option<String> {
    let mapping = mixes.iter().filter(|mix| mix.mapped > 0.0);
    let each = mapping.map(|mix| format!("{} with {}", text::pages(mix.mapped), mix.technique));
    let each: Vec<String> = each.collect();
    (!each.is_empty()).then(|| {
        format!(
            "Of these pages are mapped copy-on-write at the target, whichever way they crossed: {}.",
            each.join(", ")
        )
    })
}

/// What the timelines say.
pub(crate) fn of_timelines(techniques: &[Technique<'_>]) -> Option<String> {
    let ends: Vec<(&str, Spread)> = techniques
        .iter()
        .filter_map(|technique| {
            let run = timeline::run_shown(technique)?;
            let ends = Spread::of(run.timeline.iter().filter_map(timeline::end_of))?;
            Some((technique.name.as_str(), ends))
        })
        .collect();
    let (first, soonest) = ends.iter().min_by(|a, b| a.1.max.total_cmp(&b.1.max))?;
    let (last, latest) = ends.iter().max_by(|a, b| a.1.max.total_cmp(&b.1.max))?;
    let soonest_text = text::seconds(soonest.max);
    let apart = text::seconds(soonest.max - soonest.min);
    Some(if first == last {
        format!(
            "With {first} all VMs are sent after {soonest_text}, {apart} after the first of them."
        )
    } else {
        format!(
            "With {first} all VMs are sent after {soonest_text}, {apart} after the first of them; with \
             {last} it takes {}.",
            text::seconds(latest.max)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{metric, sample};
    use crate::results::Results;

    fn core_sentence(change: impl FnOnce(&mut Results)) -> String {
        let mut results = sample::results();
        change(&mut results);
        of_metric(&metric::CORE_BYTES, &results.techniques()).unwrap()
    }

    #[test]
    fn the_best_technique_is_set_against_stock() {
        let sentence = core_sentence(|_| ());
        assert_eq!(
            sentence,
            "The core traffic of gang+zstd is 14 % of stock's: 98 MB against 702 MB."
        );
    }

    #[test]
    fn techniques_within_the_spread_are_not_ranked() {
        let sentence = core_sentence(|results| {
            results
                .runs
                .iter_mut()
                .for_each(|run| run.core_bytes = Some(5_000_000));
        });
        assert_eq!(
            sentence,
            "No technique's core traffic can be told from stock's, 5 MB."
        );
    }

    #[test]
    fn stock_may_win() {
        let sentence = core_sentence(|results| {
            let stock = results
                .runs
                .iter_mut()
                .filter(|run| run.technique == "stock");
            stock.for_each(|run| run.core_bytes = Some(1_000_000));
        });
        assert!(
            sentence.starts_with("Stock has the smallest core traffic, 1 MB;"),
            "{sentence}"
        );
    }

    #[test]
    fn without_stock_the_smallest_is_set_against_the_largest() {
        let sentence = core_sentence(|results| {
            results.runs.retain(|run| run.technique != "stock");
        });
        assert_eq!(
            sentence,
            "The core traffic of gang+zstd is the smallest, 98 MB; that of oc the largest, 655 MB."
        );
    }

    #[test]
    fn mapped_pages_are_a_number_of_their_own() {
        let mix = |technique: &str, mapped| Mix {
            technique: technique.into(),
            total: 300.0,
            parts: Vec::new(),
            mapped,
        };
        assert_eq!(
            of_mapped(&[mix("stock", 0.0), mix("slm", 120.0)]).unwrap(),
            "Of these pages are mapped copy-on-write at the target, whichever way they crossed: 120 with \
             slm."
        );
        assert_eq!(of_mapped(&[mix("stock", 0.0)]), None);
    }

    #[test]
    fn a_single_technique_is_only_reported() {
        let sentence = core_sentence(|results| results.runs.truncate(3));
        assert_eq!(sentence, "The core traffic of stock is 702 MB.");
    }
}
