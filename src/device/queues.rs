//! The queues (streams) of a GPU: work that is put on one is done in order, work on different ones
//! in any order but where a mark (event) in one is waited for by another.
//!
//! Everything that libtorch does is on its current stream, here always the default one of the
//! device: the queue [`Queue::Compute`]. libtorch gives memory that is dropped to whoever asks
//! next, and lets that one's work simply follow on this queue; so memory that another queue still
//! uses must be held until a mark behind that use has passed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream};

use super::driver::failed;
use crate::error::{Error, Result};

/// One of the queues of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// libtorch's.
    Compute,
    /// One that was made with `add`.
    Own(usize),
}

/// What transports need of a device. Tests have a model of one.
pub trait Queues {
    type Mark;

    /// Another queue.
    fn add(&mut self) -> Result<Queue>;

    /// A mark behind all work that has been put on a queue so far.
    fn mark(&self, queue: Queue) -> Result<Self::Mark>;

    /// What is put on a queue from now on waits for a mark. The host does not.
    fn follow(&self, queue: Queue, mark: &Self::Mark) -> Result<()>;

    /// Whether all work before a mark is done.
    fn passed(&self, mark: &Self::Mark) -> Result<bool>;
}

/// The primary context of a device, which libtorch uses too: made once a process, and never given
/// back. Making it takes up to a second, and one that is given back is stale for whoever still
/// means it.
///
/// # Errors
/// [`Error::Device`] with what the driver reports.
pub fn primary(index: usize) -> Result<Arc<CudaContext>> {
    static CONTEXTS: Mutex<BTreeMap<usize, Arc<CudaContext>>> = Mutex::new(BTreeMap::new());
    let mut contexts = CONTEXTS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(context) = contexts.get(&index) {
        return Ok(Arc::clone(context));
    }

    let context = CudaContext::new(index).map_err(lost("cuDevicePrimaryCtxRetain"))?;
    contexts.insert(index, Arc::clone(&context));
    Ok(context)
}

/// The queues of a GPU.
pub struct CudaQueues {
    context: Arc<CudaContext>,
    compute: Arc<CudaStream>,
    own: Vec<Arc<CudaStream>>,
}

fn lost(call: &'static str) -> impl Fn(cudarc::driver::DriverError) -> Error {
    move |error| Error::Device(failed(call, error))
}

impl CudaQueues {
    /// Those of a device, of which libtorch's is there.
    pub fn new(index: usize) -> Result<CudaQueues> {
        let context = primary(index)?;
        Ok(CudaQueues { compute: context.default_stream(), context, own: Vec::new() })
    }

    /// The driver's name of a queue.
    pub fn stream(&self, queue: Queue) -> &CudaStream {
        match queue {
            Queue::Compute => &self.compute,
            Queue::Own(number) => &self.own[number],
        }
    }

    /// Makes the device the one that calls of this thread mean.
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(lost("cuCtxSetCurrent"))
    }

    /// Bytes of the device's memory that are taken, by whomever.
    pub fn taken(&self) -> Result<u64> {
        let (left, all) = self.memory()?;
        Ok(all - left)
    }

    /// Bytes of the device's memory that are free, and all.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (left, all) = self.context.mem_get_info().map_err(lost("cuMemGetInfo"))?;
        Ok((left as u64, all as u64))
    }
}

impl Queues for CudaQueues {
    type Mark = CudaEvent;

    fn add(&mut self) -> Result<Queue> {
        self.bind()?;
        // Before the compute in the device's order: what is small and waited for goes first.
        let (_, first) = cudarc::driver::result::stream::get_priority_range()
            .map_err(lost("cuCtxGetStreamPriorityRange"))?;
        self.own.push(
            self.context
                .new_stream_with_priority(first)
                .map_err(lost("cuStreamCreateWithPriority"))?,
        );

        Ok(Queue::Own(self.own.len() - 1))
    }

    fn mark(&self, queue: Queue) -> Result<CudaEvent> {
        self.stream(queue).record_event(None).map_err(lost("cuEventRecord"))
    }

    fn follow(&self, queue: Queue, mark: &CudaEvent) -> Result<()> {
        self.stream(queue).wait(mark).map_err(lost("cuStreamWaitEvent"))
    }

    fn passed(&self, mark: &CudaEvent) -> Result<bool> {
        mark.try_is_complete().map_err(lost("cuEventQuery"))
    }
}
