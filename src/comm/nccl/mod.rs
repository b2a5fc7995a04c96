//! The grid on GPUs: NCCL carries the values, MPI what is said about them.
//!
//! ```text
//! sender     values ──NCCL──► receiver        on the channel's own queue of both devices; see `fabric` for the order
//!            header ──MPI───► receiver        on the host: what the message is, as everywhere; a wrong one is named
//! ```
//!
//! The receiver posts its side of the transfer as soon as the schedule says that a message comes, and takes it when the
//! header has come and is right. Nobody's host waits for a device.

mod api;
mod channels;
mod fabric;
mod times;

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use cudarc::driver::CudaEvent;
use cudarc::nccl::sys::ncclDataType_t;
use tch::{Device, Kind, Tensor};

pub use api::Api;
use api::{Communicator, Span, Transfer};
use channels::{Channel, Purpose, channels};
use fabric::{Carrier, Fabric, Posted};
use times::Times;

use super::{Beside, Ends, Header, Link, Ports, Reduction, ReplicaGroup};
use crate::device::queues::{CudaQueues, Queue};
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::params::here;
use crate::wire::Wire;

/// Parts of a device that a channel's kernels take at most (blocks of threads): a link moves one message, a group sums
/// while the backward still computes.
const LINK_CTAS: i32 = 4;
const GROUP_CTAS: i32 = 16;
/// Between two looks at transfers that are waited for at the end.
const LOOK: Duration = Duration::from_micros(200);

/// NCCL's functions and a rank's communicators.
struct Nccl {
    api: Api,
    joined: Vec<Joined>,
    times: Times,
    patience: Duration,
}

/// A communicator, and whom a message of it goes to or comes from.
struct Joined {
    communicator: Communicator,
    other: usize,
}

/// A contiguous tensor as NCCL sees it.
fn span(tensor: &Tensor) -> Result<Span> {
    let kind = match tensor.kind() {
        Kind::Float => ncclDataType_t::ncclFloat32,
        Kind::BFloat16 => ncclDataType_t::ncclBfloat16,
        other => return Err(Error::Internal(format!("{other:?} does not travel"))),
    };
    match tensor.is_contiguous() && tensor.device().is_cuda() {
        true => Ok(Span { address: tensor.data_ptr().cast::<c_void>(), count: tensor.numel(), kind }),
        false => Err(Error::Internal(format!("a tensor on {:?} cannot travel as it is", tensor.device()))),
    }
}

impl Nccl {
    fn put(
        &self,
        transfer: Transfer,
        channel: usize,
        buffer: &Tensor,
        queues: &CudaQueues,
        queue: Queue,
    ) -> Result<()> {
        queues.bind()?;
        let deadline = Instant::now() + self.patience;
        // SAFETY: `span` has looked at the tensor, which `Fabric` holds until the queue has come past this: what is sent nobody
        // changes; what is received is new, and given to nobody whose work does not follow the queue; and a gradient is
        // touched by nobody before its sum has been waited for.
        unsafe {
            let stream = queues.stream(queue).cu_stream();
            self.api.put(transfer, span(buffer)?, &self.joined[channel].communicator, stream, deadline)
        }
    }
}

impl Carrier<CudaQueues> for Nccl {
    type Buffer = Tensor;

    fn send(&self, channel: usize, buffer: &Tensor, queues: &CudaQueues, queue: Queue) -> Result<()> {
        self.put(Transfer::To(self.joined[channel].other), channel, buffer, queues, queue)
    }

    fn receive(&self, channel: usize, buffer: &Tensor, queues: &CudaQueues, queue: Queue) -> Result<()> {
        self.put(Transfer::From(self.joined[channel].other), channel, buffer, queues, queue)
    }

    fn sum(&self, channel: usize, buffer: &Tensor, queues: &CudaQueues, queue: Queue) -> Result<()> {
        let sum = || self.put(Transfer::Sum, channel, buffer, queues, queue);
        self.times.around(channel, queues, queue, sum)
    }

    fn wanted(&self, channel: usize, queues: &CudaQueues) -> Result<()> {
        self.times.wanted(channel, queues)
    }

    fn done(&self) -> Result<()> {
        self.times.tell()
    }

    fn check(&self) -> Result<()> {
        self.joined.iter().try_for_each(|joined| self.api.check(&joined.communicator))
    }
}

type Cuda = Fabric<CudaQueues, Nccl>;

/// The fabric of this rank, for all its links and groups. One thread works with it.
#[derive(Clone)]
struct Shared(Arc<Mutex<Cuda>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Cuda> {
        // After a panic the run ends; what is left to do is to say so.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Beside for Shared {
    fn check(&self) -> Result<()> {
        self.lock().check()
    }

    fn settle(&self) -> Result<()> {
        while !self.lock().settled()? {
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

/// What a rank is told of to connect itself.
pub struct Connection<'a> {
    pub grid: Grid,
    pub rank: usize,
    /// Which device it has.
    pub index: usize,
    /// How sums travel.
    pub wire: Wire,
    /// Whether a tied table is exchanged.
    pub tied: bool,
    /// How long a neighbour may be late.
    pub patience: Duration,
    /// Everybody's bytes, in the order of the ranks; all ranks must ask.
    pub exchange: &'a dyn Fn(Vec<u8>) -> Result<Vec<Vec<u8>>>,
}

/// Ports whose values travel by NCCL, and whose headers by the given ones. All ranks must call this.
///
/// # Errors
/// What NCCL, the driver or the exchange report.
pub fn over(ports: Ports, connection: &Connection) -> Result<Ports> {
    let Connection { grid, rank, index, wire, .. } = *connection;
    // NCCL takes the device that is this thread's when a communicator is made.
    let queues = CudaQueues::new(index)?;
    queues.bind()?;
    let (own, nccl) = joined(connection)?;
    let mut fabric = Fabric::new(queues, nccl, own.len())?;
    meet(&mut fabric, &own, connection)?;
    let shared = Shared(Arc::new(Mutex::new(fabric)));
    let find = |purpose| own.iter().position(|channel| channel.purpose == purpose);
    let link = |headers: Option<Box<dyn Link>>, out: Purpose, back: Option<Purpose>| -> Result<Option<Box<dyn Link>>> {
        let Some(headers) = headers else { return Ok(None) };
        let (Some(out), Some(back)) = (find(out), back.and_then(find)) else {
            return Err(Error::Internal("a link without channels".into()));
        };
        let (fabric, posted) = (shared.clone(), VecDeque::new());
        let device = Device::Cuda(index);
        Ok(Some(Box::new(NcclLink { headers, fabric, out, back, device, posted })))
    };
    let mut places = Vec::new();
    for (place, ends) in grid.held(rank).into_iter().zip(ports.places) {
        let group = find(Purpose::Group(place.stage)).filter(|_| ends.group.is_some());
        places.push(Ends {
            upstream: link(ends.upstream, Purpose::Up(place), grid.upstream(place).map(Purpose::Down))?,
            downstream: link(ends.downstream, Purpose::Down(place), grid.downstream(place).map(Purpose::Up))?,
            twin: match connection.tied {
                true => link(ends.twin, Purpose::Twin(place), grid.twin(place).map(Purpose::Twin))?,
                false => None,
            },
            group: group
                .map(|channel| Box::new(NcclGroup { fabric: shared.clone(), channel, wire }) as Box<dyn ReplicaGroup>),
        });
    }
    Ok(Ports { places, beside: Some(Arc::new(shared)), ..ports })
}

/// Lets the members of every channel meet, channel by channel. NCCL connects two devices when the first message between them
/// is asked for, and only when both ends have done so; until then the host waits in that call. Later a receive may be
/// posted before the sender can have anything to send: the hosts must not have to wait for each other then.
fn meet(fabric: &mut Cuda, own: &[Channel], connection: &Connection) -> Result<()> {
    let device = Device::Cuda(connection.index);
    for (channel, Channel { purpose, members }) in own.iter().enumerate() {
        let value = Tensor::f_zeros([1], (Kind::Float, device))?;
        match purpose {
            Purpose::Group(_) => {
                let done = fabric.sum(channel, value)?;
                fabric.wait(channel, &done)?;
            }
            _ if members[0] == connection.rank => fabric.send(channel, value)?,
            _ => {
                let posted = fabric.post(channel, value)?;
                let _ = here(&fabric.take(posted)?)?;
            }
        }
        let deadline = Instant::now() + connection.patience;
        while !fabric.settled()? {
            if Instant::now() > deadline {
                return Err(Error::Device(format!(
                    "NCCL does not connect {purpose:?}: a member is missing, or cannot be reached"
                )));
            }
            std::thread::sleep(LOOK);
        }
    }
    Ok(())
}

/// The channels of a rank, each with its communicator.
fn joined(connection: &Connection) -> Result<(Vec<Channel>, Nccl)> {
    let Connection { grid, rank, tied, patience, exchange, .. } = *connection;
    let api = Api::load().map_err(Error::Device)?;
    let all = channels(grid, tied);
    let mut named: Vec<(usize, Vec<u8>)> = Vec::new();
    for (number, channel) in all.iter().enumerate() {
        if channel.members[0] == rank {
            named.push((number, api.unique_id()?));
        }
    }
    let bytes = serde_json::to_vec(&named).map_err(|error| Error::Internal(error.to_string()))?;
    let read = |bytes: &Vec<u8>| serde_json::from_slice::<Vec<(usize, Vec<u8>)>>(bytes);
    let told: std::result::Result<Vec<_>, _> = exchange(bytes)?.iter().map(read).collect();
    let told = told.map_err(|error| Error::Internal(format!("ids of NCCL that cannot be read ({error})")))?;
    let (mut own, mut communicators) = (Vec::new(), Vec::new());
    for (number, channel) in all.into_iter().enumerate() {
        let Some(me) = channel.members.iter().position(|member| *member == rank) else { continue };
        let id = told.iter().flatten().find(|(of, _)| *of == number).map(|(_, id)| id);
        let id = id.ok_or_else(|| Error::Internal(format!("nobody has named channel {number}")))?;
        let most = if matches!(channel.purpose, Purpose::Group(_)) { GROUP_CTAS } else { LINK_CTAS };
        let communicator = api.join(id, me, channel.members.len(), most, Instant::now() + patience)?;
        communicators.push(Joined { communicator, other: usize::from(me == 0) });
        own.push(channel);
    }
    Ok((own, Nccl { api, joined: communicators, times: Times::new(), patience }))
}

/// A link between two GPUs.
struct NcclLink {
    headers: Box<dyn Link>,
    fabric: Shared,
    /// The channels out and back.
    out: usize,
    back: usize,
    device: Device,
    posted: VecDeque<(Header, Posted<CudaEvent, Tensor>)>,
}

impl NcclLink {
    fn post(&mut self, expected: Header) -> Result<()> {
        let room = Tensor::f_empty(expected.shape, (expected.wire.kind(), self.device))?;
        let posted = self.fabric.lock().post(self.back, room)?;
        self.posted.push_back((expected, posted));
        Ok(())
    }
}

impl Link for NcclLink {
    fn send(&mut self, header: Header, tensor: Tensor) -> Result<()> {
        self.fabric.lock().send(self.out, tensor.f_contiguous()?)?;
        self.headers.send(Header { beside: true, ..header }, Tensor::new())
    }

    fn expect(&mut self, expected: Header) -> Result<()> {
        self.post(expected)
    }

    fn receive(&mut self, expected: Header) -> Result<Tensor> {
        if self.posted.is_empty() {
            self.post(expected)?;
        }
        // First: a message that is not the right one must be told, not waited for.
        let _ = self.headers.receive(Header { beside: true, ..expected })?;
        match self.posted.pop_front() {
            Some((header, posted)) if header == expected => self.fabric.lock().take(posted),
            other => {
                let found = other.map_or("nothing".to_owned(), |(header, _)| header.to_string());
                Err(Error::Internal(format!("{expected} is taken where {found} is posted")))
            }
        }
    }
}

/// The replicas of a stage on their GPUs.
struct NcclGroup {
    fabric: Shared,
    channel: usize,
    wire: Wire,
}

impl ReplicaGroup for NcclGroup {
    fn all_reduce(&mut self, _step: usize, mut flat: Tensor) -> Result<Reduction> {
        let packed = match self.wire {
            Wire::F32 => flat.shallow_clone(),
            Wire::Bf16 => self.wire.pack(&flat)?,
        };
        let done = self.fabric.lock().sum(self.channel, packed.shallow_clone())?;
        let (fabric, channel, wire) = (self.fabric.clone(), self.channel, self.wire);
        Ok(Reduction::new(move || {
            fabric.lock().wait(channel, &done)?;
            if wire == Wire::Bf16 {
                flat.f_copy_(&packed)?;
            }
            Ok(())
        }))
    }
}
