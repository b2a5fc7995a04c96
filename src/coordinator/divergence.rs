//! Copies of the same weights, compared by their digests.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::grid::{Grid, Place};

/// What has been told so far: (step, stage, or none for the tied table) -> copy -> digest.
pub struct Divergence {
    grid: Grid,
    digests: BTreeMap<(usize, Option<usize>), BTreeMap<Place, u64>>,
}

impl Divergence {
    pub fn new(grid: Grid) -> Divergence {
        Divergence { grid, digests: BTreeMap::new() }
    }

    /// The digest after `step` updates of a place's copy of the weights of a stage, or of the tied
    /// table; compared once all have told theirs.
    ///
    /// # Errors
    /// [`Error::CopiesDiffer`].
    pub fn record_digest(
        &mut self,
        place: Place,
        stage: Option<usize>,
        step: usize,
        digest: u64,
    ) -> Result<()> {
        let digests = self.digests.entry((step, stage)).or_default();
        digests.insert(place, digest);
        let ends = if stage.is_none() && self.grid.twin(place).is_some() { 2 } else { 1 };
        if digests.len() < ends * self.grid.replicas {
            return Ok(());
        }

        let digests = self.digests.remove(&(step, stage)).unwrap_or_default();
        if digests.values().all(|other| *other == digest) {
            return Ok(());
        }

        let texts: Vec<String> =
            digests.iter().map(|(place, digest)| format!("{digest:016x} on {place}")).collect();
        let what = stage
            .map_or("the tied embedding".into(), |stage| format!("the weights of stage {stage}"));
        Err(Error::CopiesDiffer { what, step, digests: texts.join(", ") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_of_a_stage_and_all_copies_of_the_table_are_compared() {
        let mut copies = Divergence::new(Grid::line(2, 2));
        let place = |stage, replica| Place { stage, replica };
        assert!(copies.record_digest(place(1, 0), Some(1), 3, 7).is_ok());
        assert!(
            copies.record_digest(place(0, 0), Some(0), 3, 8).is_ok(),
            "another stage has other weights"
        );
        assert!(copies.record_digest(place(1, 1), Some(1), 3, 7).is_ok());
        for copy in [place(0, 0), place(0, 1), place(1, 0)] {
            assert!(copies.record_digest(copy, None, 4, 9).is_ok());
        }
        let Err(Error::CopiesDiffer { what, step, digests }) =
            copies.record_digest(place(1, 1), None, 4, 10)
        else {
            panic!("not found")
        };
        assert_eq!((what.as_str(), step), ("the tied embedding", 4));
        assert!(digests.ends_with("000000000000000a on stage 1, replica 1"), "{digests}");
    }
}
