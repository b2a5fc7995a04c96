//! What a rank is doing, for the one who asks when nothing moves: its last actions, and how long it
//! has worked.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::FlightRecorder;
use crate::awake::Awake;
use crate::schedule::{Action, Op};

/// Actions that are remembered.
const RING: usize = 6;

/// The heartbeat of one rank.
#[derive(Debug)]
pub struct Heartbeat {
    host: String,
    recorder: Option<FlightRecorder>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// How often something was begun.
    count: u64,
    /// What was begun last, when, and the actions up to it.
    doing: Activity,
    since: Awake,
    actions: VecDeque<Action>,
    /// Work since the last question for it, without waits: seconds.
    busy: f64,
}

/// What a rank can be doing between two beats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Reading weights, making the stage.
    Starting,
    /// The last of its actions.
    Action,
    /// It waits for rank 0 to let it begin the step.
    Gate(usize),
    /// It waits until its states are saved.
    Finishing,
}

/// A heartbeat as it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeartbeatReport {
    pub host: String,
    pub count: u64,
    pub doing: Activity,
    /// Seconds.
    pub since: f64,
    /// In their printed form, the last one last.
    pub actions: Vec<String>,
}

impl Activity {
    /// In words; `last` is the last action.
    fn text(self, last: Option<String>) -> String {
        match self {
            Activity::Starting => "its beginning".into(),
            Activity::Gate(step) => format!("its wait to begin step {step}"),
            Activity::Finishing => "its last save".into(),
            Activity::Action => last.unwrap_or_default(),
        }
    }
}

impl HeartbeatReport {
    /// In words.
    pub fn text(&self) -> String {
        self.doing.text(self.actions.last().cloned())
    }

    /// What is being done.
    pub fn action(&self) -> Option<Action> {
        self.actions.last().filter(|_| self.doing == Activity::Action)?.parse().ok()
    }

    /// The actions of an op that are remembered.
    pub fn made(&self, op: Op) -> impl Iterator<Item = Action> {
        self.actions
            .iter()
            .filter_map(|text| text.parse::<Action>().ok())
            .filter(move |action| action.op == op)
    }
}

impl Heartbeat {
    /// The heartbeat of a rank on `host`, which keeps a flight recorder if it is given one.
    pub fn new(host: String, recorder: Option<FlightRecorder>) -> Heartbeat {
        let (doing, since) = (Activity::Starting, Awake::now());
        let state =
            State { count: 0, doing, since, actions: VecDeque::with_capacity(RING + 1), busy: 0.0 };
        Heartbeat { host, recorder, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Something begins that is no action.
    pub fn doing(&self, doing: Activity) {
        self.begin(&mut self.state(), doing);
        self.leave(|| doing.text(None));
    }

    /// The rank ends by itself, and has said why.
    pub fn close(&self) {
        self.recorder.iter().for_each(FlightRecorder::close);
    }

    /// Writes the flight recorder.
    fn leave(&self, text: impl Fn() -> String) {
        if let Some(recorder) = &self.recorder {
            recorder.write(&text());
        }
    }

    fn begin(&self, state: &mut State, doing: Activity) {
        let now = Awake::now();
        if state.doing == Activity::Action
            && state
                .actions
                .back()
                .is_some_and(|last| matches!(last.op, Op::Forward | Op::Backward))
        {
            state.busy += now.since(state.since).as_secs_f64();
        }

        state.count += 1;
        (state.doing, state.since) = (doing, now);
    }

    /// An action begins.
    pub fn action(&self, action: Action) {
        let mut state = self.state();
        self.begin(&mut state, Activity::Action);
        state.actions.push_back(action);
        if state.actions.len() > RING {
            state.actions.pop_front();
        }
        drop(state);
        self.leave(|| action.to_string());
    }

    /// Seconds of forwards and backwards since this was asked last.
    pub fn busy(&self) -> f64 {
        std::mem::take(&mut self.state().busy)
    }

    /// The heartbeat as it is now.
    pub fn beat(&self) -> HeartbeatReport {
        let state = self.state();
        HeartbeatReport {
            host: self.host.clone(),
            count: state.count,
            doing: state.doing,
            since: state.since.elapsed().as_secs_f64(),
            actions: state.actions.iter().map(ToString::to_string).collect(),
        }
    }
}
