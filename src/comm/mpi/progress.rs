//! The thread that owns MPI. It alone calls MPI, so messages move while the compute thread
//! computes, and one level of thread support (funneled) is enough.
//!
//! ```text
//! compute thread --- commands: send, all-reduce, report ---> progress engine ---> MPI
//!                <-- inbox of each link, done-signals ------        <---
//! ```
//!
//! A receive of the next header is always posted on every link; the tensor's receive is posted as
//! soon as its header is there, before anybody asks for it. When nothing moves the progress engine
//! sleeps on its command queue, longer every time, so a waiting rank does not burn a core; a
//! command wakes it at once. How long depends on who waits: the compute thread says so before it
//! does ([`Waiters`]), and while it computes the progress engine, which often shares its core,
//! looks up only now and then, most rarely when nothing is under way that needs it. A rank alone
//! has nothing to look for.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use mpi::Threading;
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::*;
use tch::Tensor;

use super::super::permits::Permit;
use super::backoff::{SHORTEST_SLEEP, pause};
use super::in_flight::{Inbox, Incoming, Outgoing, address};
use super::raw::{self, MpiResult, Pending};
use super::reduce::{Reducer, Work};
use crate::awake::Awake;
use crate::comm::{Header, Transfer};
use crate::control::{Control, Gate, Report};
use crate::device::Local;
use crate::error::Error;
use crate::failure::show;
use crate::trace::{Moment, Tracer};
use crate::wire::Wire;

/// Rank 0 may be late by so much, and the ranks that find it silent are apart by so much at most.
const GRACE: Duration = Duration::from_secs(3);

const TAG_REPORT: i32 = 9;
const TAG_CONTROL: i32 = 10;

/// How many threads of this rank wait for something that the progress engine brings.
#[derive(Clone)]
pub struct Waiters {
    count: Arc<AtomicUsize>,
    commands: Sender<Request>,
}

impl Waiters {
    pub fn new(count: Arc<AtomicUsize>, commands: Sender<Request>) -> Waiters {
        Waiters { count, commands }
    }

    /// Waits with `wait`, the progress engine being awake meanwhile.
    pub fn during<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.tell(true);
        let result = wait();
        self.tell(false);
        result
    }

    /// A thread begins to wait, or has waited.
    pub fn tell(&self, waits: bool) {
        if waits {
            self.count.fetch_add(1, Ordering::Relaxed);
            let _ = self.commands.send(Request::Wake); // A progress engine that is gone has nothing to bring.
        } else {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What the other threads ask of the progress engine.
pub enum Request {
    /// Everybody's bytes, in the order of the ranks; all ranks must ask. Blocks the progress
    /// engine.
    AllGather {
        bytes: Vec<u8>,
        reply: Sender<Vec<Vec<u8>>>,
    },
    /// Makes the communicators of the grid and posts the first receives; all ranks must ask.
    Connect {
        /// Of each place of this rank; none where another rank holds more.
        groups: Vec<Option<Group>>,
        key: i32,
        wire: Wire,
        inboxes: Vec<Inbox>,
        reports: Option<Sender<Report>>,
        gate: Arc<Gate>,
        stall: Duration,
        /// For each group the memory that its members share.
        reply: Sender<MpiResult<Vec<Option<Tensor>>>>,
    },
    Send {
        /// The stage that sends, and the rank that it goes to.
        stage: usize,
        to: usize,
        header: Header,
        tensor: Tensor,
        permit: Permit,
    },
    Reduce {
        /// Which of this rank's replica groups.
        slot: usize,
        /// Of the gradient.
        step: usize,
        flat: Tensor,
        work: Work,
        reply: Sender<MpiResult<()>>,
    },
    Report(Vec<u8>),
    /// To the gates of all ranks; from rank 0.
    Control(Control),
    /// Somebody has begun to wait.
    Wake,
    /// Ends all ranks.
    Abort(i32),
    /// Completes what is under way, then MPI_Finalize; all ranks must ask.
    Finish(Sender<()>),
}

/// A replica group to be made.
pub struct Group {
    /// Of the stage.
    pub color: i32,
    /// Of its gradient.
    pub values: usize,
}

/// What a rank learns when MPI has started.
#[derive(Debug, Clone)]
pub struct Identity {
    pub rank: usize,
    pub size: usize,
    pub host: String,
    /// Among the ranks of its host.
    pub local: Local,
}

/// The body of the progress engine's thread.
pub fn run(
    started: &Sender<Option<Identity>>,
    commands: &Receiver<Request>,
    waiting: Arc<AtomicUsize>,
) {
    let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else {
        let _ = started.send(None);
        return;
    };

    let world = universe.world();
    let host = mpi::environment::processor_name().unwrap_or_default();
    let local = {
        let neighbours = world.split_shared(world.rank());
        Local { rank: neighbours.rank() as usize, ranks: neighbours.size() as usize }
    };

    let identity =
        Identity { rank: world.rank() as usize, size: world.size() as usize, host, local };
    let rank = identity.rank;
    // Sums are added up here, beside the computing thread. Libtorch takes a thread's number over
    // when it is first asked for: now, before the worker has set its own.
    tch::set_num_threads(1);
    tch::get_num_threads();
    if started.send(Some(identity)).is_err() {
        return;
    }

    let mut driver = ProgressEngine::new(world, rank, waiting);
    let finished = driver.serve(commands);
    drop(driver);
    drop(universe); // MPI_Finalize
    if let Some(reply) = finished {
        let _ = reply.send(());
    }
}

struct Grids {
    links: SimpleCommunicator,
    /// Of the replica groups, one a place.
    reducers: Vec<Reducer>,
}

struct ProgressEngine {
    world: SimpleCommunicator,
    rank: usize,
    waiting: Arc<AtomicUsize>,
    grids: Option<Grids>,
    /// By the rank that they go to.
    outgoing: BTreeMap<usize, VecDeque<(Outgoing, Option<Transfer>)>>,
    incoming: Vec<Incoming>,
    /// Reports and controls that are on their way.
    notes: VecDeque<Pending<Vec<u8>>>,
    reports: Option<Sender<Report>>,
    gate: Option<Arc<Gate>>,
    /// When rank 0 was heard last, and how long it may be silent while nothing moves here.
    heard: Awake,
    patience: Duration,
    failure: Option<String>,
}

impl ProgressEngine {
    fn new(world: SimpleCommunicator, rank: usize, waiting: Arc<AtomicUsize>) -> ProgressEngine {
        ProgressEngine {
            world,
            rank,
            waiting,
            grids: None,
            outgoing: BTreeMap::new(),
            incoming: Vec::new(),
            notes: VecDeque::new(),
            reports: None,
            gate: None,
            heard: Awake::now(),
            patience: Duration::MAX,
            failure: None,
        }
    }

    /// Serves commands and moves messages until told to finish.
    fn serve(&mut self, commands: &Receiver<Request>) -> Option<Sender<()>> {
        let mut idle = 0u32;
        loop {
            let sleep = pause(idle, self.waiting.load(Ordering::Relaxed) > 0, self.under_way());
            let command = match self.grids {
                // Nothing can arrive before the grid is connected, nor at a rank alone.
                _ if self.world.size() == 1 => {
                    commands.recv().map_err(|_| RecvTimeoutError::Disconnected)
                }
                None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => commands.recv_timeout(sleep),
            };

            let mut moved = command.is_ok();
            match command {
                Ok(Request::Finish(reply)) => {
                    self.finish();
                    return Some(reply);
                }
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }

            match self.advance() {
                Ok(any) => moved |= any,
                Err(error) => self.fail(&error),
            }

            idle = if moved { 0 } else { idle.saturating_add(1) };
            self.check_rank_0();
        }
    }

    /// Whether something moves only while this rank looks.
    fn under_way(&self) -> bool {
        let reduces = || self.grids.iter().flat_map(|grids| &grids.reducers).any(Reducer::busy);
        let arrives = || self.incoming.iter().any(Incoming::arrives);
        self.outgoing.values().any(|queue| !queue.is_empty())
            || !self.notes.is_empty()
            || arrives()
            || reduces()
    }

    /// Ends the run if rank 0, which would ask why nothing moves, is silent itself.
    fn check_rank_0(&self) {
        if self.rank == 0 || self.heard.elapsed() < self.patience {
            return;
        }

        let Some(gate) = self.gate.as_ref().filter(|gate| !gate.ended()) else { return };
        let beat = gate.heartbeat.beat();
        if beat.since > self.patience.as_secs_f64() {
            let place = format!("rank 0, seen from rank {} on {},", self.rank, beat.host);
            let what = format!(
                "is silent (here the last action, {}, began {:.0} s ago)",
                beat.actions.last().map_or("none", String::as_str),
                beat.since
            );

            show(None, &Error::Hang { seconds: self.patience.as_secs_f64(), place, what });
            gate.heartbeat.close();
            std::thread::sleep(GRACE / 10);
            self.world.abort(4);
        }
    }

    fn obey(&mut self, command: Request) {
        if self.failure.is_some() && !matches!(command, Request::Abort(_)) {
            return; // Dropping the command tells whoever waits for its answer.
        }

        let result = match command {
            Request::AllGather { bytes, reply } => {
                let _ = reply.send(all_gather(&self.world, &bytes));
                Ok(())
            }

            Request::Connect { groups, key, wire, inboxes, reports, gate, stall, reply } => {
                (self.reports, self.gate) = (reports, Some(gate));
                // One after the other, so that one of them speaks.
                self.patience =
                    stall + GRACE + GRACE.mul_f64(self.rank as f64 / self.world.size() as f64);
                self.heard = Awake::now();
                let _ = reply.send(self.connect(&groups, key, wire, inboxes));
                Ok(())
            }

            Request::Send { stage, to, header, tensor, permit } => {
                // Values that travel another way are shown there.
                let shown = self.tracer().filter(|_| !header.payload_elsewhere);
                let transfer = shown.map(|_| Transfer::begin(&header, stage));
                self.send(to, &header, tensor, permit, transfer)
            }

            Request::Reduce { slot, step, flat, work, reply } => {
                self.reduce(slot, step, flat, work, reply)
            }
            Request::Report(bytes) => self.report(bytes),
            Request::Control(control) => self.control(control),
            Request::Abort(code) => self.world.abort(code),
            Request::Wake | Request::Finish(_) => Ok(()),
        };

        if let Err(error) = result {
            self.fail(&error);
        }
    }

    fn connect(
        &mut self,
        groups: &[Option<Group>],
        key: i32,
        wire: Wire,
        inboxes: Vec<Inbox>,
    ) -> MpiResult<Vec<Option<Tensor>>> {
        let mut reducers = Vec::new();
        for group in groups {
            let color =
                group.as_ref().map_or(Color::undefined(), |group| Color::with_value(group.color));
            let made = self.world.split_by_color_with_key(color, key);
            if let Some(group) = group {
                let made = made.ok_or("no communicator for the replica group")?;
                raw::return_errors(&made)?;
                let stage = group.color as usize;
                reducers.push(Reducer::new(made, wire, group.values, stage)?);
            }
        }

        let memories = reducers.iter().map(Reducer::memory).collect();
        let grids = Grids { links: self.world.duplicate(), reducers };
        raw::return_errors(&grids.links)?;
        for inbox in inboxes {
            self.incoming.push(Incoming::start(&grids.links, inbox)?);
        }

        self.grids = Some(grids);
        Ok(memories)
    }

    fn links(&self) -> MpiResult<&SimpleCommunicator> {
        self.grids
            .as_ref()
            .map(|grids| &grids.links)
            .ok_or_else(|| "the grid is not connected".to_owned())
    }

    fn send(
        &mut self,
        to: usize,
        header: &Header,
        tensor: Tensor,
        permit: Permit,
        transfer: Option<Transfer>,
    ) -> MpiResult<()> {
        let outgoing = Outgoing::start(self.links()?, to, header, tensor, permit)?;
        self.outgoing.entry(to).or_default().push_back((outgoing, transfer));
        Ok(())
    }

    fn reduce(
        &mut self,
        slot: usize,
        step: usize,
        flat: Tensor,
        work: Work,
        reply: Sender<MpiResult<()>>,
    ) -> MpiResult<()> {
        let traced = self.tracer().map(|_| (step, Moment::now()));
        let grids = self.grids.as_mut().ok_or("the grid is not connected")?;
        grids.reducers[slot].push(flat, work, reply, traced);
        Ok(())
    }

    /// Where events go, while they are wanted.
    fn tracer(&self) -> Option<&Tracer> {
        self.gate.as_ref().map(|gate| &gate.tracer).filter(|tracer| tracer.on())
    }

    fn report(&mut self, bytes: Vec<u8>) -> MpiResult<()> {
        if self.rank == 0 {
            return self.deliver(&bytes);
        }
        self.notes.push_back(raw::send_bytes(address(self.links()?, 0, TAG_REPORT), bytes)?);
        Ok(())
    }

    fn control(&mut self, control: Control) -> MpiResult<()> {
        let bytes = serde_json::to_vec(&control).map_err(|error| error.to_string())?;
        for rank in 1..self.world.size() as usize {
            let note = raw::send_bytes(address(self.links()?, rank, TAG_CONTROL), bytes.clone())?;
            self.notes.push_back(note);
        }
        self.on_control(control)
    }

    fn on_control(&mut self, control: Control) -> MpiResult<()> {
        self.heard = Awake::now();
        let Some(gate) = &self.gate else { return Ok(()) };
        gate.apply(control);
        let rank = self.rank;
        let report = match control {
            Control::Ask => Report::Heartbeat { rank, beat: gate.heartbeat.beat() },
            Control::Clock(number) => Report::Clock { rank, number, at: Moment::now() },
            _ => return Ok(()),
        };

        let bytes = serde_json::to_vec(&report).map_err(|error| error.to_string())?;
        self.report(bytes)
    }

    fn deliver(&mut self, bytes: &[u8]) -> MpiResult<()> {
        let report = serde_json::from_slice(bytes)
            .map_err(|error| format!("a report that cannot be read ({error})"))?;
        if let Some(reports) = &self.reports {
            let _ = reports.send(report); // A coordinator that is gone has said why.
        }
        Ok(())
    }

    /// Completes what can be completed now; says whether anything could.
    fn advance(&mut self) -> MpiResult<bool> {
        let mut moved = false;
        if self.failure.is_some() {
            return Ok(false); // What was under way is lost; only the end is waited for.
        }

        let Some(grids) = &mut self.grids else { return Ok(false) };
        for incoming in &mut self.incoming {
            moved |= incoming.advance(&grids.links)?;
        }

        // Only the oldest to every rank: each question lets MPI look everywhere, and messages leave
        // about in order.
        for queue in self.outgoing.values_mut() {
            while let Some((outgoing, _)) = queue.front_mut() {
                if !outgoing.advance()? {
                    break;
                }

                let left = queue.pop_front().and_then(|(_, transfer)| transfer);
                if let Some((transfer, gate)) = left.zip(self.gate.as_ref()) {
                    gate.tracer.add(transfer.end());
                }
                moved = true;
            }
        }

        for reducer in &mut grids.reducers {
            moved |= reducer.advance(self.gate.as_ref().map(|gate| &gate.tracer))?;
        }

        while let Some(pending) = self.notes.front_mut() {
            if pending.test()?.is_none() {
                break;
            }

            self.notes.pop_front();
        }

        if self.rank == 0 {
            while let Some(bytes) = raw::poll_bytes(self.links()?, TAG_REPORT)? {
                self.deliver(&bytes)?;
                moved = true;
            }
        } else {
            while let Some(bytes) = raw::poll_bytes(self.links()?, TAG_CONTROL)? {
                let control = serde_json::from_slice(&bytes);
                self.on_control(
                    control.map_err(|error| format!("a control that cannot be read ({error})"))?,
                )?;

                moved = true;
            }
        }

        Ok(moved)
    }

    /// Hands an error of MPI to everybody who may wait for something.
    fn fail(&mut self, error: &str) {
        if self.failure.is_some() {
            return;
        }

        self.failure = Some(error.to_owned());
        tracing::error!(error, "MPI");
        for incoming in self.incoming.drain(..) {
            incoming.fail(error);
        }

        for reducer in self.grids.iter_mut().flat_map(|grids| &mut grids.reducers) {
            reducer.fail(error);
        }

        self.outgoing.clear();
        if let Some(gate) = &self.gate {
            gate.apply(Control::Shutdown);
        }

        if let Some(reports) = self.reports.take() {
            let error = Error::Transport(error.to_owned());
            let _ = reports.send(Report::Failed { origin: format!("rank {}", self.rank), error });
        }
    }

    /// Everything that was sent is on its way, and all that rank 0 has to tell is heard, before the
    /// headers that nobody will send are taken back.
    fn finish(&mut self) {
        let busy = |driver: &ProgressEngine| {
            let told = driver.gate.as_ref().is_none_or(|gate| gate.ended());
            !(told && driver.outgoing.values().all(VecDeque::is_empty) && driver.notes.is_empty())
        };

        while self.failure.is_none() && busy(self) {
            match self.advance() {
                Ok(true) => {}
                Ok(false) => std::thread::sleep(SHORTEST_SLEEP),
                Err(error) => self.fail(&error),
            }

            self.check_rank_0();
        }

        for incoming in self.incoming.drain(..) {
            if let Err(error) = incoming.stop() {
                tracing::warn!(error, "a posted receive cannot be taken back");
            }
        }

        self.grids = None;
    }
}

/// Bytes of all ranks: their lengths first, then the bytes, padded to the longest.
fn all_gather(world: &SimpleCommunicator, bytes: &[u8]) -> Vec<Vec<u8>> {
    let size = world.size() as usize;
    let mut lengths = vec![0u64; size];
    world.all_gather_into(&(bytes.len() as u64), &mut lengths[..]);
    let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
    if longest == 0 {
        return vec![Vec::new(); size];
    }

    let mut mine = bytes.to_vec();
    mine.resize(longest, 0);
    let mut all = vec![0u8; longest * size];
    world.all_gather_into(&mine[..], &mut all[..]);
    all.chunks(longest)
        .zip(lengths)
        .map(|(chunk, length)| chunk[..length as usize].to_vec())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command as Process;
    use std::sync::mpsc::{channel, sync_channel};

    use tch::Kind;

    use super::super::super::permits::Permits;
    use super::super::reduce::Work;
    use std::time::Instant;

    use super::*;
    use crate::comm::Content;
    use crate::schedule::Pass;

    /// MPI starts once in a process, so a test of it gets one of its own: this program with only
    /// that test, for a minute at most.
    fn alone(name: &str, test: impl FnOnce()) {
        if std::env::var_os("OUROBOROS_ALONE").is_some() {
            return test();
        }

        let name = format!("comm::mpi::progress::tests::{name}");
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut process = Process::new(std::env::current_exe().unwrap());
        process.args(["--exact", &name, "--nocapture"]).env("OUROBOROS_ALONE", "1");
        process.stdout(log.reopen().unwrap()).stderr(log.reopen().unwrap());
        let mut process = process.spawn().unwrap();
        let started = Instant::now();
        while process.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = process.kill(); // It is over, unless it has hung.

        let status = process.wait().unwrap();
        let text = std::fs::read_to_string(log.path()).unwrap();
        assert!(
            status.success() && text.contains("1 passed"),
            "{status} after {:?}\n{text}",
            started.elapsed()
        );
    }

    fn header(step: usize) -> Header {
        Header {
            content: Content::Activation,
            pass: Pass::Train,
            step,
            microbatch: 0,
            shape: [1, 2, 3],
            wire: Wire::F32,
            payload_elsewhere: false,
        }
    }

    /// A progress engine in a world of one rank, whose link ends at itself.
    struct Lonely {
        commands: Sender<Request>,
        inbox: Receiver<super::super::in_flight::Arrival>,
        reports: Receiver<Report>,
        gate: Arc<Gate>,
    }

    impl Lonely {
        fn start() -> (Lonely, std::thread::JoinHandle<()>) {
            let ((started, identity), (commands, received)) = (channel(), channel());
            let driver = std::thread::spawn(move || run(&started, &received, Arc::default()));
            let identity = identity.recv().unwrap().unwrap();
            assert_eq!((identity.rank, identity.size, identity.local.ranks), (0, 1, 1));

            let ((sender, inbox), (reporter, reports)) = (sync_channel(4), channel());
            let gate = Arc::new(Gate::new(3, "here", None));
            let (reply, connected) = channel();
            let inboxes =
                vec![Inbox { from: 0, content: Content::Activation, largest: 1 << 20, sender }];
            let connect = Request::Connect {
                groups: vec![Some(Group { color: 0, values: 0 })],
                key: 0,
                wire: Wire::F32,
                inboxes,
                reports: Some(reporter),
                gate: Arc::clone(&gate),
                stall: Duration::from_secs(60),
                reply,
            };
            commands.send(connect).unwrap();
            assert_eq!(connected.recv().unwrap().unwrap().len(), 1, "one group, without memory");
            (Lonely { commands, inbox, reports, gate }, driver)
        }

        fn send(&self, command: Request) {
            self.commands.send(command).unwrap();
        }

        /// Wakes the progress engine, which in a world of one sleeps until it is told something,
        /// until `there` gives a value.
        fn until<T>(&self, mut there: impl FnMut() -> Option<T>) -> T {
            for _ in 0..1000 {
                if let Some(value) = there() {
                    return value;
                }
                self.send(Request::Wake);
                std::thread::sleep(Duration::from_millis(1));
            }
            panic!("nothing came");
        }
    }

    #[test]
    fn the_driver_carries_messages_sums_reports_and_controls() {
        alone("the_driver_carries_messages_sums_reports_and_controls", || {
            let (lonely, driver) = Lonely::start();

            let (reply, gathered) = channel();
            lonely.send(Request::AllGather { bytes: b"mine".to_vec(), reply });
            assert_eq!(gathered.recv().unwrap(), [b"mine".to_vec()]);

            let tensor = Tensor::arange(6, (Kind::Float, tch::Device::Cpu));
            for step in [4, 5] {
                let permit = Permits::new(2).try_acquire().unwrap();
                let tensor = &tensor + step as f64;
                lonely.send(Request::Send {
                    stage: 0,
                    to: 0,
                    header: header(step),
                    tensor,
                    permit,
                });
            }
            for step in [4, 5] {
                let (found, values) = lonely.until(|| lonely.inbox.try_recv().ok()).unwrap();
                assert_eq!(found, header(step));
                assert_eq!(values.view([-1]), &tensor + step as f64);
            }

            for work in [Work::Both, Work::Reduce, Work::Gather] {
                let (reply, summed) = channel();
                let flat = tensor.shallow_clone();
                lonely.send(Request::Reduce { slot: 0, step: 0, flat, work, reply });
                assert!(
                    lonely.until(|| summed.try_recv().ok()).is_ok(),
                    "the sum of one is itself"
                );
            }

            let report = Report::TableNorm { step: 7, norm: 0.5 };
            lonely.send(Request::Report(serde_json::to_vec(&report).unwrap()));
            assert_eq!(lonely.until(|| lonely.reports.try_recv().ok()), report);
            lonely.send(Request::Control(Control::Limit(9)));
            lonely.until(|| (lonely.gate.limit() == 9).then_some(()));
            lonely.send(Request::Control(Control::Ask));
            let answer = lonely.until(|| lonely.reports.try_recv().ok());
            assert!(matches!(answer, Report::Heartbeat { rank: 0, .. }), "{answer:?}");

            lonely.send(Request::Control(Control::Shutdown));
            let (reply, finished) = channel();
            lonely.send(Request::Finish(reply));
            finished.recv().unwrap();
            driver.join().unwrap();
        });
    }

    /// A damaged header asks for no memory.
    #[test]
    fn a_message_that_is_larger_than_any_is_refused() {
        alone("a_message_that_is_larger_than_any_is_refused", || {
            let (lonely, driver) = Lonely::start();
            let permit = Permits::new(2).try_acquire().unwrap();
            let header = Header { shape: [1 << 30, 1 << 30, 1 << 30], ..header(4) };
            let tensor = Tensor::zeros([6], (Kind::Float, tch::Device::Cpu));
            lonely.send(Request::Send { stage: 0, to: 0, header, tensor, permit });

            let report = lonely.until(|| lonely.reports.try_recv().ok());
            let Report::Failed { error: Error::Transport(text), .. } = report else {
                panic!("{report:?}")
            };
            assert!(
                text.contains("rank 0 tells of a larger message than any: activation 4.0"),
                "{text}"
            );
            let (reply, finished) = channel();
            lonely.send(Request::Finish(reply));
            finished.recv().unwrap();
            driver.join().unwrap();
        });
    }

    /// An error of the transport reaches everybody who waits: the coordinator, links, sums, the
    /// gate.
    #[test]
    fn whoever_waits_hears_of_a_failure() {
        alone("whoever_waits_hears_of_a_failure", || {
            let (lonely, driver) = Lonely::start();
            lonely.send(Request::Report(b"no report".to_vec()));
            let report = lonely.until(|| lonely.reports.try_recv().ok());
            let Report::Failed { origin, error: Error::Transport(text) } = report else {
                panic!("{report:?}")
            };
            assert_eq!(origin, "rank 0");
            assert!(text.contains("a report that cannot be read"), "{text}");

            assert!(lonely.until(|| lonely.inbox.try_recv().ok()).is_err(), "the link is told");
            assert!(lonely.gate.ended() && lonely.gate.wait(3).is_err());
            let (reply, summed) = channel();
            let flat = Tensor::zeros([2], (Kind::Float, tch::Device::Cpu));
            lonely.send(Request::Reduce { slot: 0, step: 0, flat, work: Work::Both, reply });
            assert!(summed.recv().is_err(), "nobody answers any more");

            let (reply, finished) = channel();
            lonely.send(Request::Finish(reply));
            finished.recv().unwrap();
            driver.join().unwrap();
        });
    }
}
