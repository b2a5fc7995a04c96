//! Whether a set of action lists is a run of the algorithm: every message meets its receive, nothing deadlocks, every
//! version that is used exists and is still held, no bound on memory is passed.

use super::{Action, Costs, Fault, Op, Pass, Schedule, simulate};
use crate::delay::version;
use crate::grid::Grid;

/// Checks the lists of all places (in the order of their ranks) against `schedule`.
///
/// # Errors
/// The first action that breaks a rule, and the rule.
pub fn check(schedule: &Schedule, grid: Grid, lists: &[Vec<Action>]) -> Result<(), Fault> {
    for (rank, list) in lists.iter().enumerate() {
        let stage = grid.place(rank).stage;
        let mut ledger = Ledger { schedule, stage, forwards: 0, backwards: 0, reduced: None, updates: 0 };
        for action in list {
            if action.stage != stage {
                return Err(Fault(format!("{action} stands in the list of {}", grid.place(rank))));
            }
            ledger.take(action).map_err(|rule| Fault(format!("{action} on {}: {rule}", grid.place(rank))))?;
        }
        if ledger.updates != schedule.sync.steps {
            let found = ledger.updates;
            return Err(Fault(format!("{}: {found} updates in {} steps", grid.place(rank), schedule.sync.steps)));
        }
    }
    simulate(grid, lists, Costs { forward: 1.0, backward: 2.0, message: 0.0 }).map(|_| ())
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
}

impl Ledger<'_> {
    fn take(&mut self, action: &Action) -> Result<(), String> {
        if action.pass == Pass::Eval {
            let drained = self.backwards == self.forwards && self.updates == action.step;
            return if drained { Ok(()) } else { Err("an evaluation before the pipeline is drained".into()) };
        }
        let m = self.schedule.microbatches;
        let number = action.step * m + action.microbatch;
        match action.op {
            Op::Forward => {
                in_order(number, self.forwards)?;
                self.forwards += 1;
                let (held, bound) = (self.forwards - self.backwards, self.schedule.activations_held(self.stage));
                if held > bound {
                    return Err(format!("{held} microbatches of activations held, {bound} allowed"));
                }
                self.version_is_there(action.step)
            }
            Op::Backward => {
                in_order(number, self.backwards)?;
                if self.backwards >= self.forwards {
                    return Err("a backward before its forward".into());
                }
                if self.reduced.is_some() {
                    return Err("a backward into a gradient that is being reduced".into());
                }
                self.backwards += 1;
                self.version_is_there(action.step)
            }
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
            _ => Ok(()),
        }
    }

    /// The version of `step` exists and has not been overwritten; at a sync point nothing is under way.
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
    use crate::schedule::Kind;
    use proptest::prelude::*;

    fn lists(schedule: &Schedule, grid: Grid) -> Vec<Vec<Action>> {
        grid.places().map(|place| schedule.actions(place.stage).collect()).collect()
    }

    fn any_kind() -> impl Strategy<Value = Kind> {
        use Kind::*;
        prop_oneof![3 => Just(Decoupled), 1 => Just(OneForwardOneBackward), 1 => Just(Gpipe), 1 => Just(Sequential)]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        /// Every receive has its send, no deadlock, bounds kept, versions as defined: for any grid and sync points.
        #[test]
        fn generated_lists_are_runs_of_the_algorithm(
            kind in any_kind(), k in 1usize..=6, r in 1usize..=3, m in 1usize..=6, h in 1usize..=3,
            steps in 1usize..=12, at in prop::collection::btree_set(1usize..12, 0..4), warm_up in 0usize..4,
            extra in prop::collection::vec(0usize..3, 6), every in prop::option::of(1usize..5),
        ) {
            let mut sync = SyncPoints { at, warm_up, ..SyncPoints::ends(steps) };
            sync.periods.extend(every);
            let mut schedule = Schedule::new(kind, k, m, h, sync);
            if kind == Kind::Decoupled {
                schedule.delays.iter_mut().zip(extra).for_each(|(d, e)| *d += e);
            }
            schedule.evals = every.map(|every| crate::schedule::Evals { every, microbatches: 2 });
            let grid = Grid { stages: k, replicas: r };
            prop_assert_eq!(check(&schedule, grid, &lists(&schedule, grid)), Ok(()));
        }

        /// No idle device in the steady state when messages are free.
        #[test]
        fn decoupled_stages_are_never_idle(k in 1usize..=6, m in 1usize..=6, h in 1usize..=3, backward in 1u32..4) {
            let schedule = Schedule::new(Kind::Decoupled, k, m, h, SyncPoints::ends(1));
            let costs = Costs { forward: 1.0, backward: backward as f64, message: 0.0 };
            for share in crate::schedule::ideal(&schedule, costs).unwrap().utilization {
                prop_assert!((share - 1.0).abs() < 1e-9, "{share}");
            }
        }

        /// Swapping or dropping any action that matters is found.
        #[test]
        fn a_dropped_action_is_found(k in 2usize..=4, m in 1usize..=3, stage in 0usize..4, which in 0usize..1000) {
            let schedule = Schedule::new(Kind::Decoupled, k, m, 1, SyncPoints::ends(5));
            let grid = Grid { stages: k, replicas: 1 };
            let mut lists = lists(&schedule, grid);
            let list = &mut lists[stage % k];
            let matters: Vec<usize> = (0..list.len()).filter(|i| list[*i].op != Op::Load).collect();
            list.remove(matters[which % matters.len()]);
            prop_assert!(check(&schedule, grid, &lists).is_err());
        }
    }

    #[test]
    fn a_delay_below_its_bound_is_found() {
        let mut schedule = Schedule::new(Kind::Decoupled, 4, 1, 1, SyncPoints::ends(8));
        let grid = Grid { stages: 4, replicas: 1 };
        let made_with_enough = lists(&schedule, grid);
        schedule.delays[0] = 2;
        let fault = check(&schedule, grid, &made_with_enough).unwrap_err();
        assert_eq!(fault.0, "0F3.0 on stage 0, replica 0: version 1 is not written yet, only 0");
    }

    #[test]
    fn memory_bounds_are_kept_and_reached() {
        let schedule = Schedule::new(Kind::Decoupled, 4, 2, 1, SyncPoints::ends(9));
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
