//! Where a run is, of what its folder says.

use std::time::Duration;

use crate::files;
use crate::metrics::{EventLine, PlaceRecord, clock, thousands, wall_time};
use crate::report::{History, Phase, thin};

/// Steps that the rate is taken over, and points of the loss curve.
const RECENT: usize = 50;
const POINTS: usize = 400;

/// Events that are shown.
const EVENTS: usize = 12;

/// One look at a run.
#[derive(Debug)]
pub struct State {
    pub name: String,
    pub grid: String,
    pub phase: Phase,
    pub step: u64,
    pub steps: Option<u64>,
    pub loss: f64,
    pub eval_loss: Option<f64>,
    pub tokens_per_s: Option<f64>,
    pub left: Option<Duration>,
    /// Losses over steps, few enough to be drawn.
    pub curve: Vec<(f64, f64)>,
    pub evals: Vec<(f64, f64)>,
    pub places: Vec<PlaceRecord>,
    /// The newest first.
    pub events: Vec<EventLine>,
}

impl State {
    pub fn new(history: &History) -> State {
        let facts = history.facts();
        let steps = &history.metrics.steps;
        let recent = &steps[steps.len().saturating_sub(RECENT)..];
        let seconds: f64 = recent.iter().map(|point| point.step_s).sum();
        let tokens: f64 = recent.iter().map(|point| point.tokens_per_s * point.step_s).sum();
        let step_s = (!recent.is_empty()).then(|| seconds / recent.len() as f64);
        let step = steps.last().map_or(0, |point| point.step);
        let all = facts["steps"].as_u64();

        let phase = Phase::new(history, step_s.unwrap_or(0.0), wall_time());
        let still = matches!(phase, Phase::Running);
        let apart = apart(history).or(step_s);
        let left = all.zip(apart).filter(|_| still).map(|(all, apart)| {
            Duration::try_from_secs_f64(all.saturating_sub(step) as f64 * apart).unwrap_or_default()
        });
        let points: Vec<(f64, f64)> =
            steps.iter().map(|point| (point.step as f64, point.loss)).collect();
        State {
            name: files::name(&history.folder),
            grid: facts["grid"].as_str().unwrap_or("?").to_owned(),
            phase,
            step,
            steps: all,
            loss: steps.last().map_or(f64::NAN, |point| point.loss),
            eval_loss: history.metrics.evals.last().map(|point| point.loss),
            tokens_per_s: (seconds > 0.0).then(|| tokens / seconds),
            left,
            curve: thin(&points, POINTS),
            evals: history
                .metrics
                .evals
                .iter()
                .map(|point| (point.step as f64, point.loss))
                .collect(),
            places: history.places.places.values().cloned().collect(),
            events: history.events.iter().rev().take(EVENTS).cloned().collect(),
        }
    }

    /// The share of the run that is behind it.
    pub fn done(&self) -> f64 {
        self.steps.map_or(0.0, |steps| self.step as f64 / steps.max(1) as f64).clamp(0.0, 1.0)
    }

    /// All of it in a line.
    pub fn line(&self) -> String {
        let of = self.steps.map_or(String::new(), |steps| format!("/{steps}"));
        let mut text = format!("{}: {}, step {}{of}", self.name, self.phase.text(), self.step);
        if self.step > 0 {
            text.push_str(&format!(", loss {:.4}", self.loss));
        }
        if let Some(loss) = self.eval_loss {
            text.push_str(&format!(", held-out {loss:.4}"));
        }
        if let Some(rate) = self.tokens_per_s.filter(|rate| rate.is_finite()) {
            text.push_str(&format!(", {} tokens/s", thousands(rate as u64)));
        }
        if let Some(left) = self.left {
            text.push_str(&format!(", {} left", clock(left)));
        }
        if let Some((name, share)) = self.busiest() {
            text.push_str(&format!("; busiest {name}: {:.0} %", 100.0 * share));
        }
        text
    }

    /// The place that computes most of its time.
    fn busiest(&self) -> Option<(&str, f64)> {
        let share = |place: &PlaceRecord| place.recent.share("compute");
        let busiest = self.places.iter().max_by(|a, b| share(a).total_cmp(&share(b)))?;
        Some((&busiest.name, share(busiest)))
    }
}

/// Seconds from a step to the next since this process began, evaluations and saves in them.
fn apart(history: &History) -> Option<f64> {
    let (start, last) = (history.starts().last()?, history.metrics.steps.last()?);
    let made = last.step.checked_sub(start.step as u64).filter(|made| *made > 0)?;
    Some((last.time - start.time) / made as f64).filter(|apart| *apart > 0.0)
}

/// What a place does most, in words.
pub fn doing(place: &PlaceRecord) -> String {
    let kinds = place.recent.kinds.iter();
    let Some((kind, _)) = kinds.max_by(|a, b| a.1.total_cmp(b.1)) else {
        return "nothing yet".to_owned();
    };
    match kind.as_str() {
        "compute" => "computes".to_owned(),
        "upstream" => "waits for stage before".to_owned(),
        "downstream" => "waits for stage behind".to_owned(),
        "reduce" => "waits for replicas".to_owned(),
        "update" => "updates".to_owned(),
        "copies" => "hands over".to_owned(),
        "table" => "works on the table".to_owned(),
        "evaluation" => "evaluates".to_owned(),
        "save" => "saves".to_owned(),
        other => other.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(lines: usize, events: &[&str]) -> (tempfile::TempDir, History) {
        let folder = tempfile::tempdir().unwrap();
        let step = |step: usize| {
            format!(
                "{{\"step\":{step},\"loss\":{},\"lr\":0.1,\"tokens\":{},\"step_s\":0.5,\"tokens_per_s\":8.0}}\n",
                3.0 - step as f64 / 100.0,
                4 * step
            )
        };
        std::fs::write(
            folder.path().join("metrics.jsonl"),
            (1..=lines).map(step).collect::<String>(),
        )
        .unwrap();
        std::fs::write(folder.path().join("events.jsonl"), events.join("\n") + "\n").unwrap();
        let mut history = History::new(folder.path());
        history.read().unwrap();
        (folder, history)
    }

    const START: &str =
        r#"{"time":1,"step":0,"kind":"start","text":"started","facts":{"grid":"4x2","steps":100}}"#;

    #[test]
    fn a_run_is_told_in_a_line() {
        let history = history(20, &[START]);
        let state = State::new(&history.1);
        assert_eq!(
            (state.phase.clone(), state.steps, state.done()),
            (Phase::Running, Some(100), 0.2)
        );
        let line = state.line();
        assert!(line.contains("step 20/100, loss 2.8000, 8 tokens/s, 0:40 left"), "{line}");

        // By the clock, where steps tell when they were made: evaluations and saves are in it.
        let (folder, mut history) = history;
        let timed = r#"{"step":21,"loss":2.5,"lr":0.1,"tokens":84,"step_s":0.5,"tokens_per_s":8.0,"time":43}"#;
        std::fs::write(folder.path().join("metrics.jsonl"), format!("{timed}\n")).unwrap();
        history.read().unwrap();
        let left = State::new(&history).left;
        assert_eq!(left, Some(Duration::from_secs(2 * 79)));

        let (_folder, none) = self::history(0, &[START]);
        assert!(
            State::new(&none).line().ends_with("running, step 0/100"),
            "{}",
            State::new(&none).line()
        );
    }

    #[test]
    fn ends_and_silence_are_seen() {
        let end = |stopped: bool| {
            format!(
                r#"{{"time":2,"step":20,"kind":"end","text":"ended","facts":{{"stopped":{stopped}}}}}"#
            )
        };
        let fault = r#"{"time":2,"step":20,"kind":"fault","text":"not finite"}"#;
        for (events, expected) in [
            (vec![START, &end(false)], Phase::Ended),
            (vec![START, &end(true)], Phase::Stopped),
            (vec![START, fault], Phase::Failed),
            (vec![START, fault, START], Phase::Running),
            (vec![], Phase::Running),
        ] {
            let (_folder, history) = history(20, &events);
            assert_eq!(State::new(&history).phase, expected, "{events:?}");
        }

        let (_folder, history) = history(20, &[START]);
        assert!(
            matches!(Phase::new(&history, 0.5, wall_time() + 45.0), Phase::Silent(seconds) if seconds > 44.0)
        );
        assert_eq!(Phase::new(&history, 10.0, wall_time() + 45.0), Phase::Running);
    }
}
