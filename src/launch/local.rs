//! Runs in one process: the grid as threads, or the oracle.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use super::devices::chosen;
use super::job::Job;
use super::{announce, watch};
use crate::comm::local;
use crate::control::{Controls, Gate, Mode, Report, Reporter, SignalWatch};
use crate::coordinator::{Coordinator, Ranks};
use crate::device::{ComputeDevice, Local};
use crate::error::{Error, Placed, Result};
use crate::failure::{FirstError, caught, panic_text, show};
use crate::metrics::Summary;
use crate::oracle::Oracle;
use crate::runtime;
use crate::setup::Setup;
use crate::worker::Worker;

/// The grid as threads of this process.
///
/// # Errors
/// The first error of any place, with the place.
pub(super) fn threads(job: &Job) -> Placed<Summary> {
    let (setup, out, coordinator) = prepare(job, |setup, chosen| {
        let all = 0..setup.grid.size();
        job.check_memory(setup, chosen, all.clone(), &[])?;
        job.check_gpu_memory(setup, all)
    })
    .map_err(|error| (None, error))?;
    announce(&setup, "threads of one process", job.mode(&setup).inject);
    run_local(&setup, &out, coordinator, job.mode(&setup))
}

/// Folder, log and coordinator of a run in one process.
fn prepare(
    job: &Job,
    check: impl Fn(&Setup, &ComputeDevice) -> Result<()>,
) -> Result<(Arc<Setup>, PathBuf, Coordinator)> {
    let (setup, _) = job.setup()?;
    let chosen = chosen(&setup.config, Local::ALONE)?;
    let setup = setup.with_device(chosen.device());
    let setup = job.begin(job.origin(&setup)?, setup)?;

    check(&setup, &chosen)?;
    let (out, setup) = (job.out(&setup), Arc::new(setup));
    let coordinator = Coordinator::new(Arc::clone(&setup), &out)?.of_mode(&job.mode(&setup));
    job.tell_of_trace(&setup);
    runtime::log_to(&out, 0)?;
    Ok((setup, out, coordinator))
}

/// Trains `setup` on threads of this process; what `train --transport local` and the tests run.
///
/// # Errors
/// The first error of any place, with the place.
pub fn run_local(
    setup: &Arc<Setup>,
    out: &Path,
    coordinator: Coordinator,
    mode: Mode,
) -> Placed<Summary> {
    let (reports, received) = channel();
    let grid = setup.grid;
    let (schedule, watch) = (&setup.schedule, watch(out, &mode));
    let limit = setup.start() + setup.lead();
    let (ports, controls) =
        local::connect(grid, schedule.link_capacity(), setup.config.wire, limit, &reports);
    let _signals = watch_signals(&mode, reporter(&reports)).map_err(|error| (None, error))?;
    let first = FirstError::default();
    let summary = std::thread::scope(|scope| {
        for (rank, ports) in ports.into_iter().enumerate() {
            let (first, mode, failed) = (&first, mode.clone(), reporter(&reports));
            scope.spawn(move || {
                let work =
                    || Worker::new(Arc::clone(setup), rank, ports, out.to_owned(), mode)?.run();
                if let Err(error) = caught(work) {
                    first.set(rank, error.clone());
                    let _ = failed.send(Report::Failed { origin: grid.name(rank), error });
                }
            });
        }

        let ranks = if grid.size() > 1 { Ranks::Threads } else { Ranks::Processes };
        let summary = coordinator.run(&received, &controls, watch, grid.size(), ranks);
        if let Err((origin, error @ Error::Hang { .. })) = &summary {
            // The thread that stands still can be neither ended nor waited for.
            show(origin.as_deref(), error);
            std::process::exit(i32::from(error.exit_code()));
        }

        // Whoever still wants to report, or to be told something, finds the coordinator gone.
        drop((received, controls));
        summary
    });

    match (first.take(), summary) {
        (None, summary) => summary,
        // The coordinator's own error, which took the reports away from the places.
        (Some((_, Error::Lost { .. })), Err(error)) => Err(error),
        (Some((rank, error)), _) => Err((Some(grid.name(rank)), error)),
    }
}

/// The oracle.
///
/// # Errors
/// What it finds.
pub(super) fn oracle(job: &Job) -> Placed<Summary> {
    let (setup, out, coordinator) = prepare(job, |_, _| Ok(())).map_err(|error| (None, error))?;
    announce(&setup, "the oracle, in one process", None);
    if std::env::args().any(|word| word == "--emulate") {
        say!("note: --emulate is called --oracle");
    }
    run_oracle(&setup, &out, coordinator, &job.mode)
}

/// Trains `setup` with the oracle.
///
/// # Errors
/// What the oracle finds.
pub fn run_oracle(
    setup: &Arc<Setup>,
    out: &Path,
    coordinator: Coordinator,
    mode: &Mode,
) -> Placed<Summary> {
    let (reports, received) = channel();
    let oracles = reporter(&reports);
    let _signals = watch_signals(mode, reporter(&reports)).map_err(|error| (None, error))?;
    let failed = reporter(&reports);
    let gate = Arc::new(Gate::new(setup.schedule.sync.start + setup.lead(), "this process", None));
    let told = Arc::clone(&gate);
    let controls = Controls::new(move |control| told.apply(control));
    let (outcome, summary) = std::thread::scope(|scope| {
        let work = || Oracle::new(Arc::clone(setup), oracles, gate, out.to_owned())?.run();
        let oracle = scope.spawn(|| {
            let outcome = caught(work);
            if let Err(error) = &outcome {
                let _ = failed
                    .send(Report::Failed { origin: "the oracle".into(), error: error.clone() });
            }
            outcome
        });

        let summary = coordinator.without_watchdog().run(
            &received,
            &controls,
            watch(out, mode),
            1,
            Ranks::Processes,
        );

        drop((received, controls));
        (
            oracle.join().unwrap_or_else(|panic| Err(Error::Internal(panic_text(panic.as_ref())))),
            summary,
        )
    });

    outcome.map_err(|error| (None, error)).and(summary)
}

fn reporter(reports: &Sender<Report>) -> Reporter {
    let reports = reports.clone();
    Reporter::new(move |report| {
        reports.send(report).map_err(|_| Error::Internal("the coordinator is gone".into()))
    })
}

fn watch_signals(mode: &Mode, reports: Reporter) -> Result<Option<SignalWatch>> {
    mode.signals.then(|| SignalWatch::start(reports, "this process".into(), || false)).transpose()
}
