//! The part of a trace that a place's own actions make: what it did, what it waited for, how much it
//! held. [`crate::trace`] has the picture.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use cudarc::driver::CudaEvent;
use tch::Device;

use super::place::PlaceState;
use super::probes::Probe;
use crate::clock::TimeKind;
use crate::control::{Gate, Report, Reporter};
use crate::delay::version;
use crate::device::queues::{CudaQueues, Queue, Queues};
use crate::device::timing::mark;
use crate::error::Result;
use crate::memory::resident;
use crate::schedule::{Action, Op, Pass, Tie};
use crate::setup::Setup;
use crate::trace::{ClockName, Count, Event, Moment, Part, Span, Wait, Window, reserve};

/// Between two looks at a GPU that has work left.
const LOOK: Duration = Duration::from_micros(200);

/// Writes what the rank does while a window is open.
pub(super) struct Tracing {
    setup: Arc<Setup>,
    gate: Arc<Gate>,
    reports: Reporter,
    out: PathBuf,
    rank: usize,
    /// Those of the rank.
    stages: Vec<usize>,
    /// The GPU, if the rank has one: moments are its own then.
    queues: Option<CudaQueues>,
    open: Option<Open>,
    /// Writes the parts of windows that are over.
    threads: Vec<JoinHandle<()>>,
}

/// A moment of the host, or a mark in the compute of its GPU.
#[derive(Clone)]
enum Stamp {
    Host(Moment),
    Device(Arc<CudaEvent>),
}

/// A window.
struct Open {
    window: Window,
    /// The stages that have not come past it yet: those that must begin a backward of a later step,
    /// and those whose table is not yet as new as their weights.
    backwards: Vec<usize>,
    tables: Vec<usize>,
    /// When the last action ended; when the present one, or the rest of it, began.
    ended: Stamp,
    begun: Stamp,
    /// The present action.
    action: Action,
    /// The time since the last action's end was a wait for rank 0.
    held: bool,
    /// The window is over, but for what the GPU has not come past yet.
    over: bool,
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
    ) -> Result<Tracing> {
        let queues = match setup.device {
            Device::Cuda(index) => Some(CudaQueues::new(index)?),
            _ => None,
        };
        let (setup, gate, reports) = (Arc::clone(setup), Arc::clone(gate), reports.clone());
        let (open, threads) = (None, Vec::new());
        Ok(Tracing { setup, gate, reports, out, rank, stages, queues, open, threads })
    }

    /// Now, on the host or in the compute of the GPU.
    fn stamp(&self) -> Result<Stamp> {
        Ok(match &self.queues {
            None => Stamp::Host(Moment::now()),
            Some(queues) => Stamp::Device(Arc::new(mark(queues.stream(Queue::Compute))?)),
        })
    }

    /// Lets the moments of the GPU be told in those of the host: waits, once a window, until it has
    /// come past a mark.
    fn align(&self) -> Result<()> {
        let Some(queues) = &self.queues else { return Ok(()) };
        let base = Arc::new(mark(queues.stream(Queue::Compute))?);
        while !queues.passed(&base)? {
            std::hint::spin_loop();
        }
        self.gate.tracer.begin_on_device(base, Moment::now());
        Ok(())
    }

    /// Begins a window with an action.
    fn open(&mut self, window: Window, action: &Action) -> Result<()> {
        let (rank, reports) = (self.rank, self.reports.clone());
        let told = move |end: std::io::Result<()>| {
            let failed = end.err().map(|error| error.to_string());
            // A coordinator that is gone wants no trace.
            let _ = reports.send(Report::Traced { rank, window, clock: ClockName::own(), failed });
        };

        self.align()?;
        let reserve = reserve(self.setup.two_states(), self.setup.grid.devices());
        match Part::begin(Part::path(&self.out, window, rank), reserve, told) {
            Ok(part) => self.gate.tracer.begin(part),
            Err(error) => {
                let (clock, failed) = (ClockName::own(), Some(error.to_string()));
                self.gate.tracer.plan(Window { from: usize::MAX, to: usize::MAX });
                return self.reports.send(Report::Traced { rank, window, clock, failed });
            }
        }
        let now = self.stamp()?;
        let (schedule, backwards) = (&self.setup.schedule, self.stages.clone());
        let has_table =
            |stage: &usize| schedule.tie != Tie::Untied && schedule.ends(*stage).next().is_some();
        let tables = backwards.iter().copied().filter(has_table).collect();
        let (ended, begun, action) = (now.clone(), now, *action);
        let (held, over) = (false, false);
        self.open = Some(Open { window, backwards, tables, ended, begun, action, held, over });
        Ok(())
    }

    /// Ends the window.
    fn close(&mut self) {
        self.open = None;
        self.threads.retain(|thread| !thread.is_finished());
        self.threads.extend(self.gate.tracer.end().map(Part::end));
    }

    /// Adds what happens from one stamp to another.
    fn add(&self, begin: &Stamp, end: &Stamp, event: Event) {
        match (begin, end) {
            (Stamp::Host(begin), Stamp::Host(end)) => {
                self.gate.tracer.add(event.at(Span { begin: *begin, end: *end }));
            }
            (Stamp::Device(begin), Stamp::Device(end)) => {
                self.gate.tracer.add_later(Arc::clone(begin), Arc::clone(end), event);
            }
            _ => {}
        }
    }

    /// How much a place holds.
    fn counts(&self, action: &Action, place: &PlaceState, at: &Stamp) {
        let stage = place.place.stage;
        let count = |count, value| {
            self.add(at, at, Event::Count { stage, count, value, at: Moment::default() });
        };
        if action.op == Op::Update && place.place.stage == self.stages[0] {
            let bytes = match &self.queues {
                Some(queues) => queues.taken().ok(),
                None => resident(),
            };
            bytes.into_iter().for_each(|bytes| count(Count::Memory, bytes));
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
        if self.open.is_some() && !self.gate.tracer.on() {
            self.close(); // It could not be written.
        }

        if self.open.is_none() {
            let due = self.gate.tracer.due(action.step).filter(|_| action.pass == Pass::Train);
            match due {
                Some(window) => self.open(window, action)?,
                None => return Ok(()),
            }
        }

        let now = self.stamp()?;
        let empty = self.gate.tracer.look()?;
        let Some(open) = &mut self.open else { return Ok(()) };
        if open.over {
            if empty {
                self.close();
            }
            return Ok(());
        }

        if action.op == Op::Backward && action.step >= open.window.to {
            open.backwards.retain(|stage| *stage != action.stage);
        }

        open.over = open.backwards.is_empty() && open.tables.is_empty();
        let (over, ended) = (open.over, open.ended.clone());
        let wait = if open.held { Wait::Gate } else { Wait::Between };
        (open.begun, open.action, open.held) = (now.clone(), *action, false);
        let span = Span::default();
        self.add(&ended, &now, Event::Wait { stage: action.stage, wait, span });
        match (over, &self.queues) {
            (true, None) => self.close(),
            (true, Some(_)) => self.gate.tracer.ending(),
            (false, _) => {}
        }
        Ok(())
    }

    fn held(&mut self) {
        self.open.iter_mut().for_each(|open| open.held = true);
    }

    fn waited(&mut self, _: TimeKind) -> Result<()> {
        if self.open.as_ref().is_none_or(|open| open.over) {
            return Ok(());
        }

        let now = self.stamp()?;
        let Some(open) = &mut self.open else { return Ok(()) };
        let (action, begun) = (open.action, std::mem::replace(&mut open.begun, now.clone()));
        self.add(&begun, &now, Event::Action { action, waits: true, span: Span::default() });
        Ok(())
    }

    fn end(&mut self, action: &Action, place: &PlaceState) -> Result<()> {
        if self.open.as_ref().is_none_or(|open| open.over) {
            return Ok(());
        }

        let now = self.stamp()?;
        let Some(open) = &mut self.open else { return Ok(()) };
        let begun = open.begun.clone();
        let turn = std::mem::replace(&mut open.ended, now.clone());
        // Under `head` and `fresh` an update takes a part that is older.
        let schedule = &self.setup.schedule;
        let older = if schedule.tie == Tie::Aligned { 0 } else { schedule.delays[0] };
        if matches!(action.op, Op::UpdateTable | Op::AwaitTable)
            && action.step + 1 >= open.window.to + older
        {
            open.tables.retain(|stage| *stage != action.stage);
        }

        let span = Span::default();
        self.add(&begun, &now, Event::Action { action: *action, waits: false, span });
        for other in self.stages.iter().filter(|stage| **stage != action.stage) {
            self.add(&turn, &now, Event::Wait { stage: *other, wait: Wait::Elsewhere, span });
        }
        self.counts(action, place, &now);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        // The GPU comes past everything by itself.
        while self.open.is_some() && !self.gate.tracer.look()? {
            std::thread::sleep(LOOK);
        }

        self.close();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // What it could not write it has said.
        }
        Ok(())
    }
}
