//! What a rank is doing, for the one who asks when nothing moves: its last actions, and how long it has worked.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::schedule::{Action, Op};

/// Actions that are remembered.
const RING: usize = 6;

/// What a rank does, in a file that outlives it.
#[derive(Debug, Clone)]
pub struct Trace {
    file: Arc<File>,
    /// Nothing is written any more.
    closed: Arc<Mutex<bool>>,
}

impl Trace {
    /// Bytes of the file: an action is shorter.
    const LENGTH: usize = 48;
    /// The last words of a rank that has said why it, or a neighbour, ends.
    pub const TOLD: &str = "told";

    pub fn new(file: File) -> Trace {
        Trace { file: Arc::new(file), closed: Arc::default() }
    }

    /// Replaces what is written. A file that fails is as good as none: these are last words only.
    pub fn write(&self, text: &str) {
        let closed = self.closed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !*closed {
            self.put(text);
        }
    }

    /// The rank has spoken: whatever its threads still do, its neighbours need not.
    pub fn told(&self) {
        let mut closed = self.closed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *closed = true;
        self.put(Trace::TOLD);
    }

    fn put(&self, text: &str) {
        let _ = self.file.write_all_at(format!("{text:<0$.0$}", Trace::LENGTH).as_bytes(), 0);
    }

    /// What is written, if anything.
    pub fn read(&self) -> Option<String> {
        let mut bytes = [0; Trace::LENGTH];
        self.file.read_exact_at(&mut bytes, 0).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    }
}

/// The pulse of one rank.
#[derive(Debug)]
pub struct Pulse {
    host: String,
    trace: Option<Trace>,
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

impl Doing {
    /// In words; `last` is the last action.
    fn text(self, last: Option<String>) -> String {
        match self {
            Doing::Beginning => "its beginning".into(),
            Doing::Limit(step) => format!("its wait to begin step {step}"),
            Doing::Finishing => "its last save".into(),
            Doing::Action => last.unwrap_or_default(),
        }
    }
}

impl Beat {
    /// In words.
    pub fn text(&self) -> String {
        self.doing.text(self.actions.last().cloned())
    }

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
    /// The pulse of a rank on `host`, which leaves a trace if it is given a file for it.
    pub fn new(host: String, trace: Option<Trace>) -> Pulse {
        let (doing, since) = (Doing::Beginning, Instant::now());
        let state = State { count: 0, doing, since, actions: VecDeque::with_capacity(RING + 1), busy: 0.0 };
        Pulse { host, trace, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Something begins that is no action.
    pub fn doing(&self, doing: Doing) {
        self.begin(&mut self.state(), doing);
        self.leave(|| doing.text(None));
    }

    /// The rank ends by itself, and has said why.
    pub fn told(&self) {
        self.trace.iter().for_each(Trace::told);
    }

    /// Writes the trace.
    fn leave(&self, text: impl Fn() -> String) {
        if let Some(trace) = &self.trace {
            trace.write(&text());
        }
    }

    fn begin(&self, state: &mut State, doing: Doing) {
        let now = Instant::now();
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
        let mut state = self.state();
        self.begin(&mut state, Doing::Action);
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
