//! What a rank is doing, for the one who asks when nothing moves: its last actions, and how long it has worked.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::schedule::{Action, Op};

/// Actions that are remembered.
const RING: usize = 6;

/// The pulse of one rank.
#[derive(Debug)]
pub struct Pulse {
    host: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// How often something was begun.
    count: u64,
    /// What was begun last, when, and the actions up to it.
    doing: Doing,
    since: Instant,
    actions: VecDeque<Action>,
    /// Work since the last question for it, without waits: seconds.
    busy: f64,
}

/// What a rank can be doing between two beats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Doing {
    /// Reading weights, making the stage.
    Beginning,
    /// The last of its actions.
    Action,
    /// It waits for rank 0 to let it begin the step.
    Limit(usize),
    /// It waits until its states are saved.
    Finishing,
}

/// A pulse as it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    pub host: String,
    pub count: u64,
    pub doing: Doing,
    /// Seconds.
    pub since: f64,
    /// In their printed form, the last one last.
    pub actions: Vec<String>,
}

impl Beat {
    /// What is being done.
    pub fn action(&self) -> Option<Action> {
        self.actions.last().filter(|_| self.doing == Doing::Action)?.parse().ok()
    }

    /// The actions of an op that are remembered.
    pub fn made(&self, op: Op) -> impl Iterator<Item = Action> {
        self.actions.iter().filter_map(|text| text.parse::<Action>().ok()).filter(move |action| action.op == op)
    }
}

impl Pulse {
    pub fn new(host: String) -> Pulse {
        let (doing, since) = (Doing::Beginning, Instant::now());
        let state = State { count: 0, doing, since, actions: VecDeque::with_capacity(RING + 1), busy: 0.0 };
        Pulse { host, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Something begins.
    pub fn doing(&self, doing: Doing) {
        let (mut state, now) = (self.state(), Instant::now());
        if state.doing == Doing::Action
            && state.actions.back().is_some_and(|last| matches!(last.op, Op::Forward | Op::Backward))
        {
            state.busy += now.duration_since(state.since).as_secs_f64();
        }
        state.count += 1;
        (state.doing, state.since) = (doing, now);
    }

    /// An action begins.
    pub fn action(&self, action: Action) {
        self.doing(Doing::Action);
        let mut state = self.state();
        state.actions.push_back(action);
        if state.actions.len() > RING {
            state.actions.pop_front();
        }
    }

    /// Seconds of forwards and backwards since this was asked last.
    pub fn busy(&self) -> f64 {
        std::mem::take(&mut self.state().busy)
    }

    /// The pulse as it is now.
    pub fn beat(&self) -> Beat {
        let state = self.state();
        Beat {
            host: self.host.clone(),
            count: state.count,
            doing: state.doing,
            since: state.since.elapsed().as_secs_f64(),
            actions: state.actions.iter().map(ToString::to_string).collect(),
        }
    }
}
