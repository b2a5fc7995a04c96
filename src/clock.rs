//! Where a device's time goes, action by action, between the ends of two steps' last backwards:
//! from the one to the other a pipeline in its steady state does the work of so many steps,
//! whatever stage it is watched at.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::schedule::{Action, Op, Pass, Schedule};

/// What a device's time is spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeKind {
    /// Forwards and backwards.
    Compute,
    /// Waiting for the stage before: for its activations, or for room for gradients.
    Upstream,
    /// Waiting for the stage behind: for its gradients, or for room for activations.
    Downstream,
    /// Waiting for the replicas' sums.
    Reduce,
    /// Norms and optimizers.
    Update,
    /// Reading batches, handing messages over.
    Copies,
    /// The tied table: putting parts together, waiting for the other end.
    Table,
    /// Between actions.
    Idle,
    /// All of an evaluation, its waits included.
    Evaluation,
    /// Copying a state that is saved, waiting until the one before it is written.
    Save,
}

impl TimeKind {
    /// All of them, as tables show them.
    pub const ALL: [(TimeKind, &'static str); 10] = [
        (TimeKind::Compute, "compute"),
        (TimeKind::Upstream, "upstream"),
        (TimeKind::Downstream, "downstream"),
        (TimeKind::Reduce, "reduce"),
        (TimeKind::Update, "update"),
        (TimeKind::Copies, "copies"),
        (TimeKind::Table, "table"),
        (TimeKind::Idle, "idle"),
        (TimeKind::Evaluation, "evaluation"),
        (TimeKind::Save, "save"),
    ];

    /// Those of the steps themselves: what `bench` has, which neither evaluates nor saves.
    pub fn of_steps() -> &'static [(TimeKind, &'static str)] {
        &TimeKind::ALL[..TimeKind::Evaluation as usize]
    }

    /// What an action is counted as.
    pub fn of(action: &Action) -> TimeKind {
        if action.pass == Pass::Eval {
            return TimeKind::Evaluation;
        }

        match action.op {
            Op::Forward | Op::Backward => TimeKind::Compute,
            Op::RecvActivation => TimeKind::Upstream,
            Op::RecvGradient => TimeKind::Downstream,
            Op::Update => TimeKind::Update,
            Op::Load | Op::SendActivation | Op::SendGradient | Op::Reduce => TimeKind::Copies,
            Op::Save => TimeKind::Save,
            Op::Part | Op::RecvPart | Op::ReduceTable | Op::SendTable | Op::RecvTable => {
                TimeKind::Table
            }
            Op::UpdateTable | Op::AwaitTable | Op::Digest => TimeKind::Table,
        }
    }
}

/// The times of one stage while the clock ran, in seconds: the sums, and how many microbatches and
/// updates they are of.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct StageTimes {
    pub stage: usize,
    pub forward: f64,
    pub backward: f64,
    pub update: f64,
    /// Batches read, messages handed over.
    pub copies: f64,
    /// The work on the tied table, without its waits.
    pub table: f64,
    pub microbatches: usize,
    pub updates: usize,
}

/// The times of one device.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Times {
    /// Steps that the clock ran for, and seconds.
    pub steps: usize,
    pub seconds: f64,
    /// Seconds of each kind, in the order of [`TimeKind::ALL`].
    pub shares: [f64; TimeKind::ALL.len()],
    /// One for each stage of the device.
    pub stages: Vec<StageTimes>,
    /// Seconds of a processor, of the thread that computes and of the one that owns MPI (0 where
    /// there is none).
    pub processor: [f64; 2],
}

impl Times {
    /// Of these stages, nothing yet.
    fn none(stages: &[usize]) -> Times {
        let stage = |stage: &usize| StageTimes { stage: *stage, ..StageTimes::default() };
        Times { stages: stages.iter().map(stage).collect(), ..Times::default() }
    }

    /// The time of an action was so long.
    fn count(&mut self, action: &Action, seconds: f64) {
        let of = |times: &&mut StageTimes| times.stage == action.stage;
        let Some(stage) = self.stages.iter_mut().find(of) else { return };
        match action.op {
            Op::Forward => stage.forward += seconds,
            Op::Backward => {
                stage.backward += seconds;
                stage.microbatches += 1;
            }
            Op::Update => {
                stage.update += seconds;
                stage.updates += 1;
            }

            Op::Load | Op::SendActivation | Op::SendGradient | Op::Reduce => {
                stage.copies += seconds
            }

            Op::Part | Op::ReduceTable | Op::SendTable | Op::UpdateTable | Op::Digest => {
                stage.table += seconds
            }

            Op::RecvActivation
            | Op::RecvGradient
            | Op::RecvPart
            | Op::RecvTable
            | Op::AwaitTable
            | Op::Save => {}
        }
    }

    /// Adds the times of the same device in other steps.
    pub fn add(&mut self, other: &Times) {
        self.steps += other.steps;
        self.seconds += other.seconds;
        self.shares.iter_mut().zip(other.shares).for_each(|(sum, share)| *sum += share);
        self.processor.iter_mut().zip(other.processor).for_each(|(sum, time)| *sum += time);
        for (sum, stage) in self.stages.iter_mut().zip(&other.stages) {
            sum.forward += stage.forward;
            sum.backward += stage.backward;
            sum.update += stage.update;
            sum.copies += stage.copies;
            sum.table += stage.table;
            sum.microbatches += stage.microbatches;
            sum.updates += stage.updates;
        }
    }

    /// A share of the device's time, from 0 to 1.
    pub fn fraction(&self, kind: TimeKind) -> f64 {
        self.shares[kind as usize] / self.seconds
    }
}

/// Steps from whose last backward to which one's the clock runs: filling and draining are left out.
/// None in a run that is too short.
pub fn window(schedule: &Schedule) -> Option<Range<usize>> {
    let steps = schedule.sync.steps;
    let fill = fill(schedule);
    let window = fill + steps / 8..steps.saturating_sub(1 + fill);
    (window.end > window.start + 1).then_some(window)
}

/// Whether a run is long enough to be measured.
///
/// # Errors
/// [`Error::Config`] about `steps`, with the least number that is.
pub fn check(schedule: &Schedule) -> Result<()> {
    if window(schedule).is_some() {
        return Ok(());
    }

    let enough = |steps: &usize| {
        let mut longer = schedule.clone();
        longer.sync.steps = *steps;
        window(&longer).is_some()
    };

    let least = (schedule.sync.steps + 1..).find(enough).unwrap_or(usize::MAX);
    Err(Error::config(
        "steps",
        schedule.sync.steps,
        format!("too few to measure; take {least} or more"),
    ))
}

/// Steps after which a schedule has filled its pipeline.
fn fill(schedule: &Schedule) -> usize {
    let most = |values: &[usize]| values.iter().max().copied().unwrap_or(0);
    most(&schedule.ahead).div_ceil(schedule.microbatches).max(most(&schedule.delays)) + 1
}

/// Seconds that this thread and the one that owns MPI have had a processor so far, by the kernel's
/// count (proc(5), `schedstat`); 0 where there is none.
fn processor() -> [f64; 2] {
    let of = |task: &Path| -> Option<f64> {
        let text = fs::read_to_string(task.join("schedstat")).ok()?;
        Some(text.split(' ').next()?.parse::<u64>().ok()? as f64 / 1e9)
    };

    let named = |task: &PathBuf| {
        fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "mpi")
    };

    let mut tasks =
        fs::read_dir("/proc/self/task").into_iter().flatten().flatten().map(|task| task.path());
    let mpi = tasks.find(named).and_then(|task| of(&task));
    [of(Path::new("/proc/thread-self")).unwrap_or(0.0), mpi.unwrap_or(0.0)]
}

/// The clock of one device.
pub struct Clock {
    window: Option<Range<usize>>,
    microbatches: usize,
    /// The stage whose backwards start and stop it.
    marker: usize,
    started: Option<Instant>,
    last: Instant,
    /// Within an evaluation.
    evaluates: bool,
    /// Processor times when it was started.
    before: [f64; 2],
    times: Times,
    /// Since the last question for it, when that was, and the processor times then.
    recent: Times,
    asked: Instant,
    then: [f64; 2],
}

impl Clock {
    /// A clock for the stages of one device.
    pub fn new(schedule: &Schedule, stages: &[usize]) -> Clock {
        let now = Instant::now();
        Clock {
            window: window(schedule),
            microbatches: schedule.microbatches,
            marker: stages.first().copied().unwrap_or(0),
            started: None,
            last: now,
            evaluates: false,
            before: [0.0; 2],
            times: Times::none(stages),
            recent: Times::none(stages),
            asked: now,
            then: processor(),
        }
    }

    /// What the device has done since this was last asked, in all passes, if that is long enough ago.
    pub fn recent(&mut self, least: Duration) -> Option<Times> {
        let seconds = self.last.duration_since(self.asked);
        if seconds < least {
            return None;
        }

        let stages: Vec<usize> = self.recent.stages.iter().map(|times| times.stage).collect();
        let mut recent = std::mem::replace(&mut self.recent, Times::none(&stages));
        let now = processor();
        recent.seconds = seconds.as_secs_f64();
        recent.processor = [now[0] - self.then[0], now[1] - self.then[1]];
        (self.asked, self.then) = (self.last, now);
        Some(recent)
    }

    /// An action begins.
    pub fn began(&mut self, action: &Action) {
        self.evaluates = action.pass == Pass::Eval;
        self.waited_for(TimeKind::Idle);
    }

    /// The time since the last call was a wait of this kind, or the evaluation's.
    pub fn waited_for(&mut self, kind: TimeKind) {
        self.lap(if self.evaluates { TimeKind::Evaluation } else { kind });
    }

    /// The time since the last call was spent on `share`; how much it was.
    fn lap(&mut self, share: TimeKind) -> f64 {
        let now = Instant::now();
        let seconds = now.duration_since(self.last).as_secs_f64();
        self.last = now;
        self.recent.shares[share as usize] += seconds;
        if self.started.is_some() {
            self.times.shares[share as usize] += seconds;
        }
        seconds
    }

    /// An action is over.
    pub fn passed(&mut self, action: &Action) {
        let seconds = self.lap(TimeKind::of(action));
        if action.pass == Pass::Eval {
            return;
        }

        self.recent.count(action, seconds);
        if self.started.is_some() {
            self.times.count(action, seconds);
        }

        let ends_step = action.op == Op::Backward && action.microbatch + 1 == self.microbatches;
        if !ends_step || action.stage != self.marker {
            return;
        }

        self.recent.steps += 1;
        if let Some(window) = self.window.clone() {
            if action.step == window.start {
                self.started = Some(self.last);
                self.before = processor();
            } else if action.step == window.end
                && let Some(started) = self.started.take()
            {
                self.times.seconds = self.last.duration_since(started).as_secs_f64();
                self.times.steps = window.len();
                let now = processor();
                self.times.processor = [now[0] - self.before[0], now[1] - self.before[1]];
            }
        }
    }

    /// What was measured; none in a run that was too short.
    pub fn times(&self) -> Option<Times> {
        (self.times.steps > 0).then(|| self.times.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::schedule::ScheduleKind;

    #[test]
    fn the_window_leaves_filling_and_draining_out() {
        let window = |stages, m, steps| {
            window(&Schedule::new(ScheduleKind::Decoupled, stages, m, 1, SyncPoints::ends(steps)))
        };
        assert_eq!(window(1, 4, 16), Some(3..14));
        assert_eq!(window(4, 1, 24), Some(7..19));
        assert_eq!(window(4, 1, 9), None);
        assert_eq!(window(11, 8, 24), Some(6..20));
    }

    #[test]
    fn a_run_that_is_too_short_is_told_how_long_it_must_be() {
        for (stages, m) in [(1, 4), (6, 1), (11, 1), (11, 8)] {
            let of = |steps| {
                Schedule::new(ScheduleKind::Decoupled, stages, m, 1, SyncPoints::ends(steps))
            };
            let told = check(&of(2)).unwrap_err().to_string();
            let least: usize =
                told.split("take ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
            assert!(check(&of(least)).is_ok() && check(&of(least - 1)).is_err(), "{told}");
        }
    }

    #[test]
    fn every_moment_of_the_window_is_somebodys() {
        let schedule = Schedule::new(ScheduleKind::Decoupled, 2, 2, 1, SyncPoints::ends(8));
        let mut clock = Clock::new(&schedule, &[0]);
        for action in schedule.actions(0) {
            clock.began(&action);
            if action.op == Op::Forward {
                std::thread::sleep(Duration::from_millis(2));
            }
            clock.passed(&action);
        }
        let times = clock.times().unwrap();
        let window = window(&schedule).unwrap();
        assert_eq!((times.steps, times.stages[0].microbatches), (window.len(), 2 * window.len()));
        assert_eq!(times.stages[0].updates, window.len());
        let counted = times.stages[0].copies;
        assert!(
            (counted - times.fraction(TimeKind::Copies) * times.seconds).abs() < 1e-9,
            "{times:?}"
        );
        assert!((times.shares.iter().sum::<f64>() - times.seconds).abs() < 1e-6, "{times:?}");
        assert!(times.fraction(TimeKind::Compute) > 0.5, "{times:?}");
        // What was done lately is all of it.
        let recent = clock.recent(Duration::ZERO).unwrap();
        assert!((recent.shares.iter().sum::<f64>() - recent.seconds).abs() < 1e-6, "{recent:?}");
        assert_eq!((recent.steps, recent.stages[0].updates), (8, 8));
        assert!(recent.seconds > times.seconds && clock.recent(Duration::from_secs(1)).is_none());
        // An evaluation is that and nothing else, whatever is waited for in it.
        let eval = Action { pass: Pass::Eval, ..schedule.actions(0).next().unwrap() };
        clock.began(&eval);
        std::thread::sleep(Duration::from_millis(2));
        clock.waited_for(TimeKind::Upstream);
        clock.passed(&eval);
        let told = clock.recent(Duration::ZERO).unwrap();
        let evaluation = TimeKind::Evaluation as usize;
        let alone = |(kind, share): (usize, &f64)| kind == evaluation || *share == 0.0;
        assert!(told.shares.iter().enumerate().all(alone) && told.steps == 0, "{told:?}");
        assert!(told.shares[evaluation] > 0.001, "{told:?}");
        let mut sum = recent.clone();
        sum.add(&recent);
        assert_eq!((sum.steps, sum.stages[0].microbatches), (16, 32));

        // It has slept most of the time.
        assert!(times.processor[0] < times.seconds && times.processor[1] == 0.0, "{times:?}");
    }
}
