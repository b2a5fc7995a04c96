//! Runs in one process: the grid as threads, or the oracle.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use super::devices::chosen;
use super::job::Job;
use super::{announce, watch};
use crate::comm::{Reporter, local};
use crate::device::Local;
use crate::emulator::Emulator;
use crate::error::{Error, Placed, Result};
use crate::failure::{FirstError, caught, panic_text, show};
use crate::metrics::{Mode, Recorder, Report, Summary};
use crate::panel::{Controls, Panel};
use crate::runtime;
use crate::setup::Setup;
use crate::signals::SignalWatch;
use crate::worker::Worker;

/// The grid as threads of this process.
///
/// # Errors
/// The first error of any place, with the place.
pub(super) fn threads(job: &Job) -> Placed<Summary> {
    let (setup, out, recorder) =
        prepare(job, |setup| job.check_memory(setup, 0..setup.grid.size(), &[])).map_err(|error| (None, error))?;
    announce(&setup, "threads of one process", job.mode(&setup).inject);
    run_local(&setup, &out, recorder, job.mode(&setup))
}

/// Folder, log and recorder of a run in one process.
fn prepare(job: &Job, check: impl Fn(&Setup) -> Result<()>) -> Result<(Arc<Setup>, PathBuf, Recorder)> {
    let (setup, _) = job.setup()?;
    let chosen = chosen(&setup.config, Local::ALONE)?;
    let setup = setup.on(chosen.device());
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
    let limit = setup.start() + setup.lead();
    let (ports, controls) = local::connect(grid, schedule.link_capacity(), setup.config.wire, limit, &reports);
    let _signals = watch_signals(&mode, reporter(&reports)).map_err(|error| (None, error))?;
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
///
/// # Errors
/// What it finds.
pub(super) fn oracle(job: &Job) -> Placed<Summary> {
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
    let _signals = watch_signals(mode, reporter(&reports)).map_err(|error| (None, error))?;
    let failed = reporter(&reports);
    let panel = Arc::new(Panel::new(setup.schedule.sync.start + setup.lead(), "this process", None));
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

fn watch_signals(mode: &Mode, reports: Reporter) -> Result<Option<SignalWatch>> {
    mode.signals.then(|| SignalWatch::start(reports, "this process".into(), || false)).transpose()
}
