//! Refuses runs that need more memory than they may have, before they begin.

use std::ops::Range;

use super::limits::limits;
use super::prediction::{Prediction, beside};
use crate::error::{Error, Result};
use crate::setup::Setup;

/// Refuses a run whose ranks need more memory than they may have, before it has begun. `ranks` are
/// those of this process; `neighbours` other ranks of this machine, with the paths of their control
/// groups.
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
            let who = if all.len() == 1 {
                setup.grid.name(ranks.start)
            } else {
                format!("{} ranks", all.len())
            };

            let (needed, left) = (mib(needed), mib(limit.left));
            return Err(Error::Memory(format!(
                "{needed} MiB predicted for {who}, {left} MiB left of {}",
                limit.name
            )));
        }
    }

    Ok(())
}

/// What of a GPU's memory is left free: pieces between tensors that nobody can use, and what no
/// formula knows. At the last byte libtorch gives memory back and asks for it anew, which waits for
/// the whole device each time.
fn reserve(bytes: u64) -> u64 {
    (3 << 29).max(bytes * 3 / 100)
}

/// Refuses ranks whose GPU, of `bytes`, could not hold them if it had nothing else to hold.
///
/// # Errors
/// [`Error::Memory`] with the need by the prediction.
pub fn check_gpu_size(setup: &Setup, ranks: Range<usize>, bytes: u64) -> Result<()> {
    let left = bytes.saturating_sub(beside(setup, ranks.start));
    fits(setup, ranks, left, bytes, &format!("the GPU has {} MiB for it", left >> 20))
}

/// Refuses ranks of this process whose GPU, of `bytes`, of which `left` are free now that
/// everything is connected, cannot hold what they need together.
///
/// # Errors
/// As [`check_gpu_size`].
pub fn check_gpu(setup: &Setup, ranks: Range<usize>, left: u64, bytes: u64) -> Result<()> {
    fits(setup, ranks, left, bytes, &format!("{} MiB left of the GPU", left >> 20))
}

fn fits(setup: &Setup, ranks: Range<usize>, left: u64, bytes: u64, found: &str) -> Result<()> {
    let needed: u64 = ranks.clone().map(|rank| Prediction::new(setup, rank).on_gpu()).sum();
    let reserve = reserve(bytes);
    if needed + reserve <= left {
        return Ok(());
    }

    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let who = if ranks.len() == 1 {
        setup.grid.name(ranks.start)
    } else {
        format!("{} places", ranks.len())
    };

    let (needed, reserve) = (mib(needed), mib(reserve));
    Err(Error::Memory(format!(
        "{needed} MiB predicted for {who}, {found}, of which {reserve} stay free"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_keeps_a_reserve() {
        assert_eq!(reserve(80 << 30), (80u64 << 30) * 3 / 100);
        assert_eq!(reserve(24 << 30), 3 << 29);
    }
}
