//! The grid as threads of one process: channels for links, a star of channels around replica 0 for
//! a replica group.
//!
//! A thread that ends drops its ends of the channels, so whoever waits for it wakes with an error
//! at once.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use tch::Tensor;

use super::permits::{Permit, Permits};
use super::{Endpoints, Header, Link, Ports, Reduction, ReplicaGroup, Transfer, checked};
use crate::control::{Control, Controls, Gate, Report, Reporter};
use crate::error::{Error, Result};
use crate::grid::{Grid, Place};
use crate::trace::{Event, Moment, Span};
use crate::wire::Wire;

type Message = (Header, Tensor, Permit);

/// The ports of all ranks, in their order, and what tells them all. `capacity` bounds the messages
/// under way on a link; steps before `limit` may be begun at once.
pub fn connect(
    grid: Grid,
    capacity: usize,
    wire: Wire,
    limit: usize,
    reports: &Sender<Report>,
) -> (Vec<Ports>, Controls) {
    let gate = |_| Arc::new(Gate::new(limit, "this process", None));
    let gates: Vec<Arc<Gate>> = (0..grid.size()).map(gate).collect();
    let of = |place: Place| Arc::clone(&gates[grid.rank(place)]);
    let link = |a: Place, b: Place| link((a, of(a)), (b, of(b)), capacity);
    let mut ends: BTreeMap<Place, Endpoints> =
        grid.places().map(|place| (place, Endpoints::default())).collect();
    for place in grid.places() {
        if let Some(next) = grid.downstream(place) {
            let (above, below) = link(place, next);
            ends.entry(place).or_default().downstream = Some(above);
            ends.entry(next).or_default().upstream = Some(below);
        }

        if place.stage == 0
            && let Some(twin) = grid.twin(place)
        {
            let (first, last) = link(place, twin);
            ends.entry(place).or_default().twin = Some(first);
            ends.entry(twin).or_default().twin = Some(last);
        }
    }

    if grid.replicas > 1 {
        for stage in 0..grid.stages {
            for (place, group) in grid.group(stage).zip(groups(grid, stage, wire, &of)) {
                ends.entry(place).or_default().group = Some(group);
            }
        }
    }

    let ports = |rank: usize| {
        let reports = reports.clone();
        let gone = move |_| Error::Lost {
            peer: grid.held(0)[0],
            doing: format!("{} reports", grid.name(rank)),
        };
        let reporter = Reporter::new(move |report| reports.send(report).map_err(gone));
        let places =
            grid.held(rank).iter().map(|place| ends.remove(place).unwrap_or_default()).collect();
        Ports { places, reports: reporter, gate: Arc::clone(&gates[rank]), transfers: None }
    };

    let ports: Vec<Ports> = (0..grid.size()).map(ports).collect();
    let reports = reports.clone();
    let tell = move |control| {
        for (rank, gate) in gates.iter().enumerate() {
            gate.apply(control);
            if control == Control::Ask {
                let _ = reports.send(Report::Heartbeat { rank, beat: gate.heartbeat.beat() }); // The coordinator itself asks.
            }
        }
    };

    (ports, Controls::new(tell))
}

/// Both ends of a link between two places, each with its rank's gate.
fn link(
    (a, gate_a): (Place, Arc<Gate>),
    (b, gate_b): (Place, Arc<Gate>),
    capacity: usize,
) -> (Box<dyn Link>, Box<dyn Link>) {
    let (down, from_a) = channel();
    let (up, from_b) = channel();
    let end = |me, gate, peer, sender, receiver| {
        let (permits, room, expected) = (Permits::new(capacity), None, VecDeque::new());
        Box::new(LocalLink { me, gate, peer, sender, receiver, permits, room, expected })
    };
    (end(a, gate_a, b, down, from_b), end(b, gate_b, a, up, from_a))
}

struct LocalLink {
    me: Place,
    gate: Arc<Gate>,
    peer: Place,
    sender: Sender<Message>,
    receiver: Receiver<Message>,
    permits: Permits,
    /// For the next message, where it was waited for.
    room: Option<Permit>,
    /// What was said to come: whoever says something else is found here, where tests run.
    expected: VecDeque<Header>,
}

impl Link for LocalLink {
    // A neighbour that ends drops what it has not taken, which makes room.
    fn await_room(&mut self) -> Result<bool> {
        if self.room.is_some() {
            return Ok(false);
        }

        self.room = self.permits.try_acquire();
        let waits = self.room.is_none();
        self.room.get_or_insert_with(|| self.permits.acquire());
        Ok(waits)
    }

    fn send(&mut self, header: Header, tensor: Tensor) -> Result<()> {
        self.await_room()?;
        let room = self.room.take().ok_or_else(|| Error::Internal("no room".to_owned()))?;
        let lost =
            |_| Error::Lost { peer: self.peer, doing: format!("{} sends {header}", self.me) };
        let transfer = self.gate.tracer.on().then(|| Transfer::begin(&header, self.me.stage));
        self.sender.send((header, tensor, room)).map_err(lost)?;
        transfer.into_iter().for_each(|transfer| self.gate.tracer.add(transfer.end()));
        Ok(())
    }

    fn prepare(&mut self, expected: Header) -> Result<()> {
        self.expected.push_back(expected);
        Ok(())
    }

    fn receive(&mut self, expected: Header) -> Result<Tensor> {
        if let Some(first) = self.expected.pop_front().filter(|first| *first != expected) {
            return Err(Error::Internal(format!(
                "{} expects {first} and takes {expected}",
                self.me
            )));
        }
        let lost =
            |_| Error::Lost { peer: self.peer, doing: format!("{} waits for {expected}", self.me) };
        let (found, tensor, _) = self.receiver.recv().map_err(lost)?;
        checked(self.peer, self.me, expected, found)?;
        Ok(tensor)
    }
}

/// What travels in a replica group: the number of the half of a sum among those of its group, and
/// values.
type Numbered<T> = (u64, T);

/// Values from one member, by the number of their half of a sum: two may be under way, and be
/// waited for in any order.
struct Mailbox<T> {
    receiver: Receiver<Numbered<T>>,
    early: BTreeMap<u64, T>,
}

impl<T> Mailbox<T> {
    fn new(receiver: Receiver<Numbered<T>>) -> Mailbox<T> {
        Mailbox { receiver, early: BTreeMap::new() }
    }

    fn take(&mut self, number: u64) -> Option<T> {
        while !self.early.contains_key(&number) {
            let (found, values) = self.receiver.recv().ok()?;
            self.early.insert(found, values);
        }
        self.early.remove(&number)
    }
}

/// Replica 0 owns everything: it adds up, in the order of the replicas, so the sum is the same for
/// every run and every R.
struct Leader {
    gate: Arc<Gate>,
    stage: usize,
    wire: Wire,
    members: Arc<Mutex<Vec<Member>>>,
    started: Started,
}

/// Replica 0's ends towards another replica.
struct Member {
    mailbox: Mailbox<Tensor>,
    sender: Sender<Numbered<Tensor>>,
}

struct Follower {
    gate: Arc<Gate>,
    place: Place,
    wire: Wire,
    sender: Sender<Numbered<Tensor>>,
    mailbox: Arc<Mutex<Mailbox<Tensor>>>,
    started: Started,
}

/// How many of each half of a sum were started.
#[derive(Default)]
struct Started {
    reduces: u64,
    gathers: u64,
}

impl Started {
    fn reduce(&mut self) -> u64 {
        self.reduces += 1;
        self.reduces - 1
    }

    fn gather(&mut self) -> u64 {
        self.gathers += 1;
        self.gathers - 1
    }
}

fn groups(
    grid: Grid,
    stage: usize,
    wire: Wire,
    gate: &dyn Fn(Place) -> Arc<Gate>,
) -> Vec<Box<dyn ReplicaGroup>> {
    let mut members = Vec::new();
    let mut followers: Vec<Box<dyn ReplicaGroup>> = Vec::new();
    for place in grid.group(stage).skip(1) {
        let (to_leader, receiver) = channel();
        let (sender, from_leader) = channel();
        members.push(Member { mailbox: Mailbox::new(receiver), sender });
        let mailbox = Arc::new(Mutex::new(Mailbox::new(from_leader)));
        followers.push(Box::new(Follower {
            gate: gate(place),
            place,
            wire,
            sender: to_leader,
            mailbox,
            started: Started::default(),
        }));
    }

    let members = Arc::new(Mutex::new(members));
    let leader: Box<dyn ReplicaGroup> = Box::new(Leader {
        gate: gate(Place { stage, replica: 0 }),
        stage,
        wire,
        members,
        started: Started::default(),
    });
    std::iter::once(leader).chain(followers).collect()
}

/// A half of a sum that is made when it is waited for.
type Half = Box<dyn FnOnce() -> Result<()> + Send>;

/// A sum of `flat`, from now until it has been waited for, as traces show it.
fn traced(gate: &Arc<Gate>, stage: usize, step: usize, flat: &Tensor, half: Half) -> Half {
    if !gate.tracer.on() {
        return half;
    }

    let (gate, begin) = (Arc::clone(gate), Moment::now());
    let bytes = (flat.numel() * size_of::<f32>()) as u64;
    Box::new(move || {
        half()?;
        let span = Span { begin, end: Moment::now() };
        gate.tracer.add(Event::Sum { stage, step, bytes, span });
        Ok(())
    })
}

impl Leader {
    fn lost(stage: usize, step: usize, replica: usize) -> Error {
        let peer = Place { stage, replica };
        Error::Lost { peer, doing: format!("the gradient of step {step} is reduced") }
    }

    /// Adds up what the others send under this number.
    fn adds(&self, step: usize, number: u64, mut flat: Tensor) -> Half {
        let (members, stage, wire) = (Arc::clone(&self.members), self.stage, self.wire);
        Box::new(move || {
            let lost = |replica| Leader::lost(stage, step, replica);
            let mut members = members.lock().map_err(|_| lost(0))?;
            wire.round(&mut flat)?;
            for (i, member) in members.iter_mut().enumerate() {
                let gradient = member.mailbox.take(number).ok_or_else(|| lost(i + 1))?;
                let _ = flat.f_add_(&gradient)?;
            }

            Ok(wire.round(&mut flat)?)
        })
    }

    /// Sends its values to the others under this number.
    fn sends(&self, step: usize, number: u64, mut flat: Tensor) -> Half {
        let (members, stage, wire) = (Arc::clone(&self.members), self.stage, self.wire);
        Box::new(move || {
            let lost = |replica| Leader::lost(stage, step, replica);
            let members = members.lock().map_err(|_| lost(0))?;
            wire.round(&mut flat)?;
            let sum = flat.f_detach_copy()?;
            for (i, member) in members.iter().enumerate() {
                member.sender.send((number, sum.shallow_clone())).map_err(|_| lost(i + 1))?;
            }

            Ok(())
        })
    }
}

impl ReplicaGroup for Leader {
    fn all_reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        let (reduce, gather) = (self.started.reduce(), self.started.gather());
        let adds = self.adds(step, reduce, flat.shallow_clone());
        let sends = self.sends(step, gather, flat.shallow_clone());
        let both: Half = Box::new(move || adds().and_then(|()| sends()));
        Ok(Reduction::new(traced(&self.gate, self.stage, step, &flat, both)))
    }

    fn reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        let number = self.started.reduce();
        Ok(Reduction::new(self.adds(step, number, flat)))
    }

    fn gather(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        let number = self.started.gather();
        self.sends(step, number, flat)()?;
        Ok(Reduction::new(|| Ok(())))
    }
}

impl Follower {
    fn lost(&self, step: usize) -> Error {
        let peer = Place { replica: 0, ..self.place };
        Error::Lost { peer, doing: format!("the gradient of step {step} is reduced") }
    }

    /// Sends its values to replica 0.
    fn send(&mut self, step: usize, flat: &Tensor) -> Result<()> {
        let mut flat = flat.shallow_clone();
        self.wire.round(&mut flat)?;
        let number = self.started.reduce();
        self.sender.send((number, flat.f_detach_copy()?)).map_err(|_| self.lost(step))
    }

    /// Takes the sum from replica 0.
    fn takes(&mut self, step: usize, mut flat: Tensor) -> Half {
        let (mailbox, number, lost) =
            (Arc::clone(&self.mailbox), self.started.gather(), self.lost(step));
        Box::new(move || {
            let sum = mailbox.lock().ok().and_then(|mut mailbox| mailbox.take(number));
            Ok(flat.f_copy_(&sum.ok_or(lost)?)?)
        })
    }
}

impl ReplicaGroup for Follower {
    fn all_reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.send(step, &flat)?;
        let takes = self.takes(step, flat.shallow_clone());
        Ok(Reduction::new(traced(&self.gate, self.place.stage, step, &flat, takes)))
    }

    fn owned(&self, len: usize) -> Range<usize> {
        len..len
    }

    fn reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.send(step, &flat)?;
        Ok(Reduction::new(|| Ok(())))
    }

    fn gather(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        Ok(Reduction::new(self.takes(step, flat)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Content;
    use super::*;
    use crate::params::{slice, slice_mut, zeros};
    use crate::schedule::Pass;
    use tch::Device;

    fn header(step: usize) -> Header {
        Header {
            content: Content::Activation,
            pass: Pass::Train,
            step,
            microbatch: 0,
            shape: [1, 1, 2],
            wire: Wire::F32,
            payload_elsewhere: false,
        }
    }

    #[test]
    fn a_link_carries_and_checks() {
        let mut ports = connect(Grid::line(2, 1), 2, Wire::F32, 0, &channel().0).0;
        let mut below = ports.pop().unwrap().places.remove(0).upstream.unwrap();
        let mut above = ports.pop().unwrap().places.remove(0).downstream.unwrap();
        above.send(header(3), Tensor::from_slice(&[1f32, 2.0])).unwrap();
        assert_eq!(below.receive(header(3)).unwrap(), Tensor::from_slice(&[1f32, 2.0]));
        above.send(header(4), Tensor::from_slice(&[1f32, 2.0])).unwrap();
        assert_eq!(
            below.receive(header(5)).unwrap_err().to_string(),
            "wrong message from stage 0, replica 0 to stage 1, replica 0: expected activation 5.0 f32 [1, 1, 2], found \
             activation 4.0 f32 [1, 1, 2]; do all ranks run the same program and config?"
        );
        drop(above);
        assert!(matches!(below.receive(header(5)), Err(Error::Lost { .. })));
    }

    #[test]
    fn a_group_adds_in_the_order_of_the_replicas() {
        let values = [1e8f32, 1.0, -1e8];
        let threads: Vec<_> = connect(Grid::line(1, 3), 2, Wire::F32, 0, &channel().0)
            .0
            .into_iter()
            .zip(values)
            .enumerate()
            .map(|(replica, (mut ports, value))| {
                std::thread::spawn(move || {
                    let (mut first, mut second) =
                        (zeros(4, Device::Cpu).unwrap(), zeros(2, Device::Cpu).unwrap());
                    slice_mut(&mut first).fill(value);
                    slice_mut(&mut second).fill(1.0);
                    let mut group = ports.places.remove(0).group.unwrap();
                    let one = group.all_reduce(0, first.shallow_clone()).unwrap();
                    let two = group.all_reduce(0, second.shallow_clone()).unwrap();
                    // Every member may wait in an order of its own.
                    let (early, late) = if replica == 1 { (two, one) } else { (one, two) };
                    early.wait().unwrap();
                    late.wait().unwrap();
                    (slice(&first)[3], slice(&second)[1])
                })
            })
            .collect();
        let expected = (values[0] + values[1]) + values[2];
        for thread in threads {
            assert_eq!(thread.join().unwrap(), (expected, 3.0));
        }
    }

    /// The halves one after the other are the whole; every value is owned once.
    #[test]
    fn a_sum_in_halves_is_the_same() {
        let threads: Vec<_> = connect(Grid::line(1, 3), 2, Wire::F32, 0, &channel().0)
            .0
            .into_iter()
            .enumerate()
            .map(|(replica, mut ports)| {
                std::thread::spawn(move || {
                    let values: Vec<f32> =
                        (0..7).map(|i| (i as f32 + 1.7).powi(3 + replica as i32)).collect();
                    let (whole, halves) =
                        (Tensor::from_slice(&values), Tensor::from_slice(&values));
                    let mut group = ports.places.remove(0).group.unwrap();
                    group.all_reduce(0, whole.shallow_clone()).unwrap().wait().unwrap();
                    group.reduce(0, halves.shallow_clone()).unwrap().wait().unwrap();
                    let owned = group.owned(7);
                    assert_eq!(slice(&halves)[owned.clone()], slice(&whole)[owned.clone()]);
                    group.gather(0, halves.shallow_clone()).unwrap().wait().unwrap();
                    assert_eq!(slice(&halves), slice(&whole));
                    owned.len()
                })
            })
            .collect();
        assert_eq!(threads.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>(), 7);
    }
}
