//! The grid on GPUs: NCCL carries the values, MPI what is said about them.
//!
//! ```text
//! sender     values ──NCCL──► receiver        on the channel's own queue of both devices; see `fabric` for the order
//!            header ──MPI───► receiver        on the host: what the message is, as everywhere; a wrong one is named
//! ```
//!
//! The receiver makes room for a message as soon as the schedule says that it comes, asks for it
//! when its turn has come, and takes it when the header has come and is right. Nobody's host waits
//! for a device.
//!
//! ```text
//! api        NCCL's functions, communicators
//! channels   which channels a grid has, who takes part in which
//! fabric     the order of transfers on a device, and who holds their memory
//! ordered    sums in the order of the replicas, where NCCL's have another
//! ends       links and groups over it
//! times      how long sums take on the device
//! ```

mod api;
mod channels;
mod fabric;
mod ordered;
mod ends;
mod times;
#[cfg(test)]
mod deadlock;

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cudarc::nccl::sys::ncclDataType_t;
use tch::{Device, Kind, Tensor};

pub use api::Api;
use api::{Communicator, DeviceMemory, Transfer};
use channels::{Channel, Purpose, channels};
use ends::{LOOK, Shared, Travel};
use fabric::{Carrier, Fabric};
use times::Times;

use super::Ports;
use crate::control::Gate;
use crate::device::context;
use crate::device::queues::{CudaQueues, Queue};
use crate::device::timing::mark;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::params::to_host;
use crate::trace::Event;
use crate::wire::Wire;

/// Parts of a device that a channel's kernels take at most (blocks of threads). A link moves one
/// message, for which one is enough, and a receive that waits for its sender keeps a multiprocessor
/// from the products beside it; a group sums while the backward still computes.
const LINK_CTAS: i32 = 1;
const GROUP_CTAS: i32 = 16;

/// NCCL's functions and a rank's communicators.
struct Nccl {
    api: Api,
    joined: Vec<Joined>,
    times: Times,
    /// Of the rank: its tracer; what the next sending or sum is.
    gate: Arc<Gate>,
    about: Mutex<Option<Event>>,
    /// Which device it is.
    index: usize,
    /// Whether sums of more than two have the order of the replicas.
    ordered: bool,
}

/// A communicator, which member this rank is, and whom a message goes to or comes from.
struct Joined {
    communicator: Communicator,
    me: usize,
    members: usize,
    other: usize,
}

/// Some values of a contiguous tensor as NCCL sees it.
fn part(tensor: &Tensor, values: Range<usize>) -> Result<DeviceMemory> {
    let whole = device_memory(tensor)?;
    if values.end > whole.count {
        return Err(Error::Internal(format!(
            "values up to {} of {} are to travel",
            values.end, whole.count
        )));
    }

    let address = whole.address.wrapping_byte_add(values.start * tensor.kind().elt_size_in_bytes());
    Ok(DeviceMemory { address, count: values.len(), ..whole })
}

/// A contiguous tensor as NCCL sees it.
fn device_memory(tensor: &Tensor) -> Result<DeviceMemory> {
    let kind = match tensor.kind() {
        Kind::Float => ncclDataType_t::ncclFloat32,
        Kind::BFloat16 => ncclDataType_t::ncclBfloat16,
        other => return Err(Error::Internal(format!("{other:?} does not travel"))),
    };

    match tensor.is_contiguous() && tensor.device().is_cuda() {
        true => Ok(DeviceMemory {
            address: tensor.data_ptr().cast::<c_void>(),
            count: tensor.numel(),
            kind,
        }),
        false => Err(Error::Internal(format!(
            "a tensor on {:?} cannot travel as it is",
            tensor.device()
        ))),
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
        // SAFETY: `span` has looked at the tensor, which `Fabric` holds until the queue has come
        // past this: what is sent nobody changes; what is received is new, and given to nobody
        // whose work does not follow the queue; and a gradient is touched by nobody before its sum
        // has been waited for.
        unsafe {
            let stream = queues.stream(queue).cu_stream();
            self.api.put(
                transfer,
                device_memory(buffer)?,
                &self.joined[channel].communicator,
                stream,
            )
        }
    }

    /// A sum in the order of the members: [`ordered`] has the picture.
    fn ordered_sum(
        &self,
        channel: usize,
        buffer: &Tensor,
        scratch: &Tensor,
        queues: &CudaQueues,
        queue: Queue,
    ) -> Result<()> {
        queues.bind()?;
        let Joined { communicator, me, members, .. } = &self.joined[channel];
        let (me, members, stream) = (*me, *members, queues.stream(queue).cu_stream());
        let slice = |member| ordered::slice(buffer.numel(), member, members);
        let own = slice(me);
        let others = || (0..members).filter(|member| *member != me);
        let put = |transfer, span: DeviceMemory| match span.count {
            0 => Ok(()),
            // SAFETY: as in `put`, for parts of buffer and scratch, both of which `Fabric` holds;
            // parts do not overlap.
            _ => unsafe { self.api.put(transfer, span, communicator, stream) },
        };

        self.api.grouped(communicator, || {
            others().try_for_each(|other| {
                let at = ordered::place(own.len(), other, me);
                put(Transfer::To(other), part(buffer, slice(other))?)?;
                put(Transfer::From(other), part(scratch, at..at + own.len())?)
            })
        })?;

        ordered::sum(buffer, scratch, me, members, self.index, stream)?;
        self.api.grouped(communicator, || {
            others().try_for_each(|other| {
                put(Transfer::To(other), part(buffer, own.clone())?)?;
                put(Transfer::From(other), part(buffer, slice(other))?)
            })
        })
    }
}

impl Nccl {
    /// Puts work on a queue, with marks around it where it is traced.
    fn traced(
        &self,
        queues: &CudaQueues,
        queue: Queue,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let tracer = &self.gate.tracer;
        let about = self.about.lock().ok().and_then(|mut about| about.take());
        let Some(event) = about.filter(|_| tracer.on()) else { return work() };
        let begin = Arc::new(mark(queues.stream(queue))?);
        work()?;
        tracer.add_later(begin, Arc::new(mark(queues.stream(queue))?), event);
        Ok(())
    }
}

impl Carrier<CudaQueues> for Nccl {
    type Buffer = Tensor;

    fn about(&self, event: Event) {
        if self.gate.tracer.on()
            && let Ok(mut about) = self.about.lock()
        {
            *about = Some(event);
        }
    }

    fn send(
        &self,
        channel: usize,
        buffer: &Tensor,
        queues: &CudaQueues,
        queue: Queue,
    ) -> Result<()> {
        let to = Transfer::To(self.joined[channel].other);
        self.traced(queues, queue, || self.put(to, channel, buffer, queues, queue))
    }

    fn receive(
        &self,
        channel: usize,
        buffer: &Tensor,
        queues: &CudaQueues,
        queue: Queue,
    ) -> Result<()> {
        self.put(Transfer::From(self.joined[channel].other), channel, buffer, queues, queue)
    }

    fn scratch(&self, channel: usize, buffer: &Tensor, _: &CudaQueues) -> Result<Option<Tensor>> {
        let Joined { me, members, .. } = self.joined[channel];
        if !self.ordered || members < 3 {
            return Ok(None);
        }
        let values = ordered::scratch(buffer.numel(), me, members) as i64;
        Ok(Some(Tensor::f_empty([values], (buffer.kind(), buffer.device()))?))
    }

    fn sum(
        &self,
        channel: usize,
        buffer: &Tensor,
        scratch: Option<&Tensor>,
        queues: &CudaQueues,
        queue: Queue,
    ) -> Result<()> {
        let sum = || match scratch {
            Some(scratch) => self.ordered_sum(channel, buffer, scratch, queues, queue),
            None => self.put(Transfer::Sum, channel, buffer, queues, queue),
        };

        let traced = || self.traced(queues, queue, sum);
        self.times.around(channel, queues, queue, traced)
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

/// How many channels, each with a communicator, a rank has on a grid.
pub fn channels_of(grid: Grid, tied: bool, rank: usize) -> usize {
    channels(grid, tied).iter().filter(|channel| channel.members.contains(&rank)).count()
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
    /// Whether the same kernels must be taken as on a device without neighbours.
    pub deterministic: bool,
    /// How long a neighbour may be late.
    pub patience: Duration,
    /// Everybody's bytes, in the order of the ranks; all ranks must ask.
    pub exchange: &'a dyn Fn(Vec<u8>) -> Result<Vec<Vec<u8>>>,
}

/// Ports whose values travel by NCCL, and whose headers by the given ones. All ranks must call
/// this.
pub fn over(ports: Ports, connection: &Connection) -> Result<Ports> {
    let Connection { grid, rank, index, wire, tied, .. } = *connection;
    let api = Api::load().map_err(Error::Device)?;
    let named = named(&api, connection)?;
    let (fabric, own) = connected(api, named, connection, &ports.gate)?;

    if !connection.deterministic {
        let receives = |channel: &&Channel| {
            !matches!(channel.purpose, Purpose::Group(_)) && channel.members[1] == rank
        };

        let waiting = own.iter().filter(receives).count() as i32;
        context::leave_multiprocessors(waiting * LINK_CTAS)?;
    }

    let (shared, travel) =
        (Shared::new(fabric), Travel { grid, rank, device: Device::Cuda(index), wire, tied });
    let places = ends::over(ports.places, travel, &own, &shared, |link| Box::new(link))?;
    Ok(Ports { places, transfers: Some(Arc::new(shared)), ..ports })
}

/// The channels of a rank, each with the name of its communicator.
fn named(api: &Api, connection: &Connection) -> Result<Vec<(Channel, Vec<u8>)>> {
    let Connection { grid, rank, tied, exchange, .. } = *connection;
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
    let told = told
        .map_err(|error| Error::Internal(format!("ids of NCCL that cannot be read ({error})")))?;

    let mut own = Vec::new();
    for (number, channel) in
        all.into_iter().enumerate().filter(|(_, channel)| channel.members.contains(&rank))
    {
        let id = told.iter().flatten().find(|(of, _)| *of == number).map(|(_, id)| id.clone());
        own.push((
            channel,
            id.ok_or_else(|| Error::Internal(format!("nobody has named channel {number}")))?,
        ));
    }

    Ok(own)
}

/// Joins all communicators and lets their members meet, on a thread of its own: NCCL's calls wait
/// for the other members, however long that takes. Afterwards none does.
fn connected(
    api: Api,
    named: Vec<(Channel, Vec<u8>)>,
    connection: &Connection,
    gate: &Arc<Gate>,
) -> Result<(Cuda, Vec<Channel>)> {
    let Connection { rank, index, patience, .. } = *connection;
    // NCCL rounds a sum of bf16 after every addition; of two there is only one.
    let ordered = connection.deterministic || connection.wire == Wire::Bf16;
    let purposes: Vec<Purpose> = named.iter().map(|(channel, _)| channel.purpose).collect();
    let steps = Arc::new(AtomicUsize::new(0));
    let (done, result) = sync_channel(1);
    let (counted, gate) = (Arc::clone(&steps), Arc::clone(gate));
    let body = move || {
        let _ = done.send(meet(api, named, rank, index, ordered, gate, &counted)); // Nobody listens any more if it was too late.
    };

    let thread = std::thread::Builder::new().name("nccl set-up".into()).spawn(body);
    thread.map_err(|error| Error::Internal(format!("no thread for NCCL's set-up ({error})")))?;

    let (mut seen, mut since) = (0, Instant::now());
    loop {
        match result.recv_timeout(patience.min(Duration::from_secs(1))) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Internal("a panic in NCCL's set-up".into()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }

        let step = steps.load(Ordering::Relaxed);
        if step > seen {
            (seen, since) = (step, Instant::now());
        } else if since.elapsed() > patience {
            let purpose = purposes[seen % purposes.len()];
            return Err(Error::Device(format!(
                "timed out after {:.0} s: NCCL does not connect {purpose:?}: a member is missing, or cannot be reached",
                patience.as_secs_f64()
            )));
        }
    }
}

/// Joins the communicators, channel by channel; then lets the members of every channel meet. NCCL
/// connects two devices when the first message between them is asked for, and only when both ends
/// have done so; until then the host waits in that call. Later a receive may be posted before the
/// sender can have anything to send: the hosts must not have to wait for each other then.
fn meet(
    api: Api,
    named: Vec<(Channel, Vec<u8>)>,
    rank: usize,
    index: usize,
    ordered: bool,
    gate: Arc<Gate>,
    steps: &AtomicUsize,
) -> Result<(Cuda, Vec<Channel>)> {
    // NCCL takes the device that is this thread's when a communicator is made.
    let queues = CudaQueues::new(index)?;
    queues.bind()?;
    let (mut own, mut joined) = (Vec::new(), Vec::new());
    for (channel, id) in named {
        let Channel { purpose, members } = &channel;
        let me = members.iter().position(|member| *member == rank).unwrap_or_default();
        let most = if matches!(purpose, Purpose::Group(_)) { GROUP_CTAS } else { LINK_CTAS };
        let communicator = api.join(&id, me, members.len(), most)?;
        joined.push(Joined {
            communicator,
            me,
            members: members.len(),
            other: usize::from(me == 0),
        });

        own.push(channel);
        steps.fetch_add(1, Ordering::Relaxed);
    }

    let (times, about) = (Times::new(), Mutex::default());
    let nccl = Nccl { api, joined, times, gate, about, index, ordered };
    let mut fabric = Fabric::new(queues, nccl, own.len())?;
    for (channel, Channel { purpose, members }) in own.iter().enumerate() {
        // So many values that of an ordered sum every member has some.
        let values = [(members.len() * ordered::ALIGN) as i64];
        let value = Tensor::f_zeros(values, (Kind::Float, Device::Cuda(index)))?;
        match purpose {
            Purpose::Group(_) => {
                let done = fabric.sum(channel, value)?;
                fabric.wait(channel, &done)?;
            }
            _ if members[0] == rank => fabric.send(channel, value)?,
            _ => {
                let room = fabric.room(value)?;
                let posted = fabric.post(channel, room)?;
                let _ = to_host(&fabric.take(posted)?)?;
            }
        }

        while !fabric.settled()? {
            std::thread::sleep(LOOK);
        }

        steps.fetch_add(1, Ordering::Relaxed);
    }

    Ok((fabric, own))
}
