//! The traces of a run on rank 0: which steps are traced, what the clocks of the ranks say meanwhile,
//! and the parts of all ranks made into one file, on a thread beside the coordinator.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::control::{Control, Controls};
use crate::error::{Error, Result};
use crate::files;
use crate::setup::Setup;
use crate::trace::{About, Alignment, ClockName, Moment, Offset, Part, Window, merge, reserve};

/// Between two looks at the file `TRACE`: it may be far away.
const LOOK: Duration = Duration::from_secs(1);

/// Between two questions to the clocks: of the first ones of a window, of the others; how many answers
/// there are at least before a trace is written, and how long the last ones are waited for.
const ASK: Duration = Duration::from_millis(20);
const ASK_AGAIN: Duration = Duration::from_secs(1);
const FIRST: usize = 200;
const LEAST: usize = 8;
const PATIENCE: Duration = Duration::from_secs(3);

/// The traces of a run.
pub struct Traces {
    setup: Arc<Setup>,
    out: PathBuf,
    /// Ranks, and whether they are threads of one process.
    ranks: usize,
    threads: bool,
    /// Whether there are places that can be traced: the oracle has none.
    possible: bool,
    looked: Instant,
    /// The file `TRACE` that could not be read has been told of.
    unread: bool,
    open: Option<Open>,
    /// One that was asked for before that one, and comes behind it.
    later: Option<Window>,
    merging: Vec<Merging>,
}

/// A trace that is being written; a failed one whose parts are being removed.
struct Merging {
    window: Window,
    failed: bool,
    thread: JoinHandle<io::Result<()>>,
}

/// A window that is being traced.
struct Open {
    window: Window,
    alignment: Alignment,
    asked: Instant,
    /// Of each rank whose part is complete.
    parts: Vec<(usize, ClockName)>,
    complete: Option<Instant>,
    failed: bool,
}

impl Traces {
    /// None yet, of so many ranks.
    pub fn new(setup: Arc<Setup>, out: &Path) -> Traces {
        let (out, looked) = (out.to_owned(), Instant::now());
        let (threads, possible, unread) = (false, true, false);
        let (open, later, merging) = (None, None, Vec::new());
        Traces { setup, out, ranks: 0, threads, possible, looked, unread, open, later, merging }
    }

    /// The ranks are so many; whether they are threads of one process, and can be traced.
    pub fn of_ranks(&mut self, ranks: usize, threads: bool, possible: bool) {
        (self.ranks, self.threads, self.possible) = (ranks, threads, possible);
    }

    /// All ranks know that these steps are traced.
    pub fn expect(&mut self, window: Window) {
        self.open = Some(Open {
            window,
            alignment: Alignment::new(self.setup.grid.size()),
            asked: Instant::now(),
            parts: Vec::new(),
            complete: None,
            failed: false,
        });
    }

    /// Looks for the file `TRACE`, asks the clocks, and writes what is complete; `limit` is the first
    /// step that nobody may begin yet, `apart` how many steps a trace takes to be over for all, `stop` the
    /// one that the run ends before if it is told to. What people should read.
    pub fn look(
        &mut self,
        limit: usize,
        apart: usize,
        stop: Option<usize>,
        controls: &Controls,
    ) -> Vec<String> {
        let mut notes = Vec::new();
        if stop.is_none() && self.looked.elapsed() >= LOOK {
            self.looked = Instant::now();
            notes.extend(self.asked_for(limit, apart, controls));
        }

        notes.extend(self.begin_later(limit, controls));
        self.ask(limit, controls);
        notes.extend(self.begin_merging(stop));
        let (over, merging): (Vec<_>, Vec<_>) = std::mem::take(&mut self.merging)
            .into_iter()
            .partition(|merging| merging.thread.is_finished());
        self.merging = merging;
        notes.extend(over.into_iter().filter_map(|merging| self.merged(merging)));
        notes
    }

    /// What a file `TRACE` in the run's folder comes to, which is removed. One that is empty is being
    /// written.
    fn asked_for(&mut self, limit: usize, apart: usize, controls: &Controls) -> Option<String> {
        let path = self.out.join("TRACE");
        let text = match files::read_text(&path) {
            Ok(text) if text.trim().is_empty() => return None,
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                let told = format!("the file TRACE cannot be read ({error})");
                return (!std::mem::replace(&mut self.unread, true)).then_some(told);
            }
        };

        self.unread = false;
        if let Err(error) = fs::remove_file(&path) {
            return Some(format!("the file TRACE cannot be removed ({error}), and traces nothing"));
        }

        let (steps, planned) =
            (self.setup.config.steps, self.open.as_ref().map(|open| open.window));
        let count = text.trim().parse::<usize>().ok().filter(|count| *count > 0);
        Some(match count {
            None => format!(
                "the file TRACE holds `{}`: write a number of steps, as in 10",
                text.trim().chars().take(40).collect::<String>()
            ),
            Some(_) if !self.possible => {
                "the file TRACE is not heeded: the oracle has no places".to_owned()
            }
            Some(_) if limit >= steps => {
                "the file TRACE came too late: all steps up to the end are under way".to_owned()
            }
            Some(count) => {
                let window = Window { from: limit, to: limit.saturating_add(count).min(steps) };
                let reached = [planned, self.later].into_iter().flatten();
                let free = window.to.saturating_add(apart);
                if let Some(other) = reached.into_iter().find(|other| other.from < free) {
                    return Some(format!(
                        "the file TRACE came before the trace of the steps {other} is made: ask again after it"
                    ));
                }

                self.later = planned.or(self.later);
                self.expect(window);
                controls.send(Control::Trace(window));
                format!("tracing the steps {window}")
            }
        })
    }

    /// The window that another one came before, once that is complete.
    fn begin_later(&mut self, limit: usize, controls: &Controls) -> Option<String> {
        let window = self.later.filter(|_| self.open.is_none())?;
        self.later = None;
        if limit > window.from {
            return Some(format!(
                "note: the steps {window} are not traced: the trace before them was not complete"
            ));
        }

        self.expect(window);
        controls.send(Control::Trace(window));
        None
    }

    /// Asks all ranks what their clocks say.
    fn ask(&mut self, limit: usize, controls: &Controls) {
        let several = self.ranks > 1 && !self.threads;
        // Clocks drift: not before somebody may have begun.
        let begun = |open: &&mut Open| several && limit > open.window.from;
        let Some(open) = self.open.as_mut().filter(begun) else { return };
        let wait = if open.alignment.questions() < FIRST { ASK } else { ASK_AGAIN };
        if open.asked.elapsed() >= wait {
            open.asked = Instant::now();
            controls.send(Control::Clock(open.alignment.ask()));
        }
    }

    /// A rank's clock has answered.
    pub fn answered(&mut self, rank: usize, number: u64, at: Moment) {
        let now = Moment::now();
        self.open.iter_mut().for_each(|open| open.alignment.answer(rank, number, at, now));
    }

    /// A rank has written its part, or cannot: what people should read.
    pub fn traced(
        &mut self,
        rank: usize,
        window: Window,
        clock: ClockName,
        failed: Option<String>,
    ) -> Option<String> {
        let open = self.open.as_mut().filter(|open| open.window == window)?;
        open.parts.push((rank, clock));
        if open.parts.len() == self.ranks {
            open.complete = Some(Instant::now());
        }

        let first = failed.filter(|_| !open.failed)?;
        open.failed = true;
        let name = self.setup.grid.name(rank);
        Some(format!(
            "note: the steps {window} are not traced: {name} cannot write its part ({first})"
        ))
    }

    /// Begins to write the trace of a window that is complete, once the clocks have said enough.
    fn begin_merging(&mut self, stop: Option<usize>) -> Option<String> {
        let one = self.ranks == 1 || self.threads;
        let ready = |open: &Open, complete: &Instant| {
            let same = open.parts.iter().all(|(_, clock)| *clock == ClockName::own());
            one || same || open.alignment.answers() >= LEAST || complete.elapsed() >= PATIENCE
        };
        if !self.open.as_ref().is_some_and(|open| {
            open.failed && open.complete.is_some()
                || open.complete.as_ref().is_some_and(|complete| ready(open, complete))
        }) {
            return None;
        }

        let open = self.open.take()?;
        let (window, now) = (open.window, Moment::now());
        let parts: Vec<(usize, PathBuf, Option<Offset>)> = open
            .parts
            .iter()
            .map(|(rank, clock)| {
                let path = Part::path(&self.out, window, *rank);
                (*rank, path, open.alignment.offset(*rank, clock, now))
            })
            .collect();
        let to = stop.map_or(window.to, |stop| stop.min(window.to));
        // The save of a stop right before the window has begun it, and nothing else.
        let (empty, unbegun) = (to <= window.from, unbegun(window));
        let window = Window { to, ..window };
        let about = About {
            name: self.setup.config.name.clone(),
            grid: self.setup.grid,
            schedule: self.setup.schedule.clone(),
            window,
            reserve: reserve(self.setup.two_states(), self.setup.grid.devices()),
            threads: self.threads,
        };

        let (path, failed) = (self.out.join(window.file()), open.failed || empty);
        let work = move || {
            let remove = parts.iter().map(|(_, path, _)| path.clone()).collect::<Vec<_>>();
            let done = if failed { Ok(()) } else { write(&about, parts, &path) };
            remove.iter().for_each(|part| {
                let _ = fs::remove_file(part); // The next run removes what stays.
            });
            done
        };
        match std::thread::Builder::new().name("trace".into()).spawn(work) {
            Ok(thread) => self.merging.push(Merging { window, failed, thread }),
            Err(error) => return Some(format!("note: no thread that writes the trace ({error})")),
        }
        empty.then_some(unbegun)
    }

    /// Whether a trace is still to be written.
    pub fn pending(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.complete.is_some()) || !self.merging.is_empty()
    }

    /// At the end of the run: what there is to say of steps that were to be traced and were not made.
    pub fn unbegun(&self) -> Option<String> {
        self.open.as_ref().map(|open| unbegun(open.window)).or(self.later.map(unbegun))
    }

    /// How a trace's writing ended, in words.
    fn merged(&self, merging: Merging) -> Option<String> {
        let Merging { window, failed, thread } = merging;
        let (path, end) = (self.out.join(window.file()), thread.join());
        if failed {
            return None; // That has been told.
        }

        Some(match end {
            Ok(Ok(())) => format!("trace of the steps {window}: {}", path.display()),
            Ok(Err(error)) => format!(
                "note: the trace of the steps {window} cannot be written ({}: {error}); the training goes on",
                path.display()
            ),
            Err(_) => format!("note: the trace of the steps {window} could not be made"),
        })
    }
}

/// What there is to say of steps that were to be traced and were not made.
fn unbegun(window: Window) -> String {
    format!("note: the steps {window} are not traced: the run ends before them")
}

/// Writes a trace of parts whose clocks are known.
fn write(
    about: &About,
    parts: Vec<(usize, PathBuf, Option<Offset>)>,
    path: &Path,
) -> io::Result<()> {
    let known = parts.into_iter().map(|(rank, part, offset)| {
        let silent = || io::Error::other(format!("the clock of rank {rank} has not answered"));
        Ok((rank, part, offset.ok_or_else(silent)?))
    });
    merge(about, &known.collect::<io::Result<Vec<_>>>()?, path)
}

/// Removes what traces of a run that was killed have left.
///
/// # Errors
/// [`Error::Config`] about `--out`.
pub fn tidy(out: &Path) -> Result<()> {
    crate::trace::remove_left(out).map_err(|error| {
        let remedy = format!("a part of an old trace cannot be removed ({error})");
        Error::config("--out", out.display(), remedy)
    })
}
