//! Whether a set of action lists is a run of the algorithm: every message meets its receive,
//! nothing deadlocks, every version that is used exists and is still held, no bound on memory is
//! passed.

use super::{Action, Costs, Op, Pass, Schedule, TableEnd, Tie, Violation, simulate};
use crate::delay::version;

/// Checks the lists of all devices of `replicas` pipelines (in the order of their ranks) against
/// `schedule`.
///
/// # Errors
/// The first action that breaks a rule, and the rule.
pub fn check(schedule: &Schedule, replicas: usize, lists: &[Vec<Action>]) -> Result<(), Violation> {
    let grid = schedule.grid(replicas);
    for (rank, list) in lists.iter().enumerate() {
        let held = grid.held(rank);
        let mut ledgers: Vec<Ledger> =
            held.iter().map(|place| Ledger::new(schedule, place.stage)).collect();
        for action in list {
            let Some(i) = held.iter().position(|place| place.stage == action.stage) else {
                return Err(Violation(format!(
                    "{action} stands in the list of {}",
                    grid.name(rank)
                )));
            };

            // On a ring the other stage of this device may update the table.
            let tables = ledgers
                .iter()
                .find(|ledger| ledger.updates_table())
                .map_or(0, |ledger| ledger.tables);
            let broken = |rule| Violation(format!("{action} on {}: {rule}", held[i]));
            ledgers[i].take(action, tables).map_err(broken)?;
        }

        for (ledger, place) in ledgers.iter().zip(&held) {
            ledger.end().map_err(|rule| Violation(format!("{place}: {rule}")))?;
        }
    }

    simulate(schedule, lists, Costs { forward: 1.0, backward: 2.0, message: 0.0 }).map(|_| ())
}

/// What one place has done so far.
struct Ledger<'a> {
    schedule: &'a Schedule,
    stage: usize,
    forwards: usize,
    backwards: usize,
    /// The step whose gradient is being reduced: its buffer must not be touched.
    reduced: Option<usize>,
    updates: usize,
    /// Parts of the table's gradient that are complete here; parts, or sums, that came from the
    /// other end.
    parts: usize,
    received: usize,
    /// Steps before this one have their input part in an update.
    joined: usize,
    reduced_table: Option<usize>,
    tables: usize,
}

impl<'a> Ledger<'a> {
    fn new(schedule: &'a Schedule, stage: usize) -> Ledger<'a> {
        let start = schedule.sync.start;
        Ledger {
            schedule,
            stage,
            forwards: start * schedule.microbatches,
            backwards: start * schedule.microbatches,
            reduced: None,
            updates: start,
            parts: start,
            received: start,
            // Parts of a run that goes on between two sync points may wait still.
            joined: schedule.table_inputs(start, schedule.sync.since, false).start,
            reduced_table: None,
            tables: start,
        }
    }

    /// `tables`: updates of the table that this device has made.
    fn take(&mut self, action: &Action, tables: usize) -> Result<(), String> {
        if !self.updates_table() {
            self.tables = tables;
        }

        if action.pass == Pass::Eval || action.op == Op::Save {
            let tied = !self.schedule.uses_table(self.stage) || self.tables == action.step;
            let drained = self.backwards == self.forwards && self.updates == action.step && tied;
            return if drained {
                Ok(())
            } else {
                Err("an evaluation or a save before the pipeline is drained".into())
            };
        }

        let m = self.schedule.microbatches;
        let number = action.step * m + action.microbatch;
        match action.op {
            Op::Forward => self.forward(action, number),
            Op::Backward => self.backward(action, number),
            Op::Reduce => {
                if self.backwards != (action.step + 1) * m {
                    return Err("an all-reduce before the step's last backward".into());
                }

                self.reduced = Some(action.step);
                Ok(())
            }
            Op::Update => {
                in_order(action.step, self.updates)?;
                if self.reduced.take() != Some(action.step) {
                    return Err("an update without its all-reduce".into());
                }

                self.updates += 1;
                Ok(())
            }
            _ => self.table(action),
        }
    }

    /// A forward of the how manieth microbatch.
    fn forward(&mut self, action: &Action, number: usize) -> Result<(), String> {
        in_order(number, self.forwards)?;
        self.forwards += 1;

        let held = self.forwards - self.backwards;
        let bound = self.schedule.activations_held(self.stage);
        if held > bound {
            return Err(format!("{held} microbatches of activations held, {bound} allowed"));
        }

        self.table_is_there(action.step, true)?;
        self.version_is_there(action.step)
    }

    /// A backward of the how manieth microbatch.
    fn backward(&mut self, action: &Action, number: usize) -> Result<(), String> {
        in_order(number, self.backwards)?;
        if self.backwards >= self.forwards {
            return Err("a backward before its forward".into());
        }

        if self.reduced.is_some() {
            return Err("a backward into a gradient that is being reduced".into());
        }

        if self.schedule.uses_table(self.stage) && action.step != self.parts {
            return Err(format!("a backward before the part of step {} is complete", self.parts));
        }

        self.backwards += 1;
        self.table_is_there(action.step, false)?;
        self.version_is_there(action.step)
    }

    /// Whether this stage's list holds the updates of the table that it uses.
    fn updates_table(&self) -> bool {
        let alone = self.schedule.grid(1).held(self.schedule.grid(1).device(self.stage)).len() == 1;
        self.schedule.uses_table(self.stage) && (alone || self.stage == self.schedule.joiner())
    }

    fn table(&mut self, action: &Action) -> Result<(), String> {
        let step = action.step;
        match action.op {
            Op::Part => {
                in_order(step, self.parts)?;
                if self.backwards != (step + 1) * self.schedule.microbatches {
                    return Err("a part before the step's last backward".into());
                }

                self.parts += 1;
            }
            Op::RecvPart | Op::RecvTable => {
                in_order(step, self.received)?;
                self.received += 1;
            }
            Op::ReduceTable => {
                in_order(step, self.tables)?;
                let inputs = self.inputs(step);
                let other = if self.schedule.stages == 1 { self.parts } else { self.received };
                let (input, output) =
                    if self.stage == 0 { (self.parts, other) } else { (other, self.parts) };
                if input < inputs.end || output <= step {
                    return Err("an all-reduce of the table without its parts".into());
                }

                if inputs.start != self.joined {
                    return Err(format!(
                        "the input part of step {} is left out or used twice",
                        self.joined
                    ));
                }

                self.joined = inputs.end;
                self.reduced_table = Some(step);
            }
            Op::SendTable if self.reduced_table != Some(step) => {
                return Err("a sum that is not made".into());
            }
            Op::UpdateTable if self.stage != self.schedule.joiner() => {
                in_order(step, self.tables)?;
                if self.received != step + 1 {
                    return Err("an update of the table without its sum".into());
                }

                self.tables += 1;
            }
            Op::UpdateTable => {
                if self.reduced_table.take() != Some(step) {
                    return Err("an update of the table without its all-reduce".into());
                }

                self.tables += 1;
            }
            Op::AwaitTable if self.tables <= step => {
                return Err("the table is not updated yet".into());
            }
            Op::Digest => in_order(step, self.tables)?,
            _ => {}
        }

        Ok(())
    }

    fn inputs(&self, step: usize) -> std::ops::Range<usize> {
        let sync = &self.schedule.sync;
        self.schedule.table_inputs(step, sync.before(step), sync.contains(step + 1))
    }

    /// The version of the table that `step` uses exists; on a stage that runs its forward early and
    /// its backward late, it is still held.
    fn table_is_there(&self, step: usize, forward: bool) -> Result<(), String> {
        if !self.schedule.uses_table(self.stage) {
            return Ok(());
        }

        let (sync, held) = (
            self.schedule.sync.before(step),
            self.schedule.tables_held(self.schedule.grid(1).device(self.stage)),
        );

        for end in self.schedule.ends(self.stage) {
            let needed = version(sync, step, self.schedule.table_delay(end));
            if needed > self.tables {
                return Err(format!(
                    "version {needed} of the table is not written yet, only {}",
                    self.tables
                ));
            }

            if self.tables - needed >= held {
                return Err(format!(
                    "version {needed} of the table is overwritten by version {}",
                    self.tables
                ));
            }

            // Under `head` the head's backward uses the newest version too.
            let newest = match self.schedule.tie {
                Tie::Fresh => forward,
                Tie::Head => end == TableEnd::Output,
                Tie::Aligned | Tie::Untied => false,
            };

            if newest && needed != self.tables {
                return Err(format!(
                    "version {needed} of the table is not the newest, {}",
                    self.tables
                ));
            }
        }

        Ok(())
    }

    /// Nothing is left to do.
    fn end(&self) -> Result<(), String> {
        let steps = self.schedule.sync.steps;
        if self.updates != steps {
            return Err(format!("{} updates in {steps} steps", self.updates));
        }

        let joined = if self.stage == self.schedule.joiner() { self.joined } else { steps };
        if self.updates_table() && (self.tables != steps || joined != steps) {
            return Err(format!(
                "{} updates of the table in {steps} steps, {} parts",
                self.tables, self.joined
            ));
        }

        Ok(())
    }

    /// The version of `step` exists and has not been overwritten; at a sync point nothing is under
    /// way.
    fn version_is_there(&self, step: usize) -> Result<(), String> {
        let sync = self.schedule.sync.before(step);
        let delay = self.schedule.delays[self.stage];
        let needed = version(sync, step, delay);
        if needed > self.updates {
            return Err(format!("version {needed} is not written yet, only {}", self.updates));
        }

        if self.updates - needed > delay {
            return Err(format!("version {needed} is overwritten by version {}", self.updates));
        }

        if self.backwards < sync * self.schedule.microbatches {
            return Err(format!("step {step} begins before sync point {sync} is drained"));
        }

        Ok(())
    }
}

fn in_order(found: usize, expected: usize) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("out of order, number {expected} is due")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::grid::Placement;
    use crate::schedule::{ScheduleKind, Tie};
    use proptest::prelude::*;

    fn lists(schedule: &Schedule, replicas: usize) -> Vec<Vec<Action>> {
        let grid = schedule.grid(replicas);
        (0..grid.size())
            .map(|rank| schedule.device_actions(rank % grid.devices()).collect())
            .collect()
    }

    fn any_tie() -> impl Strategy<Value = Tie> {
        prop_oneof![Just(Tie::Untied), Just(Tie::Aligned), Just(Tie::Head), Just(Tie::Fresh)]
    }

    fn waits_for_nobody() -> impl Strategy<Value = Tie> {
        prop_oneof![Just(Tie::Untied), Just(Tie::Aligned), Just(Tie::Head)]
    }

    fn any_kind() -> impl Strategy<Value = ScheduleKind> {
        use ScheduleKind::*;
        prop_oneof![3 => Just(Decoupled), 1 => Just(OneForwardOneBackward), 1 => Just(Gpipe), 1 => Just(Sequential)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        /// Every receive has its send, no deadlock, bounds kept, versions as defined: for any grid
        /// and sync points.
        #[test]
        fn generated_lists_are_runs_of_the_algorithm(
            kind in any_kind(), k in 1usize..=6, r in 1usize..=3, m in 1usize..=6, h in 1usize..=3,
            steps in 1usize..=12, at in prop::collection::btree_set(1usize..12, 0..4), warm_up in 0usize..4,
            extra in prop::collection::vec(0usize..3, 6), every in prop::option::of(1usize..5),
            tie in any_tie(), ring: bool,
        ) {
            let mut sync = SyncPoints { at, warm_up, ..SyncPoints::ends(steps) };
            sync.periods.extend(every);
            let mut schedule = Schedule::new(kind, k, m, h, sync);
            if kind == ScheduleKind::Decoupled {
                schedule.delays.iter_mut().zip(extra).for_each(|(d, e)| *d += e);
            }
            schedule.evals = every.map(|every| crate::schedule::Evals { every, microbatches: 2 });
            schedule.tie = tie;
            if ring && k >= 3 {
                schedule.placement = Placement::Ring;
            }
            prop_assert_eq!(check(&schedule, r, &lists(&schedule, r)), Ok(()));
        }

        /// No idle device in the steady state when messages are free.
        #[test]
        fn decoupled_stages_are_never_idle(
            k in 1usize..=6, m in 1usize..=6, h in 1usize..=3, backward in 1u32..4, tie in waits_for_nobody(),
        ) {
            let mut schedule = Schedule::new(ScheduleKind::Decoupled, k, m, h, SyncPoints::ends(1));
            schedule.tie = tie;
            let costs = Costs { forward: 1.0, backward: backward as f64, message: 0.0 };
            for share in crate::schedule::ideal(&schedule, costs).unwrap().utilization {
                prop_assert!((share - 1.0).abs() < 1e-9, "{share}");
            }
        }

        /// Swapping or dropping any action that matters is found.
        #[test]
        fn a_dropped_action_is_found(
            k in 2usize..=4, m in 1usize..=3, stage in 0usize..4, which in 0usize..1000, tie in any_tie(), ring: bool,
        ) {
            let mut schedule = Schedule::new(ScheduleKind::Decoupled, k, m, 1, SyncPoints::ends(5));
            schedule.tie = tie;
            if ring && k >= 3 {
                schedule.placement = Placement::Ring;
            }
            let mut lists = lists(&schedule, 1);
            let device = stage % lists.len();
            let list = &mut lists[device];
            // The batch and the digest are nobody's input, and on a ring stage 0 hands its part to
            // itself.
            let idle = |a: &Action| matches!(a.op, Op::Load | Op::Digest | Op::AwaitTable);
            let matters: Vec<usize> = (0..list.len()).filter(|i| !idle(&list[*i])).collect();
            list.remove(matters[which % matters.len()]);
            prop_assert!(check(&schedule, 1, &lists).is_err());
        }
    }

    #[test]
    fn a_delay_below_its_bound_is_found() {
        let mut schedule = Schedule::new(ScheduleKind::Decoupled, 4, 1, 1, SyncPoints::ends(8));
        let made_with_enough = lists(&schedule, 1);
        schedule.delays[0] = 2;
        let fault = check(&schedule, 1, &made_with_enough).unwrap_err();
        assert_eq!(fault.0, "0F3.0 on stage 0, replica 0: version 1 is not written yet, only 0");
    }

    /// A run that goes on between two sync points: what was under way joins as if it had not been
    /// stopped.
    #[test]
    fn lists_that_go_on_between_sync_points_are_runs_too() {
        for (stages, m, ring) in
            [(1, 1, false), (2, 1, false), (4, 1, false), (4, 3, false), (4, 1, true), (5, 2, true)]
        {
            for (start, tie) in
                (1..12).flat_map(|start| [(start, Tie::Head), (start, Tie::Aligned)])
            {
                let mut schedule =
                    Schedule::new(ScheduleKind::Decoupled, stages, m, 1, SyncPoints::ends(12));
                schedule.sync.from(start, 0);
                schedule.tie = tie;
                if ring {
                    schedule.placement = Placement::Ring;
                }
                assert_eq!(
                    check(&schedule, 2, &lists(&schedule, 2)),
                    Ok(()),
                    "K = {stages}, m = {m}, from {start}"
                );
            }
        }
    }

    /// On a ring the table's newest version is written while the embedding still uses much older
    /// ones.
    #[test]
    fn a_ring_under_head_holds_more_tables() {
        let mut schedule = Schedule::new(ScheduleKind::Decoupled, 4, 1, 1, SyncPoints::ends(20));
        (schedule.placement, schedule.tie) = (Placement::Ring, Tie::Head);
        let (mut written, mut oldest, mut most) = (0, 0, 0);
        for action in schedule.device_actions(0) {
            match (action.op, action.stage) {
                (Op::UpdateTable, _) => written = action.step + 1,
                // The version of the oldest step under way, which its backward, run again, may
                // read.
                (Op::Backward, 0) => oldest = action.step + 1,
                _ => {}
            }
            most = most.max(written + 1 - version(0, oldest, schedule.delays[0]).min(written));
        }
        assert_eq!((most, schedule.tables_held(0)), (7, 7));
    }

    #[test]
    fn memory_bounds_are_kept_and_reached() {
        let schedule = Schedule::new(ScheduleKind::Decoupled, 4, 2, 1, SyncPoints::ends(9));
        for stage in 0..4 {
            let (mut held, mut most) = (0usize, 0);
            for action in schedule.actions(stage) {
                held += usize::from(action.op == Op::Forward);
                most = most.max(held);
                held -= usize::from(action.op == Op::Backward);
            }
            assert_eq!(most, schedule.activations_held(stage), "stage {stage}");
        }
    }
}
