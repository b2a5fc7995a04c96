//! What the ranks of a world check together before they train.

use std::path::Path;

use super::job::Job;
use crate::checkpoint::Checkpoint;
use crate::comm::mpi::{self, Identity, World};
use crate::error::{Error, Result};
use crate::grid::Placement;
use crate::memory;
use crate::setup::Setup;
use crate::topology::Topology;

/// The setup, checked against the world.
pub(super) fn setup_of_rank(job: &Job, world: &World) -> Result<(Setup, Option<Topology>)> {
    let (setup, topology) = job.setup()?;
    let (size, grid) = (world.identity.size, setup.grid);
    if let Some((launched, _)) = mpi::launched()
        && launched != size
    {
        let found = format!("{launched} processes started and {size} ranks in MPI's world");
        return Err(Error::config("launcher", found, format!("use the mpirun of {}", mpi::library_version())));
    }
    if grid.size() != size {
        let devices = match grid.placement {
            Placement::Line => "K * R",
            Placement::Ring => "(K - 1) * R",
        };
        let remedy = format!("run mpirun -n {}, or give --grid KxR with {devices} = {size}", grid.size());
        return Err(Error::config("grid", format!("{grid} = {} devices and {size} ranks", grid.size()), remedy));
    }
    Ok((setup, topology))
}

/// The setup that goes on from what rank 0 has found and verified.
pub(super) fn resumed(job: &Job, world: &World, setup: Setup) -> Result<Setup> {
    let found = if world.identity.rank == 0 { job.saved(&setup) } else { Ok(None) };
    let path = found.as_ref().ok().and_then(Option::as_ref).map(|saved| saved.path.to_string_lossy().into_owned());
    let all = world.all_gather(path.unwrap_or_default().into_bytes())?;
    let saved = match found? {
        Some(saved) => Some(saved),
        None if all[0].is_empty() => None,
        None => Some(Checkpoint::read_manifest(Path::new(String::from_utf8_lossy(&all[0]).as_ref()))?),
    };
    match saved {
        Some(saved) => setup.resume(saved),
        None => Ok(setup),
    }
}

/// Refuses ranks that are not on the nodes where the topology has them.
pub(super) fn on_their_nodes(topology: Option<&Topology>, world: &World) -> Result<()> {
    let hosts = hosts(world)?;
    topology.map_or(Ok(()), |topology| topology.check_hosts(&hosts))
}

/// The hosts of all ranks.
pub(super) fn hosts(world: &World) -> Result<Vec<String>> {
    let all = world.all_gather(world.identity.host.clone().into_bytes())?;
    Ok(all.iter().map(|host| String::from_utf8_lossy(host).into_owned()).collect())
}

/// Refuses a machine whose limits the ranks on it would break.
pub(super) fn enough_memory(job: &Job, world: &World, setup: &Setup) -> Result<()> {
    let Identity { rank, host, .. } = &world.identity;
    let group = memory::control_group().unwrap_or_default();
    let all = world.all_gather(format!("{host}\n{group}").into_bytes())?;
    let of_rank = |(other, bytes): (usize, &Vec<u8>)| {
        let text = String::from_utf8_lossy(bytes);
        let (on, group) = text.split_once('\n')?;
        (on == host && other != *rank).then(|| (other, group.to_owned()))
    };
    let neighbours: Vec<(usize, String)> = all.iter().enumerate().filter_map(of_rank).collect();
    job.check_memory(setup, *rank..*rank + 1, &neighbours)
}

/// Refuses a world whose ranks have read different configs, or texts of different length.
pub(super) fn same_everywhere(world: &World, setup: &Setup) -> Result<()> {
    let (train, held_out) = (setup.corpus.train.len(), setup.corpus.held_out.len());
    let mine =
        format!("{}\n# {train} + {held_out} tokens of text, from step {}", setup.config.to_toml(), setup.start());
    let all = world.all_gather(mine.into_bytes())?;
    match all.iter().position(|other| *other != all[0]) {
        None => Ok(()),
        Some(rank) => {
            let found = format!("another config or text on rank {rank} than on rank 0");
            Err(Error::config("CONFIG", found, "give all nodes the same files"))
        }
    }
}
