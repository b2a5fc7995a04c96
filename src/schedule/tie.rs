//! The tied table: who uses which version of it, who puts the parts of its gradient together.
//!
//! With tied embeddings a table V is used by stage 0 (rows of it are the input) and by stage K-1
//! (the head). Each use gives a part of its gradient; an update of V needs a part of either.
//! `d_in^t` and `d_out^t` are the parts of step t, E = D_0 the delay of stage 0:
//!
//! ```text
//!                                                        used at step t by the embedding    by the head
//! aligned   V[t+1] = V[t] + optimizer(d_out^t + d_in^t)         V[max(s, t - E)]          V[max(s, t - E)]
//! head      V[t+1] = V[t] + optimizer(d_out^t + d_in^{t-E})     V[max(s, t - E)]          V[t]
//! fresh     V[t+1] = V[t] + optimizer(d_out^t + d_in^{t-E})     V[t]                      V[t]
//! ```
//!
//! (head, fresh: no input part for the first E steps after a sync point; those still under way at
//! the next one join the update of the last step before it, in order. Under `head` an input part is
//! 2E updates old when it is applied.) One stage puts the parts together and reduces them, the
//! joiner: stage 0, under `head` the last one. The other gets the reduced sum and makes the same
//! update of its own copy. So the copies cannot differ by the order of any sum, and one all-reduce
//! serves both. Where stage 0 is the joiner:
//!
//! ```text
//! stage K-1   ... B(last)  P --.                                      .--> RT  TU      P   the part is complete
//!                              '--part--.                            |                RP  take the head's part
//! stage 0     ... B(last)  P             '--> RP  TR   ...   ST --sum-'    TU          TR  start the all-reduce
//!                                                                                     ST  wait for it, send the sum
//!                                                                                     RT  take it
//!                                                                                     TU  write the next version
//! ```
//!
//! Under `head` the last stage joins: it has its own part of step t and the input's of step t - E,
//! which stage 0 has sent by then, and needs V[t+1] for its next forward; stage 0 needs that only
//! for the forward of step t+1+E, and so makes the same update when its backward of step t is over,
//! as late as it may:
//!
//! ```text
//! stage 0     ... B(last of t-E)  P --.                                             RT(t)  TU(t)  F(t+1+E) ...
//!                                     '--part--.                                .--sum-'
//! stage K-1   ... B(last of t)    P             '--> RP(t-E)  TR(t) ... ST(t) --'  TU(t)  F(t+1) ...
//! ```
//!
//! On a ring there is one table, which the joiner updates: the other stage hands its part over, and
//! before it needs a version it awaits the update (`AT`) that writes it. Under `aligned` nobody
//! waits: stage 0 takes the head's part long after it was sent, and sends the sum before the
//! forward whose activations the last stage waits for anyway.

use std::ops::Range;

use super::Schedule;
use crate::grid::Placement;

/// Whether the two ends use one table, and which parts of its gradient an update puts together.
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
pub enum Tie {
    /// Both parts of one step.
    Aligned,
    /// The head's part of a step with the input's part of `D_0` steps before, of which only the
    /// head uses the newest version: nobody waits.
    Head,
    /// The head's part of a step with the input's part of `D_0` steps before: the paper's rule, for
    /// which stage 0 waits.
    Fresh,
    /// Nothing is tied: two tables.
    #[serde(rename = "none")]
    #[value(name = "none")]
    Untied,
}

/// The two uses of a tied table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TableEnd {
    /// Rows of it are the model's input: stage 0.
    Input,
    /// It is the matrix of the head: stage K-1.
    Output,
}

impl Schedule {
    /// Whether a stage uses the tied table.
    pub fn uses_table(&self, stage: usize) -> bool {
        self.tie != Tie::Untied && (stage == 0 || stage == self.stages - 1)
    }

    /// The ends of the tied table that a stage has.
    pub fn ends(&self, stage: usize) -> impl Iterator<Item = TableEnd> + use<> {
        let input = (stage == 0).then_some(TableEnd::Input);
        let output = (stage == self.stages - 1).then_some(TableEnd::Output);
        let tied = self.tie != Tie::Untied;
        input.into_iter().chain(output).filter(move |_| tied)
    }

    /// How many updates old the version of the tied table is that an end uses for a step.
    pub fn table_delay(&self, end: TableEnd) -> usize {
        match (self.tie, end) {
            (Tie::Aligned, _) | (Tie::Head, TableEnd::Input) => self.delays[0],
            (Tie::Head, TableEnd::Output) | (Tie::Fresh | Tie::Untied, _) => 0,
        }
    }

    /// The stage that puts the parts of the tied table's gradient together and updates it first.
    pub fn joiner(&self) -> usize {
        if self.tie == Tie::Head { self.stages - 1 } else { 0 }
    }

    /// The versions of the tied table that a device holds at most: an input part is computed at the
    /// version of its forward. On a ring under `head` one table serves both ends: updated early for
    /// the head, read late by the embedding.
    pub fn tables_held(&self, device: usize) -> usize {
        match self.tie {
            Tie::Fresh | Tie::Head if device != 0 => 1,
            Tie::Head if self.placement == Placement::Ring => 2 * self.delays[0] + 1,
            _ => self.delays[0] + 1,
        }
    }

    /// The steps whose input parts join the update of step `t`; `from` is the last sync point, and
    /// `last` says that all that are under way join.
    pub fn table_inputs(&self, t: usize, from: usize, last: bool) -> Range<usize> {
        let delay = if matches!(self.tie, Tie::Fresh | Tie::Head) { self.delays[0] } else { 0 };
        let first = (t.max(from + delay) - delay).max(from);
        let past = if last { t + 1 } else { (t + 1).saturating_sub(delay).max(from) };
        first.min(past)..past
    }

    /// Whether every input part that is under way joins the update of the step before boundary `t`:
    /// at a sync point; under `fresh` wherever the pipeline is drained, as where a run is
    /// `stopped`.
    pub fn joins_all(&self, t: usize, stopped: bool) -> bool {
        self.sync.contains(t) || (stopped && self.tie == Tie::Fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::schedule::ScheduleKind;

    #[test]
    fn every_input_part_joins_one_update() {
        let mut schedule = Schedule::new(ScheduleKind::Decoupled, 4, 1, 1, SyncPoints::ends(8));
        schedule.tie = Tie::Aligned;
        assert_eq!(
            (2..8).map(|t| schedule.table_inputs(t, 2, t == 7)).collect::<Vec<_>>(),
            [2..3, 3..4, 4..5, 5..6, 6..7, 7..8]
        );
        schedule.tie = Tie::Fresh;
        assert_eq!(
            (2..8).map(|t| schedule.table_inputs(t, 2, t == 7)).collect::<Vec<_>>(),
            [2..2, 2..2, 2..2, 2..3, 3..4, 4..8]
        );
        assert_eq!(
            (2..4).map(|t| schedule.table_inputs(t, 2, t == 3)).collect::<Vec<_>>(),
            [2..2, 2..4]
        );
        assert_eq!(schedule.table_inputs(2, 2, true), 2..3);

        schedule.tie = Tie::Head;
        assert_eq!(
            (2..8).map(|t| schedule.table_inputs(t, 2, t == 7)).collect::<Vec<_>>(),
            [2..2, 2..2, 2..2, 2..3, 3..4, 4..8]
        );
        // Stopped before step 6 and gone on: what was under way joins as if it had not been.
        assert_eq!(
            (6..8).map(|t| schedule.table_inputs(t, 2, false)).collect::<Vec<_>>(),
            [3..4, 4..5]
        );
    }
}
