//! The thread that writes a rank's states to the disk, beside the training.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Worker;
use crate::checkpoint::Snapshot;
use crate::control::{Gate, Report, Reporter};
use crate::error::{Error, Result};
use crate::inject::Fault;
use crate::schedule::{Action, TableEnd};
use crate::trace::{Event, Moment, Span};

/// States that wait while one is written: two stages may share a device.
const WAITING: usize = 1;

pub struct Writer {
    snapshots: SyncSender<(Snapshot, Duration)>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Starts the thread; what it has written, or cannot write, it reports itself.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(out: PathBuf, reports: Reporter, gate: Arc<Gate>) -> Result<Writer> {
        let (snapshots, received) = sync_channel::<(Snapshot, Duration)>(WAITING);
        let body = move || {
            for (snapshot, copied) in received {
                let (place, step, begin) = (snapshot.place, snapshot.step, Moment::now());
                gate.tracer.writing(Some((place.stage, step, begin)));
                let report = match snapshot.write(&out, copied) {
                    Ok(written) => Report::Saved { place, step, written },
                    Err(error) => Report::Failed { origin: place.to_string(), error },
                };

                let span = Span { begin, end: Moment::now() };
                gate.tracer.writing(None);
                gate.tracer.add(Event::Write { stage: place.stage, step, span });

                if reports.send(report).is_err() {
                    return; // The run is being ended.
                }
            }
        };

        let thread = std::thread::Builder::new().name("writer".into()).spawn(body);
        let thread = thread
            .map_err(|error| Error::Internal(format!("no thread for checkpoints ({error})")))?;
        Ok(Writer { snapshots, thread })
    }

    /// Hands over a state that was `copied` in so much time; waits while the ones before are being
    /// written.
    ///
    /// # Errors
    /// If the thread is gone.
    pub fn save(&self, snapshot: Snapshot, copied: Duration) -> Result<()> {
        self.snapshots
            .send((snapshot, copied))
            .map_err(|_| Error::Internal("the thread that writes checkpoints is gone".into()))
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    /// If the thread has panicked.
    pub fn finish(self) -> Result<()> {
        drop(self.snapshots);
        self.thread.join().map_err(|_| Error::Internal("a panic while writing a checkpoint".into()))
    }
}

impl Worker {
    /// Copies the state of a place and lets the writer save it beside the training.
    pub(super) fn save(&mut self, action: &Action) -> Result<()> {
        if self.context.mode.bench {
            return Ok(());
        }

        // What is not finite must be known before it is saved; the copy waits for the device
        // anyway.
        self.deferred.flush()?;

        let begun = Instant::now();
        let (context, place) = (&self.context, &self.places[self.context.slot(action)]);
        let (setup, schedule) = (&context.setup, &context.setup.schedule);
        let mut snapshot = Snapshot::new(place.place, action.step, setup.grid.replicas);

        // Versions that are still used are saved where a run is stopped between sync points; at one
        // there are none.
        let since = schedule.since(action.step);
        let saved = |delay| setup.versions_saved(since, action.step, delay);
        if let Some(table) = self.table.as_ref().filter(|_| place.place.stage == 0) {
            let table = table.table();
            snapshot.add(table.layout(), table.flat(), table.optimizer())?;
            snapshot.add_older(
                table.layout(),
                table.versions().used(saved(schedule.table_delay(TableEnd::Input))),
            )?;
        }

        if let Some(table) = self.table.as_ref().filter(|_| place.place.stage == schedule.joiner())
        {
            snapshot.add_parts(table.table().layout(), table.table().waiting())?;
        }

        let versions = &place.versions;
        snapshot.add(versions.layout(), versions.flat(), &place.optimizer)?;
        snapshot.add_older(
            versions.layout(),
            versions.used(saved(schedule.delays[place.place.stage])),
        )?;

        for (microbatch, states) in place.compute.remembered() {
            let rows = setup.train_rows(place.place.replica, microbatch);
            snapshot.remember(rows.start, states)?;
        }

        if context.faults.hit(Fault::DiskFull, action) {
            snapshot.fill_disk();
        }

        match &self.writer {
            Some(writer) => writer.save(snapshot, begun.elapsed()),
            None => Err(Error::Internal("nobody writes checkpoints".into())),
        }
    }
}
