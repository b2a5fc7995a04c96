//! Which device a rank computes on: the processor, or one GPU. The program knows nothing of CUDA
//! when it is built; what it needs is looked for when a config asks for it, so one binary serves
//! machines with and without.
//!
//! ```text
//! config `device`  ──►  libraries   libtorch's CUDA half, NCCL, NVRTC: loaded from beside the libtorch that was found
//!                       driver      its version, its devices
//!                       choose      the device of this rank among those of its host
//! then                  context     switches of libtorch that tch does not have
//!                       queues      streams and marks, and the one context that all share
//!                       compiler    NVRTC
//!                       kernels     our own, on a stream
//!                       timing      how long work takes there
//! ```

pub mod context;
pub mod driver;
pub mod libraries;
pub mod compiler;
pub mod queues;
pub mod kernels;
pub mod timing;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

pub use driver::{Driver, Gpu};

use crate::error::{Error, Result};

/// Settings that CUDA's libraries read from the environment, as this program needs them, where the
/// user has none of his own. Must be called before there is a second thread.
pub fn prepare_environment() {
    for (name, value) in [
        // Every stream a queue of its own: two that wait for each other's neighbours must not stand
        // in one line.
        ("CUDA_DEVICE_MAX_CONNECTIONS", "32"),
        // Groups connect when they are made, not when they first sum.
        ("NCCL_RUNTIME_CONNECT", "0"),
        // Sums that switches make have no order of their own, and take buffers; ours overlap with
        // compute anyway.
        ("NCCL_NVLS_ENABLE", "0"),
        // Fixed workspaces, without which cuBLAS is not deterministic. Source: cuBLAS, "Results
        // reproducibility".
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
    ] {
        if std::env::var_os(name).is_none() {
            // SAFETY: the caller has no other thread that could read the environment now.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

/// What a config asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DeviceSetting {
    /// A GPU where there is one that can be used, else the processor.
    Auto,
    Cpu,
    Cuda,
}

/// The place of a process among those of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    pub rank: usize,
    pub ranks: usize,
}

impl Local {
    /// A process by itself.
    pub const ALONE: Local = Local { rank: 0, ranks: 1 };
}

/// What a rank computes on.
#[derive(Debug, Clone, PartialEq)]
pub enum ComputeDevice {
    Cpu,
    Cuda(Gpu),
}

impl ComputeDevice {
    /// libtorch's name of it.
    pub fn device(&self) -> Device {
        match self {
            ComputeDevice::Cpu => Device::Cpu,
            ComputeDevice::Cuda(gpu) => Device::Cuda(gpu.index),
        }
    }
}

/// The device of a process. Must come before the first tensor where it may be a GPU: libtorch looks
/// for its CUDA half once.
///
/// # Errors
/// [`Error::Config`] about `device` if a GPU is wanted and cannot be had.
pub fn choose(choice: DeviceSetting, local: Local, shared: bool) -> Result<ComputeDevice> {
    let found = match choice {
        DeviceSetting::Cpu => return Ok(ComputeDevice::Cpu),
        _ => driver::find().and_then(usable),
    };

    match (choice, found) {
        (DeviceSetting::Auto, Err(why)) => {
            tracing::info!(%why, "no GPU is used");
            Ok(ComputeDevice::Cpu)
        }
        (_, Err(why)) => Err(Error::config(
            "device",
            format!("`cuda`, but {why}"),
            "set device = \"cpu\", or mend that; see ouroboros doctor",
        )),
        (_, Ok(driver)) => pick(&driver.gpus, local, shared).map(ComputeDevice::Cuda),
    }
}

/// A driver that libtorch can work with.
fn usable(driver: Driver) -> std::result::Result<Driver, String> {
    if driver.gpus.is_empty() {
        return Err(format!(
            "the driver shows no device (CUDA_VISIBLE_DEVICES is {})",
            std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_else(|_| "not set".into())
        ));
    }

    let needed = libraries::load_torch_cuda()?;
    // Within a major version drivers of any minor one will do: kernels of our own are compiled to
    // machine code.
    if driver.version.0 < needed {
        let (major, minor) = driver.version;
        return Err(format!(
            "the driver is too old: it serves CUDA {major}.{minor}, and this libtorch needs {needed}.0"
        ));
    }

    libraries::nvrtc()?;
    Ok(driver)
}

/// One rank a GPU, by the rank's number on its host. A rank that sees a single one may have been
/// given its own.
fn pick(gpus: &[Gpu], local: Local, shared: bool) -> Result<Gpu> {
    let index = match gpus.len() {
        1 => 0,
        n if shared => local.rank % n,
        _ => local.rank,
    };

    gpus.get(index).cloned().ok_or_else(|| {
        let found = format!("{} ranks on this host, which has {} GPUs", local.ranks, gpus.len());
        Error::config(
            "grid",
            found,
            "start as many ranks as there are GPUs, or set allow_shared_gpu = true",
        )
    })
}

/// Values of the host on a device, copied while the host goes on: through pinned memory, which
/// libtorch does not use again before the copy is made.
pub fn to_device(values: &Tensor, device: Device) -> Result<Tensor> {
    match device {
        Device::Cpu => Ok(values.shallow_clone()),
        _ => Ok(values.f_internal_pin_memory(device)?.f_to_device_(
            device,
            values.kind(),
            true,
            false,
        )?),
    }
}

/// Refuses two ranks on one GPU. `all` has of every rank its host and its GPU.
///
/// # Errors
/// [`Error::Config`] about `allow_shared_gpu` with both ranks.
pub fn check_apart(all: &[(String, Gpu)], shared: bool) -> Result<()> {
    for (rank, (host, gpu)) in all.iter().enumerate() {
        // By identity, not by address: slices of a GPU are devices of their own.
        let other = all[..rank].iter().position(|(on, other)| on == host && other.uuid == gpu.uuid);
        if let Some(other) = other.filter(|_| !shared) {
            let found = format!("false, and ranks {other} and {rank} have both {gpu} on {host}");
            let remedy = "start no more ranks on a host than it has GPUs (each its own by CUDA_VISIBLE_DEVICES, or all to be \
                          seen by all), or set it to true for a test";
            return Err(Error::config("allow_shared_gpu", found, remedy));
        }
    }

    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: usize) -> Gpu {
        let bus = format!("0000:0{index}:00.0");
        Gpu {
            index,
            name: "Test".into(),
            bus,
            uuid: format!("{index:032x}"),
            bytes: 1 << 30,
            capability: (9, 0),
        }
    }

    #[test]
    fn a_rank_takes_the_gpu_of_its_number() {
        let gpus = [gpu(0), gpu(1)];
        let of = |rank, ranks| pick(&gpus, Local { rank, ranks }, false).map(|gpu| gpu.index);
        assert_eq!((of(0, 2), of(1, 2)), (Ok(0), Ok(1)));
        let error = of(2, 3).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(
            error.to_string().contains("`grid`: found 3 ranks on this host, which has 2 GPUs"),
            "{error}"
        );
        assert_eq!(pick(&gpus, Local { rank: 3, ranks: 4 }, true).unwrap().index, 1);
        // It sees its own only.
        assert_eq!(pick(&gpus[..1], Local { rank: 5, ranks: 8 }, false).unwrap().index, 0);
    }

    #[test]
    fn two_ranks_on_one_gpu_are_refused() {
        let at = |host: &str, index| (host.to_owned(), gpu(index));
        check_apart(&[at("a", 0), at("a", 1), at("b", 0)], false).unwrap();
        let both = [at("a", 0), at("b", 1), at("b", 1)];
        let error = check_apart(&both, false).unwrap_err().to_string();
        assert!(error.contains("ranks 1 and 2 have both Test (0000:01:00.0) on b"), "{error}");
        check_apart(&both, true).unwrap();
        // Two slices of one GPU.
        let slice = |uuid: &str| ("a".to_owned(), Gpu { uuid: uuid.into(), ..gpu(0) });
        check_apart(&[slice("1"), slice("2")], false).unwrap();
        assert!(check_apart(&[slice("1"), slice("1")], false).is_err());
    }

    /// Where the tests of CI run, and most laptops.
    #[test]
    fn a_machine_without_a_gpu_says_so() {
        if driver::find().is_ok() {
            return; // scripts/gpu-check.sh is for such a machine.
        }
        assert_eq!(choose(DeviceSetting::Auto, Local::ALONE, false).unwrap(), ComputeDevice::Cpu);
        let error = choose(DeviceSetting::Cuda, Local::ALONE, false).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains("setting `device`: found `cuda`, but "), "{text}");
        assert!(text.contains("set device = \"cpu\""), "{text}");
    }
}
