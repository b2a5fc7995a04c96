//! The runs of a study: oracles in processes of their own, several at once, each made once.
//!
//! A run is made in `runs/ID.PROCESS/` and renamed to `runs/ID/` when it is complete, so that what
//! was killed is never taken for a result.

use std::collections::VecDeque;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::plan::{Plan, Run, Variant};
use crate::bar::Bar;
use crate::error::{Error, NOT_FINITE, Result};
use crate::files;
use crate::metrics::clock;

/// Steps of the run that the time of a study is guessed from.
const PILOT_STEPS: usize = 6;
/// Lines of a failing run's output that are shown.
const TAIL: usize = 8;

/// Between two looks at how far the runs are; parts of a run, of the bar that shows it.
const LOOK: Duration = Duration::from_millis(500);
const PARTS: f64 = 1000.0;

/// The file in the folder of a run whose loss has become no number.
const DIVERGED: &str = "diverged";

/// The folder of a study.
pub struct Runs {
    base: PathBuf,
    folder: PathBuf,
    jobs: usize,
}

impl Runs {
    /// Opens the folder of a study, which may have been begun.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out` if it is another study's, or cannot be written.
    pub fn open(out: &Path, plan: &Plan, jobs: usize) -> Result<Runs> {
        let wrong = |problem: String| Error::config("--out", out.display(), problem);
        let folder = out.join("runs");
        fs::create_dir_all(&folder).map_err(|error| wrong(format!("cannot be made ({error})")))?;

        // What runs depend on, besides rate, seed and share, which their names tell.
        let configs = out.join("configs");
        fs::create_dir_all(&configs).map_err(|error| wrong(format!("cannot be made ({error})")))?;
        for variant in plan.variants() {
            let (text, kept) = (
                plan.config(variant)?.to_toml(),
                configs.join(format!("{}.toml", variant.folder())),
            );

            match fs::read_to_string(&kept) {
                Ok(before) if before != text => {
                    let problem = format!(
                        "holds runs of another `{}`; choose another folder, or remove it",
                        variant.name
                    );

                    return Err(wrong(problem));
                }
                Ok(_) => {}
                Err(_) => files::write(&kept, text.as_bytes())
                    .map_err(|error| wrong(format!("cannot be written ({error})")))?,
            }
        }

        Ok(Runs { base: plan.base.clone(), folder, jobs })
    }

    /// Whether a run is complete.
    fn is_made(&self, run: &Run) -> bool {
        self.folder.join(&run.id).exists()
    }

    /// The held-out loss at the end of a complete run, nats a token; infinite if the run has
    /// diverged.
    ///
    /// # Errors
    /// [`Error::Internal`] if it is not complete.
    pub fn loss(&self, run: &Run) -> Result<f64> {
        if self.folder.join(&run.id).join(DIVERGED).exists() {
            return Ok(f64::INFINITY);
        }
        let found = self.lines(run).iter().rev().find_map(|line| line.get("eval_loss")?.as_f64());
        found.ok_or_else(|| Error::Internal(format!("the run {} has no held-out loss", run.id)))
    }

    /// The same in bits per byte of the text, where that is known.
    pub fn bits_per_byte(&self, run: &Run) -> Option<f64> {
        self.lines(run).iter().rev().find_map(|line| line.get("eval_bpb")?.as_f64())
    }

    /// The loss of a run that counts in a result.
    ///
    /// # Errors
    /// As [`Runs::loss`], and [`Error::Config`] if the run has diverged.
    pub fn finite_loss(&self, run: &Run) -> Result<f64> {
        match self.loss(run)? {
            loss if loss.is_finite() => Ok(loss),
            _ => Err(Error::config(
                "rates",
                format!("{}, which has diverged", run.id),
                "give smaller ones",
            )),
        }
    }

    /// The held-out losses of a complete run on its way: steps made, nats a token.
    pub fn evaluations(&self, run: &Run) -> Vec<(usize, f64)> {
        let of = |line: &serde_json::Value| {
            Some((line.get("step")?.as_u64()? as usize, line.get("eval_loss")?.as_f64()?))
        };
        self.lines(run).iter().filter_map(of).collect()
    }

    /// The metrics of a run.
    fn lines(&self, run: &Run) -> Vec<serde_json::Value> {
        let text =
            fs::read_to_string(self.folder.join(&run.id).join("metrics.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The best learning rate of a variant that has been searched.
    ///
    /// # Errors
    /// As [`Runs::loss`].
    pub fn best_rate(&self, plan: &Plan, variant: &Variant, seed: u64) -> Result<f64> {
        plan.best_of(variant, |run| self.loss(run), seed)
    }

    /// Tells how long the study will take about, by a few steps of its first variant.
    ///
    /// # Errors
    /// A run that fails.
    pub fn estimate(&mut self, plan: &Plan) -> Result<()> {
        let first = &plan.list[0];
        let searched: usize = plan.variants().map(|variant| plan.rates_of(variant).len()).sum();
        let further = plan.list.len() * (plan.seeds.len() - 1);
        let references = plan.variants().filter(|variant| variant.is_reference()).count();
        let shares: f64 = plan.shares.iter().filter(|share| **share != 1.0).sum();
        let runs =
            (searched + further) as f64 + references as f64 * plan.seeds.len() as f64 * shares;
        let made = fs::read_dir(&self.folder).map_or(0, |runs| runs.flatten().count());
        let left = (runs - made as f64).max(0.0);
        if left < 1.0 {
            return Ok(());
        }

        let mut pilot = plan.run(first, plan.rates[0], plan.seeds[0], 1.0)?;
        pilot.id = "pilot".into();
        pilot.sets.push(format!("steps={PILOT_STEPS}"));
        let _ = fs::remove_dir_all(self.folder.join(&pilot.id));
        let begun = Instant::now();
        self.make_one(&pilot)?;
        let whole = begun.elapsed().as_secs_f64();

        // The start and the evaluations are there once, whatever the steps.
        let mut steps: Vec<f64> =
            self.lines(&pilot).iter().filter_map(|line| line.get("step_s")?.as_f64()).collect();
        steps.sort_by(f64::total_cmp);
        let step = steps.get(steps.len() / 2).copied().unwrap_or_default();
        let seconds = whole + step * plan.config(first)?.steps.saturating_sub(PILOT_STEPS) as f64;

        let _ = fs::remove_dir_all(self.folder.join(&pilot.id));
        let minutes = left * seconds / self.jobs as f64 / 60.0;
        say!(
            "{}: {left:.0} runs of {seconds:.0} s, {} at once: about {minutes:.0} minutes",
            plan.name,
            self.jobs
        );

        Ok(())
    }

    /// Makes the runs that are not made yet.
    ///
    /// # Errors
    /// The first run that fails; no further ones begin then.
    pub fn make(&self, runs: &[Run]) -> Result<()> {
        let todo: VecDeque<&Run> = runs.iter().filter(|run| !self.is_made(run)).collect();
        let (count, begun) = (todo.len(), Instant::now());
        let bar = Bar::of_parts((PARTS * count as f64) as u64, "training");
        let (all, over) = (todo.clone(), AtomicBool::new(false));
        let queue = Mutex::new((todo, 0usize, Ok(())));
        let lock = || queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner());

        let work = || {
            loop {
                let Some(run) = lock().0.pop_front() else { return };
                let started = Instant::now();
                let result = self.make_one(run).and_then(|()| self.loss(run));

                let mut state = lock();
                state.1 += 1;
                match result {
                    Ok(loss) => {
                        let left = begun
                            .elapsed()
                            .div_f64(state.1 as f64)
                            .mul_f64((count - state.1) as f64);
                        let (seconds, done) = (started.elapsed().as_secs_f64(), state.1);
                        let loss =
                            if loss.is_finite() { format!("{loss:.4}") } else { DIVERGED.into() };
                        bar.beside(|| {
                            say!(
                                "{done:>4}/{count}  {:<48} {loss}  {seconds:.0} s, {} left",
                                run.id,
                                clock(left)
                            );
                        });
                    }
                    Err(error) => {
                        state.0.clear();
                        if state.2.is_ok() {
                            state.2 = Err(error);
                        }
                        return;
                    }
                }
            }
        };

        std::thread::scope(|scope| {
            scope.spawn(|| self.show(&all, &bar, &over));
            let workers: Vec<_> = (0..self.jobs).map(|_| scope.spawn(work)).collect();
            let panicked = workers.into_iter().find_map(|worker| worker.join().err());
            over.store(true, Ordering::Relaxed);
            if let Some(panicked) = panicked {
                std::panic::resume_unwind(panicked);
            }
        });

        lock().2.clone()
    }

    /// Shows how far the runs are until they are over, on a terminal.
    fn show(&self, runs: &VecDeque<&Run>, bar: &Bar, over: &AtomicBool) {
        let mut shown = 0;
        while std::io::stderr().is_terminal() && !over.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK);
            let made: f64 = runs.iter().map(|run| self.share(run)).sum();
            let now = ((PARTS * made) as u64).max(shown);
            bar.advance(now - shown);
            shown = now;
        }
    }

    /// How much of a run is made, from 0 to 1.
    fn share(&self, run: &Run) -> f64 {
        if self.is_made(run) {
            return 1.0;
        }

        let folder = self.making(run);
        let config = fs::read_to_string(folder.join("config.toml")).unwrap_or_default();
        let steps =
            config.parse::<toml::Table>().ok().and_then(|keys| keys.get("steps")?.as_integer());
        let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
        let last = text.lines().rev().find_map(|line| {
            serde_json::from_str::<serde_json::Value>(line).ok()?["step"].as_f64()
        });
        last.zip(steps).map_or(0.0, |(step, steps)| (step / steps.max(1) as f64).min(1.0))
    }

    /// Where a run is made.
    fn making(&self, run: &Run) -> PathBuf {
        self.folder.join(format!("{}.{}", run.id, std::process::id()))
    }

    /// One run, from its beginning.
    fn make_one(&self, run: &Run) -> Result<()> {
        let folder = self.making(run);
        let wrong = |error: std::io::Error| {
            Error::config("--out", folder.display(), format!("cannot be written ({error})"))
        };

        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).map_err(wrong)?;
        let log = folder.join("output.log");
        let output = fs::File::create(&log).map_err(wrong)?;

        let program =
            std::env::current_exe().map_err(|error| Error::Internal(error.to_string()))?;
        let mut command = Command::new(program);
        command
            .arg("train")
            .arg(&self.base)
            .args(["--oracle", "--dies-with-parent", "--out"])
            .arg(&folder);
        run.sets.iter().for_each(|set| {
            command.args(["--set", set]);
        });

        let errors = output.try_clone().map_err(wrong)?;
        let status =
            command.stdin(Stdio::null()).stdout(output).stderr(errors).status().map_err(wrong)?;

        if status.code() == Some(i32::from(NOT_FINITE)) {
            // A result: this rate is too large.
            fs::write(folder.join(DIVERGED), "").map_err(wrong)?;
        } else if !status.success() {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n  ");
            return Err(Error::Usage(format!(
                "run {} of the study has failed ({status}); its last lines:\n  {tail}",
                run.id
            )));
        }

        // Weights are not looked at.
        let _ = fs::remove_dir_all(folder.join("checkpoints"));
        fs::rename(&folder, self.folder.join(&run.id)).map_err(wrong)
    }
}
