//! What is done around each action. A new observer is a [`Probe`] in a file of its own and a line
//! in [`Probes::new`].

use std::sync::Arc;
use std::time::Duration;

use super::faults::Faults;
use super::place::PlaceState;
use super::tracing::Tracing;
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
    fn waited(&mut self, _share: TimeKind) -> Result<()> {
        Ok(())
    }

    /// Between two actions: the time since the last one was a wait for rank 0.
    fn held(&mut self) {}

    /// After it.
    fn end(&mut self, _action: &Action, _place: &PlaceState) -> Result<()> {
        Ok(())
    }

    /// After the last one.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The probes of a device. The clock is the innermost one: it does not count the others' time as an
/// action's.
pub(super) struct Probes {
    list: Vec<Box<dyn Probe>>,
    clock: Clock,
}

impl Probes {
    /// Log, heartbeat, faults on purpose and trace around the clock.
    pub(super) fn new(clock: Clock, gate: &Arc<Gate>, faults: Faults, tracing: Tracing) -> Probes {
        let beating = Beating(Arc::clone(gate));
        Probes {
            list: vec![Box::new(Log), Box::new(beating), Box::new(faults), Box::new(tracing)],
            clock,
        }
    }

    pub(super) fn begin(&mut self, action: &Action, place: &mut PlaceState) -> Result<()> {
        self.list.iter_mut().try_for_each(|probe| probe.begin(action, place))?;
        self.clock.begin(action, place)
    }

    pub(super) fn waited(&mut self, share: TimeKind) -> Result<()> {
        self.clock.waited(share)?;
        self.list.iter_mut().try_for_each(|probe| probe.waited(share))
    }

    pub(super) fn held(&mut self) {
        self.list.iter_mut().for_each(|probe| probe.held());
    }

    pub(super) fn end(&mut self, action: &Action, place: &PlaceState) -> Result<()> {
        self.clock.end(action, place)?;
        self.list.iter_mut().try_for_each(|probe| probe.end(action, place))
    }

    pub(super) fn finish(&mut self) -> Result<()> {
        self.list.iter_mut().try_for_each(|probe| probe.finish())
    }

    /// Where the time went since this was last asked, if that is long enough ago.
    pub(super) fn recent(&mut self, least: Duration) -> Option<Times> {
        self.clock.recent(least)
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
    fn begin(&mut self, action: &Action, _: &mut PlaceState) -> Result<()> {
        self.began(action);
        Ok(())
    }

    fn waited(&mut self, share: TimeKind) -> Result<()> {
        self.waited_for(share);
        Ok(())
    }

    fn end(&mut self, action: &Action, _: &PlaceState) -> Result<()> {
        self.passed(action);
        Ok(())
    }
}
