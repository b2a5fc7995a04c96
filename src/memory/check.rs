//! Refuses runs that need more memory than they may have, before they begin.

use std::ops::Range;

use super::Prediction;
use super::limits::limits;
use crate::error::{Error, Result};
use crate::setup::Setup;

/// Refuses a run whose ranks need more memory than they may have, before it has begun. `ranks` are those of this process;
/// `neighbours` other ranks of this machine, with the paths of their control groups.
///
/// # Errors
/// [`Error::Memory`] with the need by the prediction and the limit.
pub fn check(setup: &Setup, ranks: Range<usize>, neighbours: &[(usize, String)]) -> Result<()> {
    let predicted = |rank| Prediction::new(setup, rank).total();
    for limit in limits() {
        let inside = |path: &str| limit.group.as_ref().is_some_and(|group| path.starts_with(group));
        let sharing = neighbours.iter().filter(|(_, path)| inside(path)).map(|(rank, _)| *rank);
        let all: Vec<usize> = ranks.clone().chain(sharing).collect();
        let needed: u64 = all.iter().map(|rank| predicted(*rank)).sum();
        if needed > limit.left {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            let who = if all.len() == 1 { setup.grid.name(ranks.start) } else { format!("{} ranks", all.len()) };
            let (needed, left) = (mib(needed), mib(limit.left));
            return Err(Error::Memory(format!("{needed} MiB predicted for {who}, {left} MiB left of {}", limit.name)));
        }
    }
    Ok(())
}

/// Refuses ranks of this process whose GPU, of which `left` bytes are free, cannot hold what they need together.
///
/// # Errors
/// [`Error::Memory`] with the need by the prediction.
pub fn check_gpu(setup: &Setup, ranks: Range<usize>, left: u64) -> Result<()> {
    let needed: u64 = ranks.clone().map(|rank| Prediction::new(setup, rank).on_gpu()).sum();
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    match needed <= left {
        true => Ok(()),
        false => {
            let who = if ranks.len() == 1 { setup.grid.name(ranks.start) } else { format!("{} places", ranks.len()) };
            Err(Error::Memory(format!("{} MiB predicted for {who}, {} MiB left of the GPU", mib(needed), mib(left))))
        }
    }
}
