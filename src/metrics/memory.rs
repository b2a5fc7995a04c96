//! Predicted and measured peak memory of a place.

use std::fs;

use crate::grid::Place;
use crate::optim::Optimizer;
use crate::setup::Setup;

/// f32.
const VALUE: u64 = 4;

/// The parts of a place's predicted peak, in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// `D_k + 1` versions.
    pub weights: u64,
    pub gradient: u64,
    pub optimizer: u64,
    /// `a_k + 1` microbatches.
    pub activations: u64,
    /// What one backward and the links need for a moment.
    pub transient: u64,
}

impl Prediction {
    /// The peak of `place` by the formulas of the layers.
    pub fn new(setup: &Setup, place: Place) -> Prediction {
        let stack = setup.stack(place.stage);
        let layout = crate::params::Layout::new(stack.parameters());
        let flat = layout.len as u64 * VALUE;
        let schedule = &setup.schedule;
        let tokens = (setup.rows * setup.config.data.sequence) as u64;
        let hidden = tokens * setup.config.model.d_model as u64 * VALUE;
        let saved = tokens * stack.saved_per_token() as u64 * VALUE;
        let held = schedule.activations_held(place.stage) as u64;
        let activations = if setup.config.recompute { held * hidden + saved } else { held * saved };
        let state = Optimizer::state_buffers(setup.config.optimizer.kind) as u64;
        // A message each way to every neighbour.
        let neighbours = [setup.grid.upstream(place), setup.grid.downstream(place)];
        let messages = 2 * neighbours.iter().flatten().count() as u64 * hidden;
        Prediction {
            weights: schedule.versions_held(place.stage) as u64 * flat,
            gradient: flat,
            optimizer: state * flat,
            activations,
            transient: tokens * stack.transient_per_token() as u64 * VALUE + messages,
        }
    }

    pub fn total(&self) -> u64 {
        self.weights + self.gradient + self.optimizer + self.activations + self.transient
    }
}

/// Measures how far the resident memory of this process rises above where it stood.
#[derive(Debug)]
pub struct Gauge {
    start: u64,
}

impl Gauge {
    /// Begins here: the kernel's mark of the highest resident memory is put back to the present.
    pub fn start() -> Option<Gauge> {
        // 5 resets VmHWM (proc(5)); where that is not allowed the mark may come from before the start.
        let _ = fs::write("/proc/self/clear_refs", "5");
        Some(Gauge { start: status("VmRSS:")? })
    }

    /// Bytes between the start and the highest mark since.
    pub fn peak(&self) -> Option<u64> {
        Some(status("VmHWM:")?.saturating_sub(self.start))
    }
}

fn status(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gauge_sees_what_is_touched() {
        let gauge = Gauge::start().unwrap();
        let block = vec![1u8; 64 << 20];
        assert!(block.iter().map(|b| u64::from(*b)).sum::<u64>() == 64 << 20);
        assert!(gauge.peak().unwrap() >= 60 << 20);
    }
}
