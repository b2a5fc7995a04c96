//! Rank 0's part of the control plane: puts the reports of all places together, step by step, hands
//! what is complete to the sinks, completes saved states, and decides when the run stops or has
//! failed.

mod commits;
mod divergence;
mod facts;
mod sinks;
mod steps;
mod stop_planner;
mod stragglers;
mod traces;
mod watchdog;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use commits::{Commits, check_room};
use divergence::Divergence;
use facts::{Made, facts};
use sinks::Sinks;
use steps::{Complete, Step, Steps};
use stop_planner::{StopPlanner, Stopping};
use stragglers::Stragglers;
use traces::Traces;
use watchdog::Watchdog;

use crate::awake::Awake;
use crate::clock::Times;
use crate::control::{Controls, Mode, Report, Watch};
use crate::emulated_compute::EmulatedCompute;
use crate::error::{Error, Placed, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::memory::Prediction;
use crate::metrics::{
    Bench, EvalLine, EventKind, EventLine, PlaceLine, StageStaleness, StalenessLine, StepLine,
    Summary, print_memory, wall_time,
};
use crate::number::Readback;
use crate::optim::learning_rate;
use crate::setup::Setup;
use crate::staleness::Staleness;

/// Between two looks at the clock where nothing is reported; while a trace is being written.
const LOOK: Duration = Duration::from_millis(500);
const LOOK_AT_TRACE: Duration = Duration::from_millis(20);

/// Seconds after which all ranks have written their parts of a trace, mostly.
const TRACE_IS_OVER: f64 = 10.0;

/// How long a run that is done waits for a trace to be written.
const LONGEST_MERGE: Duration = Duration::from_secs(60);

/// What the ranks of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ranks {
    /// Each has a process, whose memory can be measured; as a single one has.
    Processes,
    /// Several of one process, so that only the sum of their memory can be measured.
    Threads,
}

/// Collects reports until every place is done.
pub struct Coordinator {
    setup: Arc<Setup>,
    out: PathBuf,
    lock: FolderLock,
    sinks: Sinks,
    steps: Steps,
    divergence: Divergence,
    stragglers: Stragglers,
    /// What was measured of steps that are not complete yet, by stage, the table last.
    staleness: BTreeMap<usize, BTreeMap<usize, Staleness>>,
    watchdog: Option<Watchdog>,
    /// Ranks that are done, with the peak of their memory; and their times.
    done: Vec<(usize, Option<u64>)>,
    times: Vec<(usize, Option<Times>)>,
    /// Only measures: tells where the time goes, saves nothing.
    bench: bool,
    emulated: Option<EmulatedCompute>,
    commits: Commits,
    planner: StopPlanner,
    traces: Traces,
    /// When the last step was complete.
    last: Awake,
    losses: Vec<f64>,
    eval_loss: Option<f64>,
}

impl Coordinator {
    /// Prepares the run's folder: `config.toml`, an empty `metrics.jsonl` (one of an earlier run is
    /// kept as `metrics.previous.jsonl`).
    ///
    /// # Errors
    /// [`Error::Config`] about `--out` if the folder cannot be written, or another run writes into
    /// it.
    pub fn new(setup: Arc<Setup>, out: &Path) -> Result<Coordinator> {
        let wrong = |error: std::io::Error| {
            Error::config(
                "--out",
                out.display(),
                format!("cannot be written ({error}); choose another folder"),
            )
        };

        check_room(&setup, out)?;
        std::fs::create_dir_all(out).map_err(wrong)?;
        let lock = FolderLock::take(out)?;
        traces::tidy(out)?;
        files::write(&out.join("config.toml"), setup.config.to_toml().as_bytes()).map_err(wrong)?;

        if let Some(saved) = setup.resumed.as_ref().or(setup.initial.as_ref()) {
            saved.carry_source(out)?;
        }

        let (start, config, grid) = (setup.start(), &setup.config, setup.grid);

        Ok(Coordinator {
            out: out.to_owned(),
            lock,
            sinks: Sinks::begin(&setup, out)?,
            steps: Steps::new(grid.stages, grid.replicas, setup.dimensions.tied, start),
            divergence: Divergence::new(grid),
            stragglers: Stragglers::default(),
            staleness: BTreeMap::new(),
            watchdog: Some(Watchdog::new(grid, config.stall_seconds)),
            done: Vec::new(),
            times: Vec::new(),
            bench: false,
            emulated: None,
            commits: Commits::begin(Arc::clone(&setup), out)?,
            planner: StopPlanner::new(config.steps, start, setup.lead()),
            traces: Traces::new(Arc::clone(&setup), out),
            last: Awake::now(),
            losses: Vec::new(),
            eval_loss: None,
            setup,
        })
    }

    /// How the lock on the run's folder calls this run.
    pub fn owner(&self) -> &str {
        self.lock.owner()
    }

    /// The coordinator of a run of this mode.
    pub fn of_mode(mut self, mode: &Mode) -> Coordinator {
        mode.trace.into_iter().for_each(|window| self.traces.expect(window));
        Coordinator { bench: mode.bench, emulated: mode.emulated.clone(), ..self }
    }

    /// The coordinator of a run that has no heartbeats.
    pub fn without_watchdog(self) -> Coordinator {
        Coordinator { watchdog: None, ..self }
    }

    /// Takes reports until all ranks are done, completing each saved state on the way, and tells
    /// the places how far they may go. `count` is the number of ranks.
    ///
    /// # Errors
    /// What a place reports, reports that end early, or a file that cannot be written.
    pub fn run(
        mut self,
        reports: &Receiver<Report>,
        controls: &Controls,
        mut watch: Watch,
        count: usize,
        ranks: Ranks,
    ) -> Placed<Summary> {
        let made = Made {
            oracle: self.watchdog.is_none(),
            bench: self.bench,
            emulated: self.emulated.is_some(),
        };
        let facts = facts(&self.setup, ranks, made);
        let begun = if self.setup.resumed.is_some() { "resumed" } else { "started" };
        self.event(EventLine::now(self.setup.start(), EventKind::Start, begun).with(facts))
            .map_err(|error| (None, error))?;
        let result = self.collect(reports, controls, &mut watch, count, ranks);
        if let Err((origin, error)) = &result {
            let place = origin.as_ref().map_or(String::new(), |origin| format!("{origin}: "));
            // The error of the run is the one to tell.
            let _ = self.note(EventKind::Fault, &format!("{place}{error}"));
        }

        result?;
        self.finish(ranks).map_err(|error| (None, error))
    }

    /// Takes reports until all ranks are done.
    fn collect(
        &mut self,
        reports: &Receiver<Report>,
        controls: &Controls,
        watch: &mut Watch,
        count: usize,
        ranks: Ranks,
    ) -> Placed<()> {
        self.last = Awake::now();
        let places = self.watchdog.is_some();
        self.traces.of_ranks(count, ranks == Ranks::Threads, places);

        let mut done = None;
        while self.done.len() < count || self.traces.pending() {
            if self.done.len() == count
                && done.get_or_insert_with(Awake::now).elapsed() > LONGEST_MERGE
            {
                let text = "note: the trace takes too long to be written, and is given up";
                let _ = self.note(EventKind::Trace, text); // It is a trace only.
                break;
            }

            let look = if self.traces.pending() { LOOK_AT_TRACE } else { LOOK };
            match reports.recv_timeout(look) {
                Ok(report) => self.hear(report, controls)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err((
                        None,
                        Error::Internal("the places ended before they were done".into()),
                    ));
                }
            }

            if let Some(reason) = watch.reason(self.time_to_stop()) {
                self.stop(&reason, controls).map_err(|error| (None, error))?;
            }

            self.look_at_traces(controls).map_err(|error| (None, error))?;
            self.planner.raise(self.steps.done(), controls);
            // Ranks that are done have nothing more to do.
            let watchdog = self.watchdog.as_mut().filter(|_| self.done.len() < count);
            if let Some(error) = watchdog.and_then(|watchdog| watchdog.look(controls)) {
                return Err((None, error));
            }
        }

        if self.planner.stop().is_some() {
            watch.done();
        }

        let unbegun = self.traces.unbegun();
        unbegun
            .map_or(Ok(()), |text| self.note(EventKind::Trace, &text))
            .map_err(|error| (None, error))
    }

    /// Takes a report, of whatever kind.
    fn hear(&mut self, report: Report, controls: &Controls) -> Placed<()> {
        let nowhere = |error| (None, error);
        match report {
            Report::Failed { origin, error } => return Err((Some(origin), error)),
            Report::Stop { reason } => self.stop(&reason, controls).map_err(nowhere)?,
            Report::Clock { rank, number, at } => self.traces.answered(rank, number, at),
            Report::Heartbeat { rank, beat } => {
                self.watchdog.iter_mut().for_each(|watchdog| watchdog.heard(rank, beat.clone()));
            }
            report => {
                self.watchdog.iter_mut().for_each(Watchdog::moved);
                self.take(report).map_err(nowhere)?;
            }
        }
        Ok(())
    }

    /// How long a stop takes from now on: the steps up to the limit, and the save, as long as the
    /// longest yet.
    fn time_to_stop(&self) -> Duration {
        self.planner.time_to_stop(self.steps.done()) + self.commits.longest()
    }

    /// Lets everybody stop at the limit, which nobody has passed.
    fn stop(&mut self, reason: &str, controls: &Controls) -> Result<()> {
        if self.bench {
            return Ok(());
        }

        let text = match self.planner.end_at_limit(controls) {
            Stopping::Already => return Ok(()),
            Stopping::AtEnd => {
                format!("{reason}: all steps up to the end are under way, so the run ends there")
            }
            Stopping::UsedVersions(step) => format!(
                "{reason}: the run stops and saves at step {step}, in about {:.1} s ({} steps under way, then the save)",
                self.time_to_stop().as_secs_f64(),
                self.planner.under_way(self.steps.done())
            ),
        };

        self.note(EventKind::Stop, &text)
    }

    /// Whether steps are to be traced, or have been.
    fn look_at_traces(&mut self, controls: &Controls) -> Result<()> {
        let (limit, stop) = (self.planner.limit(), self.planner.stop());
        // Those that are under way, and those that are made until all ranks have written what they know.
        let under_way = limit.saturating_sub(self.steps.done());
        let step_s = self.planner.median().unwrap_or(TRACE_IS_OVER);
        let apart = under_way + (TRACE_IS_OVER / step_s.max(1e-6)).ceil() as usize;
        let notes = self.traces.look(limit, apart, stop, controls);
        notes.iter().try_for_each(|text| self.note(EventKind::Trace, text))
    }

    /// Tells of something that has happened.
    fn note(&mut self, kind: EventKind, text: &str) -> Result<()> {
        self.event(EventLine::now(self.steps.done(), kind, text))
    }

    fn event(&mut self, line: EventLine) -> Result<()> {
        self.sinks.tell(|sink| sink.event(&line))
    }

    fn take(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Loss { replica, step, loss } => self.steps.loss(step, replica, loss),
            Report::Norm { stage, step, norm } => self.steps.norm(step, stage, norm),
            Report::TableNorm { step, norm } => self.steps.table_norm(step, norm),
            Report::Eval { replica, step, loss_sum, tokens } => {
                self.steps.evaluation(step, replica, loss_sum, tokens);
            }

            Report::Staleness { stage, step, measured } => {
                let stage = stage.unwrap_or(self.setup.grid.stages);
                self.staleness.entry(step).or_default().insert(stage, measured);
            }

            Report::TableDigest { place, step, digest } => {
                self.divergence.record_digest(place, None, step, digest)?;
            }

            Report::Digest { place, step, digest } => {
                self.divergence.record_digest(place, Some(place.stage), step, digest)?;
            }

            Report::Busy { rank, seconds } => self.busy(rank, seconds)?,
            Report::Times { rank, step, times, memory, peak } => {
                self.times(rank, step, &times, memory, peak)?;
            }

            Report::Saved { place, step, written } => {
                if let Some(text) = self.commits.saved(place, step, written)? {
                    self.note(EventKind::Saved, &text)?;
                }
            }

            Report::Done { rank, peak_bytes, times } => {
                self.times.push((rank, times));
                self.done.push((rank, peak_bytes));
                self.done.sort();
            }

            Report::Traced { rank, window, clock, failed } => {
                if let Some(text) = self.traces.traced(rank, window, clock, failed) {
                    self.note(EventKind::Trace, &text)?;
                }
            }

            Report::Failed { .. }
            | Report::Stop { .. }
            | Report::Heartbeat { .. }
            | Report::Clock { .. } => {}
        }

        while let Some(complete) = self.steps.next() {
            match complete {
                Complete::Step(step, of) => self.step(step, &of)?,
                Complete::Evaluation(step, loss, tokens) => self.eval(step, loss, tokens)?,
            }
        }

        Ok(())
    }

    /// Tells of a rank that has become slow.
    fn busy(&mut self, rank: usize, seconds: f64) -> Result<()> {
        let Some((then, now)) = self.stragglers.take(rank, seconds) else { return Ok(()) };
        let name = self.setup.grid.name(rank);
        let text = format!(
            "note: {name} (rank {rank}) has become slow: {now:.3} s of work a step, {then:.3} s before"
        );
        self.note(EventKind::Straggler, &text)
    }

    /// Tells where the time of a rank went.
    fn times(
        &mut self,
        rank: usize,
        step: usize,
        times: &Times,
        memory: Option<u64>,
        peak: Option<u64>,
    ) -> Result<()> {
        let (setup, name) = (&self.setup, self.setup.grid.name(rank));
        let replica = setup.grid.held(rank)[0].replica;
        let predicted = Prediction::new(setup, rank).of_device(setup);
        let line = PlaceLine { rank, name: &name, replica, step, times, memory, peak, predicted };
        self.sinks.tell(|sink| sink.place(&line))
    }

    fn step(&mut self, step: usize, of: &Step) -> Result<()> {
        let config = &self.setup.config;
        let now = Awake::now();
        let seconds = now.since(self.last).as_secs_f64();
        self.last = now;

        let tokens = (config.batch * config.data.sequence) as u64;
        let line = StepLine {
            step: step + 1,
            loss: of.loss(),
            lr: learning_rate(&config.optimizer, step, config.steps),
            tokens: tokens * (step as u64 + 1),
            step_s: seconds,
            tokens_per_s: tokens as f64 / seconds,
            grad_norm: &of.norms(),
            table_norm: of.table_norm(),
            source_tokens: self.setup.given(step + 1),
            time: wall_time(),
        };

        let skipped = of.skipped();
        if !skipped.is_empty() {
            let whose = skipped.join(", ");
            let text =
                format!("step {:>6}  not finite: the update of {whose} is left out", step + 1);
            self.note(EventKind::Skipped, &text)?;
        }

        self.sinks.tell(|sink| sink.step(&line))?;
        self.tell_staleness(step)?;
        self.losses.push(of.loss());
        self.planner.step(seconds);
        Ok(())
    }

    /// What was measured of a step whose updates are all made: every place reports it before its norm.
    fn tell_staleness(&mut self, step: usize) -> Result<()> {
        let Some(found) = self.staleness.remove(&step) else { return Ok(()) };
        let stages = self.setup.grid.stages;
        let of = |(stage, measured): (usize, Staleness)| {
            let stage = if stage < stages { stage.into() } else { "table".into() };
            StageStaleness { stage, measured }
        };
        let staleness = found.into_iter().map(of).collect();
        let line = StalenessLine { step: step + 1, staleness };
        self.sinks.tell(|sink| sink.staleness(&line))
    }

    fn eval(&mut self, step: usize, eval_loss: f64, eval_tokens: usize) -> Result<()> {
        let measure = self.setup.corpus.measure();
        let line = EvalLine {
            step,
            eval_loss,
            eval_tokens,
            eval_bpc: measure.bits_per_unit(eval_loss),
            eval_ppl: measure.perplexity(eval_loss),
            eval_bpb: measure.bits_per_byte(eval_loss),
        };

        self.sinks.tell(|sink| sink.eval(&line))?;

        self.eval_loss = Some(eval_loss);
        // The time of an evaluation is not that of the next step; where it is read late it may come
        // with that step.
        if self.setup.readback == Readback::Now {
            self.last = Awake::now();
        }

        Ok(())
    }

    fn finish(mut self, ranks: Ranks) -> Result<Summary> {
        let facts = serde_json::json!({
            "stopped": self.planner.stop().is_some(),
            "eval_loss": self.eval_loss,
            "step_s": self.planner.median(),
            "peak_bytes": self.done.iter().map(|(_, peak)| *peak).collect::<Vec<_>>(),
        });
        self.event(EventLine::now(self.steps.done(), EventKind::End, "ended").with(facts))?;
        self.sinks.tell(|sink| sink.finish())?;
        if self.bench {
            return self.finish_bench(ranks);
        }

        let (steps, grid) = (self.setup.config.steps, self.setup.grid);
        if self.setup.start() == steps {
            let saved = self.setup.resumed.as_ref().map(|saved| saved.path.clone());
            return Ok(match self.commits.newest() {
                Some(again) => {
                    say!(
                        "all {steps} steps are made; saved again, as a grid of {grid} does: {}",
                        again.display()
                    );

                    self.summary(Some(again))
                }
                None => {
                    say!("nothing is left to do: all {steps} steps are made, and saved");
                    self.summary(saved)
                }
            });
        }

        if let Some(step) = self.planner.stop() {
            say!("stopped at step {step} of {steps}, checkpoint saved; --resume continues from it");
            return Ok(self.summary(self.commits.newest()));
        }

        print_memory(&self.setup, &self.done, ranks == Ranks::Threads);
        let summary = self.summary(self.commits.newest());
        summary.print(&self.setup);
        Ok(summary)
    }

    /// Where the time went, of a run that only measures.
    fn finish_bench(mut self, ranks: Ranks) -> Result<Summary> {
        self.times.sort_by_key(|(rank, _)| *rank);
        let bench = Bench::new(&self.setup, self.emulated.as_ref(), &self.times, &self.done)?;
        bench.write(&self.out)?;
        put!("{}", bench.table(ranks == Ranks::Threads));
        Ok(self.summary(None))
    }

    fn summary(&self, checkpoint: Option<PathBuf>) -> Summary {
        let tail = &self.losses[self.losses.len() - self.losses.len().div_ceil(10)..];
        let tokens = (self.setup.config.batch * self.setup.config.data.sequence) as f64;
        Summary {
            loss: tail.iter().sum::<f64>() / tail.len() as f64,
            eval_loss: self.eval_loss,
            tokens_per_s: tokens / self.planner.median().unwrap_or(f64::NAN),
            checkpoint,
            stopped: self.planner.stop().is_some(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::config::Config;
    use crate::control::{Control, Limits};
    use crate::grid::Place;

    /// A run of 12 steps on 2x2, and the folder that it writes.
    fn setup(sets: &[&str]) -> Arc<Setup> {
        let text = "steps = 12\nbatch = 8\nmicrobatches = 1\n[grid]\nstages = 2\nreplicas = 2\n[model]\nlayers = 2\n\
                    d_model = 8\nheads = 2\nd_ff = 8\ntie = \"none\"\n[data]\nsynthetic = 2000\nsequence = 8";
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        Arc::new(Setup::new(Config::parse(text, &sets).unwrap()).unwrap())
    }

    /// What the places report of step `t`, the replicas' losses apart by 2.
    fn step(t: usize) -> Vec<Report> {
        let loss = |replica| Report::Loss {
            replica,
            step: t,
            loss: 3.0 + 2.0 * replica as f64 - t as f64 / 8.0,
        };
        let norm = |stage| Report::Norm { stage, step: t, norm: 1.0 + stage as f64 };
        vec![norm(1), loss(1), norm(0), loss(0)]
    }

    fn done() -> impl Iterator<Item = Report> {
        (0..4).map(|rank| Report::Done { rank, peak_bytes: Some(1 << 20), times: None })
    }

    /// A coordinator's run over these reports: how it ends, the lines of its file, what it has
    /// sent.
    fn run(
        sets: &[&str],
        reports: Vec<Report>,
    ) -> (Placed<Summary>, Vec<serde_json::Value>, Vec<Control>) {
        let (setup, out, sent) =
            (setup(sets), tempfile::tempdir().unwrap(), Arc::new(Mutex::new(Vec::new())));
        let coordinator = Coordinator::new(Arc::clone(&setup), out.path()).unwrap();
        let (sender, receiver) = channel();
        reports.into_iter().for_each(|report| sender.send(report).unwrap());
        drop(sender);
        let watch = Watch::new(out.path(), Limits::default(), None);
        let result = {
            let sent = Arc::clone(&sent);
            let controls = Controls::new(move |control| sent.lock().unwrap().push(control));
            coordinator.run(&receiver, &controls, watch, 4, Ranks::Threads)
        };
        let text = std::fs::read_to_string(out.path().join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let sent = sent.lock().unwrap().clone();
        (result, lines, sent)
    }

    #[test]
    fn a_run_is_written_step_by_step() {
        // Step 1 is complete before step 0.
        let mut reports: Vec<Report> = [step(1), step(0)].concat();
        reports.extend((2..12).flat_map(step));
        let eval =
            |replica| Report::Eval { replica, step: 12, loss_sum: 8.0 + replica as f64, tokens: 4 };
        reports.extend([eval(1), eval(0)].into_iter().chain(done()));
        let (result, lines, sent) = run(&["eval.every=12"], reports);

        let summary = result.unwrap();
        assert_eq!((summary.eval_loss, summary.stopped), (Some(17.0 / 8.0), false));
        let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12]);
        assert_eq!(
            (&lines[3]["loss"], &lines[3]["tokens"]),
            (&(4.0 - 3.0 / 8.0).into(), &256.into())
        );
        assert_eq!(lines[3]["grad_norm"], serde_json::json!([1.0, 2.0]));
        assert!(lines[3].get("table_norm").is_none());
        assert_eq!(
            (&lines[12]["eval_loss"], &lines[12]["eval_tokens"]),
            (&(17.0 / 8.0).into(), &8.into())
        );
        assert_eq!(sent.last(), Some(&Control::Shutdown));
        assert!(sent.contains(&Control::Limit(12)), "{sent:?}");
    }

    /// Whoever asks, the run stops at a step that no place has begun, once.
    #[test]
    fn a_request_to_stop_becomes_the_limit() {
        let stop = |reason: &str| Report::Stop { reason: reason.into() };
        let mut reports = step(0);
        reports.extend([stop("SIGUSR1"), stop("SIGTERM")]);
        reports.extend((1..5).flat_map(step).chain(done()));
        let (result, lines, sent) = run(&[], reports);
        assert!(result.unwrap().stopped);
        let stops: Vec<&Control> =
            sent.iter().filter(|control| matches!(control, Control::Stop(_))).collect();
        let [Control::Stop(at)] = stops[..] else { panic!("{sent:?}") };
        assert!(*at >= 3 && *at < 12, "{sent:?}");
        assert_eq!(lines.len(), 5, "steps under way are written");
    }

    #[test]
    fn the_first_failure_ends_the_run() {
        let origin = "stage 1, replica 0".to_owned();
        let error = Error::Internal("broken".into());
        let mut reports = step(0);
        reports.push(Report::Failed { origin: origin.clone(), error: error.clone() });
        reports.extend(step(1));
        let (result, lines, _) = run(&[], reports);
        assert_eq!(result.unwrap_err(), (Some(origin), error));
        assert_eq!(lines.len(), 1);
        let (result, _, _) = run(&[], step(0));
        assert!(result.unwrap_err().1.to_string().contains("ended before they were done"));
    }

    #[test]
    fn replicas_that_are_no_copies_any_more_end_the_run() {
        let digest = |replica| Report::Digest {
            place: Place { stage: 1, replica },
            step: 4,
            digest: replica as u64,
        };
        let (result, _, _) = run(&["verify_every=4"], vec![digest(0), digest(1)]);
        assert!(matches!(result.unwrap_err().1, Error::CopiesDiffer { step: 4, .. }));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_about_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Coordinator::new(setup(&[]), file.path()).err().unwrap().to_string();
        assert!(error.contains("`--out`") && error.contains("choose another folder"), "{error}");
    }
}
