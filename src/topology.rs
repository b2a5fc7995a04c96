//! The machine of a run, as `topology/*.toml` describes it: nodes, devices, the speed of its links,
//! and how places lie on them. What it says is checked against the hosts that the ranks have found
//! themselves on.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::grid::{Grid, Order};

/// More devices than that are a mistake.
const DEVICES: usize = 1 << 24;

/// Nodes of the same kind.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Topology {
    pub nodes: usize,
    /// Devices a node: ranks on it.
    pub devices: usize,
    /// Which places are next to each other, and so on one node.
    #[serde(default)]
    pub order: Order,
    /// Between devices of a node, and between nodes.
    pub inside: Speed,
    pub between: Speed,
}

/// What a link should do.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Speed {
    pub gbit_s: f64,
    pub latency_us: f64,
}

impl Topology {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::Config`] about `--topology`.
    pub fn load(path: &Path) -> Result<Topology> {
        let wrong = |problem: String| Error::config("--topology", path.display(), problem);
        let text = std::fs::read_to_string(path)
            .map_err(|error| wrong(format!("cannot be read ({error})")))?;
        let topology: Topology =
            toml::from_str(&text).map_err(|error| wrong(error.to_string().trim().to_owned()))?;
        let speeds = [topology.inside, topology.between];
        let good = |value: f64| value.is_finite() && value > 0.0;
        let room = topology.nodes.checked_mul(topology.devices);
        if !room.is_some_and(|room| (1..=DEVICES).contains(&room)) {
            return Err(wrong(format!(
                "nodes and devices must be at least 1, together at most {DEVICES} devices"
            )));
        }

        if !speeds.iter().all(|speed| good(speed.gbit_s) && good(speed.latency_us)) {
            return Err(wrong("gbit_s and latency_us must be above 0".into()));
        }

        Ok(topology)
    }

    /// The node of a rank.
    pub fn node(&self, rank: usize) -> usize {
        rank / self.devices
    }

    /// What the link between two ranks should do.
    pub fn speed(&self, a: usize, b: usize) -> Speed {
        if self.node(a) == self.node(b) { self.inside } else { self.between }
    }

    /// Whether the grid has room on the machine.
    ///
    /// # Errors
    /// [`Error::Config`] about `grid`.
    pub fn check_grid(&self, grid: Grid) -> Result<()> {
        let room = self.nodes * self.devices;
        if grid.size() <= room {
            return Ok(());
        }

        let found = format!("{grid} = {} devices", grid.size());
        Err(Error::config(
            "grid",
            found,
            format!("the topology has {} nodes of {} = {room}", self.nodes, self.devices),
        ))
    }

    /// Whether the ranks, in their order, are on the nodes where the topology has them.
    ///
    /// # Errors
    /// [`Error::Config`] about `--topology` with the first rank that is not.
    pub fn check_hosts(&self, hosts: &[String]) -> Result<()> {
        let remedy = || {
            let devices = self.devices;
            format!(
                "each node takes {devices} ranks in turn: mpirun --map-by ppr:{devices}:node, or another topology"
            )
        };

        let wrong = |found: String| Err(Error::config("--topology", found, remedy()));
        let mut seen = BTreeSet::new();
        for (node, ranks) in hosts.chunks(self.devices).enumerate() {
            let first = node * self.devices;
            if !seen.insert(&ranks[0]) {
                return wrong(format!(
                    "rank {first} of node {node} on {}, which other nodes' ranks are on",
                    ranks[0]
                ));
            }

            if let Some(other) = ranks.iter().position(|host| *host != ranks[0]) {
                let rank = first + other;
                return wrong(format!(
                    "rank {rank} on {} and rank {first} of the same node on {}",
                    ranks[other], ranks[0]
                ));
            }
        }

        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(nodes: usize, devices: usize) -> Topology {
        let speed = Speed { gbit_s: 10.0, latency_us: 5.0 };
        Topology {
            nodes,
            devices,
            order: Order::default(),
            inside: speed,
            between: Speed { gbit_s: 1.0, ..speed },
        }
    }

    #[test]
    fn ranks_are_where_the_topology_has_them() {
        let hosts = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let two = topology(2, 2);
        assert!(
            two.check_hosts(&hosts("a a b b")).is_ok() && two.check_hosts(&hosts("a a b")).is_ok()
        );
        let told = |text: &str| two.check_hosts(&hosts(text)).unwrap_err().to_string();
        assert!(told("a b a b").contains("rank 1 on b and rank 0 of the same node on a"));
        assert!(told("a a a a").contains("rank 2 of node 1 on a, which other nodes' ranks are on"));
        assert!(two.check_grid(Grid::line(2, 2)).is_ok());
        assert!(
            two.check_grid(Grid::line(5, 1)).unwrap_err().to_string().contains("2 nodes of 2 = 4")
        );
        assert_eq!((two.speed(0, 1).gbit_s, two.speed(1, 2).gbit_s), (10.0, 1.0));
    }

    #[test]
    fn the_files_of_the_repository_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("topology");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().flatten().collect();
        assert!(files.len() >= 3);
        for file in files {
            Topology::load(&file.path()).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}
