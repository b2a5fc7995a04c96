//! `ouroboros watch`: a run as it goes, from the files in its folder alone: nothing here can hurt it, and
//! it works over ssh, on any machine that sees the folder.
//!
//! ```text
//! history (report)  --> state: where the run is --> screen: a page of the terminal
//!                                               '-> a line, where there is no terminal
//! ```

mod state;
mod screen;

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use crate::error::{Error, Result};
use crate::report::History;
use state::State;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Request {
    pub run: PathBuf,
    /// Between two looks at the files.
    pub every: Duration,
    /// One look, printed as a line.
    pub once: bool,
}

/// Shows the run until somebody types q; without a terminal prints a line a look until the run has
/// ended.
///
/// # Errors
/// [`Error::Data`] for a folder that is no run's.
pub fn watch(request: &Request) -> Result<()> {
    let wrong = |problem: String| Error::Data {
        path: request.run.display().to_string(),
        problem,
        remedy: "give the folder of a run, as in runs/quickstart".to_owned(),
    };
    if !request.run.is_dir() {
        return Err(wrong("is no folder".to_owned()));
    }

    let unread = |error: io::Error| wrong(format!("cannot be read ({error})"));
    let mut history = History::new(&request.run);
    history.read().map_err(unread)?;
    if history.metrics.steps.is_empty() && history.events.is_empty() {
        return Err(wrong(
            "has neither a step in metrics.jsonl nor an event in events.jsonl".to_owned(),
        ));
    }

    if request.once || !io::stdout().is_terminal() {
        return lines(request, history).map_err(unread);
    }

    let mut terminal = ratatui::try_init().map_err(unread)?;
    let shown = show(request, &mut history, &mut terminal);
    ratatui::restore();
    shown.map_err(unread)
}

/// A line a look.
fn lines(request: &Request, mut history: History) -> io::Result<()> {
    loop {
        let state = State::new(&history);
        say!("{}", state.line());
        if request.once || state.phase.is_over() {
            return Ok(());
        }

        std::thread::sleep(request.every);
        history.read()?;
    }
}

/// The page, drawn anew after every look and when the window changes.
fn show(
    request: &Request,
    history: &mut History,
    terminal: &mut ratatui::DefaultTerminal,
) -> io::Result<()> {
    let mut state = State::new(history);
    let (mut looked, mut first) = (Instant::now(), 0usize);
    loop {
        let mut most = 0;
        terminal.draw(|frame| most = screen::draw(frame, &state, first))?;
        first = first.min(most);
        let left = request.every.saturating_sub(looked.elapsed());
        if event::poll(left)? {
            let event = event::read()?;
            if leaves(&event) {
                return Ok(());
            }
            first = scrolled(&event, first);
        }

        if looked.elapsed() >= request.every {
            history.read()?;
            state = State::new(history);
            looked = Instant::now();
        }
    }
}

/// The first place that is shown after a key.
fn scrolled(event: &Event, first: usize) -> usize {
    let Event::Key(key) = event else { return first };
    match key.code {
        KeyCode::Down if key.kind != KeyEventKind::Release => first + 1,
        KeyCode::Up if key.kind != KeyEventKind::Release => first.saturating_sub(1),
        _ => first,
    }
}

/// q, Escape, or Ctrl-C.
fn leaves(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press
        && match key.code {
            KeyCode::Char('q') | KeyCode::Esc => true,
            KeyCode::Char('c') => control,
            _ => false,
        }
}
