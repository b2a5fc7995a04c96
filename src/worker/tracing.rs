//! The part of a trace that a place's own actions make: what it did, what it waited for, how much it
//! held. [`crate::trace`] has the picture.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use super::place::PlaceState;
use super::probes::Probe;
use crate::clock::TimeKind;
use crate::control::{Gate, Report, Reporter};
use crate::delay::version;
use crate::error::Result;
use crate::memory::resident;
use crate::schedule::{Action, Op, Pass, Tie};
use crate::setup::Setup;
use crate::trace::{ClockName, Count, Event, Moment, Part, Span, Wait, Window};

/// Writes what the rank does while a window is open.
pub(super) struct Tracing {
    setup: Arc<Setup>,
    gate: Arc<Gate>,
    reports: Reporter,
    out: PathBuf,
    rank: usize,
    /// Those of the rank.
    stages: Vec<usize>,
    open: Option<Open>,
    /// Writes the parts of windows that are over.
    threads: Vec<JoinHandle<()>>,
}

/// A window.
struct Open {
    window: Window,
    /// The stages that have not come past it yet: those that must begin a backward of a later step,
    /// and those whose table is not yet as new as their weights.
    backwards: Vec<usize>,
    tables: Vec<usize>,
    /// When the last action ended; when the present one, or the rest of it, began.
    ended: Moment,
    begun: Moment,
    /// The present action.
    action: Action,
    /// The time since the last action's end was a wait for rank 0.
    held: bool,
}

impl Tracing {
    /// Of a rank, which writes into a run's folder.
    pub(super) fn new(
        setup: &Arc<Setup>,
        gate: &Arc<Gate>,
        reports: &Reporter,
        out: PathBuf,
        rank: usize,
        stages: Vec<usize>,
    ) -> Tracing {
        let (setup, gate, reports) = (Arc::clone(setup), Arc::clone(gate), reports.clone());
        Tracing { setup, gate, reports, out, rank, stages, open: None, threads: Vec::new() }
    }

    /// Begins a window with an action.
    fn open(&mut self, window: Window, action: &Action) -> Result<()> {
        let (rank, reports) = (self.rank, self.reports.clone());
        let told = move |end: std::io::Result<()>| {
            let failed = end.err().map(|error| error.to_string());
            // A coordinator that is gone wants no trace.
            let _ = reports.send(Report::Traced { rank, window, clock: ClockName::own(), failed });
        };

        let now = Moment::now();
        self.gate.tracer.begin(Part::begin(Part::path(&self.out, window, rank), told)?);
        let (schedule, backwards) = (&self.setup.schedule, self.stages.clone());
        let has_table =
            |stage: &usize| schedule.tie != Tie::Untied && schedule.ends(*stage).next().is_some();
        let tables = backwards.iter().copied().filter(has_table).collect();
        let (ended, begun, action, held) = (now, now, *action, false);
        self.open = Some(Open { window, backwards, tables, ended, begun, action, held });
        Ok(())
    }

    /// Ends the window.
    fn close(&mut self) {
        self.open = None;
        self.threads.retain(|thread| !thread.is_finished());
        self.threads.extend(self.gate.tracer.end().map(Part::end));
    }

    fn add(&self, event: Event) {
        self.gate.tracer.add(event);
    }

    /// How much a place holds.
    fn counts(&self, action: &Action, place: &PlaceState, at: Moment) {
        let stage = place.place.stage;
        let count = |count, value| self.add(Event::Count { stage, count, value, at });
        if action.op == Op::Update && place.place.stage == self.stages[0] {
            resident().into_iter().for_each(|bytes| count(Count::Memory, bytes));
        }

        if !matches!(action.op, Op::Forward | Op::Backward | Op::Update)
            || action.pass == Pass::Eval
        {
            return;
        }

        let (waiting, oldest) = place.compute.under_way();
        let delay = self.setup.schedule.delays[stage];
        let newest = place.versions.newest();
        let used = oldest.map_or(newest, |of| version(place.sync, of.step, delay).min(newest));
        count(Count::Versions, (newest - used) as u64 + 1);
        count(Count::Activations, waiting as u64);
    }
}

impl Probe for Tracing {
    fn begin(&mut self, action: &Action, _: &mut PlaceState) -> Result<()> {
        if self.open.is_none() {
            let due = self.gate.tracer.due(action.step).filter(|_| action.pass == Pass::Train);
            match due {
                Some(window) => self.open(window, action)?,
                None => return Ok(()),
            }
        }

        let now = Moment::now();
        let Some(open) = &mut self.open else { return Ok(()) };
        if action.op == Op::Backward && action.step >= open.window.to {
            open.backwards.retain(|stage| *stage != action.stage);
        }

        let over = open.backwards.is_empty() && open.tables.is_empty();
        let span = Span { begin: open.ended, end: now };
        let wait = if open.held { Wait::Gate } else { Wait::Between };
        (open.begun, open.action, open.held) = (now, *action, false);
        self.add(Event::Wait { stage: action.stage, wait, span });
        if over {
            self.close();
        }
        Ok(())
    }

    fn held(&mut self) {
        self.open.iter_mut().for_each(|open| open.held = true);
    }

    fn waited(&mut self, _: TimeKind) {
        let Some(open) = &mut self.open else { return };
        let (action, now) = (open.action, Moment::now());
        let span = Span { begin: open.begun, end: now };
        open.begun = now;
        self.add(Event::Action { action, waits: true, span });
    }

    fn end(&mut self, action: &Action, place: &PlaceState) {
        let Some(open) = &mut self.open else { return };
        let now = Moment::now();
        let span = Span { begin: open.begun, end: now };
        let turn = Span { begin: open.ended, end: now };
        open.ended = now;
        // Under `head` and `fresh` an update takes a part that is older.
        let schedule = &self.setup.schedule;
        let older = if schedule.tie == Tie::Aligned { 0 } else { schedule.delays[0] };
        if matches!(action.op, Op::UpdateTable | Op::AwaitTable)
            && action.step + 1 >= open.window.to + older
        {
            open.tables.retain(|stage| *stage != action.stage);
        }

        self.add(Event::Action { action: *action, waits: false, span });
        for other in self.stages.iter().filter(|stage| **stage != action.stage) {
            self.add(Event::Wait { stage: *other, wait: Wait::Elsewhere, span: turn });
        }
        self.counts(action, place, now);
    }

    fn finish(&mut self) {
        self.close();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // What it could not write it has said.
        }
    }
}
