//! The grid of K stages times R replicas: which rank holds which place, who is next to whom. Arithmetic only.

use std::fmt;

/// One position of the grid; one rank holds one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Place {
    pub stage: usize,
    pub replica: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stage {}, replica {}", self.stage, self.replica)
    }
}

/// The two axes: K pipeline stages, R data-parallel replicas; both at least 1.
///
/// Ranks run along the stages first, so that the ranks of one pipeline stand next to each other:
///
/// ```text
///               stage 0   stage 1   stage 2
/// replica 0     rank 0 -- rank 1 -- rank 2     -- link: activations down, gradients up
///                 |         |         |
/// replica 1     rank 3 -- rank 4 -- rank 5      | replica group: all-reduce of gradients
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    pub stages: usize,
    pub replicas: usize,
}

impl Grid {
    /// How many places there are, and so how many ranks.
    pub fn size(self) -> usize {
        self.stages * self.replicas
    }

    /// The rank that holds `place`.
    pub fn rank(self, place: Place) -> usize {
        place.replica * self.stages + place.stage
    }

    /// The place that `rank` holds.
    pub fn place(self, rank: usize) -> Place {
        Place { stage: rank % self.stages, replica: rank / self.stages }
    }

    /// All places in the order of their ranks.
    pub fn places(self) -> impl Iterator<Item = Place> {
        (0..self.size()).map(move |rank| self.place(rank))
    }

    /// The neighbour that sends activations to `place`.
    pub fn upstream(self, place: Place) -> Option<Place> {
        (place.stage > 0).then(|| Place { stage: place.stage - 1, ..place })
    }

    /// The neighbour that receives activations from `place`.
    pub fn downstream(self, place: Place) -> Option<Place> {
        (place.stage + 1 < self.stages).then(|| Place { stage: place.stage + 1, ..place })
    }

    /// The replica group of a stage, in the order of the replicas.
    pub fn group(self, stage: usize) -> impl Iterator<Item = Place> {
        (0..self.replicas).map(move |replica| Place { stage, replica })
    }
}

impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.stages, self.replicas)
    }
}

impl std::str::FromStr for Grid {
    type Err = String;

    /// Reads `KxR`, as in `--grid 4x2`.
    fn from_str(text: &str) -> Result<Grid, String> {
        let wrong = || format!("`{text}` is not a grid; write stages x replicas, as in 4x2");
        let (k, r) = text.split_once(['x', 'X']).ok_or_else(wrong)?;
        let grid = Grid { stages: k.parse().map_err(|_| wrong())?, replicas: r.parse().map_err(|_| wrong())? };
        if grid.stages == 0 || grid.replicas == 0 { Err(wrong()) } else { Ok(grid) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_run_along_the_stages() {
        let grid = Grid { stages: 3, replicas: 2 };
        let table: Vec<_> = grid.places().map(|p| (p.stage, p.replica)).collect();
        assert_eq!(table, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]);
        for (rank, place) in grid.places().enumerate() {
            assert_eq!(grid.rank(place), rank);
        }
    }

    #[test]
    fn neighbours_stay_in_their_replica() {
        let grid = Grid { stages: 3, replicas: 2 };
        let place = |stage| Place { stage, replica: 1 };
        assert_eq!(grid.upstream(place(0)), None);
        assert_eq!(grid.upstream(place(2)), Some(place(1)));
        assert_eq!(grid.downstream(place(0)), Some(place(1)));
        assert_eq!(grid.downstream(place(2)), None);
        assert_eq!(grid.group(1).map(|p| grid.rank(p)).collect::<Vec<_>>(), [1, 4]);
    }

    #[test]
    fn a_grid_reads_what_it_prints() {
        assert_eq!("4x2".parse(), Ok(Grid { stages: 4, replicas: 2 }));
        assert_eq!(Grid { stages: 11, replicas: 4 }.to_string(), "11x4");
        for wrong in ["", "4", "x", "0x1", "1x0", "-1x2", "4x2x1", "ax2"] {
            assert!(wrong.parse::<Grid>().is_err(), "{wrong}");
        }
    }
}
