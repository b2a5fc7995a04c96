//! What a rank is told from outside while it works: how far it may go, and where to stop.
//!
//! Whoever asks for a stop (a signal at any rank, a file, a deadline) tells rank 0. All places must stop at the same step
//! boundary, one that nobody has passed, without anybody waiting for a vote. So every place has a *limit*, a step that it
//! may not begin; rank 0 raises it, well before it is reached, as steps are completed; and to stop, rank 0 declares the
//! present limit the end.
//!
//! ```text
//! steps complete     ....|                     limit >= complete + longest delay + 2, or a place could wait for ever:
//! steps under way         .......              the update before the last one is made only with the next forward
//! limit                             |          nobody has begun this step, so this is where all can stop
//! ```

use std::sync::{Condvar, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::grid::Place;
use crate::pulse::{Doing, Pulse, Trace};

/// What rank 0 tells all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// Steps before this one may be begun.
    Limit(usize),
    /// The run ends at this boundary, which is the last limit.
    Stop(usize),
    /// The pulse is asked for.
    Ask,
    /// Nothing more will be told.
    End,
}

/// What a place at its limit learns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// There is a new limit.
    Go(usize),
    /// The run ends here.
    Stop,
}

/// The panel of one rank.
pub struct Panel {
    pub pulse: Pulse,
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

impl Panel {
    /// The panel of a rank on `host` that may go up to `limit` without being told, and leaves a trace if it can.
    pub fn new(limit: usize, host: &str, trace: Option<Trace>) -> Panel {
        let pulse = Pulse::new(host.to_owned(), trace);
        Panel {
            pulse,
            waits: Box::new(|_| ()),
            state: Mutex::new(State { limit, stop: None, ended: false }),
            changed: Condvar::new(),
        }
    }

    /// With `waits` told when its place begins to wait (true) and when it has waited (false): whoever brings what it waits for.
    pub fn telling(self, waits: impl Fn(bool) + Send + Sync + 'static) -> Panel {
        Panel { waits: Box::new(waits), ..self }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Something is told.
    pub fn tell(&self, control: Control) {
        let mut state = self.state();
        match control {
            Control::Limit(limit) => state.limit = state.limit.max(limit),
            Control::Stop(at) => state.stop = Some(at),
            Control::Ask => {}
            Control::End => state.ended = true,
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
    pub fn wait(&self, step: usize) -> Result<Word> {
        self.pulse.doing(Doing::Limit(step));
        let waits = |state: &mut State| state.limit <= step && state.stop.is_none() && !state.ended;
        (self.waits)(true);
        let state = self.changed.wait_while(self.state(), waits).unwrap_or_else(|poisoned| poisoned.into_inner());
        (self.waits)(false);
        match state.stop {
            Some(at) if at == step => Ok(Word::Stop),
            _ if state.limit > step => Ok(Word::Go(state.limit)),
            _ => {
                let peer = Place { stage: 0, replica: 0 };
                Err(Error::Lost { peer, doing: format!("waiting to begin step {step}") })
            }
        }
    }
}

/// Tells all ranks; on rank 0.
pub struct Controls(Box<dyn Fn(Control) + Send>);

impl Controls {
    pub fn new(tell: impl Fn(Control) + Send + 'static) -> Controls {
        Controls(Box::new(tell))
    }

    /// Tells all ranks, this one too.
    pub fn tell(&self, control: Control) {
        (self.0)(control);
    }
}

impl Drop for Controls {
    fn drop(&mut self) {
        self.tell(Control::End);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_place_waits_at_its_limit_and_stops_where_it_is_told() {
        let panel = Arc::new(Panel::new(3, "here", None));
        assert_eq!(panel.wait(2).unwrap(), Word::Go(3));
        let waiting = std::thread::spawn({
            let panel = Arc::clone(&panel);
            move || (panel.wait(3).unwrap(), panel.wait(7).unwrap())
        });
        panel.tell(Control::Limit(5));
        panel.tell(Control::Limit(7));
        panel.tell(Control::Stop(7));
        let (first, second) = waiting.join().unwrap();
        assert!(matches!(first, Word::Go(5 | 7)), "{first:?}");
        assert_eq!(second, Word::Stop);
        assert_eq!(panel.wait(6).unwrap(), Word::Go(7));
        let panel = Panel::new(3, "here", None);
        panel.tell(Control::End);
        assert!(panel.wait(3).is_err());
    }
}
