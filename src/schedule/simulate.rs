//! An event simulation of action lists: who waits for whom, how long a step takes. It runs the very
//! lists that the workers run, so a schedule that it finds free of deadlock and mismatch is so.

use std::collections::{HashMap, VecDeque};
use std::fmt;

use rayon::prelude::*;

use super::{Action, Op, Schedule};
use crate::grid::{Grid, Place};

/// Times of one microbatch on one device, in any unit; a stage that has half a device takes half of
/// them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    pub forward: f64,
    pub backward: f64,
    /// From the end of a forward or backward to the arrival at the neighbour.
    pub message: f64,
}

/// Times of one microbatch and of one update on one stage, in any unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageCosts {
    pub forward: f64,
    pub backward: f64,
    pub update: f64,
}

impl Costs {
    /// The times of every stage; updates are free.
    pub fn stages(self, schedule: &Schedule) -> Vec<StageCosts> {
        let of = |share: f64| StageCosts {
            forward: self.forward * share,
            backward: self.backward * share,
            update: 0.0,
        };
        (0..schedule.stages).map(|stage| of(schedule.device_fraction(stage))).collect()
    }
}

/// What is wrong with a set of action lists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// When an action of a place ran.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    pub action: Action,
    pub start: f64,
    pub end: f64,
}

struct Message {
    action: Action,
    arrives: f64,
}

/// An all-reduce: when each member of the replica group has started it, and how many have used its
/// sum.
#[derive(Default)]
struct Reduced {
    started: Vec<f64>,
    used: usize,
}

/// What is known of all places at some moment of a simulation.
pub(super) struct SimState {
    grid: Grid,
    /// The stage that puts the parts of the tied table's gradient together.
    joiner: usize,
    stages: Vec<StageCosts>,
    message: f64,
    /// (from, to, what) -> messages under way, in order.
    links: HashMap<(Place, Place, Op), VecDeque<Message>>,
    /// (stage, step, what) -> the all-reduces under way.
    reduces: HashMap<(usize, usize, Op), Reduced>,
    /// replica -> updates of the table by the joiner, and when the last of them was made.
    tables: HashMap<usize, (usize, f64)>,
}

impl SimState {
    pub(super) fn new(
        schedule: &Schedule,
        replicas: usize,
        stages: Vec<StageCosts>,
        message: f64,
    ) -> SimState {
        let (grid, joiner) = (schedule.grid(replicas), schedule.joiner());
        SimState {
            grid,
            joiner,
            stages,
            message,
            links: HashMap::new(),
            reduces: HashMap::new(),
            tables: HashMap::new(),
        }
    }

    /// From when on `action` of `replica` can run, as far as its inputs go; none while they are not
    /// known.
    pub(super) fn ready(&self, replica: usize, action: Action) -> Result<Option<f64>, Violation> {
        let place = Place { stage: action.stage, replica };
        Ok(match action.op {
            Op::RecvActivation => {
                self.arrival(place, self.grid.upstream(place), Op::SendActivation, action)?
            }
            Op::RecvGradient => {
                self.arrival(place, self.grid.downstream(place), Op::SendGradient, action)?
            }
            Op::RecvPart => self.arrival(place, self.other_end(place), Op::Part, action)?,
            Op::RecvTable => self.arrival(place, self.other_end(place), Op::SendTable, action)?,
            Op::Update => self.reduced(Op::Reduce, action),
            Op::SendTable => self.reduced(Op::ReduceTable, action),
            Op::UpdateTable if place.stage == self.joiner => self.reduced(Op::ReduceTable, action),
            Op::AwaitTable => {
                let (updates, made) = self.tables.get(&replica).copied().unwrap_or_default();
                (updates > action.step).then_some(made)
            }
            _ => Some(0.0),
        })
    }

    /// Runs an action that is ready; when it ends.
    pub(super) fn run(
        &mut self,
        replica: usize,
        action: Action,
        start: f64,
    ) -> Result<f64, Violation> {
        let place = Place { stage: action.stage, replica };
        let costs = self.stages[action.stage];
        match action.op {
            Op::Forward => return Ok(start + costs.forward),
            Op::Backward => return Ok(start + costs.backward),
            Op::SendActivation => self.send(place, self.grid.downstream(place), action, start)?,
            Op::SendGradient => self.send(place, self.grid.upstream(place), action, start)?,
            // The joiner keeps its part.
            Op::Part if place.stage == self.joiner => {}
            Op::Part | Op::SendTable => self.send(place, self.other_end(place), action, start)?,
            Op::RecvActivation => self.take(place, self.grid.upstream(place), Op::SendActivation),
            Op::RecvGradient => self.take(place, self.grid.downstream(place), Op::SendGradient),
            Op::RecvPart => self.take(place, self.other_end(place), Op::Part),
            Op::RecvTable => self.take(place, self.other_end(place), Op::SendTable),
            Op::Reduce | Op::ReduceTable => {
                self.reduces
                    .entry((place.stage, action.step, action.op))
                    .or_default()
                    .started
                    .push(start);
            }
            Op::Update => {
                self.used(Op::Reduce, action);
                return Ok(start + costs.update);
            }
            Op::UpdateTable if place.stage == self.joiner => {
                self.tables.insert(replica, (action.step + 1, start));
                self.used(Op::ReduceTable, action);
            }

            Op::Load | Op::UpdateTable | Op::AwaitTable | Op::Digest | Op::Save => {}
        }

        Ok(start)
    }

    /// The place at the other end of the pipeline, on this device or another.
    fn other_end(&self, place: Place) -> Option<Place> {
        let last = self.grid.stages - 1;
        let stage = match place.stage {
            0 => last,
            stage if stage == last => 0,
            _ => return None,
        };
        Some(Place { stage, ..place })
    }

    fn send(
        &mut self,
        from: Place,
        to: Option<Place>,
        action: Action,
        now: f64,
    ) -> Result<(), Violation> {
        let to = to.ok_or_else(|| Violation(format!("{action} has nobody to send to")))?;
        let message = if self.grid.rank(from) == self.grid.rank(to) { 0.0 } else { self.message };
        self.links
            .entry((from, to, action.op))
            .or_default()
            .push_back(Message { action, arrives: now + message });
        Ok(())
    }

    fn arrival(
        &self,
        to: Place,
        from: Option<Place>,
        sent: Op,
        action: Action,
    ) -> Result<Option<f64>, Violation> {
        let from = from.ok_or_else(|| Violation(format!("{action} has nobody to receive from")))?;
        let Some(message) = self.links.get(&(from, to, sent)).and_then(VecDeque::front) else {
            return Ok(None);
        };

        if message.action != (Action { stage: from.stage, op: sent, ..action }) {
            return Err(Violation(format!("{action} meets the message of {}", message.action)));
        }

        Ok(Some(message.arrives))
    }

    fn take(&mut self, to: Place, from: Option<Place>, sent: Op) {
        if let Some(link) = from.and_then(|from| self.links.get_mut(&(from, to, sent))) {
            link.pop_front();
        }
    }

    fn reduced(&self, started: Op, action: Action) -> Option<f64> {
        let reduced = self.reduces.get(&(action.stage, action.step, started))?;
        let all = reduced.started.len() == self.grid.replicas;
        all.then(|| reduced.started.iter().copied().fold(0.0, f64::max))
    }

    /// A merged list is made while a run lasts: what is over must not be kept.
    fn used(&mut self, started: Op, action: Action) {
        let key = (action.stage, action.step, started);
        if let Some(reduced) = self.reduces.get_mut(&key) {
            reduced.used += 1;
            if reduced.used == self.grid.replicas {
                self.reduces.remove(&key);
            }
        }
    }

    /// Messages and all-reduces that are held.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.links.values().map(VecDeque::len).sum::<usize>() + self.reduces.len()
    }
}

/// Runs the action lists of all devices (in the order of their ranks).
///
/// # Errors
/// A receive that meets another message than its own, messages left over at the end, or a deadlock
/// (with what every stuck place waits for).
pub fn simulate(
    schedule: &Schedule,
    lists: &[Vec<Action>],
    costs: Costs,
) -> Result<Vec<Vec<Span>>, Violation> {
    simulate_stages(schedule, lists, costs.stages(schedule), costs.message, None)
}

/// A device comes late once: by so much, with the first forward of a step.
#[derive(Clone, Copy)]
struct Pause {
    device: usize,
    step: usize,
    extra: f64,
}

impl Pause {
    /// What it adds to an action of a device.
    fn before(self, device: usize, action: Action) -> f64 {
        let Action { op, step, microbatch, .. } = action;
        let hit = (device, op, step, microbatch) == (self.device, Op::Forward, self.step, 0);
        if hit { self.extra } else { 0.0 }
    }
}

/// The same with times of every stage's own.
fn simulate_stages(
    schedule: &Schedule,
    lists: &[Vec<Action>],
    stages: Vec<StageCosts>,
    message: f64,
    pause: Option<Pause>,
) -> Result<Vec<Vec<Span>>, Violation> {
    let devices = schedule.grid(1).devices();
    let mut world = SimState::new(schedule, lists.len() / devices, stages, message);
    let mut clock = vec![0.0f64; lists.len()];
    let mut spans: Vec<Vec<Span>> = vec![Vec::new(); lists.len()];
    loop {
        let mut moved = false;
        for (rank, list) in lists.iter().enumerate() {
            while let Some(action) = list.get(spans[rank].len()) {
                let Some(ready) = world.ready(rank / devices, *action)? else { break };
                let start = clock[rank].max(ready);
                let late = pause.map_or(0.0, |pause| pause.before(rank, *action));
                let end = world.run(rank / devices, *action, start + late)?;
                spans[rank].push(Span { action: *action, start, end });
                clock[rank] = end;
                moved = true;
            }
        }

        if !moved {
            break;
        }
    }

    let stuck = |rank: usize| {
        let action = lists[rank].get(spans[rank].len())?;
        let place = Place { stage: action.stage, replica: rank / devices };
        Some(format!("{place} waits at {action}"))
    };

    let stuck: Vec<String> = (0..lists.len()).filter_map(stuck).collect();
    if !stuck.is_empty() {
        return Err(Violation(format!("deadlock: {}", stuck.join("; "))));
    }

    if let Some(message) = world.links.values().find_map(|link| link.front()) {
        return Err(Violation(format!("nobody receives {}", message.action)));
    }

    Ok(spans)
}

/// The steady state of a schedule under given times.
#[derive(Debug, Clone, PartialEq)]
pub struct Ideal {
    /// Over one device that holds the whole model: the devices' work per step over the time between
    /// two steps.
    pub speed_up: f64,
    /// Share of its time that each device computes.
    pub utilization: Vec<f64>,
    /// The speed-up over the `BEFORE_DRAIN` steps before a sync point, from the end of a step's
    /// last backward on stage 0 to the end of the last one's: the drain waits for no new forward,
    /// so it may be faster.
    pub before_drain: f64,
}

/// Steps before a sync point that [`Ideal::before_drain`] is taken over.
pub const BEFORE_DRAIN: usize = 30;

/// A simulation that is long enough for fill and drain not to count.
struct Long {
    schedule: Schedule,
    spans: Vec<Vec<Span>>,
    /// Whole runs of K steps average out a pattern that repeats only after several steps.
    window: std::ops::Range<usize>,
}

impl Long {
    /// Steps that fill it, and those of its window.
    fn lengths(schedule: &Schedule) -> (usize, usize) {
        let (k, m) = (schedule.stages, schedule.microbatches);
        let waiting = schedule.link_capacity().saturating_add(k).saturating_mul(2);
        (waiting.div_ceil(m), 8 * k)
    }

    fn new(
        schedule: &Schedule,
        stages: Vec<StageCosts>,
        message: f64,
        pause: Option<(usize, f64)>,
    ) -> Result<Long, Violation> {
        let (fill, length) = Long::lengths(schedule);
        let window = 2 * fill..2 * fill + length;
        let mut long = schedule.clone();
        long.sync.steps = (window.end + fill).max(fill + BEFORE_DRAIN + 1);
        long.sync.warm_up = 0;
        long.sync.periods.clear();
        long.sync.at.clear();
        (long.evals, long.saves) = (None, None);
        long.sync.start = 0;
        let devices = schedule.grid(1).devices();
        let lists: Vec<Vec<Action>> =
            (0..devices).map(|device| long.device_actions(device).collect()).collect();
        let at = |(device, extra)| Pause { device, step: window.start, extra };
        let spans = simulate_stages(&long, &lists, stages, message, pause.map(at))?;
        Ok(Long { schedule: long, spans, window })
    }

    /// When a stage's last backward of a step ends: the same place of the pattern in every step.
    fn end_of(&self, stage: usize, step: usize) -> f64 {
        let last = |s: &&Span| {
            let Action { stage: of, op, step: t, microbatch, .. } = s.action;
            (of, op, t, microbatch) == (stage, Op::Backward, step, self.schedule.microbatches - 1)
        };
        self.spans[self.schedule.grid(1).device(stage)].iter().find(last).map_or(0.0, |s| s.end)
    }

    /// What the window takes a device.
    fn time(&self, device: usize) -> f64 {
        self.end_of(device, self.window.end) - self.end_of(device, self.window.start)
    }
}

/// The steady state under times of one microbatch on a device.
///
/// # Errors
/// As [`simulate`].
pub fn ideal(schedule: &Schedule, costs: Costs) -> Result<Ideal, Violation> {
    let long = Long::new(schedule, costs.stages(schedule), costs.message, None)?;
    let devices = schedule.grid(1).devices();
    let work =
        |steps: usize| (costs.forward + costs.backward) * (schedule.microbatches * steps) as f64;
    let utilization: Vec<f64> =
        (0..devices).map(|device| work(long.window.len()) / long.time(device)).collect();
    let last = long.schedule.sync.steps - 1;
    let tail = long.end_of(0, last) - long.end_of(0, last - BEFORE_DRAIN);
    let before_drain = work(BEFORE_DRAIN) * devices as f64 / tail;
    Ok(Ideal { speed_up: utilization.iter().sum(), utilization, before_drain })
}

/// Forwards and backwards that [`step_time`] goes through, one behind the other: what it takes time and
/// memory for.
pub fn simulated(schedule: &Schedule) -> usize {
    let (fill, length) = Long::lengths(schedule);
    let steps = fill.saturating_mul(3).saturating_add(length);
    let of_a_step = 2 * schedule.stages * schedule.microbatches;
    of_a_step.saturating_mul(steps)
}

/// How often [`absorbed`] simulates the grid.
pub fn simulations(schedule: &Schedule) -> usize {
    1 + schedule.grid(1).devices() * HALVINGS
}

/// The time of a step in the steady state, under times of every stage's own.
///
/// # Errors
/// As [`simulate`].
pub fn step_time(
    schedule: &Schedule,
    stages: Vec<StageCosts>,
    message: f64,
) -> Result<f64, Violation> {
    let long = Long::new(schedule, stages, message, None)?;
    Ok(long.time(0) / long.window.len() as f64)
}

/// How late each device may be once, in the steady state, without the run's end being later for it by
/// more than a hundredth of a step: what its slack absorbs; and the most that is looked for, eight
/// steps.
///
/// # Errors
/// As [`simulate`].
pub fn absorbed(
    schedule: &Schedule,
    stages: &[StageCosts],
    message: f64,
) -> Result<(Vec<f64>, f64), Violation> {
    let end = |pause: Option<(usize, f64)>| -> Result<(f64, f64), Violation> {
        let long = Long::new(schedule, stages.to_vec(), message, pause)?;
        let last = long.spans.iter().flatten().map(|span| span.end).fold(0.0, f64::max);
        Ok((last, long.time(0) / long.window.len() as f64))
    };

    let (undisturbed, step) = end(None)?;
    let latest = LATEST * step;
    let absorbs = |device: usize| -> Result<f64, Violation> {
        let (mut least, mut most) = (0.0, latest);
        for _ in 0..HALVINGS {
            let middle = 0.5 * (least + most);
            let late = end(Some((device, middle)))?.0 - undisturbed;
            if late <= 0.01 * step { least = middle } else { most = middle }
        }
        Ok(least)
    };
    let found =
        (0..schedule.grid(1).devices()).into_par_iter().map(absorbs).collect::<Result<_, _>>()?;
    Ok((found, latest))
}

/// Steps that a device is late at most where what it absorbs is looked for, and how often the range
/// is halved.
const LATEST: f64 = 8.0;
const HALVINGS: usize = 12;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::grid::Placement;
    use crate::schedule::{ScheduleKind, Tie};

    fn action(text: &str) -> Action {
        text.parse().unwrap()
    }

    const FREE: Costs = Costs { forward: 1.0, backward: 2.0, message: 0.0 };

    fn speed_up(kind: ScheduleKind, stages: usize, m: usize, slack: usize, costs: Costs) -> f64 {
        ideal(&Schedule::new(kind, stages, m, slack, SyncPoints::ends(1)), costs).unwrap().speed_up
    }

    #[test]
    fn speed_ups_of_the_design() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 0.005, "{a} is not {b}");
        close(speed_up(ScheduleKind::Decoupled, 4, 1, 1, FREE), 4.0);
        close(speed_up(ScheduleKind::OneForwardOneBackward, 4, 1, 1, FREE), 1.0);
        close(speed_up(ScheduleKind::Decoupled, 4, 4, 1, FREE), 4.0);
        close(speed_up(ScheduleKind::OneForwardOneBackward, 4, 4, 1, FREE), 2.29);
        close(speed_up(ScheduleKind::Gpipe, 4, 4, 1, FREE), 2.29);
        close(speed_up(ScheduleKind::Sequential, 4, 4, 1, FREE), 1.0);
        close(speed_up(ScheduleKind::Decoupled, 11, 8, 1, FREE), 11.0);
        close(speed_up(ScheduleKind::OneForwardOneBackward, 11, 8, 1, FREE), 4.89);
        let slow = Costs { message: 0.3, ..FREE };
        close(speed_up(ScheduleKind::Decoupled, 4, 1, 2, slow) / 4.0, 1.0);
        close(speed_up(ScheduleKind::Decoupled, 4, 1, 1, slow) / 4.0, 0.87);
    }

    #[test]
    fn a_fresh_table_stalls_the_pipeline_and_an_aligned_one_does_not() {
        for (stages, steady, before_drain) in
            [(3, 1.8, 1.85), (4, 2.0, 2.11), (5, 15.0 / 7.0, 2.32)]
        {
            let mut schedule =
                Schedule::new(ScheduleKind::Decoupled, stages, 1, 1, SyncPoints::ends(1));
            schedule.tie = Tie::Fresh;
            let fresh = ideal(&schedule, FREE).unwrap();
            assert!((fresh.speed_up - steady).abs() < 1e-9, "{stages}: {fresh:?}");
            assert!((fresh.before_drain - before_drain).abs() < 0.005, "{stages}: {fresh:?}");
            schedule.tie = Tie::Aligned;
            let aligned = ideal(&schedule, FREE).unwrap();
            assert!((aligned.speed_up - stages as f64).abs() < 1e-9, "{stages}: {aligned:?}");
            assert!((aligned.before_drain - stages as f64).abs() < 1e-9, "{stages}: {aligned:?}");
        }
    }

    /// Whatever a message takes: a fresh head is as fast as no tie.
    #[test]
    fn a_fresh_head_waits_for_nobody() {
        for (stages, m, slack) in
            (1..=6).flat_map(|k| (1..=5).flat_map(move |m| (1..=3).map(move |h| (k, m, h))))
        {
            for message in [0.0, 0.3, 1.0] {
                let mut schedule =
                    Schedule::new(ScheduleKind::Decoupled, stages, m, slack, SyncPoints::ends(1));
                let untied = ideal(&schedule, Costs { message, ..FREE }).unwrap().speed_up;
                schedule.tie = Tie::Head;
                let head = ideal(&schedule, Costs { message, ..FREE }).unwrap().speed_up;
                assert!(
                    head > untied - 1e-9,
                    "K = {stages}, m = {m}, h = {slack}, c = {message}: {head} of {untied}"
                );
            }
        }
    }

    #[test]
    fn the_slowest_stage_sets_the_pace() {
        let stage = |forward, update| StageCosts { forward, backward: 2.0, update };
        let schedule = Schedule::new(ScheduleKind::Decoupled, 3, 2, 1, SyncPoints::ends(1));
        let time =
            step_time(&schedule, vec![stage(1.0, 0.5), stage(1.5, 0.5), stage(1.0, 0.0)], 0.0)
                .unwrap();
        assert!((time - 7.5).abs() < 1e-9, "2 (1.5 + 2) + 0.5, not {time}");
    }

    /// The slowest device has nothing to give; the others have what stands between them and it.
    #[test]
    fn a_device_with_slack_absorbs_a_pause() {
        let schedule = line(3);
        let costs = |forward| StageCosts { forward, backward: 2.0 * forward, update: 0.0 };
        let uneven = [costs(0.5), costs(1.0), costs(0.25)];
        let (found, most) = absorbed(&schedule, &uneven, 0.0).unwrap();
        assert!(found[1] < 0.1 && found[0] > 0.5 && found[2] > 0.5, "{found:?}");
        assert!(found.iter().all(|pause| *pause <= most), "{found:?} {most}");
        let (even, _) = absorbed(&schedule, &[costs(1.0); 3], 0.0).unwrap();
        assert!(even.iter().all(|pause| *pause < 0.1), "{even:?}");
    }

    #[test]
    fn a_ring_keeps_all_its_devices_busy() {
        for (stages, m, tie) in [
            (3, 1, Tie::Untied),
            (4, 1, Tie::Aligned),
            (5, 4, Tie::Aligned),
            (11, 2, Tie::Untied),
            (5, 2, Tie::Head),
        ] {
            let mut schedule =
                Schedule::new(ScheduleKind::Decoupled, stages, m, 1, SyncPoints::ends(1));
            (schedule.placement, schedule.tie) = (Placement::Ring, tie);
            let ring = ideal(&schedule, FREE).unwrap();
            assert!((ring.speed_up - (stages - 1) as f64).abs() < 1e-9, "{stages}: {ring:?}");
        }
    }

    fn line(stages: usize) -> Schedule {
        Schedule::new(ScheduleKind::Decoupled, stages, 1, 1, SyncPoints::ends(1))
    }

    #[test]
    fn a_missing_send_is_a_deadlock_that_names_the_waiting_place() {
        let lists = vec![vec![action("0F0.0")], vec![action("1RA0.0"), action("1F0.0")]];
        let fault = simulate(&line(2), &lists, FREE).unwrap_err();
        assert_eq!(fault.0, "deadlock: stage 1, replica 0 waits at 1RA0.0");
    }

    #[test]
    fn a_message_out_of_order_or_left_over_is_a_fault() {
        let swapped = vec![vec![action("0SA0.1")], vec![action("1RA0.0")]];
        assert_eq!(
            simulate(&line(2), &swapped, FREE).unwrap_err().0,
            "1RA0.0 meets the message of 0SA0.1"
        );
        let left = vec![vec![action("0SA0.0")], vec![]];
        assert_eq!(simulate(&line(2), &left, FREE).unwrap_err().0, "nobody receives 0SA0.0");
    }

    #[test]
    fn an_update_waits_for_the_whole_group() {
        let lists = vec![
            vec![action("0F0.0"), action("0R0"), action("0U0")],
            vec![action("0F0.0"), action("0F0.1"), action("0R0"), action("0U0")],
        ];
        let spans = simulate(&line(1), &lists, FREE).unwrap();
        assert_eq!(spans[0].last().unwrap().end, 2.0);
    }
}
