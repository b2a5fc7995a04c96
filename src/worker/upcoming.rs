//! The next action of a device, as far as rank 0 lets the run go.

use std::collections::VecDeque;

use super::Worker;
use super::context::Context;
use crate::comm::Content;
use crate::control::GateDecision;
use crate::error::Result;
use crate::schedule::{Action, DeviceActions, Op};
use crate::setup::Setup;

/// The rest of the action list, of which the actions up to the next one that computes are taken ahead: the messages that
/// those receive are expected while the one before them computes.
pub(super) struct Upcoming<'a> {
    actions: DeviceActions<'a>,
    ahead: VecDeque<Action>,
}

impl<'a> Upcoming<'a> {
    /// The whole list of a rank.
    pub(super) fn new(setup: &'a Setup, context: &Context) -> Upcoming<'a> {
        let mut actions = setup.schedule.device_actions(setup.grid.device_of(context.rank));
        actions.set_limit(context.gate.limit());
        Upcoming { actions, ahead: VecDeque::new() }
    }
}

impl Worker {
    /// The next action; none at the end of the list, or where the run is told to stop. Waits at the gate if it must.
    pub(super) fn next_action(&mut self, upcoming: &mut Upcoming) -> Result<Option<Action>> {
        loop {
            if let Some(action) = upcoming.ahead.pop_front().or_else(|| upcoming.actions.next()) {
                if upcoming.ahead.is_empty() && action.op.computes() {
                    self.look_ahead(upcoming)?;
                }
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
        match gate.wait(step)? {
            GateDecision::Proceed(limit) => actions.set_limit(limit),
            GateDecision::Stop => {
                actions.stop(step);
                self.stop = Some(step);
            }
        }
        Ok(())
    }

    /// Takes the actions up to the next one that computes, and lets the links begin with what those will receive.
    fn look_ahead(&mut self, upcoming: &mut Upcoming) -> Result<()> {
        for action in upcoming.actions.by_ref() {
            match action.op {
                Op::RecvActivation => self.expect(Content::Activation, &action)?,
                Op::RecvGradient => self.expect(Content::Gradient, &action)?,
                _ => {}
            }

            upcoming.ahead.push_back(action);
            if action.op.computes() {
                break;
            }
        }
        Ok(())
    }
}
