//! The grid as it is shown when a run starts.

use super::Setup;
use crate::grid::Place;
use crate::schedule::{TableEnd, Tie};

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
            let (delay, versions) =
                (self.schedule.delays[stage], self.schedule.versions_held(stage));
            let last = layers.end - 1;
            out.push_str(&format!(
                "stage {stage}: layers {}..{last}, delay {delay}, versions {versions}\n",
                layers.start
            ));
        }

        let (input, head) = (
            self.schedule.table_delay(TableEnd::Input),
            self.schedule.table_delay(TableEnd::Output),
        );

        if self.schedule.tie == Tie::Head && input > 0 {
            let applied = input + self.schedule.delays[0];
            out.push_str(&format!(
                "tied table: delay {head} at the head, {input} at the embedding, whose part is applied {applied} updates old\n"
            ));
        }
        out
    }
}
