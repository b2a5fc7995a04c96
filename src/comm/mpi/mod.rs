//! The grid as MPI ranks: the handle of this rank's progress thread, and the links and groups made
//! of it.

mod raw;
mod backoff;
mod shared_memory;
mod in_flight;
mod reduce;
mod progress;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use tch::Tensor;

use super::permits::{Permit, Permits};
use super::{Content, Endpoints, Header, Link, Ports, Reduction, ReplicaGroup, checked};
use crate::control::{Card, Controls, FlightRecorder, Gate, Neighbours, Report, Reporter};
use crate::error::{Error, Result};
use crate::grid::{Grid, Place};
use crate::wire::Wire;
use in_flight::{Arrival, Inbox};
pub use progress::Identity;
use progress::{Group, Request, Waiters};
pub use reduce::{CHUNK, CHUNKS_UNDER_WAY};
use reduce::{Work, owned};
pub use shared_memory::SHARED_NAME;

/// How long MPI_Abort may take before the process ends by itself.
const ABORT_TIME: Duration = Duration::from_secs(3);

/// The size of the world and this rank, as the launcher's environment tells before MPI has started
/// (Open MPI's mpirun, launchers that speak PMI, srun with PMIx); `None` when not under a launcher.
pub fn launched() -> Option<(usize, usize)> {
    launcher().map(|(_, size, rank)| (size, rank))
}

/// The variables of a launcher: the size of its world and this rank.
const VARIABLES: [[&str; 2]; 3] = [
    ["OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"],
    ["PMI_SIZE", "PMI_RANK"],
    ["SLURM_NTASKS", "PMIX_RANK"],
];

/// The variables by which a launcher tells of itself, and what they say.
pub fn launcher() -> Option<([&'static str; 2], usize, usize)> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    VARIABLES.into_iter().find_map(|names| Some((names, number(names[0])?, number(names[1])?)))
}

/// Whether mpirun itself has started this process; the others' variables also stand in the shells
/// of batch jobs.
pub fn by_mpirun() -> bool {
    launcher().is_some_and(|(names, ..)| names == VARIABLES[0])
}

/// The version of the MPI library, which need not be started.
pub fn library_version() -> String {
    let text = mpi::environment::library_version().unwrap_or_default();
    text.split(',').next().unwrap_or_default().trim_matches(['\0', ' ', '\n']).to_owned()
}

/// MPI, started on this rank.
pub struct World {
    pub identity: Identity,
    commands: Sender<Request>,
    waiters: Waiters,
    thread: JoinHandle<()>,
    /// For the ranks of this host.
    card: Card,
    recorder: Option<FlightRecorder>,
}

/// What is wanted of links and groups.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Messages under way on a link, at most.
    pub capacity: usize,
    /// Values of a message, at most: one that says that it brings more is damaged.
    pub largest: usize,
    /// The stage that takes the parts of the tied table's gradient.
    pub joiner: usize,
    pub wire: Wire,
    /// If nothing moves here for much longer and rank 0 does not ask why, it is lost.
    pub stall: Duration,
}

impl World {
    /// Starts MPI on a thread of its own.
    ///
    /// # Errors
    /// If the thread or MPI cannot be started.
    pub fn start() -> Result<World> {
        let (started, identity) = channel();
        let (commands, receiver) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let waiters = Waiters::new(Arc::clone(&waiting), commands.clone());
        let thread = std::thread::Builder::new()
            .name("mpi".into())
            .spawn(move || progress::run(&started, &receiver, waiting))
            .map_err(|error| Error::Internal(format!("no thread for MPI ({error})")))?;
        let identity = identity.recv().ok().flatten();
        let identity =
            identity.ok_or_else(|| Error::Internal("MPI could not be started".into()))?;
        let (card, recorder) = Card::new(&identity.host);
        Ok(World { identity, commands, waiters, thread, card, recorder })
    }

    /// Meets the ranks of this host, which tell for one that dies what it was doing. All ranks must
    /// call this.
    ///
    /// # Errors
    /// If the progress engine is gone.
    pub fn meet(&self) -> Result<Neighbours> {
        let bytes =
            serde_json::to_vec(&self.card).map_err(|error| Error::Internal(error.to_string()))?;
        let cards: std::result::Result<Vec<Card>, _> =
            self.all_gather(bytes)?.iter().map(|bytes| serde_json::from_slice(bytes)).collect();
        let cards = cards.map_err(|error| Error::Internal(error.to_string()))?;
        let met = Neighbours::new(self.identity.rank, self.recorder.clone(), &cards);
        // Everybody has opened what it needs.
        self.all_gather(Vec::new())?;
        self.card.unlink();
        Ok(met)
    }

    /// This rank ends, and nobody needs to speak for it.
    fn retire(&self) {
        self.card.unlink();
        self.recorder.iter().for_each(FlightRecorder::close);
    }

    fn command(&self, command: Request) -> Result<()> {
        self.commands.send(command).map_err(|_| Error::Internal("the MPI thread is gone".into()))
    }

    /// Everybody's bytes, in the order of the ranks. All ranks must call this.
    ///
    /// # Errors
    /// If the progress engine is gone.
    pub fn all_gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let (reply, answer) = channel();
        self.command(Request::AllGather { bytes, reply })?;
        answer.recv().map_err(|_| Error::Internal("the MPI thread is gone".into()))
    }

    /// The ports of this rank, whose steps before `limit` may be begun at once, and on rank 0 the
    /// reports of all ranks. `gradients` are the values of the gradient of each place that this
    /// rank holds, for memory that its replicas share. All ranks must call this.
    pub fn connect(
        &self,
        grid: Grid,
        wanted: &Wanted,
        limit: usize,
        gradients: &[usize],
    ) -> Result<(Ports, Option<Receiver<Report>>)> {
        let held = grid.held(self.identity.rank);
        let (mut places, inboxes) = self.links(grid, wanted);
        let Wanted { wire, stall, .. } = *wanted;

        let (reports, received) = match self.identity.rank {
            0 => {
                let (sender, receiver) = channel();
                (Some(sender), Some(receiver))
            }
            _ => (None, None),
        };

        // Every rank makes as many communicators as the one that holds most places.
        let slots = (0..grid.size()).map(|rank| grid.held(rank).len()).max().unwrap_or(1);
        let group = |slot: usize| {
            Some(Group { color: held.get(slot)?.stage as i32, values: *gradients.get(slot)? })
        };

        let groups = (0..slots).map(group).collect();
        let (reply, answer) = channel();
        let key = held[0].replica as i32;
        let (gate, waiters) =
            (Gate::new(limit, &self.identity.host, self.recorder.clone()), self.waiters.clone());
        let gate = Arc::new(gate.on_wait(move |waits| waiters.tell(waits)));
        self.command(Request::Connect {
            groups,
            key,
            wire,
            inboxes,
            reports,
            gate: Arc::clone(&gate),
            stall,
            reply,
        })?;

        let connected =
            answer.recv().map_err(|_| Error::Internal("the MPI thread is gone".into()))?;
        let memories = connected.map_err(|error| Error::Internal(format!("MPI: {error}")))?;
        if grid.replicas > 1 {
            for (slot, ((place, ends), memory)) in
                held.iter().zip(&mut places).zip(memories).enumerate()
            {
                let (commands, waiters) = (self.commands.clone(), self.waiters.clone());
                ends.group = Some(Box::new(MpiGroup {
                    place: *place,
                    replicas: grid.replicas,
                    slot,
                    commands,
                    waiters,
                    memory,
                }));
            }
        }

        Ok((Ports { places, reports: self.reporter(), gate, transfers: None }, received))
    }

    /// The links of the places that this rank holds, and where what arrives over them goes.
    fn links(&self, grid: Grid, wanted: &Wanted) -> (Vec<Endpoints>, Vec<Inbox>) {
        let Wanted { capacity, largest, joiner, .. } = *wanted;
        let mut inboxes = Vec::new();
        let mut link =
            |me: Place, peer: Option<Place>, content: Content| -> Option<Box<dyn Link>> {
                let peer = peer?;
                let (sender, inbox) = sync_channel(capacity);
                inboxes.push(Inbox { from: grid.rank(peer), content, largest, sender });

                let commands = self.commands.clone();
                let (waiters, permits) = (self.waiters.clone(), Permits::new(capacity));
                Some(Box::new(MpiLink {
                    grid,
                    me,
                    peer,
                    commands,
                    waiters,
                    inbox,
                    permits,
                    room: None,
                }))
            };

        let mut places = Vec::new();
        for place in grid.held(self.identity.rank) {
            let of_table = if place.stage == joiner { Content::Part } else { Content::Sum };
            places.push(Endpoints {
                upstream: link(place, grid.upstream(place), Content::Activation),
                downstream: link(place, grid.downstream(place), Content::Gradient),
                twin: link(place, grid.twin(place), of_table),
                group: None,
            });
        }

        (places, inboxes)
    }

    /// Reaches all ranks' gates; on rank 0, once the grid is connected.
    pub fn controls(&self) -> Controls {
        let commands = self.commands.clone();
        Controls::new(move |control| {
            let _ = commands.send(Request::Control(control)); // A progress engine that is gone has said why.
        })
    }

    /// Takes reports to rank 0, once the grid is connected.
    pub fn reporter(&self) -> Reporter {
        let commands = self.commands.clone();
        Reporter::new(move |report| {
            let bytes =
                serde_json::to_vec(&report).map_err(|error| Error::Internal(error.to_string()))?;
            let gone = |_| Error::Internal("the MPI thread is gone".into());
            commands.send(Request::Report(bytes)).map_err(gone)
        })
    }

    /// Ends all ranks with this exit code. The message must have been printed.
    pub fn abort(&self, code: u8) -> ! {
        self.retire();
        let _ = self.command(Request::Abort(i32::from(code)));
        // The progress engine ends the process. If it is held up in a collective call, end without
        // it: the launcher sees the exit code and ends the others.
        std::thread::park_timeout(ABORT_TIME);
        std::process::exit(i32::from(code))
    }

    /// Waits for all ranks and leaves MPI.
    pub fn finish(self) {
        self.retire();
        let (reply, answer) = channel();
        if self.command(Request::Finish(reply)).is_ok() {
            let _ = answer.recv();
        }
        let _ = self.thread.join();
    }
}

struct MpiLink {
    grid: Grid,
    me: Place,
    peer: Place,
    commands: Sender<Request>,
    waiters: Waiters,
    inbox: Receiver<Arrival>,
    permits: Permits,
    /// For the next message, where it was waited for.
    room: Option<Permit>,
}

impl MpiLink {
    fn lost(&self, doing: String) -> Error {
        Error::Lost { peer: self.peer, doing }
    }
}

impl Link for MpiLink {
    fn await_room(&mut self) -> Result<bool> {
        if self.room.is_some() {
            return Ok(false);
        }

        self.room = self.permits.try_acquire();
        let waits = self.room.is_none();
        if waits {
            self.room = Some(self.waiters.during(|| self.permits.acquire()));
        }
        Ok(waits)
    }

    fn send(&mut self, header: Header, tensor: Tensor) -> Result<()> {
        self.await_room()?;
        let permit = self.room.take().ok_or_else(|| Error::Internal("no room".to_owned()))?;
        let (stage, to) = (self.me.stage, self.grid.rank(self.peer));
        let command = Request::Send { stage, to, header, tensor, permit };
        self.commands.send(command).map_err(|_| self.lost(format!("{} sends {header}", self.me)))
    }

    fn receive(&mut self, expected: Header) -> Result<Tensor> {
        let arrival = match self.inbox.try_recv() {
            Err(TryRecvError::Empty) => self.waiters.during(|| self.inbox.recv()).ok(),
            other => other.ok(),
        };

        let arrival =
            arrival.ok_or_else(|| self.lost(format!("{} waits for {expected}", self.me)))?;
        let (found, tensor) =
            arrival.map_err(|e| self.lost(format!("{} waits for {expected} ({e})", self.me)))?;
        checked(self.peer, self.me, expected, found)?;
        Ok(tensor)
    }
}

struct MpiGroup {
    place: Place,
    replicas: usize,
    /// Which of this rank's groups.
    slot: usize,
    commands: Sender<Request>,
    waiters: Waiters,
    memory: Option<Tensor>,
}

impl MpiGroup {
    /// Starts a sum, or a half of one.
    fn start(&mut self, step: usize, flat: Tensor, work: Work) -> Result<Reduction> {
        let peer = Place { replica: usize::from(self.place.replica == 0), ..self.place };
        let lost = move |error: String| Error::Lost {
            peer,
            doing: format!("the gradient of step {step} is reduced ({error})"),
        };

        let (reply, done) = channel();
        self.commands
            .send(Request::Reduce { slot: self.slot, step, flat, work, reply })
            .map_err(|error| lost(error.to_string()))?;

        let waiters = self.waiters.clone();
        Ok(Reduction::new(move || {
            let answer = match done.try_recv() {
                Err(TryRecvError::Empty) => waiters.during(|| done.recv()).ok(),
                other => other.ok(),
            };

            answer.ok_or_else(|| lost("the MPI thread is gone".to_owned()))?.map_err(lost)
        }))
    }
}

impl ReplicaGroup for MpiGroup {
    fn memory(&self) -> Option<Tensor> {
        self.memory.as_ref().map(Tensor::shallow_clone)
    }

    fn all_reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.start(step, flat, Work::Both)
    }

    fn owned(&self, len: usize) -> Range<usize> {
        owned(len, self.place.replica, self.replicas)
    }

    fn reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.start(step, flat, Work::Reduce)
    }

    fn gather(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.start(step, flat, Work::Gather)
    }
}
