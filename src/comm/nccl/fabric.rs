//! The order of transfers on a device, and who holds their memory meanwhile.
//!
//! Every channel (one direction of a link, or a replica group) has a queue of its own, so transfers
//! overlap with compute and with each other. The order between queues, right whatever the device
//! does first:
//!
//! ```text
//! send       compute:  ... makes x |a|                    channel:  follows a | send x | b |      x is held until b has passed
//! receive    compute:  ... |a| .................. follows b | uses x
//!            channel:            follows a | receive into x | b |
//!            x is new memory: what compute did with it before, under another name, is done at a. Nothing of x is
//!            given back before compute follows b, so what compute does with it after x is after b.
//!            host:     marks a   asks for the compute between   asks for the receive   has its header, follows b
//! all-reduce compute:  ... gradient |a| ... |waits: follows b| update
//!            channel:            follows a | sum in place | b |       the gradient is held until b has passed
//! ```
//!
//! Room for a receive may be made long before it is posted: `a` is then early, and the transfer
//! overlaps with the compute between, although the host has asked for that compute first. It must:
//! a receive that is posted cannot end before its sender has sent, which may need what that very
//! compute makes; and whatever then waits for the whole device (libtorch giving memory back to the
//! driver, a kernel that is loaded) waits for ever. So all transfers of a rank are put on their
//! queues by one thread in the order of its action list, which is the same for the same place of
//! every replica, and at every moment all work of a device can be done without any that a host
//! would only ask for later (`deadlock` has the proof by example).

use std::collections::VecDeque;

use crate::device::queues::{Queue, Queues};
use crate::error::Result;
use crate::trace::Event;

/// What moves values between the members of a channel. Tests have a model of one.
pub trait Carrier<Q: Queues> {
    type Buffer;

    /// Puts the sending of a buffer on a channel's queue.
    fn send(&self, channel: usize, buffer: &Self::Buffer, queues: &Q, queue: Queue) -> Result<()>;

    /// Puts the receiving of a buffer on a channel's queue.
    fn receive(
        &self,
        channel: usize,
        buffer: &Self::Buffer,
        queues: &Q,
        queue: Queue,
    ) -> Result<()>;

    /// Memory that the sum of a buffer needs besides, if any.
    fn scratch(
        &self,
        _channel: usize,
        _buffer: &Self::Buffer,
        _queues: &Q,
    ) -> Result<Option<Self::Buffer>> {
        Ok(None)
    }

    /// Puts the sum of a buffer over the channel's members, in place, on its queue.
    fn sum(
        &self,
        channel: usize,
        buffer: &Self::Buffer,
        scratch: Option<&Self::Buffer>,
        queues: &Q,
        queue: Queue,
    ) -> Result<()>;

    /// What the next sending or sum is in a trace.
    fn about(&self, _event: Event) {}

    /// Compute has come to where it needs a channel's oldest sum.
    fn wanted(&self, _channel: usize, _queues: &Q) -> Result<()> {
        Ok(())
    }

    /// Everything is done.
    fn done(&self) -> Result<()> {
        Ok(())
    }

    /// What has gone wrong meanwhile.
    fn check(&self) -> Result<()>;
}

/// Memory for a receive: what compute has done with it before is done at a mark.
pub struct Room<M, B> {
    free: M,
    buffer: B,
}

/// A receive that is under way.
pub struct Posted<M, B> {
    done: M,
    buffer: B,
}

/// Memory that a channel's queue still uses.
struct Held<M, B> {
    done: M,
    _buffers: [Option<B>; 2],
}

/// A channel's queue, and what it still uses, in order.
type Line<M, B> = (Queue, VecDeque<Held<M, B>>);

/// The channels of a rank.
pub struct Fabric<Q: Queues, C: Carrier<Q>> {
    queues: Q,
    carrier: C,
    channels: Vec<Line<Q::Mark, C::Buffer>>,
}

impl<Q: Queues, C: Carrier<Q>> Fabric<Q, C> {
    /// So many channels.
    pub fn new(mut queues: Q, carrier: C, channels: usize) -> Result<Fabric<Q, C>> {
        let channels =
            (0..channels).map(|_| Ok((queues.add()?, VecDeque::new()))).collect::<Result<_>>()?;
        Ok(Fabric { queues, carrier, channels })
    }

    /// The channel's queue, behind all compute so far.
    fn behind_compute(&self, channel: usize) -> Result<Queue> {
        let queue = self.channels[channel].0;
        let ready = self.queues.mark(Queue::Compute)?;
        self.queues.follow(queue, &ready)?;
        Ok(queue)
    }

    fn hold(
        &mut self,
        channel: usize,
        done: Q::Mark,
        buffer: C::Buffer,
        scratch: Option<C::Buffer>,
    ) {
        self.channels[channel].1.push_back(Held { done, _buffers: [Some(buffer), scratch] });
    }

    /// Gives back what no queue uses any more, and looks for errors.
    fn sweep(&mut self) -> Result<()> {
        self.carrier.check()?;
        for (_, held) in &mut self.channels {
            while let Some(first) = held.front() {
                if !self.queues.passed(&first.done)? {
                    break;
                }

                held.pop_front();
            }
        }

        Ok(())
    }

    /// What the next sending or sum is in a trace.
    pub fn about(&self, event: Event) {
        self.carrier.about(event);
    }

    /// Sends what compute has made.
    pub fn send(&mut self, channel: usize, buffer: C::Buffer) -> Result<()> {
        self.sweep()?;
        let queue = self.behind_compute(channel)?;
        self.carrier.send(channel, &buffer, &self.queues, queue)?;
        let done = self.queues.mark(queue)?;
        self.hold(channel, done, buffer, None);
        Ok(())
    }

    /// Memory that nobody has used yet, for a receive that is posted now or later.
    pub fn room(&mut self, buffer: C::Buffer) -> Result<Room<Q::Mark, C::Buffer>> {
        Ok(Room { free: self.queues.mark(Queue::Compute)?, buffer })
    }

    /// Posts a receive.
    pub fn post(
        &mut self,
        channel: usize,
        room: Room<Q::Mark, C::Buffer>,
    ) -> Result<Posted<Q::Mark, C::Buffer>> {
        self.sweep()?;
        let Room { free, buffer } = room;
        let queue = self.channels[channel].0;
        self.queues.follow(queue, &free)?;
        self.carrier.receive(channel, &buffer, &self.queues, queue)?;
        Ok(Posted { done: self.queues.mark(queue)?, buffer })
    }

    /// What a receive brings, for compute from now on.
    pub fn take(&mut self, posted: Posted<Q::Mark, C::Buffer>) -> Result<C::Buffer> {
        let Posted { done, buffer } = posted;
        self.queues.follow(Queue::Compute, &done)?;
        Ok(buffer)
    }

    /// Starts the sum of a buffer over the channel's members, in place; gives the mark behind it.
    pub fn sum(&mut self, channel: usize, buffer: C::Buffer) -> Result<Q::Mark> {
        self.sweep()?;
        // Before the mark of what compute has done so far: libtorch may fill it there.
        let scratch = self.carrier.scratch(channel, &buffer, &self.queues)?;
        let queue = self.behind_compute(channel)?;
        self.carrier.sum(channel, &buffer, scratch.as_ref(), &self.queues, queue)?;
        let (done, kept) = (self.queues.mark(queue)?, self.queues.mark(queue)?);
        self.hold(channel, kept, buffer, scratch);
        Ok(done)
    }

    /// Compute from now on comes after the oldest sum of a channel, whose mark is `done`.
    pub fn wait(&self, channel: usize, done: &Q::Mark) -> Result<()> {
        self.carrier.wanted(channel, &self.queues)?;
        self.queues.follow(Queue::Compute, done)
    }

    /// What has gone wrong meanwhile.
    pub fn check(&self) -> Result<()> {
        self.carrier.check()
    }

    /// Whether every channel has done what was asked of it.
    pub fn settled(&mut self) -> Result<bool> {
        self.sweep()?;
        let settled = self.channels.iter().all(|(_, held)| held.is_empty());
        if settled {
            self.carrier.done()?;
        }
        Ok(settled)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::rc::Rc;

    use super::*;

    /// A device: work with the work that must be done before it, and what the host has seen done.
    #[derive(Default)]
    struct Model {
        /// Queue, what it does, the work right before it.
        work: Vec<(Queue, Doing, Vec<usize>)>,
        last: Vec<(Queue, usize)>,
        follows: Vec<(Queue, usize)>,
        /// Work that the host has seen done.
        seen: BTreeSet<usize>,
        /// Buffer, work when its memory was got, work when it was given back and what had been seen
        /// by then.
        got: Vec<usize>,
        freed: Vec<Option<(usize, BTreeSet<usize>)>>,
        chance: u64,
    }

    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Doing {
        Makes(usize),
        Uses(usize),
        Moves(usize),
        Mark,
    }

    impl Model {
        fn put(&mut self, queue: Queue, doing: Doing) -> usize {
            let mut before: Vec<usize> =
                self.last.iter().filter(|(of, _)| *of == queue).map(|(_, work)| *work).collect();
            self.follows.retain(|(of, mark)| {
                if *of == queue {
                    before.push(*mark);
                }
                *of != queue
            });
            self.work.push((queue, doing, before));
            let number = self.work.len() - 1;
            self.last.retain(|(of, _)| *of != queue);
            self.last.push((queue, number));
            number
        }

        /// All work that is surely done before some.
        fn before(&self, work: usize) -> BTreeSet<usize> {
            let (mut found, mut open) = (BTreeSet::new(), vec![work]);
            while let Some(next) = open.pop() {
                open.extend(self.work[next].2.iter().filter(|one| found.insert(**one)));
            }
            found
        }

        /// What could go wrong: a transfer beside work on the same memory, under this name or
        /// another.
        fn faults(&self) -> Vec<String> {
            let mut faults = Vec::new();
            let ordered = |one: usize, other: usize| {
                self.before(other).contains(&one) || self.before(one).contains(&other)
            };
            for (transfer, (_, doing, _)) in self.work.iter().enumerate() {
                let Doing::Moves(buffer) = doing else { continue };
                for (work, (_, other, _)) in self.work.iter().enumerate() {
                    if matches!(other, Doing::Makes(of) | Doing::Uses(of) if of == buffer)
                        && !ordered(transfer, work)
                    {
                        faults.push(format!("{other:?} beside the transfer"));
                    }
                    // The memory may have been anybody's before it was got, and may be after it is
                    // given back.
                    let earlier =
                        work < self.got[*buffer] && !self.before(transfer).contains(&work);
                    let later = match &self.freed[*buffer] {
                        Some((when, seen)) => {
                            work >= *when
                                && !seen.contains(&transfer)
                                && !self.before(work).contains(&transfer)
                        }
                        None => false,
                    };
                    if self.work[work].0 == Queue::Compute
                        && *other != Doing::Mark
                        && (earlier || later)
                    {
                        faults.push(format!("{other:?} in memory of the transfer of {buffer}"));
                    }
                }
            }
            faults
        }
    }

    type Shared = Rc<RefCell<Model>>;

    struct Memory {
        number: usize,
        model: Shared,
    }

    impl Memory {
        fn new(model: &Shared) -> Memory {
            let mut of = model.borrow_mut();
            let now = of.work.len();
            of.got.push(now);
            of.freed.push(None);
            Memory { number: of.got.len() - 1, model: Rc::clone(model) }
        }

        fn put(&self, doing: fn(usize) -> Doing) {
            self.model.borrow_mut().put(Queue::Compute, doing(self.number));
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            let mut of = self.model.borrow_mut();
            let then = (of.work.len(), of.seen.clone());
            of.freed[self.number] = Some(then);
        }
    }

    struct ModelQueues(Shared, usize);

    impl Queues for ModelQueues {
        type Mark = usize;

        fn add(&mut self) -> Result<Queue> {
            self.1 += 1;
            Ok(Queue::Own(self.1 - 1))
        }

        fn mark(&self, queue: Queue) -> Result<usize> {
            Ok(self.0.borrow_mut().put(queue, Doing::Mark))
        }

        fn follow(&self, queue: Queue, mark: &usize) -> Result<()> {
            self.0.borrow_mut().follows.push((queue, *mark));
            Ok(())
        }

        /// Now and then; then everything before it is done too.
        fn passed(&self, mark: &usize) -> Result<bool> {
            let mut model = self.0.borrow_mut();
            model.chance = model
                .chance
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let passed = model.seen.contains(mark) || (model.chance >> 33).is_multiple_of(3);
            if passed {
                let before = model.before(*mark);
                model.seen.extend(before);
                model.seen.insert(*mark);
            }
            Ok(passed)
        }
    }

    struct ModelCarrier;

    impl Carrier<ModelQueues> for ModelCarrier {
        type Buffer = Rc<Memory>;

        fn send(
            &self,
            _: usize,
            buffer: &Rc<Memory>,
            queues: &ModelQueues,
            queue: Queue,
        ) -> Result<()> {
            queues.0.borrow_mut().put(queue, Doing::Moves(buffer.number));
            Ok(())
        }

        fn receive(
            &self,
            channel: usize,
            buffer: &Rc<Memory>,
            queues: &ModelQueues,
            queue: Queue,
        ) -> Result<()> {
            self.send(channel, buffer, queues, queue)
        }

        /// As deterministic libtorch gives memory: filled.
        fn scratch(
            &self,
            _: usize,
            _: &Rc<Memory>,
            queues: &ModelQueues,
        ) -> Result<Option<Rc<Memory>>> {
            let scratch = Memory::new(&queues.0);
            scratch.put(Doing::Makes);
            Ok(Some(Rc::new(scratch)))
        }

        fn sum(
            &self,
            channel: usize,
            buffer: &Rc<Memory>,
            scratch: Option<&Rc<Memory>>,
            queues: &ModelQueues,
            queue: Queue,
        ) -> Result<()> {
            self.send(channel, buffer, queues, queue)?;
            scratch.map_or(Ok(()), |scratch| self.send(channel, scratch, queues, queue))
        }

        fn check(&self) -> Result<()> {
            Ok(())
        }
    }

    fn model(chance: u64) -> (Shared, Fabric<ModelQueues, ModelCarrier>) {
        let model = Rc::new(RefCell::new(Model { chance, ..Model::default() }));
        let fabric = Fabric::new(ModelQueues(Rc::clone(&model), 0), ModelCarrier, 3).unwrap();
        (model, fabric)
    }

    /// What a middle stage of several replicas does, with receives posted a step before they are
    /// taken, and memory that is given back as soon as the host has no use for it.
    #[test]
    fn no_transfer_meets_other_work_on_its_memory() {
        for chance in 0..20 {
            let (model, mut fabric) = model(chance);
            let gradient = Rc::new(Memory::new(&model));
            let mut room = fabric.room(Rc::new(Memory::new(&model))).unwrap();
            for _ in 0..6 {
                let next = fabric.room(Rc::new(Memory::new(&model))).unwrap();
                let posted = fabric.post(0, std::mem::replace(&mut room, next)).unwrap();
                let x = fabric.take(posted).unwrap();
                x.put(Doing::Uses);
                let y = Rc::new(Memory::new(&model));
                y.put(Doing::Makes);
                gradient.put(Doing::Makes);
                drop(x);
                let done = fabric.sum(2, Rc::clone(&gradient)).unwrap();
                fabric.send(1, y).unwrap();
                Memory::new(&model).put(Doing::Makes);
                fabric.wait(2, &done).unwrap();
                gradient.put(Doing::Uses);
            }
            let tries = (0..100).find(|_| fabric.settled().unwrap());
            assert!(tries.is_some());
            assert_eq!(model.borrow().faults(), Vec::<String>::new(), "{chance}");
        }
    }

    /// The model sees what it is there to see.
    #[test]
    fn what_is_forgotten_is_seen() {
        let faulty = |forget: fn(&Shared, &mut Fabric<ModelQueues, ModelCarrier>)| {
            let (model, mut fabric) = model(1);
            Memory::new(&model).put(Doing::Makes);
            forget(&model, &mut fabric);
            Memory::new(&model).put(Doing::Makes);
            let faults = model.borrow().faults();
            !faults.is_empty()
        };
        // A send whose memory is given back at once.
        assert!(faulty(|model, fabric| {
            let x = Memory::new(model);
            x.put(Doing::Makes);
            fabric.behind_compute(0).unwrap();
            model.borrow_mut().put(Queue::Own(0), Doing::Moves(x.number));
        }));
        // A send that does not follow what makes its values.
        assert!(faulty(|model, fabric| {
            let x = Memory::new(model);
            x.put(Doing::Makes);
            model.borrow_mut().put(Queue::Own(0), Doing::Moves(x.number));
            let done = fabric.queues.mark(Queue::Own(0)).unwrap();
            fabric.queues.follow(Queue::Compute, &done).unwrap();
        }));
        // A receive that is used before it has come.
        assert!(faulty(|model, fabric| {
            let room = fabric.room(Rc::new(Memory::new(model))).unwrap();
            let posted = fabric.post(0, room).unwrap();
            posted.buffer.put(Doing::Uses);
        }));
        // A receive into memory that is got only after its mark: compute may still be at work
        // there, under another name.
        assert!(faulty(|model, fabric| {
            let free = fabric.queues.mark(Queue::Compute).unwrap();
            Memory::new(model).put(Doing::Makes);
            let posted =
                fabric.post(0, Room { free, buffer: Rc::new(Memory::new(model)) }).unwrap();
            fabric.take(posted).unwrap().put(Doing::Uses);
        }));
        // A sum that is not waited for.
        assert!(faulty(|model, fabric| {
            let x = Rc::new(Memory::new(model));
            fabric.sum(0, Rc::clone(&x)).unwrap();
            x.put(Doing::Uses);
        }));
        // In order, nothing is found.
        assert!(!faulty(|model, fabric| {
            let room = fabric.room(Rc::new(Memory::new(model))).unwrap();
            Memory::new(model).put(Doing::Makes);
            let posted = fabric.post(0, room).unwrap();
            fabric.take(posted).unwrap().put(Doing::Uses);
        }));
    }
}
