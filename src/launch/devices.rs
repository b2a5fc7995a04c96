//! What the ranks of a run compute on.

use super::job::Transport;
use crate::comm::mpi::World;
use crate::config::Config;
use crate::device::{self, ComputeDevice, Gpu, Local, context, libraries};
use crate::error::{Error, Result};
use crate::precision::Precision;

/// How tensors travel between ranks that compute on `chosen`; none where they stay on the host.
///
/// # Errors
/// [`Error::Usage`] about `--transport`, [`Error::Config`] about `device` if NCCL is missing.
pub(super) fn carried(
    transport: Option<Transport>,
    chosen: &ComputeDevice,
    size: usize,
) -> Result<Option<Transport>> {
    match (transport, chosen) {
        (Some(Transport::Nccl), ComputeDevice::Cpu) => Err(Error::Usage(
            "--transport nccl is for GPUs; set device = \"cuda\", or take mpi".into(),
        )),
        (Some(Transport::Mpi), ComputeDevice::Cuda(_)) => Ok(Some(Transport::Mpi)),
        // Nobody to talk to.
        (_, ComputeDevice::Cuda(_)) if size == 1 => Ok(None),
        (_, ComputeDevice::Cuda(_)) => {
            let remedy = "or take --transport mpi, which is slow";
            libraries::nccl()
                .map_err(|why| Error::config("device", format!("`cuda`, but {why}"), remedy))?;
            Ok(Some(Transport::Nccl))
        }
        (_, ComputeDevice::Cpu) => Ok(None),
    }
}

/// The device of this process, and libtorch made ready for it.
///
/// # Errors
/// [`Error::Config`] about `device` or `precision`.
pub(super) fn chosen(config: &Config, local: Local) -> Result<ComputeDevice> {
    let chosen = device::choose(config.device, local, config.allow_shared_gpu)?;
    if config.precision == Precision::Tf32 {
        if chosen == ComputeDevice::Cpu {
            let remedy = "only GPUs have it: set device = \"cuda\", or take \"f32\"";
            return Err(Error::config("precision", "`tf32` on a processor", remedy));
        }

        context::allow_tf32(true)?;
    }

    if config.deterministic {
        context::deterministic()?;
    }

    Ok(chosen)
}

/// Refuses ranks that would share a GPU, or of which only some have one. Rank 0 tells who has
/// which.
///
/// # Errors
/// [`Error::Config`] about `device` or `allow_shared_gpu`.
pub(super) fn apart(world: &World, config: &Config, chosen: &ComputeDevice) -> Result<()> {
    let gpu = match chosen {
        ComputeDevice::Cpu => None,
        ComputeDevice::Cuda(gpu) => Some(gpu.clone()),
    };

    let bytes = serde_json::to_vec(&(&world.identity.host, &gpu))
        .map_err(|error| Error::Internal(error.to_string()))?;
    let read = |bytes: &Vec<u8>| serde_json::from_slice::<(String, Option<Gpu>)>(bytes);
    let all: std::result::Result<Vec<_>, _> = world.all_gather(bytes)?.iter().map(read).collect();
    let all = all.map_err(|error| Error::Internal(error.to_string()))?;
    let with: Vec<(String, Gpu)> =
        all.iter().filter_map(|(host, gpu)| Some((host.clone(), gpu.clone()?))).collect();
    if let Some(without) =
        all.iter().position(|(_, gpu)| gpu.is_none()).filter(|_| !with.is_empty())
    {
        let found = format!(
            "`auto`, and rank {without} on {} has no GPU that can be used, others have",
            all[without].0
        );

        return Err(Error::config(
            "device",
            found,
            "set device = \"cpu\", or start ranks where GPUs are",
        ));
    }

    device::check_apart(&with, config.allow_shared_gpu)?;
    if world.identity.rank == 0 {
        for (rank, (host, gpu)) in with.iter().enumerate() {
            say!("rank {rank}: {gpu} on {host}");
        }
    }

    Ok(())
}
