//! Whether hosts and devices of a grid can wait for each other for ever, where any action may wait
//! for all that its device has been asked for: a model of them all, on which the real links and
//! groups do what real schedules say.
//!
//! ```text
//! host      a thread a rank: its action list; waits for headers, and after every computation for its whole device
//! device    queues of work, done when the work before it in its queue and what it follows is done; a receive, when also its send
//!           can be; a sum, when all of its ends can be
//! stuck     every host waits, and no work can be done
//! ```
//!
//! A send is taken to end by itself, as it does while NCCL's buffers hold it (4 MiB a channel). A
//! larger one stays on its device until its receiver comes to it in the order of the schedule; two
//! neighbours that both wait for their whole device just then, each with such a send to the other,
//! are beyond this model, and what could make them wait so is kept out by other means: kernels are
//! loaded before the first step, and a GPU keeps a reserve of memory.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use proptest::prelude::*;
use tch::{Device, Kind as Type, Tensor};

use super::channels::{Channel, Purpose, channels};
use super::ends::{FabricLink, Shared, Travel, over};
use super::fabric::{Carrier, Fabric, Posted};
use crate::comm::{Content, Endpoints, Header, Link, Reduction, ReplicaGroup};
use crate::delay::SyncPoints;
use crate::device::queues::{Queue, Queues};
use crate::error::{Error, Result};
use crate::grid::{Grid, Placement};
use crate::schedule::{Action, Lookahead, Op, Pass, Schedule, ScheduleKind, TableEnd, Tie};
use crate::wire::Wire;

/// A piece of work on a device.
struct Work {
    rank: usize,
    needs: Vec<usize>,
    doing: Doing,
    done: bool,
}

/// What it is. Transfers are told apart by their channel, among all of the grid, and by their
/// number.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Something,
    Sends((usize, usize)),
    Receives((usize, usize)),
    Sums((usize, usize)),
}

impl Doing {
    fn transfer(self) -> Option<(usize, usize)> {
        match self {
            Doing::Something => None,
            Doing::Sends(transfer) | Doing::Receives(transfer) | Doing::Sums(transfer) => {
                Some(transfer)
            }
        }
    }
}

#[derive(Default)]
struct State {
    work: Vec<Work>,
    /// What is not done.
    open: Vec<usize>,
    last: BTreeMap<(usize, usize), usize>,
    follows: BTreeMap<(usize, usize), Vec<usize>>,
    /// The ends of transfers that have been asked for, and how many of a channel by each rank.
    ends: BTreeMap<(usize, usize), Vec<usize>>,
    asked: BTreeMap<(usize, usize), usize>,
    /// On their way, by the purpose of the channel beside them.
    headers: BTreeMap<Purpose, VecDeque<Header>>,
    /// Hosts that run, and of those the ones that wait since the last change.
    live: usize,
    waiting: usize,
    changes: u64,
    stuck: bool,
}

fn number(queue: Queue) -> usize {
    match queue {
        Queue::Compute => 0,
        Queue::Own(number) => number + 1,
    }
}

impl State {
    fn put(&mut self, rank: usize, queue: Queue, doing: Doing) -> usize {
        let (line, work) = ((rank, number(queue)), self.work.len());
        let needs = self
            .last
            .insert(line, work)
            .into_iter()
            .chain(self.follows.remove(&line).into_iter().flatten());
        let needs = needs.collect();
        self.work.push(Work { rank, needs, doing, done: false });
        self.open.push(work);
        if let Some(transfer) = doing.transfer() {
            self.ends.entry(transfer).or_default().push(work);
        }

        self.changes += 1;
        self.waiting = 0;
        work
    }

    /// Does all work that can be done.
    fn work(&mut self, members: &[usize]) {
        loop {
            let free = |state: &State, work: usize| {
                state.work[work].needs.iter().all(|before| state.work[*before].done)
            };

            let can = |state: &State, work: usize| match state.work[work].doing {
                Doing::Something | Doing::Sends(_) => free(state, work),
                Doing::Receives(transfer) | Doing::Sums(transfer) => {
                    let ends = &state.ends[&transfer];
                    ends.len() == members[transfer.0] && ends.iter().all(|end| free(state, *end))
                }
            };

            let now: Vec<usize> =
                self.open.iter().copied().filter(|work| can(self, *work)).collect();
            if now.is_empty() {
                return;
            }

            now.iter().for_each(|work| self.work[*work].done = true);
            let State { open, work, .. } = self;
            open.retain(|number| !work[*number].done);
            (self.changes, self.waiting) = (self.changes + 1, 0);
        }
    }
}

/// All hosts and devices.
struct World {
    state: Mutex<State>,
    changed: Condvar,
    channels: Vec<Channel>,
    members: Vec<usize>,
}

impl World {
    fn new(grid: Grid, tied: bool) -> World {
        let channels = channels(grid, tied);
        let members = channels.iter().map(|channel| channel.members.len()).collect();
        let state = Mutex::new(State { live: grid.size(), ..State::default() });
        World { state, changed: Condvar::new(), channels, members }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Changes something that hosts may be waiting for.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let result = change(&mut state);
        (state.changes, state.waiting) = (state.changes + 1, 0);
        self.changed.notify_all();
        result
    }

    /// A host waits for something.
    fn wait<T>(&self, what: impl Fn(&mut State) -> Option<T>) -> Result<T> {
        let (mut state, mut seen) = (self.state(), None);
        loop {
            state.work(&self.members);
            if let Some(found) = what(&mut state) {
                self.changed.notify_all();
                return Ok(found);
            }

            if seen != Some(state.changes) {
                seen = Some(state.changes);
                state.waiting += 1;
            }

            state.stuck |= state.waiting == state.live;
            if state.stuck {
                self.changed.notify_all();
                return Err(Error::Internal("every host waits".into()));
            }

            self.changed.notify_all();
            state = self.changed.wait(state).unwrap();
        }
    }
}

struct ModelQueues {
    world: Arc<World>,
    rank: usize,
    own: usize,
}

impl Queues for ModelQueues {
    type Mark = usize;

    fn add(&mut self) -> Result<Queue> {
        self.own += 1;
        Ok(Queue::Own(self.own - 1))
    }

    fn mark(&self, queue: Queue) -> Result<usize> {
        Ok(self.world.change(|state| state.put(self.rank, queue, Doing::Something)))
    }

    fn follow(&self, queue: Queue, mark: &usize) -> Result<()> {
        self.world.change(|state| {
            state.follows.entry((self.rank, number(queue))).or_default().push(*mark)
        });
        Ok(())
    }

    fn passed(&self, mark: &usize) -> Result<bool> {
        Ok(self.world.state().work[*mark].done)
    }
}

/// Moves over the rank's channels, which are these of the grid's.
struct ModelCarrier(Vec<usize>);

impl ModelCarrier {
    fn put(
        &self,
        channel: usize,
        queues: &ModelQueues,
        queue: Queue,
        doing: fn((usize, usize)) -> Doing,
    ) -> Result<()> {
        let (rank, channel) = (queues.rank, self.0[channel]);
        queues.world.change(|state| {
            let asked = state.asked.entry((rank, channel)).or_default();
            *asked += 1;
            let transfer = (channel, *asked);
            state.put(rank, queue, doing(transfer));
        });

        Ok(())
    }
}

impl Carrier<ModelQueues> for ModelCarrier {
    type Buffer = Tensor;

    fn send(&self, channel: usize, _: &Tensor, queues: &ModelQueues, queue: Queue) -> Result<()> {
        self.put(channel, queues, queue, Doing::Sends)
    }

    fn receive(
        &self,
        channel: usize,
        _: &Tensor,
        queues: &ModelQueues,
        queue: Queue,
    ) -> Result<()> {
        self.put(channel, queues, queue, Doing::Receives)
    }

    fn sum(
        &self,
        channel: usize,
        _: &Tensor,
        _: Option<&Tensor>,
        queues: &ModelQueues,
        queue: Queue,
    ) -> Result<()> {
        self.put(channel, queues, queue, Doing::Sums)
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// The headers of a link.
struct Headers {
    world: Arc<World>,
    out: Purpose,
    back: Purpose,
}

impl Link for Headers {
    fn send(&mut self, header: Header, _: Tensor) -> Result<()> {
        self.world.change(|state| state.headers.entry(self.out).or_default().push_back(header));
        Ok(())
    }

    fn receive(&mut self, expected: Header) -> Result<Tensor> {
        let found = self.world.wait(|state| state.headers.get_mut(&self.back)?.pop_front())?;
        assert_eq!(found, expected);
        Ok(Tensor::new())
    }
}

/// A group is asked for only that it is there.
struct Nobody;

impl ReplicaGroup for Nobody {
    fn all_reduce(&mut self, _: usize, _: Tensor) -> Result<Reduction> {
        Err(Error::Internal("a sum beside the fabric".into()))
    }
}

/// A link as it must not be: asks for what it receives as soon as it is expected.
struct Hasty {
    link: FabricLink<ModelQueues, ModelCarrier>,
    posted: VecDeque<Posted<usize, Tensor>>,
}

impl Link for Hasty {
    fn send(&mut self, header: Header, tensor: Tensor) -> Result<()> {
        self.link.send(header, tensor)
    }

    fn prepare(&mut self, _: Header) -> Result<()> {
        let mut fabric = self.link.fabric.lock();
        let room = fabric.room(Tensor::new())?;
        self.posted.push_back(fabric.post(self.link.back, room)?);
        Ok(())
    }

    fn receive(&mut self, expected: Header) -> Result<Tensor> {
        if self.posted.is_empty() {
            self.prepare(expected)?;
        }
        let _ = self.link.headers.receive(Header { payload_elsewhere: true, ..expected })?;
        let posted = self.posted.pop_front().unwrap();
        self.link.fabric.lock().take(posted)
    }
}

/// A rank's host.
struct Host<'a> {
    world: &'a Arc<World>,
    schedule: &'a Schedule,
    rank: usize,
    grid: Grid,
    places: Vec<Endpoints>,
    reductions: Vec<Vec<Reduction>>,
    table: Option<Reduction>,
}

impl<'a> Host<'a> {
    fn new(
        world: &'a Arc<World>,
        schedule: &'a Schedule,
        replicas: usize,
        rank: usize,
        hasty: bool,
    ) -> Host<'a> {
        let (grid, tied) = (schedule.grid(replicas), schedule.tie != Tie::Untied);
        let mine = |(_, channel): &(usize, &Channel)| channel.members.contains(&rank);
        let (numbers, own): (Vec<usize>, Vec<Channel>) = world
            .channels
            .iter()
            .enumerate()
            .filter(mine)
            .map(|(number, channel)| (number, channel.clone()))
            .unzip();
        let queues = ModelQueues { world: Arc::clone(world), rank, own: 0 };
        let fabric = Shared::new(Fabric::new(queues, ModelCarrier(numbers), own.len()).unwrap());

        let headers = |out, back: Option<Purpose>| -> Option<Box<dyn Link>> {
            Some(Box::new(Headers { world: Arc::clone(world), out, back: back? }))
        };

        let ends = |place| Endpoints {
            upstream: headers(Purpose::Up(place), grid.upstream(place).map(Purpose::Down)),
            downstream: headers(Purpose::Down(place), grid.downstream(place).map(Purpose::Up)),
            twin: headers(
                Purpose::Twin(place),
                grid.twin(place).filter(|_| tied).map(Purpose::Twin),
            ),
            group: (replicas > 1).then(|| Box::new(Nobody) as Box<dyn ReplicaGroup>),
        };

        let beside: Vec<Endpoints> = grid.held(rank).into_iter().map(ends).collect();
        let reductions = beside.iter().map(|_| Vec::new()).collect();
        let travel = Travel { grid, rank, device: Device::Cpu, wire: Wire::F32, tied };
        let made = |link| -> Box<dyn Link> {
            if hasty { Box::new(Hasty { link, posted: VecDeque::new() }) } else { Box::new(link) }
        };

        let places = over(beside, travel, &own, &fabric, made).unwrap();
        Host { world, schedule, rank, grid, places, reductions, table: None }
    }

    fn run(&mut self) -> Result<()> {
        let schedule = self.schedule;
        let mut actions = schedule.device_actions(self.grid.device_of(self.rank));
        let mut ahead = Lookahead::default();
        while let Some(action) = ahead.next(&mut actions, |action| self.expect(action))? {
            self.execute(&action)?;
        }
        self.computes()
    }

    fn header(content: Content, action: &Action) -> Header {
        let Action { pass, step, microbatch, .. } = *action;
        Header {
            content,
            pass,
            step,
            microbatch,
            shape: [1, 1, 1],
            wire: Wire::F32,
            payload_elsewhere: false,
        }
    }

    fn ends(&mut self, action: &Action) -> &mut Endpoints {
        let slot = action.stage / self.grid.devices();
        &mut self.places[slot]
    }

    fn expect(&mut self, action: &Action) -> Result<()> {
        match action.op {
            Op::RecvActivation => self
                .ends(action)
                .upstream
                .as_mut()
                .unwrap()
                .prepare(Host::header(Content::Activation, action)),
            Op::RecvGradient => self
                .ends(action)
                .downstream
                .as_mut()
                .unwrap()
                .prepare(Host::header(Content::Gradient, action)),
            _ => Ok(()),
        }
    }

    /// Work on the device; then all that it has been asked for is waited for.
    fn computes(&self) -> Result<()> {
        self.world.change(|state| state.put(self.rank, Queue::Compute, Doing::Something));
        let done = |state: &mut State| {
            state.open.iter().all(|work| state.work[*work].rank != self.rank).then_some(())
        };
        self.world.wait(done)
    }

    fn sums(&mut self, action: &Action) -> Result<Option<Reduction>> {
        let value = Tensor::zeros([1], (Type::Float, Device::Cpu));
        self.ends(action)
            .group
            .as_mut()
            .map(|group| group.all_reduce(action.step, value))
            .transpose()
    }

    fn execute(&mut self, action: &Action) -> Result<()> {
        let slot = action.stage / self.grid.devices();
        let send = |link: &mut Option<Box<dyn Link>>, content| {
            link.as_mut()
                .unwrap()
                .send(Host::header(content, action), Tensor::zeros([1], (Type::Float, Device::Cpu)))
        };

        let receive = |link: &mut Option<Box<dyn Link>>, content| {
            link.as_mut().unwrap().receive(Host::header(content, action)).map(|_| ())
        };

        match action.op {
            Op::Load | Op::AwaitTable | Op::Digest => Ok(()),
            Op::Forward | Op::Save => self.computes(),
            Op::Backward => {
                self.computes()?;
                if action.pass == Pass::Train && action.microbatch + 1 == self.schedule.microbatches
                {
                    let bucket = self.sums(action)?;
                    self.reductions[slot].extend(bucket);
                    self.computes()?;
                }

                Ok(())
            }
            Op::RecvActivation => receive(&mut self.ends(action).upstream, Content::Activation),
            Op::RecvGradient => receive(&mut self.ends(action).downstream, Content::Gradient),
            Op::SendActivation => send(&mut self.ends(action).downstream, Content::Activation),
            Op::SendGradient => send(&mut self.ends(action).upstream, Content::Gradient),
            Op::Reduce => {
                let rest = self.sums(action)?;
                self.reductions[slot].extend(rest);
                Ok(())
            }
            Op::Update => {
                self.reductions[slot].drain(..).try_for_each(Reduction::wait)?;
                self.computes()
            }
            Op::Part => {
                let away =
                    action.stage != self.schedule.joiner() && self.ends(action).twin.is_some();
                let ends: Vec<TableEnd> = self.schedule.ends(action.stage).collect();
                let mut parts = ends.iter().filter(|_| away);
                parts.try_for_each(|_| send(&mut self.ends(action).twin, Content::Part))
            }
            Op::RecvPart if self.ends(action).twin.is_none() => Ok(()),
            Op::RecvPart => receive(&mut self.ends(action).twin, Content::Part),
            Op::ReduceTable => {
                self.computes()?;
                self.table = self.sums(action)?;
                Ok(())
            }
            Op::SendTable => {
                self.table.take().map_or(Ok(()), Reduction::wait)?;
                send(&mut self.ends(action).twin, Content::Sum)
            }
            Op::RecvTable => receive(&mut self.ends(action).twin, Content::Sum),
            Op::UpdateTable => {
                self.table.take().map_or(Ok(()), Reduction::wait)?;
                self.computes()
            }
        }
    }
}

/// Whether a grid comes to the end of a schedule.
fn ends_well(schedule: &Schedule, replicas: usize, hasty: bool) -> bool {
    let grid = schedule.grid(replicas);
    let world = Arc::new(World::new(grid, schedule.tie != Tie::Untied));
    let host = |rank: usize| {
        let result = Host::new(&world, schedule, replicas, rank, hasty).run();
        world.change(|state| state.live -= 1);
        result.is_ok()
    };

    std::thread::scope(|scope| {
        let hosts: Vec<_> = (0..grid.size()).map(|rank| scope.spawn(move || host(rank))).collect();
        hosts.into_iter().all(|host| host.join().unwrap())
    })
}

fn schedule(kind: ScheduleKind, stages: usize, microbatches: usize, steps: usize) -> Schedule {
    Schedule::new(kind, stages, microbatches, 1, SyncPoints::ends(steps))
}

/// The model sees what it is there to see: a receive that is asked for before the computation that
/// its sender needs.
#[test]
fn what_is_asked_for_too_early_is_seen() {
    for (kind, microbatches) in [
        (ScheduleKind::Sequential, 1),
        (ScheduleKind::OneForwardOneBackward, 1),
        (ScheduleKind::Gpipe, 2),
    ] {
        assert!(!ends_well(&schedule(kind, 2, microbatches, 2), 1, true), "{kind:?}");
    }

    // At a sync point.
    let mut decoupled = schedule(ScheduleKind::Decoupled, 3, 2, 8);
    decoupled.sync.at = [4].into();
    assert!(!ends_well(&decoupled, 1, true));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn nobody_waits_for_ever(
        kind in prop::sample::select(vec![ScheduleKind::Decoupled, ScheduleKind::OneForwardOneBackward, ScheduleKind::Gpipe, ScheduleKind::Sequential]),
        stages in 1usize..5,
        replicas in 1usize..3,
        microbatches in 1usize..4,
        slack in 1usize..3,
        tie in prop::sample::select(vec![Tie::Untied, Tie::Fresh, Tie::Aligned, Tie::Head]),
        ring: bool,
        middle: bool,
    ) {
        let mut sync = SyncPoints::ends(7);
        sync.at = middle.then_some(3).into_iter().collect();
        let mut schedule = Schedule::new(kind, stages, microbatches, slack, sync);
        schedule.tie = tie;
        if ring && stages > 2 {
            schedule.placement = Placement::Ring;
        }
        prop_assert!(ends_well(&schedule, replicas, false), "{:?}", schedule);
    }
}
