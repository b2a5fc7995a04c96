//! Makes the world of a training run: the places, as threads of this process, as the ranks of MPI,
//! or emulated one after the other. The first error wins: it is shown once, with its place, and
//! ends everybody.

mod agree;
mod job;
mod checks;
mod devices;
mod local;
mod ranks;

use std::path::Path;
use std::time::{Duration, SystemTime};

pub use agree::refuse;
pub use job::{Job, Transport};
pub use local::{run_local, run_oracle};

use crate::comm::mpi;
use crate::control::{Mode, STOPPED, Watch, left_of_job};
use crate::error::Error;
use crate::failure::{caught, show};
use crate::inject::Injection;
use crate::metrics::thousands;
use crate::setup::Setup;

/// Runs a job on whatever carries it; the exit code. Errors have been printed.
pub fn train(job: &Job) -> u8 {
    caught(|| Ok(run_job(job))).unwrap_or_else(|error| {
        show(None, &error);
        error.exit_code()
    })
}

fn run_job(job: &Job) -> u8 {
    let launched = mpi::by_mpirun() && mpi::launched().is_some_and(|(size, _)| size > 1);
    let transport = match job.transport {
        _ if job.oracle && launched => {
            return refuse(&Error::Usage("--oracle is one process; run it without mpirun".into()));
        }
        Some(Transport::Local) if launched => {
            return refuse(&Error::Usage(
                "--transport local is one process; run it without mpirun".into(),
            ));
        }
        Some(Transport::Local) if job.self_test => return refuse(&no_links()),
        Some(transport) => transport,
        None if mpi::launched().is_some() && !job.oracle => Transport::Mpi,
        None if job.self_test => return refuse(&no_links()),
        None => Transport::Local,
    };

    let result = match transport {
        _ if job.oracle => local::oracle(job),
        Transport::Local => local::threads(job),
        Transport::Mpi | Transport::Nccl => return ranks::over_mpi(job),
    };

    match result {
        Ok(summary) if summary.stopped => STOPPED,
        Ok(_) => 0,
        Err((origin, error)) => {
            show(origin.as_deref(), &error);
            error.exit_code()
        }
    }
}

fn no_links() -> Error {
    Error::Usage(
        "--self-test and --topology are about links between processes; run it with mpirun".into(),
    )
}

/// What may end the run before its last step, besides signals.
fn watch(out: &Path, mode: &Mode) -> Watch {
    Watch::new(out, mode.limits, job_end().and_then(Result::ok))
}

/// The variable in which Slurm tells the end of a job.
const JOB_END: &str = "SLURM_JOB_END_TIME";

/// What the batch job has left, or why that cannot be told.
fn job_end() -> Option<Result<Duration, String>> {
    let text = std::env::var_os(JOB_END)?.to_string_lossy().into_owned();
    Some(
        left_of_job(&text, SystemTime::now())
            .map_err(|why| format!("note: {JOB_END} = {text} {why}; it is ignored")),
    )
}

/// What to tell a user whose rank has more threads than cores that it may use: the launcher has
/// bound it, or the machine has no more.
fn too_few_cores(threads: usize) -> Option<String> {
    let cores = std::thread::available_parallelism().map_or(usize::MAX, usize::from);
    let remedy = match mpi::launched() {
        Some(_) => format!(
            "; where there are more, start it with mpirun --map-by slot:PE={threads} --bind-to core"
        ),
        None => String::new(),
    };

    (threads > cores).then(|| {
        format!("note: threads = {threads}, but this process may use {cores} cores{remedy}")
    })
}

fn announce(setup: &Setup, how: &str, inject: Option<Injection>) {
    say!("{}: grid {} as {how}, {} parameters", setup.config.name, setup.grid, setup.parameters());
    put!("{}", setup.picture());
    if let Some(saved) = &setup.resumed {
        say!(
            "resuming at step {} from {} (saved by a grid of {})",
            saved.step(),
            saved.path.display(),
            saved.manifest.grid
        );
    }

    if let Some(saved) = &setup.initial {
        say!("starting with the weights of {} (step {})", saved.path.display(), saved.step());
    }

    if let Some(injection) = inject {
        say!("a fault on purpose: {injection}");
    }

    let notes =
        too_few_cores(setup.config.threads).into_iter().chain(job_end().and_then(Result::err));
    for note in notes.chain(setup.other_texts()).chain(setup.config.notes()) {
        say!("{note}");
    }

    print_texts(setup);
    if let Some(floor) = setup.corpus.held_out.floor {
        say!("synthetic text: entropy {floor:.4} nats per byte, a floor that no model can pass");
    }
}

/// Prints how much text there is, and what an epoch of it is.
fn print_texts(setup: &Setup) {
    let corpus = &setup.corpus;
    let (train, held_out) = (corpus.train_tokens() as u64, corpus.held_out.tokens.len() as u64);
    let unit = corpus.vocabulary.name();
    say!("text: {} {unit}s to train on, {} held out", thousands(train), thousands(held_out));
    if let [only] = &corpus.sources[..] {
        let (steps, read) = setup.epoch(only);
        let (steps, read) = (thousands(steps as u64), thousands(read as u64));
        say!("an epoch: {steps} steps, which read {read} of them");
        return;
    }

    let given = setup.given(setup.config.steps).unwrap_or_default();
    let weights: f64 = corpus.sources.iter().map(|source| source.weight).sum();
    for (source, given) in corpus.sources.iter().zip(given) {
        let (_, read) = setup.epoch(source);
        let share = source.weight / weights;
        let epochs = given as f64 / read as f64;
        let most = source.epochs.map_or(String::new(), |most| format!(", {most} at most"));
        let tokens = thousands(source.tokens.len() as u64);
        say!(
            "source {}: {:.1} %, {tokens} {unit}s, {epochs:.2} epochs{most}",
            source.name,
            share * 100.0
        );
    }
}
