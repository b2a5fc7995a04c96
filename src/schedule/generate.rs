//! The generator: the rule of the module above, turned into one stage's list of actions.
//!
//! A list may be made up to a limit, before a step that nobody has begun yet; there it can be told
//! to end, and it drains and saves as at the end of the run.

use std::collections::VecDeque;

use super::{Action, Op, Pass, Schedule, TableEnd, Tie};
use crate::delay::version;
use crate::grid::Placement;

/// The actions of one stage, in order, made a microbatch at a time.
pub struct Actions<'a> {
    schedule: &'a Schedule,
    stage: usize,
    /// The last sync point and the next one.
    segment: (usize, usize),
    /// The next microbatch to forward, counted from the last sync point; `None` before the segment
    /// has begun.
    next: Option<usize>,
    /// The step whose reduced gradient still waits for its update.
    pending_update: Option<usize>,
    /// The next step whose update of the tied table has not been started, and the one that has been
    /// and is not complete.
    table: usize,
    pending_table: Option<usize>,
    /// Under `head`: the next step whose input part the last stage takes.
    part: usize,
    queue: VecDeque<Action>,
    /// No step from here on is begun.
    limit: usize,
    /// The end of the run, or where it has been told to stop.
    end: usize,
    done: bool,
}

impl<'a> Actions<'a> {
    pub(super) fn new(schedule: &'a Schedule, stage: usize) -> Actions<'a> {
        let start = schedule.sync.start;
        let segment =
            (start, if schedule.sync.steps == start { start } else { schedule.sync.after(start) });
        Actions {
            schedule,
            stage,
            segment,
            next: None,
            pending_update: None,
            table: start,
            pending_table: None,
            part: start,
            queue: VecDeque::new(),
            limit: usize::MAX,
            end: schedule.sync.steps,
            done: false,
        }
    }

    /// Lets the list go up to the beginning of step `limit`.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// The step that would be begun next, if the limit forbids it.
    pub fn held(&self) -> Option<usize> {
        let (start, end) = self.segment;
        let m = self.schedule.microbatches;
        let step = match self.next {
            None => Some(start).filter(|step| *step < self.schedule.sync.steps),
            Some(i) => (i % m == 0 && i < (end - start) * m).then_some(start + i / m),
        };
        step.filter(|step| *step >= self.limit && self.queue.is_empty() && !self.done)
    }

    /// Ends the run at the boundary before `step`, which nobody has begun: it is drained and saved.
    pub fn stop(&mut self, step: usize) {
        self.end = step;
        let start = self.segment.0;
        let Some(i) = self.next else {
            if start == step {
                self.done = true;
                if step > self.schedule.sync.start && !self.schedule.saves_at(step) {
                    self.push(Op::Save, Pass::Train, step, 0);
                }
            }

            self.segment.1 = self.segment.1.min(step);
            return;
        };

        self.segment.1 = self.segment.1.min(step);
        if i == (self.segment.1 - start) * self.schedule.microbatches
            + self.schedule.ahead[self.stage]
        {
            self.end_segment();
        }
    }

    /// The next action, left in its place.
    pub fn peek(&mut self) -> Option<&Action> {
        while self.queue.is_empty() && !self.done && self.held().is_none() {
            self.round();
        }
        self.queue.front()
    }

    fn is_last(&self) -> bool {
        self.stage == self.schedule.stages - 1
    }

    fn push(&mut self, op: Op, pass: Pass, step: usize, microbatch: usize) {
        self.queue.push_back(Action { stage: self.stage, op, pass, step, microbatch });
    }

    /// One round of the rule: the evaluation at a sync point, or forward i and backward i - a.
    fn round(&mut self) {
        let (start, end) = self.segment;
        let Some(i) = self.next else {
            if self.schedule.evaluates_at(start) {
                self.evaluation(start);
            }

            self.next = Some(0);
            self.done = start == self.schedule.sync.steps;
            if self.schedule.saves_again {
                self.push(Op::Save, Pass::Train, start, 0);
            }
            return;
        };

        let m = self.schedule.microbatches;
        let (count, ahead) = ((end - start) * m, self.schedule.ahead[self.stage]);
        if i < count {
            self.table_before_forward(i);
            self.forward(start + i / m, i % m);
        }

        if i >= ahead && i - ahead < count {
            self.backward(start + (i - ahead) / m, (i - ahead) % m);
        }

        self.next = Some(i + 1);
        if i + 1 == count + ahead {
            self.end_segment();
        }
    }

    fn end_segment(&mut self) {
        let end = self.segment.1;
        self.update_now();
        self.table_at_sync(end);
        let stopped = end == self.end && end < self.schedule.sync.steps;
        if stopped || self.schedule.saves_at(end) {
            self.push(Op::Save, Pass::Train, end, 0);
        }

        self.segment = (end, self.schedule.sync.after(end).min(self.end));
        self.next = None;
        self.done = stopped;
    }

    fn evaluation(&mut self, step: usize) {
        let microbatches = self.schedule.evals.map_or(0, |e| e.microbatches);
        for j in 0..microbatches {
            self.through(Pass::Eval, step, j);
        }
    }

    /// A microbatch on its way down: loaded at the ends, received in the middle, forwarded, sent
    /// on.
    fn through(&mut self, pass: Pass, step: usize, j: usize) {
        let (first, last) = (self.stage == 0, self.is_last());
        if first || last {
            self.push(Op::Load, pass, step, j);
        }

        if !first {
            self.push(Op::RecvActivation, pass, step, j);
        }

        self.push(Op::Forward, pass, step, j);
        if !last {
            self.push(Op::SendActivation, pass, step, j);
        }
    }

    fn forward(&mut self, step: usize, j: usize) {
        let needed = version(self.segment.0, step, self.schedule.delays[self.stage]);
        if self.pending_update.is_some_and(|t| t < needed) {
            self.update_now();
        }
        self.through(Pass::Train, step, j);
    }

    fn backward(&mut self, step: usize, j: usize) {
        if self.pending_update.is_some_and(|t| t < step) {
            self.update_now();
        }

        if self.stage < self.schedule.stages - 1 {
            self.push(Op::RecvGradient, Pass::Train, step, j);
        }

        self.push(Op::Backward, Pass::Train, step, j);
        if self.stage > 0 {
            self.push(Op::SendGradient, Pass::Train, step, j);
        }

        if j == self.schedule.microbatches - 1 {
            self.push(Op::Reduce, Pass::Train, step, 0);
            self.pending_update = Some(step);
            self.table_after_step(step);
        }
    }

    /// The last backward of a step is over: its part of the table's gradient is complete. Under
    /// `aligned` the input's part is the later one, so stage 0 can start the update. Under `head`
    /// the last stage can, but at a sync point, where it has to wait for parts that it does not
    /// need before.
    fn table_after_step(&mut self, step: usize) {
        if !self.schedule.uses_table(self.stage) {
            return;
        }

        self.push(Op::Part, Pass::Train, step, 0);
        let starts = match self.schedule.tie {
            Tie::Aligned => self.stage == 0,
            Tie::Head => self.is_last() && !self.schedule.joins_all(step + 1, false),
            Tie::Fresh | Tie::Untied => false,
        };

        if starts {
            self.start_table(step);
        }
    }

    /// Before the forward of microbatch `i` of the segment: the version that it uses is written by
    /// the update of the step before it.
    fn table_before_forward(&mut self, i: usize) {
        let sync = self.segment.0;
        let step = sync + i / self.schedule.microbatches;
        let end = if self.is_last() { TableEnd::Output } else { TableEnd::Input };
        self.table_updates(version(sync, step, self.schedule.table_delay(end)));
    }

    /// At the end of a segment every update is made, and no part is under way.
    fn table_at_sync(&mut self, end: usize) {
        self.table_updates(end);
        if self.schedule.tie == Tie::Head && self.stage == self.schedule.joiner() {
            self.take_inputs(end);
        }

        let copies = self.schedule.placement == Placement::Line && self.schedule.stages > 1;
        if copies && self.schedule.uses_table(self.stage) {
            self.push(Op::Digest, Pass::Train, end, 0);
        }
    }

    /// Makes the updates of the table before step `past`, as far as they are not made.
    fn table_updates(&mut self, past: usize) {
        if !self.schedule.uses_table(self.stage) {
            return;
        }

        while self.table < past {
            match self.schedule.placement {
                _ if self.stage == self.schedule.joiner() => self.start_table(self.table),
                Placement::Line => {
                    self.push(Op::RecvTable, Pass::Train, self.table, 0);
                    self.push(Op::UpdateTable, Pass::Train, self.table, 0);
                    self.table += 1;
                }
                Placement::Ring => {
                    self.push(Op::AwaitTable, Pass::Train, self.table, 0);
                    self.table += 1;
                }
            }
        }

        if self.pending_table.is_some_and(|t| t < past) {
            self.finish_table();
        }
    }

    /// The joiner takes the other end's part and starts the all-reduce.
    fn start_table(&mut self, step: usize) {
        self.finish_table();
        if self.schedule.tie == Tie::Head {
            let all = self.schedule.joins_all(step + 1, false);
            self.take_inputs(self.schedule.table_inputs(step, self.since(), all).end);
        } else if self.schedule.stages > 1 {
            self.push(Op::RecvPart, Pass::Train, step, 0);
        }

        self.push(Op::ReduceTable, Pass::Train, step, 0);
        self.pending_table = Some(step);
        self.table = step + 1;
    }

    /// The last stage takes the input parts of the steps before `past`.
    fn take_inputs(&mut self, past: usize) {
        while self.part < past {
            if self.schedule.stages > 1 {
                self.push(Op::RecvPart, Pass::Train, self.part, 0);
            }
            self.part += 1;
        }
    }

    /// The sync point that the segment's delays count from.
    fn since(&self) -> usize {
        let (sync, start) = (&self.schedule.sync, self.segment.0);
        if start == sync.start { sync.since } else { start }
    }

    fn finish_table(&mut self) {
        if let Some(step) = self.pending_table.take() {
            if self.schedule.placement == Placement::Line && self.schedule.stages > 1 {
                self.push(Op::SendTable, Pass::Train, step, 0);
            }
            self.push(Op::UpdateTable, Pass::Train, step, 0);
        }
    }

    fn update_now(&mut self) {
        if let Some(step) = self.pending_update.take() {
            self.push(Op::Update, Pass::Train, step, 0);
        }
    }
}

impl Iterator for Actions<'_> {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        self.peek()?;
        self.queue.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use crate::delay::SyncPoints;
    use crate::schedule::{Evals, Op, Schedule, ScheduleKind};

    fn list(schedule: &Schedule, stage: usize) -> String {
        schedule.actions(stage).map(|a| a.to_string()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn every_message_and_update_of_a_small_grid() {
        let schedule = Schedule::new(ScheduleKind::Decoupled, 2, 1, 1, SyncPoints::ends(3));
        assert_eq!(
            list(&schedule, 0),
            "0L0.0 0F0.0 0SA0.0 0L1.0 0F1.0 0SA1.0 0RG0.0 0B0.0 0R0 0U0 0L2.0 0F2.0 0SA2.0 0RG1.0 0B1.0 0R1 \
             0U1 0RG2.0 0B2.0 0R2 0U2"
        );
        assert_eq!(
            list(&schedule, 1),
            "1L0.0 1RA0.0 1F0.0 1B0.0 1SG0.0 1R0 1U0 1L1.0 1RA1.0 1F1.0 1B1.0 1SG1.0 1R1 1U1 1L2.0 1RA2.0 1F2.0 \
             1B2.0 1SG2.0 1R2 1U2"
        );
    }

    #[test]
    fn the_update_waits_until_its_gradient_buffer_or_version_is_needed() {
        let schedule = Schedule::new(ScheduleKind::Decoupled, 2, 2, 1, SyncPoints::ends(2));
        assert_eq!(
            list(&schedule, 0),
            "0L0.0 0F0.0 0SA0.0 0L0.1 0F0.1 0SA0.1 0RG0.0 0B0.0 0L1.0 0F1.0 0SA1.0 0RG0.1 0B0.1 0R0 0L1.1 0F1.1 \
             0SA1.1 0U0 0RG1.0 0B1.0 0RG1.1 0B1.1 0R1 0U1"
        );
    }

    #[test]
    fn a_run_goes_on_where_it_was_saved() {
        let mut schedule = Schedule::new(ScheduleKind::Decoupled, 3, 2, 1, SyncPoints::ends(9));
        (schedule.saves, schedule.tie) = (Some(4), super::super::Tie::Aligned);
        schedule.sync.periods.push(4);
        for stage in 0..3 {
            let whole: Vec<_> = schedule.actions(stage).collect();
            assert_eq!(
                whole.iter().filter(|a| a.op == Op::Save).map(|a| a.step).collect::<Vec<_>>(),
                [4, 8, 9]
            );
            for start in [4, 8] {
                let mut rest = schedule.clone();
                rest.sync.start = start;
                let from = whole.iter().position(|a| a.op == Op::Save && a.step == start).unwrap();
                assert_eq!(
                    rest.actions(stage).collect::<Vec<_>>(),
                    whole[from + 1..],
                    "stage {stage} from {start}"
                );
            }
        }
        schedule.sync.start = 9;
        assert_eq!(schedule.actions(0).count(), 0);
    }

    /// Whatever the limits were on the way, a stopped list is that of a run with so many steps, but
    /// for the order of what its last forwards would have called for; and it ends with a save.
    #[test]
    fn a_stopped_run_is_drained_and_saved_where_it_was_held() {
        use crate::grid::Placement;
        for (kind, m, tie, placement) in [
            (ScheduleKind::Decoupled, 1, super::Tie::Aligned, Placement::Line),
            (ScheduleKind::Decoupled, 2, super::Tie::Fresh, Placement::Line),
            (ScheduleKind::Decoupled, 2, super::Tie::Aligned, Placement::Ring),
            (ScheduleKind::Decoupled, 1, super::Tie::Head, Placement::Line),
            (ScheduleKind::Decoupled, 2, super::Tie::Head, Placement::Ring),
            (ScheduleKind::Gpipe, 3, super::Tie::Untied, Placement::Line),
        ] {
            let mut schedule = Schedule::new(kind, 4, m, 1, SyncPoints::ends(20));
            (schedule.saves, schedule.tie, schedule.placement) = (Some(6), tie, placement);
            schedule.sync.periods.extend([6, 4]);
            schedule.evals = Some(Evals { every: 4, microbatches: 2 });
            for stop in 0..20 {
                let mut shorter = schedule.clone();
                shorter.sync.steps = stop;
                for device in 0..schedule.grid(1).devices() {
                    let (mut list, mut limit) = (schedule.device_actions(device), 0);
                    list.set_limit(limit);
                    let mut found = Vec::new();
                    loop {
                        found.extend(list.by_ref());
                        match list.held() {
                            None => break,
                            Some(step) if step == stop => list.stop(step),
                            Some(step) => {
                                assert_eq!(step, limit, "stage {device} held");
                                limit = (limit + 1 + limit % 3).min(stop);
                                list.set_limit(limit);
                            }
                        }
                    }
                    let sorted = |list: Vec<super::Action>| {
                        let mut texts: Vec<String> = list
                            .into_iter()
                            // Where a run is stopped it is evaluated by the one that goes on.
                            .filter(|a| a.pass == super::Pass::Train || a.step < stop)
                            .map(|a| a.to_string())
                            .collect();
                        texts.sort();
                        texts
                    };
                    let expected: Vec<_> = if stop == 0 {
                        Vec::new()
                    } else {
                        shorter.device_actions(device).collect()
                    };
                    assert_eq!(
                        sorted(found),
                        sorted(expected),
                        "{kind:?} {tie:?} device {device} stop {stop}"
                    );
                }
            }
        }
    }

    /// Under `head` the last stage joins the input part of a delay before, updates before its next
    /// forward and sends the sum; at the sync point it takes all that are under way.
    #[test]
    fn a_fresh_head_of_a_small_grid() {
        let mut schedule = Schedule::new(ScheduleKind::Decoupled, 2, 1, 1, SyncPoints::ends(3));
        schedule.tie = super::Tie::Head;
        assert_eq!(
            list(&schedule, 0),
            "0L0.0 0F0.0 0SA0.0 0L1.0 0F1.0 0SA1.0 0RG0.0 0B0.0 0R0 0P0 0RT0 0TU0 0U0 0L2.0 0F2.0 0SA2.0 0RG1.0 0B1.0 0R1 0P1 \
             0U1 0RG2.0 0B2.0 0R2 0P2 0U2 0RT1 0TU1 0RT2 0TU2 0D3"
        );
        assert_eq!(
            list(&schedule, 1),
            "1L0.0 1RA0.0 1F0.0 1B0.0 1SG0.0 1R0 1P0 1TR0 1ST0 1TU0 1U0 1L1.0 1RA1.0 1F1.0 1B1.0 1SG1.0 1R1 1P1 1RP0 1TR1 \
             1ST1 1TU1 1U1 1L2.0 1RA2.0 1F2.0 1B2.0 1SG2.0 1R2 1P2 1U2 1RP1 1RP2 1TR2 1ST2 1TU2 1D3"
        );
    }

    #[test]
    fn evaluations_stand_at_drained_boundaries() {
        let mut sync = SyncPoints::ends(3);
        sync.periods.push(2);
        let mut schedule = Schedule::new(ScheduleKind::Decoupled, 2, 1, 1, sync);
        schedule.evals = Some(Evals { every: 2, microbatches: 1 });
        assert_eq!(
            list(&schedule, 0),
            "0L0.0 0F0.0 0SA0.0 0L1.0 0F1.0 0SA1.0 0RG0.0 0B0.0 0R0 0U0 0RG1.0 0B1.0 0R1 0U1 0eL2.0 0eF2.0 0eSA2.0 \
             0L2.0 0F2.0 0SA2.0 0RG2.0 0B2.0 0R2 0U2 0eL3.0 0eF3.0 0eSA3.0"
        );
    }
}
