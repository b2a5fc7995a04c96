//! The recorder on rank 0: puts the reports of all places together, step by step.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::bench::Bench;
use super::clock::Times;
use super::copies::Copies;
use super::lines::{EvalLine, Lines, StepLine};
use super::pace::{Pace, Stopping};
use super::progress::{Progress, State};
use super::states::{States, check_room};
use super::stragglers::Stragglers;
use super::summary::{Summary, print_memory};
use super::watchdog::Watchdog;
use super::{Mode, Report, quality};
use crate::data::Tokenizer;
use crate::emulation::Emulation;
use crate::error::{Error, Placed, Result};
use crate::optim::learning_rate;
use crate::panel::Controls;
use crate::setup::Setup;
use crate::stop::Watch;

/// What has been reported of a step so far: a loss a replica, a norm a stage.
#[derive(Default)]
struct Partial {
    losses: BTreeMap<usize, f64>,
    norms: BTreeMap<usize, f64>,
    table: Option<f64>,
}

/// Between two looks at the clock where nothing is reported.
const LOOK: Duration = Duration::from_millis(500);
/// Collects reports until every place is done.
pub struct Recorder {
    setup: Arc<Setup>,
    out: PathBuf,
    lines: Lines,
    progress: Progress,
    steps: BTreeMap<usize, Partial>,
    /// Steps written so far: an evaluation after n updates stands behind n steps.
    written: usize,
    /// step -> replica -> (sum of losses, tokens).
    evals: BTreeMap<usize, BTreeMap<usize, (f64, usize)>>,
    copies: Copies,
    stragglers: Stragglers,
    watchdog: Option<Watchdog>,
    done: Vec<(usize, Option<u64>)>,
    times: Vec<(usize, Option<Times>)>,
    /// Only measures: tells where the time goes, saves nothing.
    bench: bool,
    emulation: Option<Emulation>,
    states: States,
    pace: Pace,
    last: Instant,
    losses: Vec<f64>,
    eval_loss: Option<f64>,
}

impl Recorder {
    /// Prepares the run's folder: `config.toml`, an empty `metrics.jsonl` (one of an earlier run is kept as
    /// `metrics.previous.jsonl`).
    ///
    /// # Errors
    /// [`Error::Config`] about `--out` if the folder cannot be written.
    pub fn new(setup: Arc<Setup>, out: &Path) -> Result<Recorder> {
        let wrong = |error: std::io::Error| {
            Error::config("--out", out.display(), format!("cannot be written ({error}); choose another folder"))
        };
        check_room(&setup, out)?;
        std::fs::create_dir_all(out).map_err(wrong)?;
        std::fs::write(out.join("config.toml"), setup.config.to_toml()).map_err(wrong)?;
        let start = setup.start();
        let lines = Lines::begin(out, setup.resumed.as_ref().map(|_| start))?;
        let states = States::begin(Arc::clone(&setup), out)?;
        Ok(Recorder {
            progress: Progress::new(setup.config.steps, start),
            out: out.to_owned(),
            lines,
            steps: BTreeMap::new(),
            written: start,
            evals: BTreeMap::new(),
            copies: Copies::new(setup.grid),
            stragglers: Stragglers::default(),
            watchdog: Some(Watchdog::new(setup.grid, setup.config.stall_seconds)),
            done: Vec::new(),
            times: Vec::new(),
            bench: false,
            emulation: None,
            states,
            pace: Pace::new(setup.config.steps, start, setup.lead()),
            last: Instant::now(),
            losses: Vec::new(),
            eval_loss: None,
            setup,
        })
    }

    /// The recorder of a run of this mode.
    pub fn of_mode(self, mode: &Mode) -> Recorder {
        Recorder { bench: mode.bench, emulation: mode.emulation.clone(), ..self }
    }

    /// The recorder of a run that has no pulses.
    pub fn without_watchdog(self) -> Recorder {
        Recorder { watchdog: None, ..self }
    }

    /// Takes reports until `ranks` ranks are done, completing each saved state on the way, and tells the places how far
    /// they may go. `shared` says that the ranks are threads of this process, so that only their sum can be measured.
    ///
    /// # Errors
    /// What a place reports, reports that end early, or a file that cannot be written.
    pub fn run(
        mut self,
        reports: &Receiver<Report>,
        controls: &Controls,
        mut watch: Watch,
        ranks: usize,
        shared: bool,
    ) -> Placed<Summary> {
        self.last = Instant::now();
        while self.done.len() < ranks {
            match reports.recv_timeout(LOOK) {
                Ok(Report::Failed { origin, error }) => return Err((Some(origin), error)),
                Ok(Report::Stop { reason }) => self.stop(&reason, controls),
                Ok(Report::Pulse { rank, beat }) => {
                    self.watchdog.iter_mut().for_each(|watchdog| watchdog.heard(rank, beat.clone()));
                }
                Ok(report) => {
                    self.watchdog.iter_mut().for_each(Watchdog::moved);
                    self.take(report).map_err(|error| (None, error))?;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err((None, Error::Internal("the places ended before they were done".into())));
                }
            }
            if let Some(reason) = watch.reason(self.time_to_stop()) {
                self.stop(&reason, controls);
            }
            self.pace.raise(self.written, controls);
            if let Some(error) = self.watchdog.as_mut().and_then(|watchdog| watchdog.look(controls)) {
                return Err((None, error));
            }
        }
        if self.pace.stop().is_some() {
            watch.done();
        }
        self.finish(shared).map_err(|error| (None, error))
    }

    /// How long a stop takes from now on: the steps up to the limit, and the save, as long as the longest yet.
    fn time_to_stop(&self) -> Duration {
        self.pace.time_to_stop(self.written) + self.states.longest()
    }

    /// Lets everybody stop at the limit, which nobody has passed.
    fn stop(&mut self, reason: &str, controls: &Controls) {
        if self.bench {
            return;
        }
        let text = match self.pace.end_at_limit(controls) {
            Stopping::Already => return,
            Stopping::AtEnd => format!("{reason}: all steps up to the end are under way, so the run ends there"),
            Stopping::At(step) => format!(
                "{reason}: the run stops and saves at step {step}, in about {:.1} s ({} steps under way, then the save)",
                self.time_to_stop().as_secs_f64(),
                self.pace.under_way(self.written)
            ),
        };
        self.progress.line(&text);
    }

    fn finish(mut self, shared: bool) -> Result<Summary> {
        self.progress.finish();
        if self.bench {
            self.times.sort_by_key(|(rank, _)| *rank);
            let bench = Bench::new(&self.setup, self.emulation.as_ref(), &self.times, &self.done)?;
            bench.write(&self.out)?;
            print!("{}", bench.table(shared));
            return Ok(self.summary(None));
        }
        if self.setup.start() == self.setup.config.steps {
            let steps = self.setup.config.steps;
            let saved = self.setup.resumed.as_ref().map(|saved| saved.path.clone());
            return Ok(match self.states.newest() {
                Some(again) => {
                    let grid = self.setup.grid;
                    println!("all {steps} steps are made; saved again, as a grid of {grid} does: {}", again.display());
                    self.summary(Some(again))
                }
                None => {
                    println!("nothing is left to do: all {steps} steps are made, and saved");
                    self.summary(saved)
                }
            });
        }
        if let Some(step) = self.pace.stop() {
            println!(
                "stopped at step {step} of {}; it is saved, and --resume goes on from there",
                self.setup.config.steps
            );
            return Ok(self.summary(self.states.newest()));
        }
        print_memory(&self.setup, &self.done, shared);
        let summary = self.summary(self.states.newest());
        summary.print(&self.setup);
        Ok(summary)
    }

    fn take(&mut self, report: Report) -> Result<()> {
        match report {
            Report::Loss { replica, step, loss } => {
                self.steps.entry(step).or_default().losses.insert(replica, loss);
            }
            Report::Norm { stage, step, norm } => {
                self.steps.entry(step).or_default().norms.insert(stage, norm);
            }
            Report::Eval { replica, step, loss_sum, tokens } => {
                self.evals.entry(step).or_default().insert(replica, (loss_sum, tokens));
            }
            Report::TableNorm { step, norm } => self.steps.entry(step).or_default().table = Some(norm),
            Report::TableDigest { place, step, digest } => self.copies.told(place, None, step, digest)?,
            Report::Digest { place, step, digest } => self.copies.told(place, Some(place.stage), step, digest)?,
            Report::Busy { rank, seconds } => self.busy(rank, seconds),
            Report::Saved { place, step, written } => {
                let told = self.states.saved(place, step, written)?;
                told.iter().for_each(|text| self.progress.line(text));
            }
            Report::Done { rank, peak_bytes, times } => {
                self.times.push((rank, times));
                self.done.push((rank, peak_bytes));
                self.done.sort();
            }
            Report::Failed { .. } | Report::Stop { .. } | Report::Pulse { .. } => {}
        }
        self.write_complete()
    }

    /// Tells of a rank that has become slow.
    fn busy(&mut self, rank: usize, seconds: f64) {
        if let Some((then, now)) = self.stragglers.take(rank, seconds) {
            let name = self.setup.grid.name(rank);
            let text =
                format!("note: {name} (rank {rank}) has become slow: {now:.3} s of work a step, {then:.3} s before");
            self.progress.line(&text);
        }
    }

    /// Writes what all places have reported, in the order of the run, whoever came first.
    fn write_complete(&mut self) -> Result<()> {
        let grid = self.setup.grid;
        loop {
            let next = self.written;
            if self.evals.get(&next).is_some_and(|replicas| replicas.len() == grid.replicas) {
                let replicas = self.evals.remove(&next).unwrap_or_default();
                self.eval(next, &replicas)?;
            }
            let tied = self.setup.dimensions.tied;
            let complete = |p: &Partial| {
                p.losses.len() == grid.replicas && p.norms.len() == grid.stages && p.table.is_some() == tied
            };
            if !self.steps.get(&next).is_some_and(complete) {
                return Ok(());
            }
            let partial = self.steps.remove(&next).unwrap_or_default();
            self.step(next, &partial)?;
            self.written += 1;
        }
    }

    fn step(&mut self, step: usize, partial: &Partial) -> Result<()> {
        let config = &self.setup.config;
        // In the order of the replicas, so that the digits do not depend on who reported first.
        let loss = partial.losses.values().sum::<f64>() / partial.losses.len() as f64;
        let norms: Vec<f64> = partial.norms.values().copied().collect();
        let now = Instant::now();
        let seconds = now.duration_since(self.last).as_secs_f64();
        self.last = now;
        let tokens = (config.batch * config.data.sequence) as u64;
        let line = StepLine {
            step: step + 1,
            loss,
            lr: learning_rate(&config.optimizer, step, config.steps),
            tokens: tokens * (step as u64 + 1),
            step_s: seconds,
            tokens_per_s: tokens as f64 / seconds,
            grad_norm: &norms,
            table_norm: partial.table,
        };
        let rate = line.tokens_per_s;
        self.lines.add(&line)?;
        self.tell_skipped(step, partial);
        self.losses.push(loss);
        self.pace.step(seconds);
        self.progress.step(State { step: step + 1, loss, tokens_per_s: rate });
        Ok(())
    }

    /// Whose update was left out because its gradient was not finite.
    fn tell_skipped(&self, step: usize, partial: &Partial) {
        let mut whose: Vec<String> =
            partial.norms.iter().filter(|(_, n)| !n.is_finite()).map(|(stage, _)| format!("stage {stage}")).collect();
        whose.extend(partial.table.filter(|norm| !norm.is_finite()).map(|_| "the tied embedding".to_owned()));
        if !whose.is_empty() {
            let text = format!("step {:>6}  not finite: the update of {} is left out", step + 1, whose.join(", "));
            self.progress.line(&text);
        }
    }

    fn eval(&mut self, step: usize, replicas: &BTreeMap<usize, (f64, usize)>) -> Result<()> {
        let (sum, tokens) = replicas.values().fold((0.0, 0), |(s, n), (sum, tokens)| (s + sum, n + tokens));
        let eval_loss = sum / tokens as f64;
        let tokenizer = self.setup.config.data.tokenizer;
        let words = tokenizer == Tokenizer::Words;
        let eval_bpc = (!words).then_some(eval_loss / std::f64::consts::LN_2);
        let line = EvalLine { step, eval_loss, eval_bpc, eval_ppl: words.then(|| eval_loss.exp()) };
        self.lines.add(&line)?;
        self.progress.line(&format!("step {step:>6}  eval loss {eval_loss:.4}  {}", quality(eval_loss, tokenizer)));
        self.eval_loss = Some(eval_loss);
        // The time of an evaluation is not that of the next step; where it is read late it may come with that step.
        if !self.setup.late {
            self.last = Instant::now();
        }
        Ok(())
    }

    fn summary(&self, checkpoint: Option<PathBuf>) -> Summary {
        let tail = &self.losses[self.losses.len() - self.losses.len().div_ceil(10)..];
        let tokens = (self.setup.config.batch * self.setup.config.data.sequence) as f64;
        Summary {
            loss: tail.iter().sum::<f64>() / tail.len() as f64,
            eval_loss: self.eval_loss,
            tokens_per_s: tokens / self.pace.median().unwrap_or(f64::NAN),
            checkpoint,
            stopped: self.pace.stop().is_some(),
        }
    }
}
