//! Which channels a grid has, and which a rank takes part in: arithmetic only, the same on every
//! rank.

use crate::grid::{Grid, Place};

/// What a channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// Hidden states, from a place to the one downstream of it.
    Down(Place),
    /// Their gradients, from a place to the one upstream of it.
    Up(Place),
    /// From the tied table's one end to the other.
    Twin(Place),
    /// The replicas of a stage.
    Group(usize),
}

/// One direction of a link, or a replica group: a communicator of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channel {
    pub purpose: Purpose,
    /// Ranks; the first sends, or names the communicator.
    pub members: Vec<usize>,
}

/// All channels of a grid in one order, in which every rank joins those that are its own: nobody
/// then waits for somebody who waits for him. `tied` says whether tables are exchanged.
pub fn channels(grid: Grid, tied: bool) -> Vec<Channel> {
    let mut all = Vec::new();
    let mut pair = |purpose, from: Place, to: Option<Place>| {
        all.extend(to.map(|to| Channel { purpose, members: vec![grid.rank(from), grid.rank(to)] }));
    };

    for place in grid.places() {
        pair(Purpose::Down(place), place, grid.downstream(place));
        pair(Purpose::Up(place), place, grid.upstream(place));
        if tied {
            pair(Purpose::Twin(place), place, grid.twin(place));
        }
    }

    if grid.replicas > 1 {
        all.extend((0..grid.stages).map(|stage| Channel {
            purpose: Purpose::Group(stage),
            members: grid.group(stage).map(|place| grid.rank(place)).collect(),
        }));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::Placement;

    #[test]
    fn a_line_has_two_channels_a_link() {
        let grid = Grid::line(3, 2);
        let all = channels(grid, true);
        let count = |wanted: fn(&Purpose) -> bool| {
            all.iter().filter(|channel| wanted(&channel.purpose)).count()
        };
        assert_eq!(count(|purpose| matches!(purpose, Purpose::Down(_))), 4);
        assert_eq!(count(|purpose| matches!(purpose, Purpose::Up(_))), 4);
        assert_eq!(count(|purpose| matches!(purpose, Purpose::Twin(_))), 4);
        assert_eq!(count(|purpose| matches!(purpose, Purpose::Group(_))), 3);
        let down = all
            .iter()
            .find(|channel| channel.purpose == Purpose::Down(Place { stage: 1, replica: 1 }))
            .unwrap();
        let rank = |stage| grid.rank(Place { stage, replica: 1 });
        assert_eq!(down.members, [rank(1), rank(2)]);
        assert!(channels(grid, false).len() == all.len() - 4);
        assert!(channels(Grid::line(1, 1), true).is_empty());
    }

    /// Streams that could share one of the device's 32 queues would wait for each other: a channel
    /// has one and NCCL two of its own, beside libtorch's and those of the set-up.
    #[test]
    fn every_stream_has_a_queue_of_its_own() {
        for (stages, replicas, placement) in [
            (1, 8, Placement::Line),
            (3, 1, Placement::Line),
            (4, 3, Placement::Line),
            (4, 3, Placement::Ring),
            (9, 2, Placement::Ring),
        ] {
            let grid = Grid { placement, ..Grid::line(stages, replicas) };
            let all = channels(grid, true);
            for rank in 0..grid.size() {
                let own = all.iter().filter(|channel| channel.members.contains(&rank)).count();
                assert!(own <= 7 && 3 * own + 2 <= 32, "{own} channels of rank {rank} on {grid}");
            }
        }
    }

    /// No channel has a rank twice: NCCL would refuse it.
    #[test]
    fn a_ring_talks_to_others_only() {
        let grid = Grid { placement: Placement::Ring, ..Grid::line(4, 3) };
        for channel in channels(grid, true) {
            let mut members = channel.members.clone();
            members.sort_unstable();
            members.dedup();
            assert_eq!(members.len(), channel.members.len(), "{channel:?}");
        }
    }
}
