//! Divides a group's bandwidth over the source agents that still have work.

use std::collections::BTreeMap;

/// Each source's share of `budget`, in proportion to its unfinished moves, so that each VM of
/// the group gets the same. Sources without work get none; the sum never exceeds the budget
/// unless that is less than a byte for each.
pub(crate) fn shares<'a>(
    budget: u64,
    unfinished: &BTreeMap<&'a str, u64>,
) -> BTreeMap<&'a str, u64> {
    let total: u64 = unfinished.values().sum();
    let share = |moves: u64| {
        let share = u128::from(budget) * u128::from(moves) / u128::from(total.max(1));
        u64::try_from(share).unwrap_or(u64::MAX).max(1)
    };
    let working = unfinished.iter().filter(|(_, moves)| **moves > 0);
    working
        .map(|(source, moves)| (*source, share(*moves)))
        .collect()
}

/// What must change from `applied` to `wanted`, reductions first: applied in this order, the sum
/// never exceeds both sums. A source that is not in `applied` may have any limit.
pub(crate) fn changes<'a>(
    applied: &BTreeMap<String, u64>,
    wanted: &BTreeMap<&'a str, u64>,
) -> Vec<Change<'a>> {
    let mut changes: Vec<_> = wanted
        .iter()
        .map(|(source, share)| Change {
            source,
            share: *share,
            before: applied.get(*source).copied(),
        })
        .filter(|change| change.before != Some(change.share))
        .collect();
    changes.sort_by_key(|change| change.is_increase());
    changes
}

/// A source's new share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Change<'a> {
    pub(crate) source: &'a str,
    pub(crate) share: u64,
    before: Option<u64>,
}

impl Change<'_> {
    /// Whether the source may send more than before.
    pub(crate) fn is_increase(&self) -> bool {
        self.before.is_some_and(|before| self.share > before)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_the_unfinished_moves_and_stay_within_the_budget() {
        let unfinished = [("a", 3), ("b", 1), ("c", 0)].into();
        let shares = shares(1_000_001, &unfinished);
        assert_eq!(shares, [("a", 750_000), ("b", 250_000)].into());
    }

    #[test]
    fn the_sum_never_exceeds_the_budget_while_shares_change() {
        let budget = 999_983;
        let mut applied: BTreeMap<String, u64> = BTreeMap::new();
        for step in 0..200_u64 {
            let left = |seed: u64| (step * seed) % 7;
            let unfinished = [("a", left(3)), ("b", left(5)), ("c", left(11))].into();
            let wanted = shares(budget, &unfinished);
            // A source without work sends nothing.
            applied.retain(|source, _| wanted.contains_key(source.as_str()));
            for change in changes(&applied, &wanted) {
                applied.insert(change.source.to_owned(), change.share);
                assert!(applied.values().sum::<u64>() <= budget, "step {step}");
            }
            let reached = applied
                .iter()
                .map(|(source, share)| (source.as_str(), *share))
                .collect();
            assert_eq!(wanted, reached, "step {step}");
        }
    }
}
