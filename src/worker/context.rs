//! What all of a worker reads and nothing in it changes.

use std::sync::Arc;

use super::faults::Faults;
use crate::comm::AsyncTransfers;
use crate::config::OnNonfinite;
use crate::control::{Gate, Mode, Reporter};
use crate::schedule::Action;
use crate::setup::Setup;

/// The run and this rank in it.
pub(super) struct Context {
    pub(super) setup: Arc<Setup>,
    pub(super) rank: usize,
    /// Of all its places.
    pub(super) replica: usize,
    pub(super) mode: Mode,
    pub(super) faults: Faults,
    pub(super) reports: Reporter,
    pub(super) gate: Arc<Gate>,
    pub(super) transfers: Option<Arc<dyn AsyncTransfers>>,
}

impl Context {
    /// Which of the rank's places an action belongs to.
    pub(super) fn slot(&self, action: &Action) -> usize {
        action.stage / self.setup.grid.devices()
    }

    /// What makes the mean of a sum over microbatches and replicas.
    pub(super) fn mean(&self) -> f64 {
        1.0 / (self.setup.config.microbatches * self.setup.grid.replicas) as f64
    }

    /// Whether an update whose gradient is not finite is left out, instead of ending the run.
    pub(super) fn skips(&self) -> bool {
        self.setup.config.on_nonfinite == OnNonfinite::Skip
    }
}
