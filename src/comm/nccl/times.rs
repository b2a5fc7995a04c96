//! How long sums over replicas take on the device, and how long compute waits for them: measured
//! with marks that tell the time, where the log is at `debug` (OUROBOROS_LOG).
//! `scripts/gpu-check.sh` reads it.

use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::Mutex;

use cudarc::driver::CudaEvent;

use crate::device::queues::{CudaQueues, Queue};
use crate::device::timing::{KEPT, lost, mark, wanted};
use crate::error::Result;

#[derive(Default)]
struct Kept {
    /// All others are measured from here.
    base: Option<CudaEvent>,
    /// Of every channel, when its sums began and ended that nobody has waited for yet.
    open: BTreeMap<usize, VecDeque<(CudaEvent, CudaEvent)>>,
    /// Began, ended, wanted by compute.
    closed: Vec<[CudaEvent; 3]>,
}

/// The times of a rank's sums.
pub struct Times(Option<Mutex<Kept>>);

impl Times {
    pub fn new() -> Times {
        Times(wanted().then(Mutex::default))
    }

    /// Measures what `sum` puts on a channel's queue.
    pub fn around(
        &self,
        channel: usize,
        queues: &CudaQueues,
        queue: Queue,
        sum: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(Ok(mut kept)) = self.0.as_ref().map(Mutex::lock) else { return sum() };
        if kept.closed.len() >= KEPT {
            return sum();
        }

        if kept.base.is_none() {
            kept.base = Some(mark(queues.stream(Queue::Compute))?);
        }

        let begun = mark(queues.stream(queue))?;
        sum()?;
        let ended = mark(queues.stream(queue))?;
        kept.open.entry(channel).or_default().push_back((begun, ended));
        Ok(())
    }

    /// Compute has come to where it needs the oldest sum of a channel.
    pub fn wanted(&self, channel: usize, queues: &CudaQueues) -> Result<()> {
        let Some(Ok(mut kept)) = self.0.as_ref().map(Mutex::lock) else { return Ok(()) };
        if let Some((begun, ended)) = kept.open.get_mut(&channel).and_then(VecDeque::pop_front) {
            let wanted = mark(queues.stream(Queue::Compute))?;
            kept.closed.push([begun, ended, wanted]);
        }
        Ok(())
    }

    /// Tells the log, when all is done.
    pub fn tell(&self) -> Result<()> {
        let Some(Ok(kept)) = self.0.as_ref().map(Mutex::lock) else { return Ok(()) };
        let Some(base) = &kept.base else { return Ok(()) };
        let (mut took, mut waited) = (0.0, 0.0);
        for times in &kept.closed {
            let mut at = [0.0; 3];
            for (at, event) in at.iter_mut().zip(times) {
                *at = f64::from(base.elapsed_ms(event).map_err(lost)?);
            }

            let [begun, ended, wanted] = at;
            took += ended - begun;
            waited += f64::max(0.0, ended - wanted.max(begun));
        }

        tracing::debug!(
            sums = kept.closed.len(),
            took_ms = took,
            waited_ms = waited,
            "sums over replicas"
        );

        Ok(())
    }
}
