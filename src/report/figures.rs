//! What a report tells of a run, as figures: `--json` prints them, the page draws them.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::history::{History, StepPoint};
use super::phase::Phase;
use super::processes::{Process, processes, wall_clock};
use super::proof::{Proof, proof};
use super::thin::thin;
use crate::config::flatten;
use crate::error::{Error, Result};
use crate::files;
use crate::metrics::{EventKind, EventLine, PlaceRecord, Spent, wall_time};

/// Points that are kept of a curve.
pub const POINTS: usize = 600;

/// Groups of a run whose losses are averaged, since single ones say little; and those of its time that
/// the rate is taken over.
const GROUPS: usize = 100;
const GROUPS_OF_TIME: f64 = 200.0;

/// One run.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub name: String,
    pub folder: String,
    pub facts: Value,
    /// The keys of its config.
    pub settings: BTreeMap<String, Value>,
    /// What it is doing, or how it ended.
    pub state: String,
    pub steps: u64,
    /// Steps that it is to have.
    pub of_steps: Option<u64>,
    pub tokens: u64,
    /// Seconds that its processes took, as far as there are steps; those of the steps alone.
    pub seconds: f64,
    pub step_seconds: f64,
    /// The processes that trained it, one after the other.
    pub processes: Vec<Process>,
    pub loss: Option<f64>,
    pub eval_loss: Option<f64>,
    pub bits_per_byte: Option<f64>,
    pub step_s: Option<f64>,
    pub tokens_per_s: Option<f64>,
    pub curves: Curves,
    pub places: Vec<PlaceFigures>,
    pub proof: Option<Proof>,
    pub staleness: Vec<(u64, Value)>,
    /// Targets of the last evaluation.
    pub eval_tokens: Option<u64>,
    pub events: Vec<EventLine>,
    /// What was found wrong with the folder's files.
    pub notes: Vec<String>,
}

/// Curves, thinned without losing peaks: (x, y).
#[derive(Debug, Default, Serialize)]
pub struct Curves {
    pub loss: Vec<(f64, f64)>,
    /// Means of a hundredth of the run each.
    pub smooth: Vec<(f64, f64)>,
    pub loss_by_tokens: Vec<(f64, f64)>,
    pub loss_by_seconds: Vec<(f64, f64)>,
    pub smooth_by_tokens: Vec<(f64, f64)>,
    pub smooth_by_seconds: Vec<(f64, f64)>,
    pub eval: Vec<(f64, f64)>,
    pub eval_by_tokens: Vec<(f64, f64)>,
    pub eval_by_seconds: Vec<(f64, f64)>,
    pub tokens_per_s: Vec<(f64, f64)>,
    /// Seconds of steps up to a step.
    pub clock: Vec<(f64, f64)>,
}

/// Where the time of a rank went, and its memory.
#[derive(Debug, Serialize)]
pub struct PlaceFigures {
    pub rank: usize,
    pub name: String,
    pub stages: Vec<usize>,
    pub spent: Spent,
    pub predicted: u64,
    /// The measured peak, at the end or when it was last told.
    pub memory: Option<u64>,
}

impl Figures {
    /// Those of a run's folder.
    ///
    /// # Errors
    /// [`Error::Data`] if it has no metrics.
    pub fn read(folder: &Path) -> Result<Figures> {
        let wrong = |problem: &str| Error::Data {
            path: folder.display().to_string(),
            problem: problem.to_owned(),
            remedy: "give the folder of a run, as in runs/quickstart".to_owned(),
        };
        let unread = |error: io::Error| wrong(&format!("cannot be read ({error})"));
        if !folder.is_dir() {
            return Err(wrong("is no folder"));
        }

        let mut history = History::new(folder);
        history.read().map_err(unread)?;
        if history.metrics.steps.is_empty() {
            let problem = match folder.join("metrics.jsonl").exists() {
                true if history.metrics.damaged > 0 => {
                    "has a metrics.jsonl without a step that can be read: of another version?"
                }
                true => "has a metrics.jsonl without a step",
                false => "has no metrics.jsonl",
            };
            return Err(wrong(problem));
        }

        let config = files::read_text(&folder.join("config.toml")).unwrap_or_default();
        Ok(Figures::new(&history, settings(&config)))
    }

    fn new(history: &History, settings: BTreeMap<String, Value>) -> Figures {
        let (metrics, facts) = (&history.metrics, history.facts().clone());
        let last = metrics.steps.last().cloned().unwrap_or_default();
        let tail = &metrics.steps[metrics.steps.len() - metrics.steps.len().div_ceil(10)..];
        let eval = metrics.evals.last().copied();
        let step_s = median(metrics.steps.iter().map(|point| point.step_s));
        let phase = Phase::new(history, step_s.unwrap_or(0.0), wall_time());
        let walls = wall_clock(history);

        Figures {
            name: files::name(&history.folder),
            folder: history.folder.display().to_string(),
            state: phase.text(),
            steps: last.step,
            of_steps: facts["steps"].as_u64(),
            tokens: last.tokens,
            seconds: walls.last().copied().unwrap_or(0.0),
            step_seconds: last.clock,
            processes: processes(history, &phase),
            // Of a run that has diverged there is none.
            loss: mean(tail.iter().map(|point| point.loss)).filter(|_| last.loss.is_finite()),
            eval_loss: eval.map(|point| point.loss).filter(|loss| loss.is_finite()),
            bits_per_byte: eval.and_then(|point| point.bits_per_byte),
            step_s,
            tokens_per_s: median(metrics.steps.iter().map(|point| point.tokens_per_s)),
            curves: curves(history, &walls),
            places: places(history, &facts),
            proof: proof(&history.places, &facts).filter(|_| facts["device"] != "cuda"),
            staleness: metrics.staleness.clone(),
            eval_tokens: eval.and_then(|point| point.tokens),
            events: history.events.clone(),
            notes: notes(history, &facts),
            settings,
            facts,
        }
    }

    /// What makes a held-out loss of this run bits per byte of the text, or one of training; none where
    /// that is not known.
    pub fn bits(&self, held_out: bool) -> Option<f64> {
        let key = if held_out { "bytes_per_token" } else { "train_bytes_per_token" };
        let bytes = self.facts[key].as_f64().filter(|bytes| *bytes > 0.0)?;
        Some(1.0 / (std::f64::consts::LN_2 * bytes))
    }

    /// What tells vocabularies apart: losses of runs that differ here compare per byte only. None where it
    /// is not known.
    pub fn tokens(&self) -> Option<String> {
        let tokens = &self.facts["tokens"];
        (!tokens.is_null()).then(|| tokens.to_string())
    }

    /// Whether its steps and their time are those of a training on a grid; why not.
    pub fn no_training(&self) -> Option<&'static str> {
        let is = |key: &str| self.facts[key] == Value::Bool(true);
        match () {
            () if is("oracle") => Some("oracle"),
            () if is("emulated") => Some("emulated"),
            () if is("bench") => Some("bench"),
            () => None,
        }
    }
}

/// The keys of a config, as `--set` names them; nothing of one that is none.
fn settings(text: &str) -> BTreeMap<String, Value> {
    let mut found = Vec::new();
    if let Ok(table) = text.parse::<toml::Table>() {
        flatten("", serde_json::to_value(table).unwrap_or_default(), &mut found);
    }
    found.into_iter().collect()
}

fn curves(history: &History, walls: &[f64]) -> Curves {
    let (steps, evals) = (&history.metrics.steps, &history.metrics.evals);
    let of = |x: &dyn Fn(usize) -> f64, y: &dyn Fn(usize) -> f64| {
        let points: Vec<(f64, f64)> = (0..steps.len()).map(|i| (x(i), y(i))).collect();
        thin(&points, POINTS)
    };
    let step = |i: usize| steps[i].step as f64;
    let tokens = |i: usize| steps[i].tokens as f64;
    let clock = |i: usize| steps[i].clock;
    let wall = |i: usize| walls[i];
    let loss = |i: usize| steps[i].loss;

    // Where the step of an evaluation is among the others.
    let at = |step: u64| steps.partition_point(|point| point.step < step).min(steps.len() - 1);
    let eval = |x: &dyn Fn(usize) -> f64| {
        let points: Vec<(f64, f64)> =
            evals.iter().map(|point| (x(at(point.step)), point.loss)).collect();
        thin(&points, POINTS)
    };
    Curves {
        loss: of(&step, &loss),
        smooth: smooth(steps, &step),
        smooth_by_tokens: smooth(steps, &tokens),
        smooth_by_seconds: smooth(steps, &wall),
        loss_by_tokens: of(&tokens, &loss),
        loss_by_seconds: of(&wall, &loss),
        eval: thin(
            &evals.iter().map(|point| (point.step as f64, point.loss)).collect::<Vec<_>>(),
            POINTS,
        ),
        eval_by_tokens: eval(&tokens),
        eval_by_seconds: eval(&wall),
        tokens_per_s: rate(history),
        clock: of(&step, &clock),
    }
}

/// Means of the losses of as many neighbours as make a hundred groups of the run, at the last of each.
fn smooth(steps: &[StepPoint], x: &dyn Fn(usize) -> f64) -> Vec<(f64, f64)> {
    let group = (steps.len() / GROUPS).max(1);
    let mean = |(number, points): (usize, &[StepPoint])| {
        let loss = points.iter().map(|point| point.loss).sum::<f64>() / points.len() as f64;
        let last = number * group + points.len() - 1;
        Some((x(last), loss)).filter(|(_, loss)| loss.is_finite())
    };
    steps.chunks(group).enumerate().filter_map(mean).collect()
}

/// Tokens a second over steps: of a share of the run's time together, since reports of single steps
/// come in bursts.
fn rate(history: &History) -> Vec<(f64, f64)> {
    let steps = &history.metrics.steps;
    let least = steps.last().map_or(0.0, |last| last.clock) / GROUPS_OF_TIME;
    let (mut points, mut seconds, mut tokens) = (Vec::new(), 0.0, 0.0);
    for point in steps {
        // One that was not told is left out, with its time.
        let told = point.tokens_per_s * point.step_s;
        if told.is_finite() {
            seconds += point.step_s;
            tokens += told;
        }

        if seconds > 0.0 && seconds >= least {
            points.push((point.step as f64, tokens / seconds));
            (seconds, tokens) = (0.0, 0.0);
        }
    }
    points
}

fn places(history: &History, facts: &Value) -> Vec<PlaceFigures> {
    // Of the process that wrote the times: its end, if it has come to that.
    let end = history.events.last().filter(|event| event.kind == EventKind::End);
    let peak = |rank: usize| match facts["threads"].as_bool() {
        Some(true) => None,
        _ => end?.facts["peak_bytes"].get(rank)?.as_u64(),
    };
    let of = |(rank, place): (&usize, &PlaceRecord)| PlaceFigures {
        rank: *rank,
        name: place.name.clone(),
        stages: place.stages.clone(),
        spent: place.total.clone(),
        predicted: place.predicted,
        memory: peak(*rank).or(place.peak.filter(|_| facts["threads"] != true)),
    };
    history.places.places.iter().map(of).collect()
}

/// What is wrong with the files of a run.
fn notes(history: &History, facts: &Value) -> Vec<String> {
    let metrics = &history.metrics;
    let mut notes = Vec::new();

    if metrics.damaged > 0 {
        notes.push(format!(
            "{} lines of metrics.jsonl cannot be read, and are left out",
            metrics.damaged
        ));
    }

    if history.ends_in_a_cut() {
        notes.push("the last line of metrics.jsonl is cut, and is left out".to_owned());
    }

    if let Some(problem) = &history.unread_events {
        notes.push(format!("events.jsonl cannot be read ({problem})"));
    }

    if history.unknown_events > 0 {
        notes.push(format!(
            "{} lines of events.jsonl cannot be read, or are of another version",
            history.unknown_events
        ));
    }

    if metrics.twice > 0 {
        notes.push(format!(
            "{} steps were made again after a resume; the later ones are shown",
            metrics.twice
        ));
    }

    if metrics.missing() > 0 {
        notes.push(format!("{} steps are missing in metrics.jsonl", metrics.missing()));
    }

    if let Some(first) = metrics.steps.iter().find(|point| !point.loss.is_finite()) {
        let count = metrics.steps.iter().filter(|point| !point.loss.is_finite()).count();
        notes.push(format!("{count} losses are not finite, from step {} on", first.step));
    }

    if facts.is_null() {
        notes.push(
            "events.jsonl does not say how the run began: made by an earlier version?".to_owned(),
        );
    }

    notes.extend(notes_of_places(history, facts));
    notes
}

/// What is wrong with what a run's folder says of its places.
fn notes_of_places(history: &History, facts: &Value) -> Vec<String> {
    let mut notes = Vec::new();
    if facts["device"] == "cuda" {
        notes.push(
            "on GPUs times by kinds are those of the hosts, which do not wait for the device: no proof; a trace has the device's"
                .to_owned(),
        );
    }

    if history.unknown_places {
        notes.push("places.json cannot be read, or is of another version".to_owned());
    } else if history.earlier_places {
        notes.push("places.json is of an earlier process, and is left out".to_owned());
    } else if history.places.places.is_empty() {
        notes.push(
            "places.json does not say where the time went: too short a run, or the oracle's"
                .to_owned(),
        );
    }

    notes
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let known: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut known: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    let middle = known.len() / 2;
    if known.is_empty() {
        return None;
    }
    Some(*known.select_nth_unstable_by(middle, f64::total_cmp).1)
}
