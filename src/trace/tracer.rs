//! The tracer of a rank: what all its threads hand their events to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::{Event, Part, Window};

/// No step.
const NEVER: usize = usize::MAX;

/// Off, but for the steps of a window.
pub struct Tracer {
    on: AtomicBool,
    /// The first step of the window that is planned, and the one behind its last.
    from: AtomicUsize,
    to: AtomicUsize,
    part: Mutex<Option<Part>>,
}

impl Default for Tracer {
    fn default() -> Tracer {
        let (from, to) = (AtomicUsize::new(NEVER), AtomicUsize::new(NEVER));
        Tracer { on: AtomicBool::new(false), from, to, part: Mutex::default() }
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
        let from = self.from.load(Ordering::Relaxed);
        if step < from {
            return None;
        }

        self.from.load(Ordering::Acquire);
        Some(Window { from, to: self.to.load(Ordering::Relaxed) })
    }

    /// The window begins: events go into `part`.
    pub fn begin(&self, part: Part) {
        self.from.store(NEVER, Ordering::Relaxed);
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

    /// The window is over: what it holds, to be written out.
    pub fn end(&self) -> Option<Part> {
        self.on.store(false, Ordering::Relaxed);
        self.part().take()
    }

    fn part(&self) -> MutexGuard<'_, Option<Part>> {
        self.part.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
