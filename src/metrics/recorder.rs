//! The recorder on rank 0: puts the reports of all places together, step by step.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::bench::Bench;
use super::clock::Times;
use super::memory::Prediction;
use super::progress::{Progress, State, thousands};
use super::stragglers::Stragglers;
use super::watchdog::Watchdog;
use super::{Mode, Report, quality};
use crate::checkpoint::{self, Manifest, Shard};
use crate::config::Tokenizer;
use crate::emulation::Emulation;
use crate::error::{Error, Placed, Result};
use crate::grid::Place;
use crate::optim::{Optimizer, learning_rate};
use crate::panel::{Control, Controls};
use crate::setup::Setup;
use crate::stop::Watch;

/// A line of `metrics.jsonl` about a step. `step` counts the updates made; `tokens` those read so far.
#[derive(Serialize)]
struct StepLine<'a> {
    step: usize,
    loss: f64,
    lr: f64,
    tokens: u64,
    step_s: f64,
    tokens_per_s: f64,
    /// Before clipping, one a stage.
    grad_norm: &'a [f64],
    /// Of the tied table, which no stage's norm holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    table_norm: Option<f64>,
}

/// A line of `metrics.jsonl` about an evaluation after `step` updates.
#[derive(Serialize)]
struct EvalLine {
    step: usize,
    eval_loss: f64,
    /// Bits per byte or character.
    #[serde(skip_serializing_if = "Option::is_none")]
    eval_bpc: Option<f64>,
    /// Perplexity per word.
    #[serde(skip_serializing_if = "Option::is_none")]
    eval_ppl: Option<f64>,
}

/// What has been reported of a step so far: a loss a replica, a norm a stage.
#[derive(Default)]
struct Partial {
    losses: BTreeMap<usize, f64>,
    norms: BTreeMap<usize, f64>,
    table: Option<f64>,
}

/// The places that have written their parts of a state, and the files.
struct Saving {
    started: Instant,
    places: BTreeSet<Place>,
    files: Vec<Shard>,
}

impl Saving {
    fn new() -> Saving {
        Saving { started: Instant::now(), places: BTreeSet::new(), files: Vec::new() }
    }
}

/// How long recorder and places may take to hear of each other.
const NEWS: Duration = Duration::from_millis(500);
/// Between two looks at the clock where nothing is reported.
const LOOK: Duration = Duration::from_millis(500);
/// Steps that the time of the next one is guessed from.
const RECENT: usize = 9;

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Mean over the last tenth of the steps.
    pub loss: f64,
    pub eval_loss: Option<f64>,
    /// Tokens over the median time of a step.
    pub tokens_per_s: f64,
    /// None of a run that only measures.
    pub checkpoint: Option<PathBuf>,
    /// The run was stopped before its end, and has saved.
    pub stopped: bool,
}

/// Collects reports until every place is done.
pub struct Recorder {
    setup: Arc<Setup>,
    out: PathBuf,
    metrics: BufWriter<File>,
    progress: Progress,
    steps: BTreeMap<usize, Partial>,
    /// Steps written so far: an evaluation after n updates stands behind n steps.
    written: usize,
    /// step -> replica -> (sum of losses, tokens).
    evals: BTreeMap<usize, BTreeMap<usize, (f64, usize)>>,
    /// (step, stage, or none for the tied table) -> copy -> digest.
    digests: BTreeMap<(usize, Option<usize>), BTreeMap<Place, u64>>,
    stragglers: Stragglers,
    watchdog: Option<Watchdog>,
    done: Vec<(usize, Option<u64>)>,
    times: Vec<(usize, Option<Times>)>,
    /// Only measures: tells where the time goes, saves nothing.
    bench: bool,
    emulation: Option<Emulation>,
    /// By the step that is saved.
    saving: BTreeMap<usize, Saving>,
    longest_save: Duration,
    /// The states of this run that are kept, by their steps; the newest.
    kept: Vec<usize>,
    checkpoint: Option<PathBuf>,
    /// Steps before this one may be begun; where the run was told to stop.
    limit: usize,
    stop: Option<usize>,
    last: Instant,
    losses: Vec<f64>,
    seconds: Vec<f64>,
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
        let path = out.join("metrics.jsonl");
        let start = setup.start();
        let before = match setup.resumed {
            Some(_) => lines_before(&std::fs::read_to_string(&path).unwrap_or_default(), start),
            None => String::new(),
        };
        if path.exists() {
            std::fs::rename(&path, out.join("metrics.previous.jsonl")).map_err(wrong)?;
        }
        let mut metrics = BufWriter::new(File::create(path).map_err(wrong)?);
        metrics.write_all(before.as_bytes()).map_err(wrong)?;
        checkpoint::clear(out).map_err(wrong)?;
        Ok(Recorder {
            progress: Progress::new(setup.config.steps, start),
            kept: if setup.resumed.is_some() { checkpoint::steps(out, start) } else { Vec::new() },
            out: out.to_owned(),
            metrics,
            steps: BTreeMap::new(),
            written: start,
            evals: BTreeMap::new(),
            digests: BTreeMap::new(),
            stragglers: Stragglers::default(),
            watchdog: Some(Watchdog::new(setup.grid, setup.config.stall_seconds)),
            done: Vec::new(),
            times: Vec::new(),
            bench: false,
            emulation: None,
            saving: BTreeMap::new(),
            longest_save: Duration::ZERO,
            checkpoint: None,
            limit: start + setup.schedule.lead(),
            stop: None,
            last: Instant::now(),
            losses: Vec::new(),
            seconds: Vec::new(),
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
            self.raise_limit(controls);
            if let Some(error) = self.watchdog.as_mut().and_then(|watchdog| watchdog.look(controls)) {
                return Err((None, error));
            }
        }
        if self.stop.is_some() {
            watch.done();
        }
        self.finish(shared).map_err(|error| (None, error))
    }

    /// The median time of the last steps.
    fn step_time(&self) -> Duration {
        let mut last = self.seconds[self.seconds.len().saturating_sub(RECENT)..].to_vec();
        last.sort_by(f64::total_cmp);
        Duration::from_secs_f64(last.get(last.len() / 2).copied().unwrap_or(0.0))
    }

    /// How long a stop takes from now on: the steps up to the limit, and the save, as long as the longest yet.
    fn time_to_stop(&self) -> Duration {
        self.step_time() * (self.limit - self.written.min(self.limit)) as u32 + self.longest_save
    }

    /// Keeps the limit far enough ahead that nobody comes near it.
    fn raise_limit(&mut self, controls: &Controls) {
        let steps = self.setup.config.steps;
        if self.stop.is_some() || self.limit >= steps {
            return;
        }
        let lead = self.setup.schedule.lead();
        // Where steps are short, the way of the news takes several.
        let spare = match self.step_time() {
            Duration::ZERO => 0,
            time => (NEWS.as_secs_f64() / time.as_secs_f64()) as usize,
        };
        if self.limit <= self.written + lead - 1 + spare / 2 {
            self.limit = (self.written + lead + spare).min(steps);
            controls.tell(Control::Limit(self.limit));
        }
    }

    /// Lets everybody stop at the limit, which nobody has passed.
    fn stop(&mut self, reason: &str, controls: &Controls) {
        if self.stop.is_some() || self.bench {
            return;
        }
        let steps = self.setup.config.steps;
        if self.limit >= steps {
            self.progress.line(&format!("{reason}: all steps up to the end are under way, so the run ends there"));
            return;
        }
        self.stop = Some(self.limit);
        controls.tell(Control::Stop(self.limit));
        let seconds = self.time_to_stop().as_secs_f64();
        self.progress.line(&format!(
            "{reason}: the run stops and saves at step {}, in about {seconds:.1} s ({} steps under way, then the save)",
            self.limit,
            self.limit - self.written
        ));
    }

    fn finish(mut self, shared: bool) -> Result<Summary> {
        self.progress.finish();
        self.metrics.flush().map_err(|error| self.disk(error))?;
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
            return Ok(match self.checkpoint.clone() {
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
        if let Some(step) = self.stop {
            println!(
                "stopped at step {step} of {}; it is saved, and --resume goes on from there",
                self.setup.config.steps
            );
            return Ok(self.summary(self.checkpoint.clone()));
        }
        self.print_memory(shared);
        let summary = self.summary(self.checkpoint.clone());
        self.print_summary(&summary);
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
            Report::TableDigest { place, step, digest } => self.compare(place, None, step, digest)?,
            Report::Digest { place, step, digest } => self.compare(place, Some(place.stage), step, digest)?,
            Report::Busy { rank, seconds } => self.busy(rank, seconds),
            Report::Saved { place, step, shards } => self.saved(place, step, shards)?,
            Report::Done { rank, peak_bytes, times } => {
                self.times.push((rank, times));
                self.done.push((rank, peak_bytes));
                self.done.sort();
            }
            Report::Failed { .. } | Report::Stop { .. } | Report::Pulse { .. } => {}
        }
        self.write_complete()
    }

    /// Completes the state of a step once all places have written theirs.
    fn saved(&mut self, place: Place, step: usize, shards: Vec<Shard>) -> Result<()> {
        let saving = self.saving.entry(step).or_insert_with(Saving::new);
        saving.places.insert(place);
        saving.files.extend(shards);
        if saving.places.len() < self.setup.grid.places().count() {
            return Ok(());
        }
        let Some(Saving { mut files, started, .. }) = self.saving.remove(&step) else { return Ok(()) };
        self.longest_save = self.longest_save.max(started.elapsed());
        files.sort_by(|a, b| (a.kind, a.stage, &a.file).cmp(&(b.kind, b.stage, &b.file)));
        let pipeline = self.setup.pipeline(self.setup.schedule.since(step));
        let manifest = Manifest::new(&self.setup.config, self.setup.parameters(), step, pipeline, files);
        self.checkpoint = Some(checkpoint::complete(&self.out, &manifest, &self.setup.corpus.vocabulary)?);
        self.kept.push(step);
        checkpoint::prune(&self.out, &mut self.kept, &self.setup.config.checkpoint);
        if step < self.setup.config.steps {
            self.progress.line(&format!("step {step:>6}  saved"));
        }
        Ok(())
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

    /// Compares the copies of the weights of a stage, or of the tied table, once all have told their digests.
    fn compare(&mut self, place: Place, stage: Option<usize>, step: usize, digest: u64) -> Result<()> {
        let digests = self.digests.entry((step, stage)).or_default();
        digests.insert(place, digest);
        let grid = self.setup.grid;
        let ends = if stage.is_none() && grid.twin(place).is_some() { 2 } else { 1 };
        if digests.len() < ends * grid.replicas {
            return Ok(());
        }
        let digests = self.digests.remove(&(step, stage)).unwrap_or_default();
        if digests.values().all(|other| *other == digest) {
            return Ok(());
        }
        let texts: Vec<String> = digests.iter().map(|(place, digest)| format!("{digest:016x} on {place}")).collect();
        let what = stage.map_or("the tied embedding".into(), |stage| format!("the weights of stage {stage}"));
        Err(Error::CopiesDiffer { what, step, digests: texts.join(", ") })
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
        let text = serde_json::to_string(&line).map_err(|error| Error::Internal(error.to_string()))?;
        self.write(&text)?;
        self.tell_skipped(step, partial);
        self.losses.push(loss);
        self.seconds.push(seconds);
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
        let text = serde_json::to_string(&line).map_err(|error| Error::Internal(error.to_string()))?;
        self.write(&text)?;
        self.progress.line(&format!("step {step:>6}  eval loss {eval_loss:.4}  {}", quality(eval_loss, tokenizer)));
        self.eval_loss = Some(eval_loss);
        // The time of an evaluation is not that of the next step.
        self.last = Instant::now();
        Ok(())
    }

    fn write(&mut self, line: &str) -> Result<()> {
        writeln!(self.metrics, "{line}").and_then(|()| self.metrics.flush()).map_err(|error| self.disk(error))
    }

    fn disk(&self, error: std::io::Error) -> Error {
        Error::config("--out", self.out.display(), format!("metrics.jsonl cannot be written ({error})"))
    }

    fn summary(&self, checkpoint: Option<PathBuf>) -> Summary {
        let tail = &self.losses[self.losses.len() - self.losses.len().div_ceil(10)..];
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        let median = seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN);
        let tokens = (self.setup.config.batch * self.setup.config.data.sequence) as f64;
        Summary {
            loss: tail.iter().sum::<f64>() / tail.len() as f64,
            eval_loss: self.eval_loss,
            tokens_per_s: tokens / median,
            checkpoint,
            stopped: self.stop.is_some(),
        }
    }

    fn print_memory(&self, shared: bool) {
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        println!(
            "\npeak memory, MiB       weights  gradient  optimizer  activations  transient  holes  saving  predicted  measured"
        );
        let mut total = 0;
        for (rank, peak) in &self.done {
            let p = Prediction::new(&self.setup, *rank);
            total += p.total();
            let measured = peak.map_or("-".to_owned(), mib);
            println!(
                "{:<21} {:>8} {:>9} {:>10} {:>12} {:>10} {:>6} {:>7} {:>10} {measured:>9}",
                self.setup.grid.name(*rank),
                mib(p.weights),
                mib(p.gradient),
                mib(p.optimizer),
                mib(p.activations),
                mib(p.transient),
                mib(p.holes),
                mib(p.saving),
                mib(p.total())
            );
        }
        if shared {
            println!("ranks are threads of one process, so each shows the peak of all: {} predicted", mib(total));
        }
    }

    fn print_summary(&self, summary: &Summary) {
        println!();
        let tokenizer = self.setup.config.data.tokenizer;
        println!("loss (last tenth)   {:.4} nats per {}", summary.loss, tokenizer.unit());
        if let Some(eval) = summary.eval_loss {
            println!("held-out loss       {eval:.4} nats, {}", quality(eval, tokenizer));
        }
        if let Some(floor) = self.setup.corpus.floor {
            let best = summary.eval_loss.unwrap_or(summary.loss);
            println!(
                "entropy floor       {floor:.4} nats per byte; the loss is {:.1} % above it",
                (best / floor - 1.0) * 100.0
            );
        }
        println!("tokens/s            {}", thousands(summary.tokens_per_s as u64));
        if let Some(checkpoint) = &summary.checkpoint {
            println!("weights             {}", checkpoint.display());
        }
    }
}

/// Refuses a disk that has no room for the states of a run: one that is kept, and one that is written.
fn check_room(setup: &Setup, out: &Path) -> Result<()> {
    let buffers = 1 + Optimizer::state_buffers(setup.config.optimizer.kind);
    let needed = 2 * (setup.parameters() * buffers * size_of::<f32>()) as u64;
    match checkpoint::room(out) {
        Some(left) if left < needed => {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            let found = format!("{} with {} MiB left on its disk", out.display(), mib(left));
            Err(Error::config("--out", found, format!("two states of the run need {} MiB", mib(needed))))
        }
        _ => Ok(()),
    }
}

/// The lines of `metrics.jsonl` that a run which goes on at `start` will not write again: steps up to it, and evaluations
/// before it.
fn lines_before(text: &str, start: usize) -> String {
    let stays = |line: &&str| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        let step = value["step"].as_u64().map_or(usize::MAX, |step| step as usize);
        step < start || (step == start && value.get("eval_loss").is_none())
    };
    text.lines().filter(stays).flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_will_be_written_again_are_left_out() {
        let text = "{\"step\":1,\"loss\":3}\n{\"step\":2,\"loss\":2}\n{\"step\":2,\"eval_loss\":2}\n{\"step\":3,\"loss\":1}\n{\"st";
        let kept = |start| lines_before(text, start).lines().count();
        assert_eq!([kept(0), kept(1), kept(2), kept(3), kept(9)], [0, 1, 2, 4, 4]);
    }
}
