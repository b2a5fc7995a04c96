//! What is done around each action. A new observer is a [`Probe`] in a file of its own and a line
//! in [`Probes::new`].

use std::sync::Arc;

use super::faults::Faults;
use super::place::PlaceState;
use crate::clock::{Clock, TimeKind, Times};
use crate::control::Gate;
use crate::error::Result;
use crate::schedule::Action;

/// Something that looks at, or meddles with, every action.
pub(super) trait Probe {
    /// Before an action of a place.
    fn begin(&mut self, _action: &Action, _place: &mut PlaceState) -> Result<()> {
        Ok(())
    }

    /// Within an action: its time so far was a wait of this kind.
    fn waited(&mut self, _share: TimeKind) {}

    /// After it.
    fn end(&mut self, _action: &Action) {}
}

/// The probes of a device. The clock is the innermost one: it does not count the others' time as an
/// action's.
pub(super) struct Probes {
    list: Vec<Box<dyn Probe>>,
    clock: Clock,
}

impl Probes {
    /// Log, heartbeat and faults on purpose around the clock.
    pub(super) fn new(clock: Clock, gate: &Arc<Gate>, faults: Faults) -> Probes {
        Probes {
            list: vec![Box::new(Log), Box::new(Beating(Arc::clone(gate))), Box::new(faults)],
            clock,
        }
    }

    pub(super) fn begin(&mut self, action: &Action, place: &mut PlaceState) -> Result<()> {
        self.list.iter_mut().try_for_each(|probe| probe.begin(action, place))?;
        self.clock.begin(action, place)
    }

    pub(super) fn waited(&mut self, share: TimeKind) {
        self.clock.waited(share);
        self.list.iter_mut().for_each(|probe| probe.waited(share));
    }

    pub(super) fn end(&mut self, action: &Action) {
        self.clock.end(action);
        self.list.iter_mut().for_each(|probe| probe.end(action));
    }

    /// What the clock has measured.
    pub(super) fn times(&self) -> Option<Times> {
        self.clock.times()
    }
}

/// A line of the log, where that is wanted.
struct Log;

impl Probe for Log {
    fn begin(&mut self, action: &Action, _: &mut PlaceState) -> Result<()> {
        tracing::trace!(%action);
        Ok(())
    }
}

/// The heartbeat that the watchdog asks for.
struct Beating(Arc<Gate>);

impl Probe for Beating {
    fn begin(&mut self, action: &Action, _: &mut PlaceState) -> Result<()> {
        self.0.heartbeat.action(*action);
        Ok(())
    }
}

impl Probe for Clock {
    fn begin(&mut self, _: &Action, _: &mut PlaceState) -> Result<()> {
        self.lap(TimeKind::Idle);
        Ok(())
    }

    fn waited(&mut self, share: TimeKind) {
        self.lap(share);
    }

    fn end(&mut self, action: &Action) {
        self.passed(action);
    }
}
