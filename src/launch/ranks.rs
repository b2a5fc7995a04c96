//! This process as a rank of the grid under mpirun.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use tch::Device;

use super::agree::together;
use super::checks::{
    begun, enough_memory, hosts, on_their_nodes, same_everywhere, same_folder, setup_of_rank,
};
use super::devices::{apart, carried, chosen};
use super::job::{Job, Transport};
use super::{announce, watch};
use crate::comm::Ports;
use crate::comm::mpi::{Wanted, World};
use crate::comm::{nccl, staged};
use crate::control::{Report, STOPPED, SignalWatch};
use crate::coordinator::{Coordinator, Ranks};
use crate::error::{Error, Placed, Result};
use crate::failure::{caught, panic_text, show};
use crate::grid::Place;
use crate::runtime;
use crate::selftest::{self, Measured};
use crate::setup::Setup;
use crate::topology::Topology;
use crate::worker::Worker;

/// Between the message of a failing run and its end: the launcher forwards what ranks print by and
/// by, and its own notice must not come first.
const MESSAGE_TIME: Duration = Duration::from_millis(200);

/// How long a failed rank waits for rank 0 to tell the error and end the run, before it does so
/// itself.
const END_TIME: Duration = Duration::from_secs(3);

/// A link that needs longer than this for a test is none.
const SELF_TEST_TIME: Duration = Duration::from_secs(30);

/// Trains this rank's place; the exit code. Errors have been printed.
pub(super) fn over_mpi(job: &Job) -> u8 {
    let world = match World::start() {
        Ok(world) => world,
        Err(error) => {
            show(None, &error);
            return error.exit_code();
        }
    };

    let code = train_rank(job, &world).unwrap_or_else(|code| code);
    world.finish();
    code
}

/// Checks, then trains, this rank's place; the exit code, or that of an error that all ranks know
/// of.
fn train_rank(job: &Job, world: &World) -> std::result::Result<u8, u8> {
    let rank = world.identity.rank;
    // One after the other, so that nothing is written before every rank has found its settings and
    // data in order.
    let (setup, topology) = together(world, || setup_of_rank(job, world))?;
    let chosen = together(world, || chosen(&setup.config, world.identity.local))?;
    together(world, || apart(world, &setup.config, &chosen))?;
    let carried = together(world, || carried(job.transport, &chosen, world.identity.size))?;
    let setup = setup.with_device(chosen.device());
    let setup = Arc::new(together(world, || begun(job, world, setup))?);
    together(world, || same_everywhere(world, &setup))?;
    together(world, || on_their_nodes(topology.as_ref(), world))?;
    together(world, || enough_memory(job, world, &setup, &chosen))?;
    let out = job.out(&setup);
    let coordinator = together(world, || match rank {
        0 => Ok(Some(Coordinator::new(Arc::clone(&setup), &out)?.of_mode(&job.mode(&setup)))),
        _ => Ok(None),
    })?;

    together(world, || same_folder(world, &out, coordinator.as_ref().map(Coordinator::owner)))?;
    together(world, || runtime::log_to(&out, rank))?;
    if rank == 0 {
        announce(&setup, "MPI ranks", job.mode(&setup).inject);
        job.tell_of_trace(&setup);
    }

    tracing::info!(
        place = setup.grid.name(rank),
        rank,
        host = world.identity.host,
        pid = std::process::id(),
        "started"
    );

    let run = || -> Placed<bool> {
        let (ports, reports) = connected(job, world, &setup, carried, topology.as_ref())?;
        run_rank(job, world, &setup, &out, ports, coordinator.zip(reports))
    };

    match run() {
        Ok(stopped) => Ok(if stopped { STOPPED } else { 0 }),
        Err((origin, error)) => {
            show(origin.as_deref(), &error);
            tracing::error!(%error, "ended");
            std::thread::sleep(MESSAGE_TIME);
            world.abort(error.exit_code())
        }
    }
}

/// Tests links and groups; rank 0 tells what they do.
fn self_tested(
    topology: Option<&Topology>,
    world: &World,
    setup: &Setup,
    ports: Ports,
) -> Result<Ports> {
    let limit = Duration::from_secs_f64(setup.config.stall_seconds).min(SELF_TEST_TIME);
    let (ports, measured) =
        selftest::test(ports, setup.grid, world.identity.rank, setup.device, limit)?;
    let bytes =
        serde_json::to_vec(&measured).map_err(|error| Error::Internal(error.to_string()))?;
    let all = world.all_gather(bytes)?;
    let hosts = hosts(world)?;
    if world.identity.rank == 0 {
        let read =
            |bytes: &Vec<u8>| serde_json::from_slice::<Vec<Measured>>(bytes).unwrap_or_default();
        let measured: Vec<Measured> = all.iter().flat_map(read).collect();
        put!("{}", selftest::report(&measured, &hosts, topology));
    }

    Ok(ports)
}

/// Where this rank is: for its messages.
fn origin(world: &World, setup: &Setup) -> String {
    let rank = world.identity.rank;
    format!("{} (rank {rank} on {})", setup.grid.name(rank), world.identity.host)
}

/// The ports of this rank, tested if that is asked for, and on rank 0 the reports of all.
fn connected(
    job: &Job,
    world: &World,
    setup: &Setup,
    carried: Option<Transport>,
    topology: Option<&Topology>,
) -> Placed<(Ports, Option<Receiver<Report>>)> {
    let limit = setup.start() + setup.lead();
    let stall = Duration::from_secs_f64(setup.config.stall_seconds);
    // A GPU's gradients are on the GPU.
    let values =
        |place: &Place| if setup.device.is_cuda() { 0 } else { setup.layout(place.stage).len };
    let gradients: Vec<usize> = setup.grid.held(world.identity.rank).iter().map(values).collect();
    let (capacity, joiner) = (setup.schedule.link_capacity(), setup.schedule.joiner());
    let largest = setup.largest_message().max(selftest::LARGE as usize);
    let wanted = Wanted { capacity, largest, joiner, wire: setup.config.wire, stall };
    let connected = world.connect(setup.grid, &wanted, limit, &gradients);
    let (ports, reports) = connected.map_err(|error| (None, error))?;
    let rank = world.identity.rank;
    let ports = on_gpus(world, setup, carried, ports)
        .and_then(|ports| job.check_gpu_memory(setup, rank..rank + 1).map(|()| ports))
        .map_err(|error| (Some(origin(world, setup)), error))?;
    let ports = match job.self_test {
        true => self_tested(topology, world, setup, ports)
            .map_err(|error| (Some(origin(world, setup)), error))?,
        false => ports,
    };

    Ok((ports, reports))
}

/// The ports of a rank whose tensors are on a GPU.
fn on_gpus(
    world: &World,
    setup: &Setup,
    carried: Option<Transport>,
    ports: Ports,
) -> Result<Ports> {
    let Device::Cuda(index) = setup.device else { return Ok(ports) };
    match carried {
        Some(Transport::Nccl) => {
            let connection = nccl::Connection {
                grid: setup.grid,
                rank: world.identity.rank,
                index,
                wire: setup.config.wire,
                tied: setup.dimensions.tied,
                deterministic: setup.config.deterministic,
                patience: Duration::from_secs_f64(setup.config.stall_seconds),
                exchange: &|bytes| world.all_gather(bytes),
            };

            nccl::over(ports, &connection)
        }
        Some(_) => staged::over(ports, index),
        None => Ok(ports),
    }
}

/// The worker on a thread of its own. Rank 0 records, and so hears of every failure and ends the
/// run with the first; another rank that fails tells rank 0, and speaks for itself only if it is
/// not ended. Whether the run was stopped.
fn run_rank(
    job: &Job,
    world: &World,
    setup: &Arc<Setup>,
    out: &Path,
    ports: Ports,
    coordinator: Option<(Coordinator, Receiver<Report>)>,
) -> Placed<bool> {
    let (rank, origin) = (world.identity.rank, origin(world, setup));
    let _signals = watch_signals(job, world, setup).map_err(|error| (None, error))?;
    let reporter = world.reporter();
    let (mode, out, worker_setup) = (job.mode(setup), out.to_owned(), Arc::clone(setup));
    let watch = watch(&out, &mode);
    let work = move || -> Placed<bool> {
        let result = caught(|| Worker::new(worker_setup, rank, ports, out, mode)?.run());
        result.map_err(|error| {
            let told =
                reporter.send(Report::Failed { origin: origin.clone(), error: error.clone() });
            if told.is_ok() {
                std::thread::sleep(END_TIME);
            }

            (Some(origin), error)
        })
    };

    let worker = std::thread::Builder::new().name("worker".into()).spawn(work);
    let worker = worker
        .map_err(|error| (None, Error::Internal(format!("no thread for the worker ({error})"))))?;
    if let Some((coordinator, reports)) = coordinator {
        let size = setup.grid.size();
        // A panic while recording must reach the end of this function, or the other ranks would
        // wait for ever.
        let controls = world.controls();
        caught(|| Ok(coordinator.run(&reports, &controls, watch, size, Ranks::Processes)))
            .unwrap_or_else(|e| Err((None, e)))?;
    }

    worker.join().unwrap_or_else(|panic| Err((None, Error::Internal(panic_text(panic.as_ref())))))
}

/// Signals that ask for a stop, and the one by which the launcher ends everybody because a rank has
/// died: then one of its neighbours tells which, and what it was doing.
fn watch_signals(job: &Job, world: &World, setup: &Setup) -> Result<Option<SignalWatch>> {
    if !job.mode.signals {
        return Ok(None);
    }

    let (neighbours, grid, host) = (world.meet()?, setup.grid, world.identity.host.clone());
    let ended = move || {
        if let Some((rank, doing)) = neighbours.dead() {
            let place = format!("{} (rank {rank} on {host})", grid.name(rank));
            show(Some(&place), &Error::Died { doing });
        }

        neighbours.lost()
    };

    SignalWatch::start(world.reporter(), origin(world, setup), ended).map(Some)
}
