//! What the ranks of a world check together before they train.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use super::job::{Job, Origin};
use crate::checkpoint::Checkpoint;
use crate::comm::mpi::{self, Identity, World};
use crate::data::Fingerprint;
use crate::device::ComputeDevice;
use crate::error::{Error, Result};
use crate::files::SEEN;
use crate::grid::Placement;
use crate::lock;
use crate::memory;
use crate::setup::Setup;
use crate::topology::Topology;

/// The setup, checked against the world.
pub(super) fn setup_of_rank(job: &Job, world: &World) -> Result<(Setup, Option<Topology>)> {
    let (setup, topology) = job.setup()?;
    let (size, grid) = (world.identity.size, setup.grid);
    if let Some((names, launched, _)) = mpi::launcher()
        && launched != size
    {
        let [name, rank] = names;
        let found = format!("{name} = {launched} and {size} ranks in MPI's world");
        let remedy = format!(
            "use the mpirun of {}; where nothing launches (a shell inside a batch job), unset {name} and {rank}, or give \
             --transport local",
            mpi::library_version()
        );

        return Err(Error::config("launcher", found, remedy));
    }

    if grid.size() != size {
        let devices = match grid.placement {
            Placement::Line => "K * R",
            Placement::Ring => "(K - 1) * R",
        };

        let remedy =
            format!("run mpirun -n {}, or give --grid KxR with {devices} = {size}", grid.size());
        return Err(Error::config(
            "grid",
            format!("{grid} = {} devices and {size} ranks", grid.size()),
            remedy,
        ));
    }

    Ok((setup, topology))
}

/// The setup that begins where rank 0 has found and verified.
pub(super) fn begun(job: &Job, world: &World, setup: Setup) -> Result<Setup> {
    let first = world.identity.rank == 0;
    let found = if first { job.origin(&setup) } else { Ok(Origin::Nothing) };
    let told = match &found {
        Ok(Origin::State(saved)) => [b"s", saved.path.as_os_str().as_bytes()].concat(),
        Ok(Origin::Weights(saved)) => [b"w", saved.path.as_os_str().as_bytes()].concat(),
        Ok(Origin::Nothing) | Err(_) => Vec::new(),
    };

    let all = world.all_gather(told)?;
    let mut origin = found?;
    if let Some((kind, path)) = all[0].split_first().filter(|_| !first) {
        let saved = Checkpoint::read_manifest(Path::new(OsStr::from_bytes(path)))?;
        origin = if *kind == b's' { Origin::State(saved) } else { Origin::Weights(saved) };
    }

    job.begin(origin, setup)
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
pub(super) fn enough_memory(
    job: &Job,
    world: &World,
    setup: &Setup,
    chosen: &ComputeDevice,
) -> Result<()> {
    let Identity { rank, host, .. } = &world.identity;
    let group = memory::control_group().unwrap_or_default();
    let all = world.all_gather(format!("{host}\n{group}").into_bytes())?;
    let of_rank = |(other, bytes): (usize, &Vec<u8>)| {
        let text = String::from_utf8_lossy(bytes);
        let (on, group) = text.split_once('\n')?;
        (on == host && other != *rank).then(|| (other, group.to_owned()))
    };

    let neighbours: Vec<(usize, String)> = all.iter().enumerate().filter_map(of_rank).collect();
    job.check_memory(setup, chosen, *rank..*rank + 1, &neighbours)
}

/// Refuses a world whose ranks have read different configs, texts or vocabularies.
pub(super) fn same_everywhere(world: &World, setup: &Setup) -> Result<()> {
    let Fingerprint { train_tokens, train, held_out_tokens, held_out, vocabulary } =
        setup.corpus.fingerprint();
    let mine = [
        ("vocabulary", vocabulary.clone()),
        ("training text", format!("{train_tokens} {train}")),
        ("held-out text", format!("{held_out_tokens} {held_out}")),
        ("config", setup.config.to_toml()),
        ("step to resume from", setup.start().to_string()),
    ];

    for (what, mine) in mine {
        let all = world.all_gather(mine.into_bytes())?;
        if let Some(rank) = all.iter().position(|other| *other != all[0]) {
            let found = format!("another {what} on rank {rank} than on rank 0");
            return Err(Error::config(
                "CONFIG",
                found,
                "give all nodes the same files, and all ranks the same working folder",
            ));
        }
    }

    Ok(())
}

/// Refuses ranks that do not see the run's folder that rank 0 writes, whose lock is `owner`'s.
pub(super) fn same_folder(world: &World, out: &Path, owner: Option<&str>) -> Result<()> {
    let all = world.all_gather(owner.unwrap_or_default().as_bytes().to_vec())?;
    if world.identity.rank == 0 {
        return Ok(());
    }

    let owner = String::from_utf8_lossy(&all[0]);

    let begun = Instant::now();
    while !lock::is_of(out, &owner) {
        if begun.elapsed() > SEEN {
            let here = std::env::current_dir().unwrap_or_default();
            let found = format!(
                "{} of working folder {} on {}",
                out.display(),
                here.display(),
                world.identity.host
            );

            let remedy = "rank 0 writes a folder of this name that is not seen here: choose one that all nodes share";
            return Err(Error::config("--out", found, remedy));
        }

        std::thread::sleep(SEEN / 100);
    }

    Ok(())
}
