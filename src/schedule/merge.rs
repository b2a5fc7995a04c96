//! The list of a device: that of its stage, or, on the first device of a ring, those of its two
//! stages merged.
//!
//! The merged order is the one in which a simulation of the whole pipeline does the actions, the
//! stages competing for their device: what somebody else waits for is sent at once, and else
//! whichever can start first goes first. An order that a simulation has lived through cannot
//! deadlock, so nothing has to be proved about any schedule, delay or sync point. It is the same on
//! every replica, and made as lazily as the lists of the stages.

use std::collections::VecDeque;

use super::simulate::SimState;
use super::{Action, Actions, Costs, Op, Schedule, Violation};

/// A backward is about twice a forward.
const COSTS: Costs = Costs { forward: 1.0, backward: 2.0, message: 0.0 };

/// The actions of one device of a replica, in order.
pub enum DeviceActions<'a> {
    /// Its one stage's.
    Single(Actions<'a>),
    /// Those of the first and the last stage, merged.
    Merged(Box<Merged<'a>>),
}

impl<'a> DeviceActions<'a> {
    pub(super) fn new(schedule: &'a Schedule, device: usize) -> DeviceActions<'a> {
        match schedule.grid(1).held(device).len() {
            1 => DeviceActions::Single(schedule.actions(device)),
            _ => DeviceActions::Merged(Box::new(Merged::new(schedule))),
        }
    }
}

impl DeviceActions<'_> {
    /// Lets the list go up to the beginning of step `limit`.
    pub fn set_limit(&mut self, limit: usize) {
        match self {
            DeviceActions::Single(actions) => actions.set_limit(limit),
            DeviceActions::Merged(merged) => {
                merged.stages.iter_mut().for_each(|stage| stage.set_limit(limit))
            }
        }
    }

    /// The step that would be begun next, if the limit forbids it: then the list seems to be over.
    pub fn held(&self) -> Option<usize> {
        match self {
            DeviceActions::Single(actions) => actions.held(),
            DeviceActions::Merged(merged) => merged.held(),
        }
    }

    /// Ends the run at the step that is held: its boundary is drained and saved.
    pub fn stop(&mut self, step: usize) {
        match self {
            DeviceActions::Single(actions) => actions.stop(step),
            DeviceActions::Merged(merged) => {
                merged.stages.iter_mut().for_each(|stage| stage.stop(step));
            }
        }
    }
}

impl Iterator for DeviceActions<'_> {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        match self {
            DeviceActions::Single(actions) => actions.next(),
            DeviceActions::Merged(merged) => merged.next(),
        }
    }
}

/// A running simulation of one pipeline on a ring, of which the first device's actions are kept.
pub struct Merged<'a> {
    world: SimState,
    stages: Vec<Actions<'a>>,
    /// Of the devices.
    clock: Vec<f64>,
    queue: VecDeque<Action>,
}

impl<'a> Merged<'a> {
    fn new(schedule: &'a Schedule) -> Merged<'a> {
        Merged {
            world: SimState::new(schedule, 1, COSTS.stages(schedule), COSTS.message),
            stages: (0..schedule.stages).map(|stage| schedule.actions(stage)).collect(),
            clock: vec![0.0; schedule.grid(1).devices()],
            queue: VecDeque::new(),
        }
    }

    /// The first stage begins every step, so the device waits where it is held, whatever the other
    /// could do: the merged order must not depend on when the limit was raised.
    fn held(&self) -> Option<usize> {
        if self.queue.is_empty() { self.stages[0].held() } else { None }
    }

    /// When the next action of a stage could start, if it can.
    fn start(&mut self, stage: usize) -> Result<Option<f64>, Violation> {
        let device = stage % self.clock.len();
        let Some(action) = self.stages[stage].peek() else { return Ok(None) };
        let ready = self.world.ready(0, *action)?;
        Ok(ready.map(|ready| ready.max(self.clock[device])))
    }

    fn run(&mut self, stage: usize, start: f64) -> Result<(), Violation> {
        let device = stage % self.clock.len();
        if let Some(action) = self.stages[stage].next() {
            self.clock[device] = self.world.run(0, action, start)?;
            if device == 0 {
                self.queue.push_back(action);
            }
        }
        Ok(())
    }

    /// Lets the other devices go as far as they can, then the first device do one action.
    fn advance(&mut self) -> Result<(), Violation> {
        let last = self.stages.len() - 1;
        loop {
            let mut moved = false;
            for stage in 1..last {
                while let Some(start) = self.start(stage)? {
                    self.run(stage, start)?;
                    moved = true;
                }
            }

            if !moved {
                break;
            }
        }

        for stage in [0, last] {
            // `SendTable` waits, and a ring has none.
            let gives = |a: &Action| {
                matches!(a.op, Op::SendActivation | Op::SendGradient | Op::Part | Op::Reduce)
            };

            if self.stages[stage].peek().is_some_and(gives) {
                return self.run(stage, self.clock[0]);
            }
        }

        match (self.start(0)?, self.start(last)?) {
            (Some(first), Some(second)) if first < second => self.run(0, first),
            (_, Some(second)) => self.run(last, second),
            (Some(first), None) => self.run(0, first),
            (None, None) => Ok(()),
        }
    }
}

impl Iterator for Merged<'_> {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        self.stages[0].peek();
        if self.queue.is_empty() && self.held().is_none() {
            // A fault ends the list early, which `check` finds before any run starts.
            self.advance().ok()?;
        }
        self.queue.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::grid::Placement;
    use crate::schedule::{ScheduleKind, Tie};

    /// The list of a long run is made in little room.
    #[test]
    fn nothing_that_is_over_is_kept() {
        let mut schedule = Schedule::new(ScheduleKind::Decoupled, 4, 2, 1, SyncPoints::ends(2000));
        (schedule.placement, schedule.tie) = (Placement::Ring, Tie::Aligned);
        let mut merged = Merged::new(&schedule);
        let mut most = 0;
        while merged.next().is_some() {
            most = most.max(merged.world.held());
        }
        assert!(most < 100, "{most}");
    }
}
