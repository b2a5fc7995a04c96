//! The tracer of a rank: what all its threads hand their events to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::CudaEvent;

use super::{Event, Later, Moment, Part, Span, Window};
use crate::error::Result;

/// No step.
const NEVER: usize = usize::MAX;

/// Off, but for the steps of a window.
pub struct Tracer {
    on: AtomicBool,
    /// The first step of the window that is planned, and the one behind its last.
    from: AtomicUsize,
    to: AtomicUsize,
    part: Mutex<Option<Part>>,
    /// Of a GPU: what it has not come past yet.
    later: Mutex<Option<Later<CudaEvent>>>,
    ending: AtomicBool,
    /// Stage and step of the state that is being written, and since when.
    writing: Mutex<Option<(usize, usize, Moment)>>,
}

impl Default for Tracer {
    fn default() -> Tracer {
        let (from, to) = (AtomicUsize::new(NEVER), AtomicUsize::new(NEVER));
        let (on, ending) = (AtomicBool::new(false), AtomicBool::new(false));
        let (part, later, writing) = (Mutex::default(), Mutex::default(), Mutex::default());
        Tracer { on, from, to, part, later, ending, writing }
    }
}

impl Tracer {
    /// These steps are to be traced.
    pub fn plan(&self, window: Window) {
        self.to.store(window.to, Ordering::Relaxed);
        self.from.store(window.from, Ordering::Release);
    }

    /// The window that a step begins, if it is planned.
    pub fn due(&self, step: usize) -> Option<Window> {
        let from = self.from.load(Ordering::Acquire);
        if step < from {
            return None;
        }

        let window = Window { from, to: self.to.load(Ordering::Relaxed) };
        if step < window.to {
            return Some(window);
        }
        self.from.store(NEVER, Ordering::Relaxed); // It was missed.
        None
    }

    /// The window begins: events go into `part`.
    pub fn begin(&self, part: Part) {
        self.from.store(NEVER, Ordering::Relaxed);
        self.ending.store(false, Ordering::Relaxed);
        *self.part() = Some(part);
        self.on.store(true, Ordering::Release);
    }

    /// Whether events are wanted.
    pub fn on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Adds an event, if it is wanted.
    pub fn add(&self, event: Event) {
        if self.on()
            && let Some(part) = self.part().as_mut()
            && !part.add(event)
        {
            // It could not be written, and has said so.
            self.on.store(false, Ordering::Relaxed);
        }
    }

    /// The window begins on a GPU, a mark of which was passed at a moment.
    pub fn begin_on_device(&self, base: Arc<CudaEvent>, at: Moment) {
        *lock(&self.later) = Some(Later::new(base, at));
    }

    /// Adds an event of the GPU, between two marks.
    pub fn add_later(&self, begin: Arc<CudaEvent>, end: Arc<CudaEvent>, event: Event) {
        if self.on()
            && !self.ending.load(Ordering::Relaxed)
            && let Some(later) = lock(&self.later).as_mut()
        {
            later.add(begin, end, event);
        }
    }

    /// The GPU is asked for nothing more in this window.
    pub fn ending(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// A state is being written since a moment, or is not any more.
    pub fn writing(&self, state: Option<(usize, usize, Moment)>) {
        *lock(&self.writing) = state;
    }

    /// Adds what the GPU has come past; true if nothing is left.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn look(&self) -> Result<bool> {
        let (known, empty) = match lock(&self.later).as_mut() {
            Some(later) => (later.passed()?, later.is_empty()),
            None => return Ok(true),
        };
        known.into_iter().for_each(|event| self.add(event));
        Ok(empty)
    }

    /// The window is over: what it holds, to be written out.
    pub fn end(&self) -> Option<Part> {
        if let Some((stage, step, begin)) = *lock(&self.writing) {
            let span = Span { begin, end: Moment::now() };
            self.add(Event::Write { stage, step, span });
        }

        self.on.store(false, Ordering::Relaxed);
        *lock(&self.later) = None;
        self.part().take()
    }

    fn part(&self) -> MutexGuard<'_, Option<Part>> {
        lock(&self.part)
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
