//! How long work takes on a device, where the log is at `debug` (OUROBOROS_LOG): by marks that tell
//! the time. `scripts/gpu-check.sh` reads the log.

use std::sync::{Arc, Mutex};

use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaEvent, CudaStream, DriverError};

use super::driver::failed;
use super::queues::primary;
use crate::error::{Error, Result};

/// Pieces of work that are kept: the first ones of a run.
pub const KEPT: usize = 4096;

/// What the driver answers to a measurement.
pub fn lost(error: DriverError) -> Error {
    Error::Device(failed("a measurement of time", error))
}

/// A mark that tells the time, behind all work that has been put on a stream.
pub fn mark(stream: &CudaStream) -> Result<CudaEvent> {
    stream.record_event(Some(CU_EVENT_DEFAULT)).map_err(lost)
}

/// Whether anybody wants to know.
pub fn wanted() -> bool {
    tracing::enabled!(tracing::Level::DEBUG)
}

/// The times of one kind of work on libtorch's stream.
pub struct Spans {
    stream: Arc<CudaStream>,
    kept: Mutex<Vec<[CudaEvent; 2]>>,
}

impl Spans {
    /// Of a device; none unless they are wanted.
    pub fn new(index: usize) -> Result<Option<Spans>> {
        let of =
            |index| Ok(Spans { stream: primary(index)?.default_stream(), kept: Mutex::default() });
        wanted().then(|| of(index)).transpose()
    }

    /// Measures what `work` puts on the stream.
    pub fn around(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let Ok(mut kept) = self.kept.lock() else { return work() };
        if kept.len() >= KEPT {
            return work();
        }

        let begun = mark(&self.stream)?;
        work()?;
        kept.push([begun, mark(&self.stream)?]);
        Ok(())
    }

    /// How many, and how long all of them took, in milliseconds.
    pub fn took(&self) -> Result<(usize, f64)> {
        let Ok(kept) = self.kept.lock() else { return Ok((0, 0.0)) };
        let times = kept.iter().map(|[begun, ended]| begun.elapsed_ms(ended).map(f64::from));
        Ok((kept.len(), times.sum::<std::result::Result<f64, DriverError>>().map_err(lost)?))
    }
}
