//! `ouroboros doctor`: what is here, and one line of advice for every problem.

use std::path::Path;
use std::process::Command;

use crate::comm::mpi::{self, World};
use crate::device::{self, DeviceSetting, Local, driver, libraries};
use crate::error::Result;
use crate::runtime;

/// Prints findings and advice; under mpirun also all ranks and their hosts, once.
///
/// # Errors
/// If MPI cannot be started under mpirun.
pub fn doctor() -> Result<()> {
    let mut advice = Vec::new();
    let mut lines = vec![format!("ouroboros   {}", env!("CARGO_PKG_VERSION"))];
    libtorch(&mut lines, &mut advice);
    gpus(&mut lines, &mut advice);
    launcher(&mut lines, &mut advice);
    machine(&mut lines, &mut advice);
    match mpi::launched() {
        Some(_) => return under_mpi(&lines, &advice),
        None => lines.push(
            "ranks       not under mpirun: train runs the grid as threads of one process".into(),
        ),
    }

    print(&lines, &advice);
    Ok(())
}

fn print(lines: &[String], advice: &[String]) {
    lines.iter().for_each(|line| say!("{line}"));
    advice.iter().for_each(|line| say!("advice: {line}"));
    if advice.is_empty() {
        say!("no problem found");
    }
}

fn libtorch(lines: &mut Vec<String>, advice: &mut Vec<String>) {
    let path = runtime::libtorch_path();
    let version =
        path.as_deref().and_then(runtime::libtorch_version).unwrap_or_else(|| "unknown".into());
    let from = path.map_or("not found".into(), |path| path.display().to_string());
    lines.push(format!("libtorch    {version} (built for {}), {from}", runtime::BUILT_FOR));
    lines.push(format!(
        "            OpenMP {}, MKL {}",
        yes(tch::utils::has_openmp()),
        yes(tch::utils::has_mkl())
    ));

    if let Err(error) = runtime::check_libtorch() {
        advice.push(error.to_string());
    }
}

/// Driver and devices, whether libtorch can use them, and NCCL.
fn gpus(lines: &mut Vec<String>, advice: &mut Vec<String>) {
    match driver::find() {
        Err(why) => lines.push(format!("GPU         {why}")),
        Ok(driver) => {
            let (major, minor) = driver.version;
            lines.push(format!(
                "GPU driver  serves CUDA {major}.{minor}; {} devices to be seen",
                driver.gpus.len()
            ));

            for gpu in &driver.gpus {
                let (gib, (major, minor)) = (gpu.bytes as f64 / f64::from(1 << 30), gpu.capability);
                lines.push(format!(
                    "  GPU {:<5} {gpu}, {gib:.1} GiB, compute capability {major}.{minor}",
                    gpu.index
                ));
            }

            if let Err(error) = device::choose(DeviceSetting::Cuda, Local::ALONE, false) {
                advice.push(error.to_string());
            }
        }
    }

    match libraries::nccl() {
        Ok(nccl) => {
            lines.push(format!(
                "NCCL        {}, {}",
                libraries::dotted(nccl.version),
                nccl.path.display()
            ));
        }
        Err(why) => lines.push(format!("NCCL        {why}")),
    }
}

fn launcher(lines: &mut Vec<String>, advice: &mut Vec<String>) {
    lines.push(format!("MPI library {}", mpi::library_version()));
    let output = Command::new("mpirun").arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    match text.ok().and_then(|text| text.lines().next().map(str::to_owned)) {
        Some(version) => lines.push(format!("mpirun      {version}")),
        None => {
            lines.push("mpirun      not found".into());
            advice.push(
                "mpirun is not on the PATH: install openmpi-bin, or load your cluster's MPI module"
                    .into(),
            );
        }
    }

    let root = std::fs::metadata("/proc/self")
        .is_ok_and(|data| std::os::unix::fs::MetadataExt::uid(&data) == 0);
    if root && std::env::var_os("OMPI_ALLOW_RUN_AS_ROOT").is_none() {
        advice.push(
            "mpirun refuses to start as root: export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1".into(),
        );
    }
}

fn machine(lines: &mut Vec<String>, advice: &mut Vec<String>) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free = memory.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim().parse().ok()
    });

    let free: Option<u64> = free;
    let free_text =
        free.map_or("unknown".into(), |kib| format!("{:.1} GiB", kib as f64 / f64::from(1 << 20)));
    lines.push(format!("machine     {cores} cores for this process, {free_text} of memory free"));
    if free.is_some_and(|kib| kib < 1 << 20) {
        advice.push(
            "less than 1 GiB of memory is free: end other programs, or take a smaller model".into(),
        );
    }

    if let Some((ranks, _)) = mpi::launched()
        && ranks > cores
    {
        advice.push(format!(
            "{ranks} ranks share {cores} cores: fine for a test, but not faster than {cores} ranks"
        ));
    }

    if !Path::new("/proc/self/status").exists() {
        advice.push("no /proc: peak memory cannot be measured here".into());
    }
}

fn under_mpi(lines: &[String], advice: &[String]) -> Result<()> {
    let world = World::start()?;
    let hosts = world.all_gather(world.identity.host.clone().into_bytes())?;
    if world.identity.rank == 0 {
        let mut lines = lines.to_vec();
        lines.push(format!("ranks       {}", hosts.len()));
        for (rank, host) in hosts.iter().enumerate() {
            lines.push(format!("  rank {rank:<4} {}", String::from_utf8_lossy(host)));
        }

        print(&lines, advice);
    }

    world.finish();
    Ok(())
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}
