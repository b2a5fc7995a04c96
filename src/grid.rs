//! The grid of K stages times R replicas: which rank holds which places, who is next to whom.
//! Arithmetic only.

use std::fmt;

/// Stages or replicas of a grid: more is a mistake.
const LARGEST: usize = 1 << 16;

/// One position of the grid.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Place {
    pub stage: usize,
    pub replica: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stage {}, replica {}", self.stage, self.replica)
    }
}

/// How the K stages of a pipeline lie on its devices.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
    schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// One stage a device.
    #[default]
    Line,
    /// K stages on K-1 devices: the last stage lives with the first, so a tied table exists once.
    Ring,
}

impl Placement {
    /// Whether K stages can be placed so.
    ///
    /// # Errors
    /// What to do if not.
    pub fn check(self, stages: usize) -> Result<(), String> {
        match self {
            Placement::Ring if stages < 3 => {
                Err(format!("needs at least 3 stages, there are {stages}; take more or `line`"))
            }
            _ => Ok(()),
        }
    }
}

/// Which places lie next to each other, as ranks and so on nodes.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// The devices of a replica: its links stay on a node, all-reduces cross nodes.
    #[default]
    ReplicaMajor,
    /// The replicas of a stage: all-reduces stay on a node, links cross nodes.
    StageMajor,
}

/// The two axes: K pipeline stages, R data-parallel replicas; both at least 1, K at least 3 on a
/// ring.
///
/// A rank is a device. Ranks run along the stages first, so that those of one pipeline stand next
/// to each other (or, in stage-major order, along the replicas):
///
/// ```text
/// line          stage 0   stage 1   stage 2            ring          stage 0   stage 1   stage 2
///                                                                    stage 3
/// replica 0     rank 0 -- rank 1 -- rank 2             replica 0     rank 0 -- rank 1 -- rank 2 -- (rank 0)
///                 |         |         |                                |         |         |
/// replica 1     rank 3 -- rank 4 -- rank 5             replica 1     rank 3 -- rank 4 -- rank 5 -- (rank 3)
///
/// --  link: activations down, gradients up             |  replica group: all-reduce of gradients
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    pub stages: usize,
    pub replicas: usize,
    pub placement: Placement,
    pub order: Order,
}

impl Grid {
    /// One stage a device.
    pub fn line(stages: usize, replicas: usize) -> Grid {
        Grid { stages, replicas, placement: Placement::Line, order: Order::ReplicaMajor }
    }

    /// Devices of one replica.
    pub fn devices(self) -> usize {
        match self.placement {
            Placement::Line => self.stages,
            Placement::Ring => self.stages - 1,
        }
    }

    /// The device of a stage among those of its replica.
    pub fn device(self, stage: usize) -> usize {
        stage % self.devices()
    }

    /// How many devices there are in all, and so how many ranks.
    pub fn size(self) -> usize {
        self.devices() * self.replicas
    }

    /// The rank that holds `place`.
    pub fn rank(self, place: Place) -> usize {
        match self.order {
            Order::ReplicaMajor => place.replica * self.devices() + self.device(place.stage),
            Order::StageMajor => self.device(place.stage) * self.replicas + place.replica,
        }
    }

    /// The device of a rank among those of its replica.
    pub fn device_of(self, rank: usize) -> usize {
        match self.order {
            Order::ReplicaMajor => rank % self.devices(),
            Order::StageMajor => rank / self.replicas,
        }
    }

    /// The replica that a rank belongs to.
    pub fn replica_of(self, rank: usize) -> usize {
        match self.order {
            Order::ReplicaMajor => rank / self.devices(),
            Order::StageMajor => rank % self.replicas,
        }
    }

    /// The places that `rank` holds: one, or two on the first device of a ring.
    pub fn held(self, rank: usize) -> Vec<Place> {
        let (device, replica) = (self.device_of(rank), self.replica_of(rank));
        (device..self.stages)
            .step_by(self.devices())
            .map(|stage| Place { stage, replica })
            .collect()
    }

    /// What messages call the places of a rank.
    pub fn name(self, rank: usize) -> String {
        match self.held(rank)[..] {
            [first, second] => {
                format!("stages {} and {}, replica {}", first.stage, second.stage, first.replica)
            }
            _ => self.held(rank)[0].to_string(),
        }
    }

    /// All places, replica by replica.
    pub fn places(self) -> impl Iterator<Item = Place> {
        (0..self.replicas)
            .flat_map(move |replica| (0..self.stages).map(move |stage| Place { stage, replica }))
    }

    /// The neighbour that sends activations to `place`.
    pub fn upstream(self, place: Place) -> Option<Place> {
        (place.stage > 0).then(|| Place { stage: place.stage - 1, ..place })
    }

    /// The neighbour that receives activations from `place`.
    pub fn downstream(self, place: Place) -> Option<Place> {
        (place.stage + 1 < self.stages).then(|| Place { stage: place.stage + 1, ..place })
    }

    /// The place on another device that holds the other copy of a tied table.
    pub fn twin(self, place: Place) -> Option<Place> {
        let last = self.stages - 1;
        let twin = match place.stage {
            0 => Place { stage: last, ..place },
            stage if stage == last => Place { stage: 0, ..place },
            _ => return None,
        };
        (self.device(twin.stage) != self.device(place.stage)).then_some(twin)
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

    /// Reads `KxR`, as in `--grid 4x2`: a line.
    fn from_str(text: &str) -> Result<Grid, String> {
        let wrong = || format!("`{text}` is not a grid; write stages x replicas, as in 4x2");
        let (k, r) = text.split_once(['x', 'X']).ok_or_else(wrong)?;
        let grid = Grid::line(k.parse().map_err(|_| wrong())?, r.parse().map_err(|_| wrong())?);
        let possible = 1..=LARGEST;
        if possible.contains(&grid.stages) && possible.contains(&grid.replicas) {
            Ok(grid)
        } else {
            Err(wrong())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_run_along_the_stages() {
        let grid = Grid::line(3, 2);
        let table: Vec<_> = grid.places().map(|p| (p.stage, p.replica)).collect();
        assert_eq!(table, [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]);
        for (rank, place) in grid.places().enumerate() {
            assert_eq!((grid.rank(place), grid.held(rank)), (rank, vec![place]));
        }
        assert_eq!(grid.size(), 6);
    }

    #[test]
    fn a_ring_puts_the_last_stage_on_the_first_device() {
        let grid = Grid { placement: Placement::Ring, ..Grid::line(4, 2) };
        assert_eq!((grid.devices(), grid.size()), (3, 6));
        let held =
            |rank: usize| grid.held(rank).iter().map(|p| (p.stage, p.replica)).collect::<Vec<_>>();
        assert_eq!(held(0), [(0, 0), (3, 0)]);
        assert_eq!(held(2), [(2, 0)]);
        assert_eq!(held(3), [(0, 1), (3, 1)]);
        for rank in 0..6 {
            assert!(grid.held(rank).iter().all(|place| grid.rank(*place) == rank));
        }
        assert_eq!(
            (grid.name(3), grid.name(4)),
            ("stages 0 and 3, replica 1".into(), "stage 1, replica 1".into())
        );
    }

    #[test]
    fn the_twin_of_a_tied_table_stands_at_the_other_end() {
        let place = |stage| Place { stage, replica: 1 };
        let line = Grid::line(3, 2);
        assert_eq!(line.twin(place(0)), Some(place(2)));
        assert_eq!(line.twin(place(2)), Some(place(0)));
        assert_eq!(line.twin(place(1)), None);
        assert_eq!(Grid::line(1, 2).twin(place(0)), None);
        assert_eq!(Grid { placement: Placement::Ring, ..line }.twin(place(0)), None);
    }

    #[test]
    fn neighbours_stay_in_their_replica() {
        let grid = Grid::line(3, 2);
        let place = |stage| Place { stage, replica: 1 };
        assert_eq!(grid.upstream(place(0)), None);
        assert_eq!(grid.upstream(place(2)), Some(place(1)));
        assert_eq!(grid.downstream(place(0)), Some(place(1)));
        assert_eq!(grid.downstream(place(2)), None);
        assert_eq!(grid.group(1).map(|p| grid.rank(p)).collect::<Vec<_>>(), [1, 4]);
    }

    #[test]
    fn a_grid_reads_what_it_prints() {
        assert_eq!("4x2".parse(), Ok(Grid::line(4, 2)));
        assert_eq!(Grid::line(11, 4).to_string(), "11x4");
        for wrong in ["", "4", "x", "0x1", "1x0", "-1x2", "4x2x1", "ax2"] {
            assert!(wrong.parse::<Grid>().is_err(), "{wrong}");
        }
    }
}
