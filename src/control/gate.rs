//! What a rank is told from outside while it works: how far it may go, and where to stop.
//!
//! Whoever asks for a stop (a signal at any rank, a file, a deadline) tells rank 0. All places must
//! stop at the same step boundary, one that nobody has passed, without anybody waiting for a vote.
//! So every place has a *limit*, a step that it may not begin; rank 0 raises it, well before it is
//! reached, as steps are completed; and to stop, rank 0 declares the present limit the end.
//!
//! ```text
//! steps complete     ....|                     limit >= complete + longest delay + 2, or a place could wait for ever:
//! steps under way         .......              the update before the last one is made only with the next forward
//! limit                             |          nobody has begun this step, so this is where all can stop
//! ```

use std::sync::{Condvar, Mutex, MutexGuard};

use super::{Activity, Control, FlightRecorder, Heartbeat};
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::trace::Tracer;

/// What a place at its limit learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateDecision {
    /// There is a new limit.
    Proceed(usize),
    /// The run ends here.
    Stop,
}

/// The gate of one rank.
pub struct Gate {
    pub heartbeat: Heartbeat,
    pub tracer: Tracer,
    /// Told when its place begins to wait, and when it has waited.
    waits: Box<dyn Fn(bool) + Send + Sync>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    limit: usize,
    stop: Option<usize>,
    ended: bool,
}

impl Gate {
    /// The gate of a rank on `host` that may go up to `limit` without being told, and keeps a
    /// flight recorder if it can.
    pub fn new(limit: usize, host: &str, recorder: Option<FlightRecorder>) -> Gate {
        let heartbeat = Heartbeat::new(host.to_owned(), recorder);
        Gate {
            heartbeat,
            tracer: Tracer::default(),
            waits: Box::new(|_| ()),
            state: Mutex::new(State { limit, stop: None, ended: false }),
            changed: Condvar::new(),
        }
    }

    /// With `waits` told when its place begins to wait (true) and when it has waited (false):
    /// whoever brings what it waits for.
    pub fn on_wait(self, waits: impl Fn(bool) + Send + Sync + 'static) -> Gate {
        Gate { waits: Box::new(waits), ..self }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Rank 0 has sent something.
    pub fn apply(&self, control: Control) {
        let mut state = self.state();
        match control {
            Control::Limit(limit) => state.limit = state.limit.max(limit),
            Control::Stop(at) => state.stop = Some(at),
            Control::Trace(window) => self.tracer.plan(window),
            Control::Ask | Control::Clock(_) => {}
            Control::Shutdown => state.ended = true,
        }

        drop(state);
        self.changed.notify_all();
    }

    /// The present limit.
    pub fn limit(&self) -> usize {
        self.state().limit
    }

    /// Whether nothing more will be told.
    pub fn ended(&self) -> bool {
        self.state().ended
    }

    /// Waits, before step `step` is begun, until it may be or the run ends there.
    ///
    /// # Errors
    /// [`Error::Lost`] if rank 0 has ended, and with it the run.
    pub fn wait(&self, step: usize) -> Result<GateDecision> {
        self.heartbeat.doing(Activity::Gate(step));
        let waits = |state: &mut State| state.limit <= step && state.stop.is_none() && !state.ended;
        (self.waits)(true);
        let state = self
            .changed
            .wait_while(self.state(), waits)
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        (self.waits)(false);
        match state.stop {
            Some(at) if at == step => Ok(GateDecision::Stop),
            _ if state.limit > step => Ok(GateDecision::Proceed(state.limit)),
            _ => {
                let peer = Place { stage: 0, replica: 0 };
                Err(Error::Lost { peer, doing: format!("waiting to begin step {step}") })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_place_waits_at_its_limit_and_stops_where_it_is_told() {
        let gate = Arc::new(Gate::new(3, "here", None));
        assert_eq!(gate.wait(2).unwrap(), GateDecision::Proceed(3));
        let waiting = std::thread::spawn({
            let gate = Arc::clone(&gate);
            move || (gate.wait(3).unwrap(), gate.wait(7).unwrap())
        });
        gate.apply(Control::Limit(5));
        gate.apply(Control::Limit(7));
        gate.apply(Control::Stop(7));
        let (first, second) = waiting.join().unwrap();
        assert!(matches!(first, GateDecision::Proceed(5 | 7)), "{first:?}");
        assert_eq!(second, GateDecision::Stop);
        assert_eq!(gate.wait(6).unwrap(), GateDecision::Proceed(7));
        let gate = Gate::new(3, "here", None);
        gate.apply(Control::Shutdown);
        assert!(gate.wait(3).is_err());
    }
}
