//! Where a watched group is shown: in place on a terminal, as lines of a log, or as JSON.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use agent::types::{GroupEvent, Happening};

use crate::board::Board;
use crate::render;

/// A terminal is redrawn so often.
const FRAME: Duration = Duration::from_millis(500);
/// A log gets a line for each VM so often.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// One way to show a group.
#[derive(Debug)]
pub(crate) enum Screen {
    /// Redrawn in place on standard error.
    Terminal {
        /// So many lines of the last drawing are above the cursor.
        drawn: usize,
    },
    /// A line when something changes, and now and then.
    Log {
        /// When the last lines for every VM were written.
        last: Instant,
    },
    /// Each event as a line of JSON on standard output.
    Json,
}

impl Screen {
    /// The way that fits how we were called.
    pub(crate) fn new(json: bool) -> Self {
        if json {
            Self::Json
        } else if io::stderr().is_terminal() {
            Self::Terminal { drawn: 0 }
        } else {
            Self::Log {
                last: Instant::now(),
            }
        }
    }

    /// How often [`Self::tick`] is wanted.
    pub(crate) fn interval(&self) -> Duration {
        match self {
            Self::Log { .. } => LOG_EVERY,
            Self::Terminal { .. } | Self::Json => FRAME,
        }
    }

    /// Shows an event that the board has taken over.
    pub(crate) fn event(&mut self, event: &GroupEvent, board: &Board) -> io::Result<()> {
        match (&*self, event) {
            (Self::Json, event) => json_line(event),
            (_, GroupEvent::Move(one)) => match &one.what {
                Happening::Phase { phase, message } => {
                    let phase = render::phase(*phase);
                    self.say(&format!("{}: {phase}: {message}", one.vm), board)
                }
                Happening::Note { message } => self.say(&format!("{}: {message}", one.vm), board),
                Happening::Progress { .. } => Ok(()),
            },
            (_, GroupEvent::Prepared(prepared)) => self.say(&render::prepared(prepared), board),
            (_, GroupEvent::Finished(_)) => Ok(()),
        }
    }

    /// Shows how far everything is.
    pub(crate) fn tick(&mut self, board: &Board) -> io::Result<()> {
        match self {
            Self::Json => Ok(()),
            Self::Terminal { .. } => self.draw(board),
            Self::Log { last } => {
                *last = Instant::now();
                let width = render::vm_width(board);
                let mut err = io::stderr().lock();
                for row in board.rows.iter().filter(|row| !row.phase.is_final()) {
                    writeln!(err, "{}", render::row(row, width))?;
                }
                writeln!(err, "{}", render::total(board, width))
            }
        }
    }

    /// Says something to the person, without disturbing the drawing.
    pub(crate) fn say(&mut self, text: &str, board: &Board) -> io::Result<()> {
        self.clear()?;
        writeln!(io::stderr().lock(), "{text}")?;
        if matches!(self, Self::Terminal { .. }) {
            self.draw(board)
        } else {
            Ok(())
        }
    }

    /// Leaves the last state on the terminal and goes below it.
    pub(crate) fn close(&mut self, board: &Board) -> io::Result<()> {
        if matches!(self, Self::Terminal { .. }) {
            self.draw(board)
        } else {
            Ok(())
        }
    }

    fn clear(&mut self) -> io::Result<()> {
        if let Self::Terminal { drawn } = self {
            if *drawn > 0 {
                // Up to the drawing's first line, and erase from there.
                write!(io::stderr().lock(), "\x1b[{drawn}A\x1b[J")?;
            }
            *drawn = 0;
        }
        Ok(())
    }

    fn draw(&mut self, board: &Board) -> io::Result<()> {
        self.clear()?;
        let lines = drawing(board, size());
        let text: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
        let mut err = io::stderr().lock();
        err.write_all(text.as_bytes())?;
        if let Self::Terminal { drawn } = self {
            *drawn = lines.len();
        }
        err.flush()
    }
}

/// Writes one JSON object and a line's end to standard output.
pub(crate) fn json_line(value: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}

/// Columns and rows of the terminal.
fn size() -> (usize, usize) {
    let size = rustix::termios::tcgetwinsize(io::stderr());
    let size = size.map(|size| (usize::from(size.ws_col), usize::from(size.ws_row)));
    // A terminal that does not know its size is a serial console.
    size.ok()
        .filter(|size| size.0 > 0 && size.1 > 0)
        .unwrap_or((80, 24))
}

/// The lines that fit: the moves under way first, if not all do, and the total.
fn drawing(board: &Board, (columns, rows): (usize, usize)) -> Vec<String> {
    let width = render::vm_width(board);
    // The total, a line for what is left out, and the cursor's own.
    let room = rows.saturating_sub(3).max(1);
    let hidden = board.rows.len().saturating_sub(room);
    let mut shown: Vec<_> = board.rows.iter().collect();
    if hidden > 0 {
        shown.sort_by_key(|row| row.phase.is_final());
        shown.truncate(room);
    }
    let mut lines: Vec<_> = shown
        .into_iter()
        .map(|row| render::row(row, width))
        .collect();
    if hidden > 0 {
        lines.push(format!("… and {hidden} more"));
    }
    lines.push(render::total(board, width));
    // A line that wraps would not be erased.
    let fit = |line: String| line.chars().take(columns.saturating_sub(1)).collect();
    lines.into_iter().map(fit).collect()
}

#[cfg(test)]
mod tests {
    use agent::types::{GroupMove, GroupStatus, MoveStatus, Phase, Progress};

    use super::*;

    fn board(moved: usize, under_way: usize) -> Board {
        let one = |at: usize| GroupMove {
            status: MoveStatus {
                id: format!("g/vm-{at}"),
                group: "g".to_owned(),
                vm: format!("vm-{at}"),
                target: "b".to_owned(),
                phase: if at < moved {
                    Phase::Moved
                } else {
                    Phase::Bulk
                },
                message: String::new(),
                note: None,
                progress: Progress::default(),
            },
            source: "a".to_owned(),
            reachable: true,
            elapsed_s: 0.0,
        };
        let moves = (0..moved + under_way).map(one).collect();
        let group = "g".to_owned();
        Board::new(&GroupStatus {
            group,
            accepted_unix_ms: 0.0,
            finished: false,
            moves,
        })
    }

    #[test]
    fn a_drawing_fits_the_terminal_and_shows_what_is_under_way() {
        let lines = drawing(&board(30, 2), (60, 10));
        assert_eq!(lines.len(), 9);
        assert!(
            lines[0].starts_with("vm-30") && lines[1].starts_with("vm-31"),
            "{lines:?}"
        );
        assert_eq!(lines[7], "… and 25 more");
        assert!(
            lines[8].starts_with("total") && lines[8].contains("30 of 32"),
            "{lines:?}"
        );
        assert!(lines.iter().all(|line| line.chars().count() < 60));
    }

    #[test]
    fn a_small_group_is_shown_in_the_plans_order() {
        let lines = drawing(&board(1, 2), (200, 24));
        let names: Vec<_> = lines.iter().map(|line| &line[..5]).collect();
        assert_eq!(names, ["vm-0 ", "vm-1 ", "vm-2 ", "total"]);
    }
}
