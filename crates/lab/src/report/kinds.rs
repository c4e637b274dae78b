//! Pages by how they crossed: one bar for each technique, its parts stacked.

use maud::{Markup, html};

use super::svg::{PAGE_WIDTH, px};
use super::text;
use crate::results::{Pages, Technique};

const ROW: f64 = 34.0;
const BAR: f64 = 22.0;
const LABELS: f64 = 132.0;
const TOTALS: f64 = 130.0;
/// Surface between two parts.
const GAP: f64 = 2.0;
/// Narrower parts carry no text; their title and the table still do.
const ROOM_FOR_TEXT: f64 = 44.0;

/// A way for a page to cross, most costly first. What is mapped at the target has crossed as one of
/// these, too.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// Its field below `runs[].pages`.
    pub(crate) field: &'static str,
    pub(crate) read: fn(&Pages) -> Option<u64>,
}

pub(crate) const KINDS: &[Kind] = &[
    Kind {
        name: "with its bytes",
        field: "literal",
        read: |pages| pages.literal,
    },
    Kind {
        name: "reference",
        field: "reference",
        read: |pages| pages.reference,
    },
    Kind {
        name: "reference to another target",
        field: "remote_reference",
        read: |pages| pages.remote_reference,
    },
    Kind {
        name: "fill",
        field: "fill",
        read: |pages| pages.fill,
    },
    Kind {
        name: "zero",
        field: "zero",
        read: |pages| pages.zero,
    },
];

/// Mean pages of each of [`KINDS`] over the completed repetitions that counted them.
pub(crate) struct Mix {
    pub(crate) technique: String,
    pub(crate) total: f64,
    pub(crate) parts: Vec<f64>,
    /// Of all, those that are mapped copy-on-write at the target.
    pub(crate) mapped: f64,
}

impl Mix {
    pub(crate) fn of(technique: &Technique<'_>) -> Option<Self> {
        let counted: Vec<Pages> = technique.completed().filter_map(|run| run.pages).collect();
        let mean = |read: fn(&Pages) -> Option<u64>| {
            let counts = counted.iter().filter_map(read);
            counts.map(|pages| pages as f64).sum::<f64>() / counted.len() as f64
        };
        let total = mean(|pages| Some(pages.total));
        (total > 0.0).then(|| Self {
            technique: technique.name.clone(),
            total,
            parts: KINDS.iter().map(|kind| mean(kind.read)).collect(),
            mapped: mean(|pages| pages.mapped),
        })
    }

    /// Part of all pages that one kind is.
    pub(crate) fn share(&self, field: &str) -> f64 {
        KINDS
            .iter()
            .zip(&self.parts)
            .find(|(kind, _)| kind.field == field)
            .map_or(0.0, |(_, part)| part / self.total)
    }
}

/// Drawing and legend, or `None` if no run counted its pages.
pub(crate) fn draw(mixes: &[Mix]) -> Option<Markup> {
    let largest = mixes.iter().map(|mix| mix.total).reduce(f64::max)?;
    let height = ROW * mixes.len() as f64 + 4.0;
    let view_box = format!("0 0 {PAGE_WIDTH} {height}");
    let per_page = (PAGE_WIDTH - LABELS - TOTALS) / largest;
    Some(html! {
        (legend(mixes))
        svg viewBox=(view_box) role="img" aria-label="Pages by how they crossed" {
            @for (at, mix) in mixes.iter().enumerate() {
                @let middle = ROW * (at as f64 + 0.5);
                text class="label" x=(px(LABELS - 10.0)) y=(px(middle + 4.0)) text-anchor="end" {
                    (mix.technique)
                }
                (stack(mix, per_page, middle))
                text class="value" x=(px(LABELS + mix.total * per_page + 9.0))
                    y=(px(middle + 4.0)) { (text::pages(mix.total)) }
            }
        }
    })
}

fn stack(mix: &Mix, per_page: f64, middle: f64) -> Markup {
    let mut end = LABELS;
    let parts = KINDS
        .iter()
        .zip(&mix.parts)
        .filter(|(_, part)| **part > 0.0)
        .map(|(kind, part)| {
            let start = end;
            end += part * per_page;
            (kind, *part, start, (end - start - GAP).max(0.8))
        });
    html! {
        @for (kind, part, start, width) in parts {
            @let share = text::percent(part / mix.total);
            rect class={ "kind " (kind.field) } x=(px(start)) y=(px(middle - BAR / 2.0))
                width=(px(width)) height=(px(BAR)) rx="2" {
                title { (kind.name) ": " (text::pages(part)) ", " (share) }
            }
            @if width >= ROOM_FOR_TEXT {
                text class={ "on " (kind.field) } x=(px(start + width / 2.0))
                    y=(px(middle + 4.0)) text-anchor="middle" { (share) }
            }
        }
    }
}

fn legend(mixes: &[Mix]) -> Markup {
    html! {
        ul.legend {
            @for (at, kind) in KINDS.iter().enumerate() {
                @if mixes.iter().any(|mix| mix.parts[at] > 0.0) {
                    li { span class={ "key " (kind.field) } {} (kind.name) }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Run;

    #[test]
    fn a_page_that_is_mapped_is_counted_once_among_those_that_crossed() {
        let run = Run {
            pages: Some(Pages {
                total: 100,
                zero: Some(30),
                literal: Some(20),
                reference: Some(50),
                mapped: Some(45),
                ..Pages::default()
            }),
            ..Run::default()
        };
        let mix = Mix::of(&Technique {
            name: "slm".into(),
            runs: vec![&run],
        });
        let mix = mix.unwrap();
        assert_eq!(mix.parts.iter().sum::<f64>(), mix.total);
        assert_eq!(mix.mapped, 45.0);
    }
}
