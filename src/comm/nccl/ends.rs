//! Links and groups whose values go over a fabric, and whose headers over another transport.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tch::{Device, Tensor};

use super::channels::{Channel, Purpose};
use super::fabric::{Carrier, Fabric, Room};
use crate::comm::{AsyncTransfers, Endpoints, Header, Link, Reduction, ReplicaGroup};
use crate::device::queues::Queues;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::trace::{Event, Span};
use crate::wire::Wire;

/// Between two looks at transfers that are waited for at the end.
pub(super) const LOOK: Duration = Duration::from_micros(200);

/// What is moved, and how.
#[derive(Clone, Copy)]
pub(super) struct Travel {
    pub grid: Grid,
    pub rank: usize,
    pub device: Device,
    /// How sums travel.
    pub wire: Wire,
    /// Whether a tied table is exchanged.
    pub tied: bool,
}

/// What the places of a rank talk through: `headers` and the fabric, whose channels are those of
/// the rank, in this order. `made` makes a link of one over the fabric.
///
/// # Errors
/// If a link has no channel.
pub(super) fn over<Q, C>(
    headers: Vec<Endpoints>,
    travel: Travel,
    own: &[Channel],
    fabric: &Shared<Q, C>,
    made: impl Fn(FabricLink<Q, C>) -> Box<dyn Link>,
) -> Result<Vec<Endpoints>>
where
    Q: Queues + Send + 'static,
    Q::Mark: Send,
    C: Carrier<Q, Buffer = Tensor> + Send + 'static,
{
    let Travel { grid, rank, device, wire, tied } = travel;
    let find = |purpose| own.iter().position(|channel| channel.purpose == purpose);
    let link = |headers: Option<Box<dyn Link>>,
                stage: usize,
                out: Purpose,
                back: Option<Purpose>|
     -> Result<Option<Box<dyn Link>>> {
        let Some(headers) = headers else { return Ok(None) };
        let (Some(out), Some(back)) = (find(out), back.and_then(find)) else {
            return Err(Error::Internal("a link without channels".into()));
        };

        let (fabric, rooms) = (fabric.clone(), VecDeque::new());
        Ok(Some(made(FabricLink { headers, fabric, out, back, device, stage, rooms })))
    };

    let mut places = Vec::new();
    for (place, ends) in grid.held(rank).into_iter().zip(headers) {
        let group = find(Purpose::Group(place.stage)).filter(|_| ends.group.is_some());
        let stage = place.stage;
        let group =
            group.map(|channel| FabricGroup { fabric: fabric.clone(), channel, stage, wire });
        places.push(Endpoints {
            upstream: link(
                ends.upstream,
                stage,
                Purpose::Up(place),
                grid.upstream(place).map(Purpose::Down),
            )?,
            downstream: link(
                ends.downstream,
                stage,
                Purpose::Down(place),
                grid.downstream(place).map(Purpose::Up),
            )?,
            twin: match tied {
                true => link(
                    ends.twin,
                    stage,
                    Purpose::Twin(place),
                    grid.twin(place).map(Purpose::Twin),
                )?,
                false => None,
            },
            group: group.map(|group| Box::new(group) as Box<dyn ReplicaGroup>),
        });
    }

    Ok(places)
}

/// The fabric of this rank, for all its links and groups. One thread works with it.
pub(super) struct Shared<Q: Queues, C: Carrier<Q>>(Arc<Mutex<Fabric<Q, C>>>);

impl<Q: Queues, C: Carrier<Q>> Clone for Shared<Q, C> {
    fn clone(&self) -> Shared<Q, C> {
        Shared(Arc::clone(&self.0))
    }
}

impl<Q: Queues, C: Carrier<Q>> Shared<Q, C> {
    pub(super) fn new(fabric: Fabric<Q, C>) -> Shared<Q, C> {
        Shared(Arc::new(Mutex::new(fabric)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Fabric<Q, C>> {
        // After a panic the run ends; what is left to do is to say so.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<Q, C> AsyncTransfers for Shared<Q, C>
where
    Q: Queues + Send,
    Q::Mark: Send,
    C: Carrier<Q, Buffer = Tensor> + Send,
{
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

/// Messages that are expected, and the room for each.
type Rooms<M, B> = VecDeque<(Header, Room<M, B>)>;

/// A link between two devices.
pub(super) struct FabricLink<Q: Queues, C: Carrier<Q>> {
    pub(super) headers: Box<dyn Link>,
    pub(super) fabric: Shared<Q, C>,
    /// The channels out and back.
    out: usize,
    pub(super) back: usize,
    device: Device,
    /// The stage that sends here.
    stage: usize,
    rooms: Rooms<Q::Mark, C::Buffer>,
}

impl<Q, C> Link for FabricLink<Q, C>
where
    Q: Queues + Send,
    Q::Mark: Send,
    C: Carrier<Q, Buffer = Tensor> + Send,
{
    fn await_room(&mut self) -> Result<bool> {
        self.headers.await_room()
    }

    fn send(&mut self, header: Header, tensor: Tensor) -> Result<()> {
        let (action, bytes) = (header.action(self.stage), header.bytes());
        let fabric = &mut self.fabric.lock();
        fabric.about(Event::Transfer { action, bytes, span: Span::default() });
        fabric.send(self.out, tensor.f_contiguous()?)?;
        self.headers.send(Header { payload_elsewhere: true, ..header }, Tensor::new())
    }

    fn prepare(&mut self, expected: Header) -> Result<()> {
        let memory = Tensor::f_empty(expected.shape, (expected.wire.kind(), self.device))?;
        let room = self.fabric.lock().room(memory)?;
        self.rooms.push_back((expected, room));
        Ok(())
    }

    fn receive(&mut self, expected: Header) -> Result<Tensor> {
        if self.rooms.is_empty() {
            self.prepare(expected)?;
        }

        let room = match self.rooms.pop_front() {
            Some((header, room)) if header == expected => room,
            other => {
                let found = other.map_or("nothing".to_owned(), |(header, _)| header.to_string());
                return Err(Error::Internal(format!(
                    "{expected} is received where {found} is expected"
                )));
            }
        };

        let posted = self.fabric.lock().post(self.back, room)?;
        // First: a message that is not the right one must be told, not waited for.
        let _ = self.headers.receive(Header { payload_elsewhere: true, ..expected })?;
        self.fabric.lock().take(posted)
    }
}

/// The replicas of a stage on their devices.
struct FabricGroup<Q: Queues, C: Carrier<Q>> {
    fabric: Shared<Q, C>,
    channel: usize,
    stage: usize,
    wire: Wire,
}

impl<Q, C> ReplicaGroup for FabricGroup<Q, C>
where
    Q: Queues + Send + 'static,
    Q::Mark: Send,
    C: Carrier<Q, Buffer = Tensor> + Send + 'static,
{
    fn all_reduce(&mut self, step: usize, mut flat: Tensor) -> Result<Reduction> {
        let packed = match self.wire {
            Wire::F32 => flat.shallow_clone(),
            Wire::Bf16 => self.wire.pack(&flat)?,
        };

        let bytes = (packed.numel() * self.wire.bytes()) as u64;
        let done = {
            let mut fabric = self.fabric.lock();
            fabric.about(Event::Sum { stage: self.stage, step, bytes, span: Span::default() });
            fabric.sum(self.channel, packed.shallow_clone())?
        };
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
