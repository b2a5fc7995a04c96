//! Tensors of a GPU over a transport that touches host memory only: through pinned memory, waited
//! for. Slow, and simple: a check of the grid without NCCL.

use std::ops::Range;

use tch::{Device, Tensor};

use super::{Endpoints, Header, Link, Ports, Reduction, ReplicaGroup};
use crate::device::queues::{CudaQueues, Queue, Queues};
use crate::error::Result;

/// Ports that take and give tensors of a GPU.
pub fn over(ports: Ports, index: usize) -> Result<Ports> {
    let link = |inner: Option<Box<dyn Link>>| -> Result<Option<Box<dyn Link>>> {
        let Some(inner) = inner else { return Ok(None) };
        Ok(Some(Box::new(Staged { inner, buffer: HostBuffer::new(index)? })))
    };

    let mut places = Vec::new();
    for ends in ports.places {
        let group = match ends.group {
            Some(inner) => Some(Box::new(Staged { inner, buffer: HostBuffer::new(index)? })
                as Box<dyn ReplicaGroup>),
            None => None,
        };

        let (upstream, downstream, twin) =
            (link(ends.upstream)?, link(ends.downstream)?, link(ends.twin)?);
        places.push(Endpoints { upstream, downstream, twin, group });
    }

    Ok(Ports { places, ..ports })
}

/// A link or a group, and the way between device and host.
struct Staged<T: ?Sized> {
    inner: Box<T>,
    buffer: HostBuffer,
}

struct HostBuffer {
    queues: CudaQueues,
    device: Device,
}

impl HostBuffer {
    fn new(index: usize) -> Result<HostBuffer> {
        Ok(HostBuffer { queues: CudaQueues::new(index)?, device: Device::Cuda(index) })
    }

    /// The values on the host, there when this returns.
    fn down(&self, tensor: &Tensor) -> Result<Tensor> {
        // libtorch takes pinned memory for a copy that is not waited for.
        let host = tensor.f_contiguous()?.f_to_device_(Device::Cpu, tensor.kind(), true, false)?;
        let copied = self.queues.mark(Queue::Compute)?;
        while !self.queues.passed(&copied)? {
            std::thread::yield_now();
        }
        Ok(host)
    }
}

impl Link for Staged<dyn Link> {
    fn await_room(&mut self) -> Result<bool> {
        self.inner.await_room()
    }

    fn send(&mut self, header: Header, tensor: Tensor) -> Result<()> {
        self.inner.send(header, self.buffer.down(&tensor)?)
    }

    fn receive(&mut self, expected: Header) -> Result<Tensor> {
        Ok(self.inner.receive(expected)?.f_to_device(self.buffer.device)?)
    }
}

impl Staged<dyn ReplicaGroup> {
    /// A sum, or a half of one, that `start` begins on the host.
    fn through(
        &mut self,
        mut flat: Tensor,
        start: impl FnOnce(&mut dyn ReplicaGroup, Tensor) -> Result<Reduction>,
    ) -> Result<Reduction> {
        let host = self.buffer.down(&flat)?;
        let reduction = start(self.inner.as_mut(), host.shallow_clone())?;
        Ok(Reduction::new(move || {
            reduction.wait()?;
            Ok(flat.f_copy_(&host)?)
        }))
    }
}

impl ReplicaGroup for Staged<dyn ReplicaGroup> {
    fn all_reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.through(flat, |group, host| group.all_reduce(step, host))
    }

    fn owned(&self, len: usize) -> Range<usize> {
        self.inner.owned(len)
    }

    fn reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.through(flat, |group, host| group.reduce(step, host))
    }

    fn gather(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.through(flat, |group, host| group.gather(step, host))
    }
}
