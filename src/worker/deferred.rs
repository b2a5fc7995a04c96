//! Deferred scalars: copied to pinned memory, and reported when their event has completed. The host
//! waits for one only when it is too old, or at the end.
//!
//! ```text
//! device   ... loss of step t | copy to the host | mark ...... loss of t+1 | copy | mark ...
//! host         asks for both, goes on ......................... has the mark of t passed? then report
//! ```
//!
//! The host may be so many steps before the device as its numbers are old; [`READBACK_STEPS`]
//! bounds that, so that messages and memory that have been asked for do not pile up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::CudaEvent;
use tch::{Device, Kind, Tensor};

use crate::comm::AsyncTransfers;
use crate::control::{Report, Reporter};
use crate::device::queues::{CudaQueues, Queue, Queues};
use crate::error::Result;
use crate::number::{Number, READBACK_STEPS};

/// Between two looks at a mark that is waited for.
const LOOK: Duration = Duration::from_micros(50);

/// What becomes of a number: a report, nothing, or an error.
type Then = Box<dyn FnOnce(f64) -> Result<Option<Report>>>;

struct Waiting {
    step: usize,
    /// On the host; there when the mark has passed. Without a mark, when it is asked for.
    value: Tensor,
    mark: Option<CudaEvent>,
    then: Then,
}

/// The numbers of a place that are not known yet, the oldest first.
pub(super) struct Deferred {
    waiting: VecDeque<Waiting>,
    queues: Option<CudaQueues>,
    reports: Reporter,
    transfers: Option<Arc<dyn AsyncTransfers>>,
}

impl Deferred {
    /// None yet, of a device.
    pub(super) fn new(
        device: Device,
        reports: Reporter,
        transfers: Option<Arc<dyn AsyncTransfers>>,
    ) -> Result<Deferred> {
        let queues = match device {
            Device::Cuda(index) => Some(CudaQueues::new(index)?),
            _ => None,
        };

        Ok(Deferred { waiting: VecDeque::new(), queues, reports, transfers })
    }

    /// Reports a number of a step, now if it is known. `then` makes the report of it if there is to
    /// be one, or the error that it is.
    ///
    /// # Errors
    /// Those of `then`, or a coordinator that is gone.
    pub(super) fn defer(
        &mut self,
        step: usize,
        number: Number,
        then: impl FnOnce(f64) -> Result<Option<Report>> + 'static,
    ) -> Result<()> {
        let pending = match number {
            Number::Known(value) => return self.report(then(value)?),
            Number::Pending(pending) => pending,
        };

        // libtorch puts it into pinned memory, which a copy that nobody waits for needs.
        let value = pending.f_to_device_(Device::Cpu, Kind::Double, true, false)?;
        let mark = self.queues.as_ref().map(|queues| queues.mark(Queue::Compute)).transpose()?;
        self.waiting.push_back(Waiting { step, value, mark, then: Box::new(then) });
        Ok(())
    }

    /// Reports what is known by now, and waits for what is too old at `step`.
    pub(super) fn look(&mut self, step: usize) -> Result<()> {
        while let Some(first) = self.waiting.front() {
            let old = first.step + READBACK_STEPS <= step;
            match (&self.queues, &first.mark) {
                (Some(queues), Some(mark)) => {
                    while !queues.passed(mark)? {
                        if !old {
                            return Ok(());
                        }

                        // A transfer that has failed never ends.
                        self.transfers.as_ref().map_or(Ok(()), |transfers| transfers.check())?;
                        std::thread::sleep(LOOK);
                    }
                }
                _ if !old => return Ok(()),
                _ => {}
            }

            let Some(Waiting { value, then, .. }) = self.waiting.pop_front() else { return Ok(()) };
            self.report(then(value.f_double_value(&[])?)?)?;
        }

        Ok(())
    }

    fn report(&self, report: Option<Report>) -> Result<()> {
        report.map_or(Ok(()), |report| self.reports.send(report))
    }

    /// Waits for everything.
    ///
    /// # Errors
    /// As [`Deferred::look`].
    pub(super) fn flush(&mut self) -> Result<()> {
        self.look(usize::MAX)
    }
}
