//! The processes that trained a run, one after the other, and the time that they took.

use serde::Serialize;

use super::history::{History, StepPoint};
use super::phase::Phase;
use crate::metrics::{EventKind, EventLine};

/// One process: from the event that tells of its start to the next one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Process {
    /// Seconds since 1970.
    pub time: f64,
    pub grid: String,
    /// The step that it went on from; the last that it made, of those that count.
    pub from: u64,
    pub to: Option<u64>,
    pub tokens_per_s: Option<f64>,
    /// How it ended, or what it is doing.
    pub end: String,
}

/// The processes of a run, whose last one is in a phase.
pub fn processes(history: &History, phase: &Phase) -> Vec<Process> {
    let starts: Vec<&EventLine> = history.starts().collect();
    let of = |(number, start): (usize, &&EventLine)| {
        let until = starts.get(number + 1).map_or(f64::INFINITY, |next| next.time);
        // Clocks of two hosts may differ, and steps of an earlier version do not tell their time.
        let made = |point: &&StepPoint| point.time >= start.time && point.time < until;
        let steps: Vec<&StepPoint> = history.metrics.steps.iter().filter(made).collect();
        let seconds: f64 = steps.iter().map(|point| point.step_s).sum();
        let tokens: f64 = steps.iter().map(|point| point.tokens_per_s * point.step_s).sum();
        Process {
            time: start.time,
            grid: start.facts["grid"].as_str().unwrap_or("?").to_owned(),
            from: start.step as u64,
            to: steps.last().map(|last| last.step),
            tokens_per_s: Some(tokens / seconds).filter(|rate| rate.is_finite()),
            end: if until.is_finite() { end(history, start.time, until) } else { phase.text() },
        }
    };
    starts.iter().enumerate().map(of).collect()
}

/// How a process ended that another one followed.
fn end(history: &History, from: f64, until: f64) -> String {
    let within = |event: &&EventLine| event.time >= from && event.time < until;
    let last = history
        .events
        .iter()
        .filter(within)
        .rfind(|event| matches!(event.kind, EventKind::End | EventKind::Fault));
    match last {
        Some(event) if event.kind == EventKind::Fault => "failed".to_owned(),
        Some(event) if event.facts["stopped"] == true => "stopped".to_owned(),
        Some(_) => "ended".to_owned(),
        None => "killed: it has not told of an end".to_owned(),
    }
}

/// Seconds of the run's processes up to each step: evaluations and saves are in them; pauses between
/// two processes, and what was lost when one was killed, are not. Of steps that do not tell when they
/// were made, those of the steps themselves.
pub fn wall_clock(history: &History) -> Vec<f64> {
    let starts: Vec<f64> = history.starts().map(|start| start.time).collect();
    let (mut sum, mut before, mut clock) = (0.0, f64::NAN, 0.0);
    let mut walls = Vec::with_capacity(history.metrics.steps.len());
    for point in &history.metrics.steps {
        let started = starts[..starts.partition_point(|start| *start <= point.time)].last();
        let from = started.map_or(before, |started| before.max(*started));
        let took = point.time - from;
        sum += if took >= 0.0 { took } else { point.clock - clock };
        (before, clock) = (point.time, point.clock);
        walls.push(sum);
    }
    walls
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::wall_time;

    #[test]
    fn time_between_processes_is_nobodys() {
        let folder = tempfile::tempdir().unwrap();
        let step = |step: usize, time: f64| {
            format!(
                "{{\"step\":{step},\"loss\":3,\"tokens\":{},\"step_s\":1,\"tokens_per_s\":8,\"time\":{time}}}\n",
                8 * step
            )
        };
        let start = |step: usize, time: f64, grid: &str| {
            format!(
                "{{\"time\":{time},\"step\":{step},\"kind\":\"start\",\"text\":\"\",\"facts\":{{\"grid\":\"{grid}\"}}}}\n"
            )
        };
        // A step a second, an evaluation of three seconds behind the second; killed; an hour later
        // another goes on from the second.
        let lines = [step(1, 101.0), step(2, 102.0), step(3, 3702.0), step(4, 3706.0)];
        std::fs::write(folder.path().join("metrics.jsonl"), lines.concat()).unwrap();
        let events = start(0, 100.0, "2x2") + &start(2, 3700.0, "2x1");
        std::fs::write(folder.path().join("events.jsonl"), events).unwrap();
        let mut history = History::new(folder.path());
        history.read().unwrap();

        assert_eq!(wall_clock(&history), [1.0, 2.0, 4.0, 8.0]);
        let phase = Phase::new(&history, 1.0, wall_time());
        let found = processes(&history, &phase);
        let told: Vec<(&str, u64, Option<u64>, &str)> = found
            .iter()
            .map(|of| (of.grid.as_str(), of.from, of.to, of.end.split(':').next().unwrap()))
            .collect();
        assert_eq!(told, [("2x2", 0, Some(2), "killed"), ("2x1", 2, Some(4), "running")]);
        assert_eq!(found[0].tokens_per_s, Some(8.0));

        // Steps of an earlier version do not tell when they were made.
        let lines = [step(1, 101.0), step(2, 102.0)].concat().replace("\"time\"", "\"else\"");
        std::fs::write(folder.path().join("metrics.jsonl"), &lines).unwrap();
        history.read().unwrap();
        assert_eq!(wall_clock(&history), [1.0, 2.0]);

        // And gone on with by this one.
        let lines = lines + &step(3, 3702.0);
        std::fs::write(folder.path().join("metrics.jsonl"), lines).unwrap();
        history.read().unwrap();
        assert_eq!(wall_clock(&history), [1.0, 2.0, 4.0]);
        let found = processes(&history, &phase);
        assert_eq!((found[0].to, found[1].to), (None, Some(3)));
    }
}
