//! What a run's folder says of the run: the lines of its metrics as far as they are written, its
//! events, where its time went. Nothing is ever written here, and nothing in these files is trusted:
//! a line may be cut in the middle, of another version, or stand there twice.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::files;
use crate::metrics::{EventKind, EventLine, EventLog, Places, PlacesFile};

/// A step, after so many updates.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepPoint {
    pub step: u64,
    pub tokens: u64,
    /// Nats per token; NaN where it was not finite.
    pub loss: f64,
    pub lr: f64,
    pub step_s: f64,
    pub tokens_per_s: f64,
    /// Seconds of steps up to its end, those of earlier processes included.
    pub clock: f64,
    /// When it was complete, in seconds since 1970; NaN where that is not told.
    pub time: f64,
}

/// An evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvalPoint {
    pub step: u64,
    pub loss: f64,
    /// Targets that the loss is the mean of.
    pub tokens: Option<u64>,
    pub bits_per_byte: Option<f64>,
}

/// A line, with what is looked at of any kind.
#[derive(Deserialize)]
struct Line {
    step: u64,
    tokens: Option<u64>,
    #[serde(default, deserialize_with = "some")]
    loss: Option<Option<f64>>,
    lr: Option<f64>,
    step_s: Option<f64>,
    tokens_per_s: Option<f64>,
    #[serde(default)]
    grad_norm: Option<Vec<Option<f64>>>,
    #[serde(default, deserialize_with = "some")]
    eval_loss: Option<Option<f64>>,
    eval_bpb: Option<f64>,
    eval_tokens: Option<u64>,
    time: Option<f64>,
    staleness: Option<serde_json::Value>,
}

/// A number that may be null, as what is not finite is, where it is there at all.
fn some<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Option<f64>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// The metrics of a run, as far as they have been read.
#[derive(Debug, Default)]
pub struct Metrics {
    pub steps: Vec<StepPoint>,
    /// Of the last step: the norm of every stage's gradient.
    pub grad_norm: Vec<f64>,
    pub evals: Vec<EvalPoint>,
    /// Lines of measured staleness: the step, and what is told of every stage.
    pub staleness: Vec<(u64, serde_json::Value)>,
    /// Lines that could not be read; steps that were there before.
    pub damaged: usize,
    pub twice: usize,
}

impl Metrics {
    /// Steps that are missing between the first and the last.
    pub fn missing(&self) -> u64 {
        let (first, last) = (self.steps.first(), self.steps.last());
        let whole =
            first.zip(last).map_or(0, |(first, last)| (last.step - first.step).saturating_add(1));
        whole.saturating_sub(self.steps.len() as u64)
    }

    fn add(&mut self, text: &str) {
        let Ok(line) = serde_json::from_str::<Line>(text) else {
            self.damaged += 1;
            return;
        };

        if let Some(staleness) = line.staleness {
            while self.staleness.last().is_some_and(|(step, _)| *step >= line.step) {
                self.staleness.pop();
            }
            self.staleness.push((line.step, staleness));
        } else if let Some(loss) = line.eval_loss {
            while self.evals.last().is_some_and(|point| point.step >= line.step) {
                self.evals.pop();
            }
            self.evals.push(EvalPoint {
                step: line.step,
                loss: loss.unwrap_or(f64::NAN),
                tokens: line.eval_tokens,
                bits_per_byte: line.eval_bpb,
            });
        } else if let Some(loss) = line.loss {
            self.step(&line, loss.unwrap_or(f64::NAN));
            self.grad_norm =
                line.grad_norm.into_iter().flatten().map(|norm| norm.unwrap_or(f64::NAN)).collect();
        } else {
            self.damaged += 1;
        }
    }

    fn step(&mut self, line: &Line, loss: f64) {
        // A run that went on from an earlier state has made these steps again.
        let before = self.steps.len();
        while self.steps.last().is_some_and(|last| last.step >= line.step) {
            self.steps.pop();
        }

        if before > self.steps.len() {
            // What was measured of them is measured again; an evaluation may stand before its step.
            self.twice += before - self.steps.len();
            self.staleness.retain(|(step, _)| *step < line.step);
            self.evals.retain(|point| point.step < line.step);
        }

        let clock = self.steps.last().map_or(0.0, |last| last.clock);
        let step_s = line.step_s.filter(|seconds| seconds.is_finite()).unwrap_or(0.0);
        self.steps.push(StepPoint {
            step: line.step,
            tokens: line.tokens.unwrap_or(0),
            loss,
            lr: line.lr.unwrap_or(f64::NAN),
            step_s,
            tokens_per_s: line.tokens_per_s.unwrap_or(f64::NAN),
            clock: clock + step_s,
            time: line.time.unwrap_or(f64::NAN),
        });
    }
}

/// A file of lines that grows, read up to its last whole line.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    /// Which file it was.
    inode: u64,
    offset: u64,
    /// The beginning of a line whose end is not written yet.
    rest: Vec<u8>,
}

impl Tail {
    fn new(path: PathBuf) -> Tail {
        Tail { path, inode: 0, offset: 0, rest: Vec::new() }
    }

    /// Hands over the lines that are new; true if the file is another one than before, whose lines
    /// come from the beginning. One that is not there has none.
    fn read(&mut self, mut line: impl FnMut(&str)) -> io::Result<bool> {
        let mut file: File = match files::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other?,
        };

        let about = file.metadata()?;
        let other = self.offset > 0 && (about.ino() != self.inode || about.len() < self.offset);
        if other {
            (self.offset, self.rest) = (0, Vec::new());
        }
        self.inode = about.ino();

        file.seek(SeekFrom::Start(self.offset))?;
        let mut new = std::mem::take(&mut self.rest);
        self.offset += file.read_to_end(&mut new)? as u64;
        let whole = new.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        self.rest = new.split_off(whole);
        for bytes in new.split(|byte| *byte == b'\n').filter(|bytes| !bytes.is_empty()) {
            line(&String::from_utf8_lossy(bytes));
        }
        Ok(other)
    }
}

/// A run as its folder tells it.
#[derive(Debug)]
pub struct History {
    pub folder: PathBuf,
    pub metrics: Metrics,
    pub events: Vec<EventLine>,
    /// Lines of events that are of another version, or damaged; why there are none that can be read.
    pub unknown_events: usize,
    pub unread_events: Option<String>,
    pub places: Places,
    /// The file is of another version, or damaged; or an earlier process has written it.
    pub unknown_places: bool,
    pub earlier_places: bool,
    lines: Tail,
    log: Tail,
}

impl History {
    /// Nothing read yet.
    pub fn new(folder: &Path) -> History {
        History {
            folder: folder.to_owned(),
            metrics: Metrics::default(),
            events: Vec::new(),
            unknown_events: 0,
            unread_events: None,
            places: Places::default(),
            unknown_places: false,
            earlier_places: false,
            lines: Tail::new(folder.join("metrics.jsonl")),
            log: Tail::new(folder.join(EventLog::NAME)),
        }
    }

    /// Reads what is new.
    ///
    /// # Errors
    /// What the system says.
    pub fn read(&mut self) -> io::Result<()> {
        let mut new = Vec::new();
        if self.lines.read(|line| new.push(line.to_owned()))? {
            self.metrics = Metrics::default();
        }
        new.iter().for_each(|line| self.metrics.add(line));

        let mut new = Vec::new();
        match self.log.read(|line| new.push(serde_json::from_str::<EventLine>(line))) {
            Ok(true) => {
                self.events.clear();
                self.unknown_events = 0;
            }
            Ok(false) => {}
            Err(error) => self.unread_events = Some(error.to_string()),
        }
        self.unknown_events += new.iter().filter(|event| event.is_err()).count();
        self.events.extend(new.into_iter().flatten());

        // It is replaced whole: what cannot be read is of another version.
        if let Ok(bytes) = files::read(&self.folder.join(PlacesFile::NAME)) {
            match serde_json::from_slice(&bytes) {
                Ok(places) => (self.places, self.unknown_places) = (places, false),
                Err(_) => self.unknown_places = true,
            }
        }

        // Its ranks are not those of the process that goes on.
        let started = self.training().map_or(0.0, |start| start.time);
        self.earlier_places = !self.places.places.is_empty() && self.places.updated < started;
        if self.earlier_places {
            self.places = Places::default();
        }
        Ok(())
    }

    /// Whether the end of the last line of the metrics is missing.
    pub fn ends_in_a_cut(&self) -> bool {
        !self.lines.rest.is_empty()
    }

    /// The processes that began the run, or went on with it.
    pub fn starts(&self) -> impl DoubleEndedIterator<Item = &EventLine> {
        self.events.iter().filter(|event| event.kind == EventKind::Start)
    }

    /// The last process that trained, or may still: one that found nothing left to do says nothing of
    /// the run.
    fn training(&self) -> Option<&EventLine> {
        let mut last = None;
        for event in &self.events {
            match event.kind {
                EventKind::Start => last = Some((event, last.map(|(event, _)| event))),
                EventKind::End => {
                    let idle = |(start, _): &(&EventLine, _)| start.step == event.step;
                    let before = last.filter(idle).and_then(|(_, before)| before);
                    last = before.map(|before| (before, None)).or(last);
                }
                _ => {}
            }
        }
        last.map(|(start, _)| start)
    }

    /// The facts of the last process that trained the run.
    pub fn facts(&self) -> &serde_json::Value {
        self.training().map_or(&serde_json::Value::Null, |start| &start.facts)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn step(step: u64, loss: &str) -> String {
        format!(
            "{{\"step\":{step},\"loss\":{loss},\"lr\":0.1,\"tokens\":{},\"step_s\":0.5,\"tokens_per_s\":8,\"grad_norm\":[1,null]}}\n",
            4 * step
        )
    }

    #[test]
    fn what_is_damaged_is_counted_and_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut history = History::new(folder.path());
        history.read().unwrap();
        assert!(history.metrics.steps.is_empty() && history.facts().is_null());

        let text = [
            step(1, "3"),
            step(2, "2.5"),
            "{\"step\":2,\"eval_loss\":2.25,\"eval_tokens\":9,\"eval_bpb\":1.5}\n".to_owned(),
            "not json\n".to_owned(),
            "{\"step\":3,\"something\":1}\n".to_owned(),
            step(3, "null"),
            step(6, "2"),
            "{\"step\":7,\"lo".to_owned(),
        ];
        std::fs::write(&path, text.concat()).unwrap();
        history.read().unwrap();
        let metrics = &history.metrics;
        let steps: Vec<u64> = metrics.steps.iter().map(|point| point.step).collect();
        assert_eq!((steps, metrics.damaged, metrics.missing()), (vec![1, 2, 3, 6], 2, 2));
        assert!(metrics.steps[2].loss.is_nan() && metrics.steps[3].clock == 2.0);
        assert_eq!(metrics.evals[0].bits_per_byte, Some(1.5));

        // The line goes on, then steps are made again.
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        write!(file, "ss\":1.5}}\n{}", step(6, "1")).unwrap();
        history.read().unwrap();
        let metrics = &history.metrics;
        let last = metrics.steps.last().unwrap();
        assert_eq!((last.step, last.loss, metrics.twice), (6, 1.0, 2));

        // Another run in the same folder.
        std::fs::write(&path, step(1, "4")).unwrap();
        history.read().unwrap();
        assert_eq!(history.metrics.steps.len(), 1);
    }

    #[test]
    fn a_process_that_found_nothing_to_do_says_nothing_of_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let start = |step: u64, time: f64, grid: &str| serde_json::json!({"time": time, "step": step, "kind": "start", "text": "", "facts": {"grid": grid}});
        let end = |time: f64| serde_json::json!({"time": time, "step": 6, "kind": "end", "text": "", "facts": {}});
        let place = serde_json::json!({
            "name": "", "replica": 0, "stages": [0], "step": 6, "at": 5.0, "predicted": 0,
            "recent": {"steps": 0, "seconds": 0.0, "kinds": {}, "stages": []},
            "total": {"steps": 6, "seconds": 1.0, "kinds": {}, "stages": []},
        });
        let places = serde_json::json!({"updated": 5.0, "places": {"0": place}});
        std::fs::write(folder.path().join(PlacesFile::NAME), places.to_string()).unwrap();
        let look = |events: &[serde_json::Value]| {
            let lines: String = events.iter().map(|event| format!("{event}\n")).collect();
            std::fs::write(folder.path().join(EventLog::NAME), lines).unwrap();
            let mut history = History::new(folder.path());
            history.read().unwrap();
            (history.facts()["grid"].as_str().unwrap().to_owned(), history.earlier_places)
        };

        let mut events = vec![start(0, 1.0, "2x2"), end(5.1)];
        assert_eq!(look(&events), ("2x2".to_owned(), false));
        events.extend([start(6, 10.0, "1x1"), end(11.0), start(6, 12.0, "1x2"), end(13.0)]);
        assert_eq!(look(&events), ("2x2".to_owned(), false));
        // One that goes on may be another grid.
        events.push(start(6, 20.0, "4x1"));
        assert_eq!(look(&events), ("4x1".to_owned(), true));
    }
}
