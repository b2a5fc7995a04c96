//! The thread that writes a rank's states to the disk, beside the training.

use std::path::PathBuf;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::checkpoint::Snapshot;
use crate::comm::Reporter;
use crate::error::{Error, Result};
use crate::metrics::Report;

/// States that wait while one is written: two stages may share a device.
const WAITING: usize = 1;

pub struct Writer {
    snapshots: SyncSender<Snapshot>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Starts the thread; what it has written, or cannot write, it reports itself.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(out: PathBuf, reports: Reporter) -> Result<Writer> {
        let (snapshots, received) = sync_channel::<Snapshot>(WAITING);
        let body = move || {
            for snapshot in received {
                let place = snapshot.place;
                let report = match snapshot.write(&out) {
                    Ok(shards) => Report::Saved { place, step: snapshot.step, shards },
                    Err(error) => Report::Failed { origin: place.to_string(), error },
                };
                if reports.send(report).is_err() {
                    return; // The run is being ended.
                }
            }
        };
        let thread = std::thread::Builder::new().name("writer".into()).spawn(body);
        let thread = thread.map_err(|error| Error::Internal(format!("no thread for checkpoints ({error})")))?;
        Ok(Writer { snapshots, thread })
    }

    /// Hands a state over; waits while the ones before are being written.
    ///
    /// # Errors
    /// If the thread is gone.
    pub fn save(&self, snapshot: Snapshot) -> Result<()> {
        self.snapshots.send(snapshot).map_err(|_| Error::Internal("the thread that writes checkpoints is gone".into()))
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
