//! The grid as it is shown when a run starts.

use super::Setup;
use crate::grid::Place;

impl Setup {
    /// A picture of the grid: ranks, layers and delays of every stage.
    pub fn picture(&self) -> String {
        let mut out = String::new();
        for replica in 0..self.grid.replicas {
            let cells: Vec<String> = (0..self.grid.stages)
                .map(|stage| format!("[rank {}]", self.grid.rank(Place { stage, replica })))
                .collect();
            out.push_str(&format!("replica {replica}  {}\n", cells.join(" -- ")));
        }
        for (stage, layers) in self.partition.iter().enumerate() {
            let (delay, versions) = (self.schedule.delays[stage], self.schedule.versions_held(stage));
            let last = layers.end - 1;
            out.push_str(&format!(
                "stage {stage}: layers {}..{last}, delay {delay}, versions {versions}\n",
                layers.start
            ));
        }
        out
    }
}
