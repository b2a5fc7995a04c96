//! The schedule as data: what every stage does, in which order. First, middle and last stages
//! differ by their action lists, never by a second loop.
//!
//! Every stage follows one rule. Let `i` number the microbatches since the last sync point and let
//! `a_k` be the number of microbatches that stage k runs ahead (for the decoupled schedule its lag
//! `q_k`). Then for i = 0, 1, 2, ...: forward i; if i >= a_k: backward i - a_k; at the next sync
//! point: backward the rest. K = 4, m = 1, h = 1:
//!
//! ```text
//! stage 0   F0 F1 F2 F3 B0 F4 B1 F5 B2 ...     a_0 = 3
//! stage 1      F0 F1 F2 B0 F3 B1 F4 ...        a_1 = 2
//! stage 2         F0 F1 B0 F2 B1 ...           a_2 = 1
//! stage 3            F0 B0 F1 B1 ...           a_3 = 0
//! ```
//!
//! The four named schedules are this rule with other `a_k` and other sync points:
//!
//! | schedule | runs ahead, `a_k` | sync points |
//! |---|---|---|
//! | decoupled | `h (K-1-k)` | as the run has them |
//! | 1f1b | `min(h (K-1-k), m-1)` | every step |
//! | gpipe | `m-1` | every step |
//! | sequential | `0` | every step |
//!
//! Sends and receives are derived from the forwards and backwards, never ordered by hand. The
//! all-reduce of a step is started in its last backward, bucket by bucket, its rest right after it,
//! and waited for by the update, which stands as late as it may: before the next backward (which
//! needs the gradient buffer) and before the first forward that needs the new version. `tie` has
//! the actions of the tied table.

mod check;
mod draw;
mod generate;
mod lookahead;
mod merge;
mod picture;
mod simulate;
mod tie;

use std::fmt;
use std::str::FromStr;

pub use check::check;
pub use draw::{draw, summary, word};
pub use generate::Actions;
pub use lookahead::Lookahead;
pub use merge::DeviceActions;
pub use picture::picture;
pub use simulate::{
    Costs, Ideal, Span, StageCosts, Violation, absorbed, ideal, simulate, simulated, simulations,
    step_time,
};
pub use tie::{TableEnd, Tie};

use crate::delay::{SyncPoints, lag, least_delay};
use crate::grid::{Grid, Placement};

/// What a stage can do. The letters are those of the printed form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fetch the rows of a microbatch from the corpus (first and last stage).
    Load,
    RecvActivation,
    Forward,
    SendActivation,
    RecvGradient,
    Backward,
    SendGradient,
    /// Start the all-reduce of the step's gradient over the replica group.
    Reduce,
    /// Wait for the all-reduce and write the next version of the weights.
    Update,
    /// The step's part of the tied table's gradient is complete: hand it to the joiner.
    Part,
    /// The joiner: take the other end's part.
    RecvPart,
    /// The joiner: put the parts of an update together and start their all-reduce.
    ReduceTable,
    /// The joiner: wait for the all-reduce and send the sum to the other copy.
    SendTable,
    /// The other end: take the sum.
    RecvTable,
    /// Write the next version of the table.
    UpdateTable,
    /// The other stage of this device has updated the table that both share.
    AwaitTable,
    /// At a sync point: tell the digest of this copy of the table.
    Digest,
    /// At a sync point: save weights, state of the optimizer, and what the layers remember.
    Save,
}

impl Op {
    /// Whether it keeps the device busy.
    pub fn computes(self) -> bool {
        matches!(self, Op::Forward | Op::Backward)
    }
}

impl Op {
    const CODES: [(Op, &'static str); 18] = [
        (Op::Load, "L"),
        (Op::RecvActivation, "RA"),
        (Op::Forward, "F"),
        (Op::SendActivation, "SA"),
        (Op::RecvGradient, "RG"),
        (Op::Backward, "B"),
        (Op::SendGradient, "SG"),
        (Op::Reduce, "R"),
        (Op::Update, "U"),
        (Op::Part, "P"),
        (Op::RecvPart, "RP"),
        (Op::ReduceTable, "TR"),
        (Op::SendTable, "ST"),
        (Op::RecvTable, "RT"),
        (Op::UpdateTable, "TU"),
        (Op::AwaitTable, "AT"),
        (Op::Digest, "D"),
        (Op::Save, "S"),
    ];

    /// The letters of the printed form.
    pub fn code(self) -> &'static str {
        Op::CODES
            .iter()
            .find(|(op, _)| *op == self)
            .map(|(_, code)| *code)
            .expect("every op has a code")
    }

    /// The op of these letters.
    pub fn of_code(code: &str) -> Option<Op> {
        Op::CODES.iter().find(|(_, c)| *c == code).map(|(op, _)| *op)
    }

    /// Whether the action belongs to a whole step instead of one microbatch.
    pub fn whole_step(self) -> bool {
        use Op::*;
        let table = matches!(
            self,
            Part | RecvPart
                | ReduceTable
                | SendTable
                | RecvTable
                | UpdateTable
                | AwaitTable
                | Digest
        );
        table || matches!(self, Reduce | Update | Save)
    }
}

/// Training, or the evaluation that stands at a sync point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Pass {
    Train,
    Eval,
}

/// One action of one stage.
///
/// Printed and parsed as `stage, op, step.microbatch`: `2F5.0` is stage 2's forward of microbatch 0
/// of step 5, `2U5` its update of step 5; an `e` before the op marks the evaluation at that step:
/// `2eF5.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Action {
    pub stage: usize,
    pub op: Op,
    pub pass: Pass,
    pub step: usize,
    pub microbatch: usize,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pass = if self.pass == Pass::Eval { "e" } else { "" };
        write!(f, "{}{pass}{}{}", self.stage, self.op.code(), self.step)?;
        if self.op.whole_step() { Ok(()) } else { write!(f, ".{}", self.microbatch) }
    }
}

impl FromStr for Action {
    type Err = String;

    fn from_str(text: &str) -> Result<Action, String> {
        let wrong = || format!("`{text}` is not an action; an action looks like 2F5.0 or 2U5");
        let letters = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let digits =
            letters + text[letters..].find(|c: char| c.is_ascii_digit()).ok_or_else(wrong)?;
        let (pass, code) = match text[letters..digits].strip_prefix('e') {
            Some(code) => (Pass::Eval, code),
            None => (Pass::Train, &text[letters..digits]),
        };

        let op = Op::of_code(code).ok_or_else(wrong)?;
        let (step, microbatch) = match text[digits..].split_once('.') {
            Some((step, microbatch)) if !op.whole_step() => {
                (step, microbatch.parse().map_err(|_| wrong())?)
            }
            None if op.whole_step() => (&text[digits..], 0),
            _ => return Err(wrong()),
        };

        let stage = text[..letters].parse().map_err(|_| wrong())?;
        Ok(Action { stage, op, pass, step: step.parse().map_err(|_| wrong())?, microbatch })
    }
}

/// The four named schedules.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// No stage waits for the whole pipeline; stage k applies gradients that are `D_k` updates old.
    Decoupled,
    /// One forward, one backward, drained after every step.
    #[serde(rename = "1f1b")]
    #[value(name = "1f1b")]
    OneForwardOneBackward,
    /// All forwards, then all backwards, drained after every step.
    Gpipe,
    /// One microbatch at a time through the whole model.
    Sequential,
}

impl ScheduleKind {
    /// Whether every step is a sync point, so that all delays are 0.
    pub fn synchronous(self) -> bool {
        self != ScheduleKind::Decoupled
    }
}

/// Evaluations: one before every step that is a multiple of `every` (step 0 apart), and one at the
/// end of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evals {
    pub every: usize,
    /// Microbatches of one evaluation, a replica.
    pub microbatches: usize,
}

/// Everything that decides the action lists of a pipeline of K stages.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    pub kind: ScheduleKind,
    pub stages: usize,
    /// Microbatches m, a replica and step.
    pub microbatches: usize,
    /// `a_k`: how many microbatches each stage runs ahead.
    pub ahead: Vec<usize>,
    /// `D_k` of each stage.
    pub delays: Vec<usize>,
    pub sync: SyncPoints,
    pub evals: Option<Evals>,
    /// Saves at every multiple of so many steps, and at the end; none: nothing is saved.
    pub saves: Option<usize>,
    /// A run that has nothing left to do saves its state again, for another grid.
    pub saves_again: bool,
    pub placement: Placement,
    pub tie: Tie,
}

impl Schedule {
    /// The schedule `kind` for K stages, m microbatches, slack h, with the least delays. A
    /// synchronous kind makes every step of `sync` a sync point; periods of `sync`, evaluations,
    /// placement and tie are the caller's.
    pub fn new(
        kind: ScheduleKind,
        stages: usize,
        microbatches: usize,
        slack: usize,
        mut sync: SyncPoints,
    ) -> Schedule {
        sync.every_step |= kind.synchronous();
        let lags = (0..stages).map(|k| lag(slack, stages, k));
        let ahead: Vec<usize> = match kind {
            ScheduleKind::Decoupled => lags.collect(),
            ScheduleKind::OneForwardOneBackward => lags.map(|q| q.min(microbatches - 1)).collect(),
            ScheduleKind::Gpipe => vec![microbatches - 1; stages],
            ScheduleKind::Sequential => vec![0; stages],
        };

        let delays = if kind.synchronous() {
            vec![0; stages]
        } else {
            ahead.iter().map(|a| least_delay(*a, microbatches)).collect()
        };

        let (placement, tie) = (Placement::Line, Tie::Untied);
        Schedule {
            kind,
            stages,
            microbatches,
            ahead,
            delays,
            sync,
            evals: None,
            saves: None,
            saves_again: false,
            placement,
            tie,
        }
    }

    /// The action list of one stage, made lazily: a run may have millions of actions.
    pub fn actions(&self, stage: usize) -> Actions<'_> {
        Actions::new(self, stage)
    }

    /// The action list of one device of a replica: that of its stage, or those of its two stages
    /// merged.
    pub fn device_actions(&self, device: usize) -> DeviceActions<'_> {
        DeviceActions::new(self, device)
    }

    /// The grid of `replicas` pipelines like this.
    pub fn grid(&self, replicas: usize) -> Grid {
        Grid { placement: self.placement, ..Grid::line(self.stages, replicas) }
    }

    /// The work of a stage as a share of a device's: on a ring the two ends are meant to have half
    /// a share each.
    pub fn device_fraction(&self, stage: usize) -> f64 {
        let grid = self.grid(1);
        if grid.held(grid.device(stage)).len() == 2 { 0.5 } else { 1.0 }
    }

    /// Whether an evaluation stands before step `t` (at the end of the run: after the last step).
    pub fn evaluates_at(&self, t: usize) -> bool {
        self.evals.is_some_and(|e| t > 0 && (t == self.sync.steps || t.is_multiple_of(e.every)))
    }

    /// Whether the state at step boundary `t` is saved.
    pub fn saves_at(&self, t: usize) -> bool {
        self.saves.is_some_and(|every| {
            t > self.sync.start && (t == self.sync.steps || t.is_multiple_of(every))
        })
    }

    /// The versions of its weights that a stage holds at most.
    pub fn versions_held(&self, stage: usize) -> usize {
        self.delays[stage] + 1
    }

    /// The microbatches of activations that a stage holds at most.
    pub fn activations_held(&self, stage: usize) -> usize {
        self.ahead[stage] + 1
    }

    /// The sync point that delays count from in what goes on at boundary `t`: `t` itself, or an
    /// earlier one where a run is stopped in between, which is to go on as if it had not been.
    /// Under `fresh` parts under way join at every drain.
    pub fn since(&self, t: usize) -> usize {
        if self.tie == Tie::Fresh
            || t == self.sync.steps
            || (self.sync.contains(t) && t > self.sync.start)
        {
            t
        } else {
            self.sync.before(t)
        }
    }

    /// Steps beyond the complete ones that places may begin at least, so that none waits for ever:
    /// a step's update is made with a forward that is a delay and a step later; and one more for
    /// the way of the news.
    pub fn lead(&self) -> usize {
        self.delays.iter().max().copied().unwrap_or(0) + 3
    }

    /// More messages than can be under way on any link in one direction while training: activations
    /// and gradients by the lags, parts of the tied table by the delays.
    pub fn link_capacity(&self) -> usize {
        let most = |values: &[usize]| values.iter().max().copied().unwrap_or(0);
        most(&self.ahead).max(most(&self.delays)).saturating_add(3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_print_and_parse() {
        for text in [
            "2F5.0", "0L12.3", "10RA0.1", "3SG7.2", "1R4", "1U4", "0eF5.11", "3eRA5.1", "0P3",
            "0RP3", "3TR2", "3AT9", "2S40",
        ] {
            assert_eq!(text.parse::<Action>().unwrap().to_string(), text);
        }
        for wrong in
            ["", "F1.0", "2F", "2F5", "2U5.0", "2X5.0", "2F5.", "x2F5.0", "2F5.0x", "2F5.0.1"]
        {
            assert!(wrong.parse::<Action>().is_err(), "{wrong}");
        }
    }
}
