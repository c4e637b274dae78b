//! States as text: pure functions.

use agent::types::{GroupMove, GroupPrepared, Phase, Progress};

use crate::board::{Board, Outlook, Row};

/// Size of a page of the guests.
const PAGE_BYTES: u64 = 4096;

/// The word for a phase, as the API has it.
pub(crate) fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Queued => "queued",
        Phase::Preparing => "preparing",
        Phase::Bulk => "bulk",
        Phase::SwitchOver => "switch-over",
        Phase::Loaded => "loaded",
        Phase::Held => "held",
        Phase::Released => "released",
        Phase::Recovering => "recovering",
        Phase::PostCopy => "post-copy",
        Phase::Moved => "moved",
        Phase::Stayed => "stayed",
        Phase::NeedsPerson => "needs a person",
    }
}

/// Decimal units, three digits: `1.25 GB`.
pub(crate) fn bytes(count: u64) -> String {
    let units = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let exact = count as f64;
    // What rounds up to 1000 belongs to the next unit.
    let fitting = units.iter().find(|(_, size)| exact >= size * 0.9995);
    match fitting {
        None => format!("{count} B"),
        Some((unit, size)) => {
            let value = exact / size;
            let digits = if value < 9.995 {
                2
            } else if value < 99.95 {
                1
            } else {
                0
            };
            format!("{value:.digits$} {unit}")
        }
    }
}

/// `45 s`, `3 min 20 s`, `2 h 5 min`.
pub(crate) fn seconds(seconds: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float's conversion saturates, and times are not negative"
    )]
    let whole = seconds.ceil() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

/// How much less crossed the wire than QEMU wrote.
pub(crate) fn saved(progress: &Progress) -> String {
    if progress.stream_bytes == 0 {
        return "-".to_owned();
    }
    #[expect(clippy::cast_precision_loss, reason = "whole percent are shown")]
    let ratio = progress.wire_bytes as f64 / progress.stream_bytes as f64;
    // The protocol's own bytes can make it more than nothing.
    format!("{:.0} %", ((1.0 - ratio) * 100.0).max(0.0))
}

/// What preparation has found.
pub(crate) fn prepared(prepared: &GroupPrepared) -> String {
    let pages = &prepared.pages;
    format!(
        "prepared in {:.1} s: {} of {} with contents are distinct",
        prepared.seconds,
        bytes(pages.distinct * PAGE_BYTES),
        bytes(pages.content * PAGE_BYTES),
    )
}

/// The line of one move.
pub(crate) fn row(row: &Row, vm_width: usize) -> String {
    let head = format!("{:vm_width$}  {:<14}", row.vm, phase(row.phase));
    let rate = (!row.phase.is_final()).then_some(row.progress.wire_bytes_per_s);
    let round = format!("round {:<3}", row.progress.round);
    format!(
        "{head}{round}{}",
        numbers(&row.progress, rate, row.outlook())
    )
}

/// The line of the whole group.
pub(crate) fn total(board: &Board, vm_width: usize) -> String {
    let total = board.total();
    let ended = format!("{} of {} ended", board.ended(), board.rows.len());
    let running = (board.ended() < board.rows.len()).then_some(total.wire_bytes_per_s);
    format!(
        "{:vm_width$}  {ended:<23}{}",
        "total",
        numbers(&total, running, board.outlook())
    )
}

fn numbers(progress: &Progress, rate: Option<u64>, outlook: Outlook) -> String {
    let sent = format!("  sent {:>8}", bytes(progress.wire_bytes));
    let left = format!("  left {:>8}", bytes(progress.remaining_bytes));
    let rate = rate.map_or(String::new(), |rate| format!("  {:>8}/s", bytes(rate)));
    let saved = format!("  saved {:>4}", saved(progress));
    let outlook = match outlook {
        Outlook::Unknown => String::new(),
        Outlook::Seconds(left) => format!("  ETA {}", seconds(left)),
        Outlook::NotConverging { dirty, link } => format!(
            "  not converging: dirty {}/s above link {}/s",
            bytes(dirty),
            bytes(link)
        ),
    };
    format!("{sent}{left}{rate}{saved}{outlook}")
}

/// Width of the column of names.
pub(crate) fn vm_width(board: &Board) -> usize {
    board
        .rows
        .iter()
        .map(|row| row.vm.len())
        .max()
        .unwrap_or(0)
        .max("total".len())
}

/// The closing table.
pub(crate) fn summary(outcomes: &[GroupMove]) -> String {
    let head = ["VM", "outcome", "time", "sent", "saved", "message"].map(str::to_owned);
    let line = |one: &GroupMove| {
        let status = &one.status;
        [
            status.vm.clone(),
            phase(status.phase).to_owned(),
            format!("{:.1} s", one.elapsed_s),
            bytes(status.progress.wire_bytes),
            saved(&status.progress),
            status.message.clone(),
        ]
    };
    table(
        std::iter::once(head)
            .chain(outcomes.iter().map(line))
            .collect(),
    )
}

/// Columns as wide as their widest cell; the last is free.
pub(crate) fn table<const N: usize>(lines: Vec<[String; N]>) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<_> = (0..N).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths);
        let padded: Vec<_> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits_and_decimal_units() {
        for (count, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.00 kB"),
            (9_996_000, "10.0 MB"),
            (11_200_000, "11.2 MB"),
            (999_999_999, "1.00 GB"),
            (268_435_456, "268 MB"),
            (u64::MAX, "18446744 TB"),
        ] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn seconds_are_rounded_up_and_never_say_zero_too_early() {
        for (left, text) in [
            (0.0, "0 s"),
            (0.1, "1 s"),
            (59.2, "1 min 0 s"),
            (200.0, "3 min 20 s"),
            (7_500.0, "2 h 5 min"),
        ] {
            assert_eq!(seconds(left), text);
        }
    }

    #[test]
    fn what_is_saved_is_never_negative() {
        let progress = |stream_bytes, wire_bytes| Progress {
            stream_bytes,
            wire_bytes,
            ..Progress::default()
        };
        assert_eq!(saved(&progress(0, 0)), "-");
        assert_eq!(saved(&progress(100, 37)), "63 %");
        assert_eq!(saved(&progress(100, 101)), "0 %");
    }

    #[test]
    fn a_phase_has_the_apis_word() {
        use Phase::{Bulk, Held, Loaded, Moved, PostCopy, Preparing, Queued, Recovering, Released};
        for one in [
            Queued,
            Preparing,
            Bulk,
            Phase::SwitchOver,
            Loaded,
            Held,
            Released,
            PostCopy,
            Recovering,
            Moved,
        ] {
            assert_eq!(
                serde_json::to_string(&one).unwrap(),
                format!("\"{}\"", phase(one))
            );
        }
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_blanks() {
        let cell = |text: &str| text.to_owned();
        let text = table(vec![[cell("VM"), cell("x")], [cell("web-1"), cell("")]]);
        assert_eq!(text, "VM     x\nweb-1\n");
    }
}
