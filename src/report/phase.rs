//! Whether a run goes on, by what its folder says.

use std::time::UNIX_EPOCH;

use super::history::History;
use crate::metrics::EventKind;

/// A run that has not made a step for so many times as long as a step takes, and for so many seconds
/// at least, is silent.
const SILENT: f64 = 20.0;
const SILENT_S: f64 = 30.0;

/// What a run is doing.
#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    Running,
    /// Nothing has been written for so many seconds: killed, suspended, or hanging.
    Silent(f64),
    /// It was stopped before its last step, and has saved.
    Stopped,
    /// It has ended with an error.
    Failed,
    Ended,
}

impl Phase {
    /// Of a run whose steps take so many seconds, at a time in seconds since 1970.
    pub fn new(history: &History, step_s: f64, now: f64) -> Phase {
        let ending = history.events.iter().rev().find(|event| {
            matches!(event.kind, EventKind::Start | EventKind::End | EventKind::Fault)
        });
        match ending.map(|event| event.kind) {
            Some(EventKind::Fault) => return Phase::Failed,
            Some(EventKind::End) => {
                let stopped = ending.is_some_and(|event| event.facts["stopped"] == true);
                return if stopped { Phase::Stopped } else { Phase::Ended };
            }
            _ => {}
        }

        let silent = now - written(history);
        if silent > (SILENT * step_s).max(SILENT_S) {
            Phase::Silent(silent)
        } else {
            Phase::Running
        }
    }

    /// Whether nothing more is to come by itself.
    pub fn is_over(&self) -> bool {
        matches!(self, Phase::Stopped | Phase::Failed | Phase::Ended)
    }

    pub fn text(&self) -> String {
        match self {
            Phase::Running => "running".to_owned(),
            Phase::Silent(seconds) => format!("silent for {seconds:.0} s"),
            Phase::Stopped => "stopped".to_owned(),
            Phase::Failed => "failed".to_owned(),
            Phase::Ended => "ended".to_owned(),
        }
    }
}

/// When something was last written, by whomever, in seconds since 1970.
fn written(history: &History) -> f64 {
    let times = ["metrics.jsonl", "places.json", "events.jsonl"].iter().filter_map(|name| {
        let about = std::fs::metadata(history.folder.join(name)).ok()?;
        let at = about.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(at.as_secs_f64())
    });
    times.fold(0.0, f64::max)
}
