//! Makes the world of a training run: the places, as threads of this process, as the ranks of MPI, or emulated one
//! after the other. The first error wins: it is shown once, with its place, and ends everybody.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use crate::checkpoint::Checkpoint;
use crate::comm::mpi::{Identity, World};
use crate::comm::{Ports, Reporter, local, mpi};
use crate::config::{CheckpointConfig, Config};
use crate::emulator::Emulator;
use crate::error::{Error, Placed, Result};
use crate::failure::{FirstError, caught, panic_text, show};
use crate::grid::{Grid, Place, Placement};
use crate::inject::{Fault, Injection};
use crate::metrics::{Mode, Recorder, Report, Summary, clock, limits, memory};
use crate::panel::{Controls, Panel};
use crate::runtime;
use crate::selftest::{self, Measured};
use crate::setup::Setup;
use crate::signals::{self, SignalWatch};
use crate::stop::{STOPPED, Watch};
use crate::topology::Topology;
use crate::worker::Worker;

/// Between the message of a failing run and its end: the launcher forwards what ranks print by and by, and its own
/// notice must not come first.
const MESSAGE_TIME: Duration = Duration::from_millis(200);

/// How long a failed rank waits for rank 0 to tell the error and end the run, before it does so itself.
const END_TIME: Duration = Duration::from_secs(3);

/// A link that needs longer than this for a test is none.
const SELF_TEST_TIME: Duration = Duration::from_secs(30);

/// Steps of a measurement, besides those that fill and drain the pipeline.
const MEASURED_STEPS: usize = 16;

/// What carries tensors between places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Transport {
    /// Threads of one process.
    Local,
    /// The ranks of mpirun.
    Mpi,
}

/// What `train` is asked to do.
#[derive(Debug, Clone)]
pub struct Job {
    pub config: PathBuf,
    pub sets: Vec<String>,
    pub grid: Option<Grid>,
    pub out: Option<PathBuf>,
    pub transport: Option<Transport>,
    /// The description of the machine; whether its links are tested first.
    pub topology: Option<PathBuf>,
    pub self_test: bool,
    pub emulate: bool,
    /// Go on from this saved state, or the newest in this folder; an empty path is the run's own folder.
    pub resume: Option<PathBuf>,
    pub mode: Mode,
    /// Steps of a run that only measures; none: as many as the schedule needs.
    pub steps: Option<usize>,
}

impl Job {
    fn setup(&self) -> Result<Setup> {
        runtime::check_libtorch()?;
        let mut config = Config::load(&self.config, &self.sets, self.grid)?;
        let topology = self.topology.as_deref().map(Topology::load).transpose()?;
        if let Some(topology) = &topology {
            config.grid.order = topology.order;
            topology.check_grid(config.grid())?;
        }
        if self.mode.bench {
            config = self.measured(config);
        }
        let setup = Setup::new(config)?;
        if self.mode.bench {
            clock::check(&setup.schedule)?;
        }
        if let Some(emulation) = &self.mode.emulation {
            emulation.check(setup.grid.stages)?;
        }
        if let Some(injection) = self.mode.inject {
            self.check_injection(injection, &setup)?;
        }
        Ok(setup)
    }

    /// Whether a fault on purpose can happen.
    fn check_injection(&self, injection: Injection, setup: &Setup) -> Result<()> {
        let beyond = |value: Option<usize>, end: usize| value.is_some_and(|value| value >= end);
        let (grid, steps) = (setup.grid, setup.config.steps);
        if beyond(injection.stage, grid.stages)
            || beyond(injection.replica, grid.replicas)
            || beyond(injection.step, steps)
        {
            let remedy = format!("the grid is {grid} and the run has {steps} steps");
            return Err(Error::config("--inject", injection, remedy));
        }
        let place = Place { stage: injection.stage.unwrap_or(0), replica: injection.replica.unwrap_or(0) };
        if injection.fault == Fault::AlterTable && (!setup.dimensions.tied || grid.twin(place).is_none()) {
            let remedy = "take an end of a line of two stages or more, with model.tie = \"aligned\" or \"fresh\"";
            return Err(Error::config("--inject", format!("{injection}, which holds no copy"), remedy));
        }
        Ok(())
    }

    /// How the ranks run: with the fault that is injected drawn.
    fn mode(&self, setup: &Setup) -> Mode {
        let (grid, config) = (setup.grid, &setup.config);
        let inject = self.mode.inject.map(|injection| injection.drawn(grid, config.steps, config.seed));
        Mode { inject, ..self.mode.clone() }
    }

    /// The saved state to go on from; none if the run begins.
    fn saved(&self, setup: &Setup) -> Result<Option<Checkpoint>> {
        match &self.resume {
            None => Ok(None),
            Some(own) if own.as_os_str().is_empty() => {
                let out = self.out(setup);
                let found = Checkpoint::newest(&out)?;
                if found.is_none() {
                    println!("nothing is saved in {} yet: the run begins", out.display());
                }
                Ok(found)
            }
            Some(path) => Checkpoint::open(path).map(Some),
        }
    }

    /// The same training without the sync points that would disturb a measurement.
    fn measured(&self, config: Config) -> Config {
        let mut config = Config {
            sync_steps: 0,
            sync_at: Vec::new(),
            eval: None,
            checkpoint: CheckpointConfig::default(),
            ..config
        };
        let asked = self.sets.iter().any(|set| set.trim_start().starts_with("steps="));
        if let Some(steps) = self.steps {
            config.steps = steps;
        } else if !asked {
            let lag = (config.slack * config.grid.stages.saturating_sub(1)).div_ceil(config.microbatches.max(1));
            let longest = config.grid.delays.iter().flatten().copied().max().unwrap_or(0);
            config.steps = MEASURED_STEPS + 4 * lag.max(longest);
        }
        config
    }

    /// Whether the ranks of this process and their neighbours fit into memory. Stages that only sleep hardly touch theirs.
    fn check_memory(&self, setup: &Setup, ranks: Range<usize>, neighbours: &[(usize, String)]) -> Result<()> {
        if self.mode.emulation.is_some() { Ok(()) } else { memory::check(setup, ranks, neighbours) }
    }

    fn out(&self, setup: &Setup) -> PathBuf {
        let name = &setup.config.name;
        let folder = if self.mode.bench { format!("{name}-bench") } else { name.clone() };
        self.out.clone().unwrap_or_else(|| Path::new("runs").join(folder))
    }
}

/// Runs a job on whatever carries it; the exit code. Errors have been printed.
pub fn train(job: &Job) -> u8 {
    caught(|| Ok(run_job(job))).unwrap_or_else(|error| {
        show(None, &error);
        error.exit_code()
    })
}

fn run_job(job: &Job) -> u8 {
    if job.mode.signals {
        signals::expect_early();
    }
    let launched = mpi::launched().is_some_and(|(size, _)| size > 1);
    let transport = match job.transport {
        _ if job.emulate && launched => {
            return refuse(&Error::Usage("--emulate is one process; run it without mpirun".into()));
        }
        Some(Transport::Local) if launched => {
            return refuse(&Error::Usage("--transport local is one process; run it without mpirun".into()));
        }
        Some(Transport::Local) if job.self_test => return refuse(&no_links()),
        Some(transport) => transport,
        None if mpi::launched().is_some() && !job.emulate => Transport::Mpi,
        None if job.self_test => return refuse(&no_links()),
        None => Transport::Local,
    };
    let result = match transport {
        _ if job.emulate => emulate(job),
        Transport::Local => local(job),
        Transport::Mpi => return over_mpi(job),
    };
    match result {
        Ok(summary) => code_of(&summary),
        Err((origin, error)) => {
            show(origin.as_deref(), &error);
            error.exit_code()
        }
    }
}

fn no_links() -> Error {
    Error::Usage("--self-test and --topology are about links between processes; run it with mpirun".into())
}

fn code_of(summary: &Summary) -> u8 {
    if summary.stopped { STOPPED } else { 0 }
}

/// Shows an error that all ranks have found, once, and leaves; under mpirun all ranks must come here.
pub fn refuse(error: &Error) -> u8 {
    if mpi::launched().is_some_and(|(size, _)| size > 1)
        && let Ok(world) = World::start()
    {
        let _ = agree(&world, Some(error));
        world.finish();
    } else {
        show(None, error);
    }
    error.exit_code()
}

/// The grid as threads of this process.
fn local(job: &Job) -> Placed<Summary> {
    let (setup, out, recorder) =
        prepare(job, |setup| job.check_memory(setup, 0..setup.grid.size(), &[])).map_err(|error| (None, error))?;
    announce(&setup, "threads of one process", job.mode(&setup).inject);
    run_local(&setup, &out, recorder, job.mode(&setup))
}

/// Folder, log and recorder of a run in one process.
fn prepare(job: &Job, check: impl Fn(&Setup) -> Result<()>) -> Result<(Arc<Setup>, PathBuf, Recorder)> {
    let setup = job.setup()?;
    check(&setup)?;
    let setup = match job.saved(&setup)? {
        Some(saved) => setup.resume(saved)?,
        None => setup,
    };
    let (out, setup) = (job.out(&setup), Arc::new(setup));
    let recorder = Recorder::new(Arc::clone(&setup), &out)?.of_mode(&job.mode);
    runtime::log_to(&out, 0)?;
    Ok((setup, out, recorder))
}

/// Trains `setup` on threads of this process; what `train --transport local` and the tests run.
///
/// # Errors
/// The first error of any place, with the place.
pub fn run_local(setup: &Arc<Setup>, out: &Path, recorder: Recorder, mode: Mode) -> Placed<Summary> {
    let (reports, received) = channel();
    let grid = setup.grid;
    let (schedule, watch) = (&setup.schedule, watch(out, &mode));
    let limit = schedule.sync.start + schedule.lead();
    let (ports, controls) = local::connect(grid, schedule.link_capacity(), setup.config.wire, limit, &reports);
    let _signals = watch_signals(&mode, reporter(&reports), "this process").map_err(|error| (None, error))?;
    let first = FirstError::default();
    let summary = std::thread::scope(|scope| {
        for (rank, ports) in ports.into_iter().enumerate() {
            let (first, mode, failed) = (&first, mode.clone(), reporter(&reports));
            scope.spawn(move || {
                let work = || Worker::new(Arc::clone(setup), rank, ports, out.to_owned(), mode)?.run();
                if let Err(error) = caught(work) {
                    first.set(rank, error.clone());
                    let _ = failed.send(Report::Failed { origin: grid.name(rank), error });
                }
            });
        }
        let summary = recorder.run(&received, &controls, watch, grid.size(), grid.size() > 1);
        if let Err((origin, error @ Error::Hang { .. })) = &summary {
            // The thread that stands still can be neither ended nor waited for.
            show(origin.as_deref(), error);
            std::process::exit(i32::from(error.exit_code()));
        }
        // Whoever still wants to report, or to be told something, finds the recorder gone.
        drop((received, controls));
        summary
    });
    match (first.take(), summary) {
        (None, summary) => summary,
        // The recorder's own error, which took the reports away from the places.
        (Some((_, Error::Lost { .. })), Err(error)) => Err(error),
        (Some((rank, error)), _) => Err((Some(grid.name(rank)), error)),
    }
}

/// The oracle.
fn emulate(job: &Job) -> Placed<Summary> {
    let (setup, out, recorder) = prepare(job, |_| Ok(())).map_err(|error| (None, error))?;
    announce(&setup, "emulated in one process", None);
    run_emulated(&setup, &out, recorder, &job.mode)
}

/// Trains `setup` with the oracle.
///
/// # Errors
/// What the oracle finds.
pub fn run_emulated(setup: &Arc<Setup>, out: &Path, recorder: Recorder, mode: &Mode) -> Placed<Summary> {
    let (reports, received) = channel();
    let oracles = reporter(&reports);
    let _signals = watch_signals(mode, reporter(&reports), "this process").map_err(|error| (None, error))?;
    let failed = reporter(&reports);
    let panel = Arc::new(Panel::new(setup.schedule.sync.start + setup.schedule.lead(), "this process"));
    let told = Arc::clone(&panel);
    let controls = Controls::new(move |control| told.tell(control));
    let (outcome, summary) = std::thread::scope(|scope| {
        let work = || Emulator::new(Arc::clone(setup), oracles, panel, out.to_owned())?.run();
        let oracle = scope.spawn(|| {
            let outcome = caught(work);
            if let Err(error) = &outcome {
                let _ = failed.send(Report::Failed { origin: "the oracle".into(), error: error.clone() });
            }
            outcome
        });
        let summary = recorder.without_watchdog().run(&received, &controls, watch(out, mode), 1, false);
        drop((received, controls));
        (oracle.join().unwrap_or_else(|panic| Err(Error::Internal(panic_text(panic.as_ref())))), summary)
    });
    outcome.map_err(|error| (None, error)).and(summary)
}

fn reporter(reports: &Sender<Report>) -> Reporter {
    let reports = reports.clone();
    Reporter::new(move |report| reports.send(report).map_err(|_| Error::Internal("the recorder is gone".into())))
}

/// What may end the run before its last step, besides signals.
fn watch(out: &Path, mode: &Mode) -> Watch {
    Watch::new(out, mode.limits, std::env::var("SLURM_JOB_END_TIME").ok().as_deref())
}

fn watch_signals(mode: &Mode, reports: Reporter, origin: &str) -> Result<Option<SignalWatch>> {
    mode.signals.then(|| SignalWatch::start(reports, origin.to_owned())).transpose()
}

/// This rank of the grid under mpirun.
fn over_mpi(job: &Job) -> u8 {
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

/// Checks, then trains, this rank's place; the exit code, or that of an error that all ranks know of.
fn train_rank(job: &Job, world: &World) -> std::result::Result<u8, u8> {
    let rank = world.identity.rank;
    // One after the other, so that nothing is written before every rank has found its settings and data in order.
    let setup = together(world, || setup_of_rank(job, world))?;
    let setup = Arc::new(together(world, || resumed(job, world, setup))?);
    together(world, || same_everywhere(world, &setup))?;
    together(world, || on_their_nodes(job, world))?;
    together(world, || enough_memory(job, world, &setup))?;
    let out = job.out(&setup);
    let recorder = together(world, || match rank {
        0 => Ok(Some(Recorder::new(Arc::clone(&setup), &out)?.of_mode(&job.mode))),
        _ => Ok(None),
    })?;
    together(world, || runtime::log_to(&out, rank))?;
    if rank == 0 {
        announce(&setup, "MPI ranks", job.mode(&setup).inject);
    }
    tracing::info!(
        place = setup.grid.name(rank),
        rank,
        host = world.identity.host,
        pid = std::process::id(),
        "started"
    );
    match run_rank(job, world, &setup, &out, recorder) {
        Ok(stopped) => Ok(if stopped { STOPPED } else { 0 }),
        Err((origin, error)) => {
            show(origin.as_deref(), &error);
            tracing::error!(%error, "ended");
            std::thread::sleep(MESSAGE_TIME);
            world.abort(error.exit_code())
        }
    }
}

/// Does `work` on every rank, then tells all ranks whether it went well on all of them.
fn together<T>(world: &World, work: impl FnOnce() -> Result<T>) -> std::result::Result<T, u8> {
    let result = caught(work);
    let code = agree(world, result.as_ref().err());
    result.map_err(|error| error.exit_code()).and_then(|value| code.map_or(Ok(value), Err))
}

/// The setup, checked against the world.
fn setup_of_rank(job: &Job, world: &World) -> Result<Setup> {
    let setup = job.setup()?;
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
    Ok(setup)
}

/// The setup that goes on from what rank 0 has found and verified.
fn resumed(job: &Job, world: &World, setup: Setup) -> Result<Setup> {
    let found = if world.identity.rank == 0 { job.saved(&setup) } else { Ok(None) };
    let path = found.as_ref().ok().and_then(Option::as_ref).map(|saved| saved.path.to_string_lossy().into_owned());
    let all = world.all_gather(path.unwrap_or_default().into_bytes())?;
    let saved = match found? {
        Some(saved) => Some(saved),
        None if all[0].is_empty() => None,
        None => Some(Checkpoint::told(Path::new(String::from_utf8_lossy(&all[0]).as_ref()))?),
    };
    match saved {
        Some(saved) => setup.resume(saved),
        None => Ok(setup),
    }
}

/// Refuses ranks that are not on the nodes where the topology has them.
fn on_their_nodes(job: &Job, world: &World) -> Result<()> {
    let hosts = hosts(world)?;
    job.topology.as_deref().map(Topology::load).transpose()?.map_or(Ok(()), |topology| topology.check_hosts(&hosts))
}

/// The hosts of all ranks.
fn hosts(world: &World) -> Result<Vec<String>> {
    let all = world.all_gather(world.identity.host.clone().into_bytes())?;
    Ok(all.iter().map(|host| String::from_utf8_lossy(host).into_owned()).collect())
}

/// Tests links and groups; rank 0 tells what they do.
fn self_tested(job: &Job, world: &World, setup: &Setup, ports: Ports) -> Result<Ports> {
    let limit = Duration::from_secs_f64(setup.config.stall_seconds).min(SELF_TEST_TIME);
    let (ports, measured) = selftest::test(ports, setup.grid, world.identity.rank, limit)?;
    let bytes = serde_json::to_vec(&measured).map_err(|error| Error::Internal(error.to_string()))?;
    let all = world.all_gather(bytes)?;
    let hosts = hosts(world)?;
    if world.identity.rank == 0 {
        let read = |bytes: &Vec<u8>| serde_json::from_slice::<Vec<Measured>>(bytes).unwrap_or_default();
        let measured: Vec<Measured> = all.iter().flat_map(read).collect();
        let topology = job.topology.as_deref().map(Topology::load).transpose()?;
        print!("{}", selftest::report(&measured, &hosts, topology.as_ref()));
    }
    Ok(ports)
}

/// Refuses a machine whose limits the ranks on it would break.
fn enough_memory(job: &Job, world: &World, setup: &Setup) -> Result<()> {
    let Identity { rank, host, .. } = &world.identity;
    let group = limits::control_group().unwrap_or_default();
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
fn same_everywhere(world: &World, setup: &Setup) -> Result<()> {
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

/// The worker on a thread of its own. Rank 0 records, and so hears of every failure and ends the run with the first;
/// another rank that fails tells rank 0, and speaks for itself only if it is not ended. Whether the run was stopped.
fn run_rank(job: &Job, world: &World, setup: &Arc<Setup>, out: &Path, recorder: Option<Recorder>) -> Placed<bool> {
    let rank = world.identity.rank;
    let origin = format!("{} (rank {rank} on {})", setup.grid.name(rank), world.identity.host);
    let limit = setup.start() + setup.schedule.lead();
    let stall = Duration::from_secs_f64(setup.config.stall_seconds);
    let connected = world.connect(setup.grid, setup.schedule.link_capacity(), setup.config.wire, limit, stall);
    let (ports, reports) = connected.map_err(|error| (None, error))?;
    let ports = match job.self_test {
        true => self_tested(job, world, setup, ports).map_err(|error| (Some(origin.clone()), error))?,
        false => ports,
    };
    let reporter = world.reporter();
    let _signals = watch_signals(&job.mode, world.reporter(), &origin).map_err(|error| (None, error))?;
    let (mode, out, worker_setup) = (job.mode(setup), out.to_owned(), Arc::clone(setup));
    let watch = watch(&out, &mode);
    let work = move || -> Placed<bool> {
        let result = caught(|| Worker::new(worker_setup, rank, ports, out, mode)?.run());
        result.map_err(|error| {
            let told = reporter.send(Report::Failed { origin: origin.clone(), error: error.clone() });
            if told.is_ok() {
                std::thread::sleep(END_TIME);
            }
            (Some(origin), error)
        })
    };
    let worker = std::thread::Builder::new().name("worker".into()).spawn(work);
    let worker = worker.map_err(|error| (None, Error::Internal(format!("no thread for the worker ({error})"))))?;
    if let (Some(recorder), Some(reports)) = (recorder, reports) {
        let size = setup.grid.size();
        // A panic while recording must reach the end of this function, or the other ranks would wait for ever.
        let controls = world.controls();
        caught(|| Ok(recorder.run(&reports, &controls, watch, size, false))).unwrap_or_else(|e| Err((None, e)))?;
    }
    worker.join().unwrap_or_else(|panic| Err((None, Error::Internal(panic_text(panic.as_ref())))))
}

/// Tells all ranks of each other's errors; rank 0 shows the first, once. The exit code, if there is an error.
fn agree(world: &World, error: Option<&Error>) -> Option<u8> {
    let mine = error.map(|error| (error.exit_code(), error.to_string()));
    let bytes = serde_json::to_vec(&mine).unwrap_or_default();
    let all = match world.all_gather(bytes) {
        Ok(all) => all,
        Err(error) => {
            show(None, &error);
            return Some(error.exit_code());
        }
    };
    let errors: Vec<Option<(u8, String)>> =
        all.iter().map(|bytes| serde_json::from_slice(bytes).unwrap_or(None)).collect();
    let first = errors.iter().flatten().next()?;
    if world.identity.rank == 0 {
        // What other ranks say besides is most often the same thing seen from there.
        let everywhere = errors.iter().all(|error| error.as_ref().is_some_and(|(_, text)| *text == first.1));
        let rank = errors.iter().position(Option::is_some).unwrap_or(0);
        let origin = if everywhere || rank == 0 { String::new() } else { format!("rank {rank}: ") };
        eprintln!("error: {origin}{}", first.1);
    }
    Some(first.0)
}

/// What to tell a user whose rank has more threads than cores that it may use: the launcher has bound it, or the machine
/// has no more.
fn too_few_cores(threads: usize) -> Option<String> {
    let cores = std::thread::available_parallelism().map_or(usize::MAX, usize::from);
    let remedy = match mpi::launched() {
        Some(_) => format!("; where there are more, start it with mpirun --map-by slot:PE={threads} --bind-to core"),
        None => String::new(),
    };
    (threads > cores).then(|| format!("note: threads = {threads}, but this process may use {cores} cores{remedy}"))
}

fn announce(setup: &Setup, how: &str, inject: Option<Injection>) {
    println!("{}: grid {} as {how}, {} parameters", setup.config.name, setup.grid, setup.parameters());
    print!("{}", setup.picture());
    if let Some(saved) = &setup.resumed {
        println!(
            "goes on at step {} from {}, saved on a grid of {}",
            saved.step(),
            saved.path.display(),
            saved.manifest.grid
        );
    }
    if let Some(injection) = inject {
        println!("a fault on purpose: {injection}");
    }
    if let Some(note) = too_few_cores(setup.config.threads) {
        println!("{note}");
    }
    if let Some(floor) = setup.corpus.floor {
        println!("synthetic text: entropy {floor:.4} nats per byte, a floor that no model can pass");
    }
}
