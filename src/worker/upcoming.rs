//! The next action of a device, as far as rank 0 lets the run go.

use super::Worker;
use super::context::Context;
use crate::comm::Content;
use crate::control::GateDecision;
use crate::error::Result;
use crate::schedule::{Action, DeviceActions, Lookahead, Op};
use crate::setup::Setup;

/// The rest of the action list, of which the actions up to the next one that computes are taken
/// ahead: the messages that those receive are expected while the one before them computes.
pub(super) struct Upcoming<'a> {
    actions: DeviceActions<'a>,
    ahead: Lookahead,
}

impl<'a> Upcoming<'a> {
    /// The whole list of a rank.
    pub(super) fn new(setup: &'a Setup, context: &Context) -> Upcoming<'a> {
        let mut actions = setup.schedule.device_actions(setup.grid.device_of(context.rank));
        actions.set_limit(context.gate.limit());
        Upcoming { actions, ahead: Lookahead::default() }
    }
}

impl Worker {
    /// The next action; none at the end of the list, or where the run is told to stop. Waits at the
    /// gate if it must.
    pub(super) fn next_action(&mut self, upcoming: &mut Upcoming) -> Result<Option<Action>> {
        loop {
            let Upcoming { actions, ahead } = upcoming;
            if let Some(action) = ahead.next(actions, |action| self.look_at(action))? {
                return Ok(Some(action));
            }

            let Some(step) = upcoming.actions.held() else { return Ok(None) };
            self.pass_gate(step, &mut upcoming.actions)?;
        }
    }

    /// Waits until step `step` may begin, or the run ends before it.
    fn pass_gate(&mut self, step: usize, actions: &mut DeviceActions) -> Result<()> {
        let gate = &self.context.gate;
        if gate.limit() > step {
            actions.set_limit(gate.limit());
            return Ok(());
        }

        // Rank 0 needs our pending losses before it can raise the limit.
        self.deferred.flush()?;
        let decision = gate.wait(step)?;
        self.probes.held();
        match decision {
            GateDecision::Proceed(limit) => actions.set_limit(limit),
            GateDecision::Stop => {
                actions.stop(step);
                self.stop = Some(step);
            }
        }

        Ok(())
    }

    /// Lets the links make ready for what an action will receive.
    fn look_at(&mut self, action: &Action) -> Result<()> {
        match action.op {
            Op::RecvActivation => self.prepare(Content::Activation, action),
            Op::RecvGradient => self.prepare(Content::Gradient, action),
            _ => Ok(()),
        }
    }
}
