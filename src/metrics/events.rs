//! `events.jsonl` in the run's folder: what happened to a run besides its steps, a line each, those of
//! the processes that went on with it behind each other.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Sink, wall_time};
use crate::error::{Error, Result};
use crate::files;

/// What kind of thing happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// A process has begun the run, or gone on with it; its facts stand beside.
    Start,
    /// A state is saved.
    Saved,
    /// Somebody has asked the run to stop.
    Stop,
    /// A rank has become slow.
    Straggler,
    /// An update was left out.
    Skipped,
    /// About a trace.
    Trace,
    /// What ended the run before its end.
    Fault,
    /// The process has come to its end.
    End,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventLine {
    /// Seconds since 1970.
    pub time: f64,
    /// Complete steps.
    pub step: usize,
    pub kind: EventKind,
    pub text: String,
    /// Of a start, or an end.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub facts: serde_json::Value,
}

impl EventLine {
    /// Something that happens now.
    pub fn now(step: usize, kind: EventKind, text: &str) -> EventLine {
        let (time, text) = (wall_time(), text.to_owned());
        EventLine { time, step, kind, text, facts: serde_json::Value::Null }
    }

    /// The same with facts.
    pub fn with(self, facts: serde_json::Value) -> EventLine {
        EventLine { facts, ..self }
    }
}

/// The file of a run.
pub struct EventLog {
    path: PathBuf,
    file: File,
}

impl EventLog {
    /// The name of the file.
    pub const NAME: &str = "events.jsonl";

    /// That of a run's folder: a new one, or that of the run that is resumed.
    ///
    /// # Errors
    /// [`Error::Unwritten`] if it cannot be.
    pub fn begin(out: &Path, resumed: bool) -> Result<EventLog> {
        let path = out.join(EventLog::NAME);
        let mut options = OpenOptions::new();
        options.append(true);
        let made = match resumed {
            true => files::create_with(&path, &options),
            false => files::create(&path),
        };
        let file = made.map_err(|error| Error::unwritten(&path, error))?;
        let mut log = EventLog { path, file };
        log.end_line()?;
        Ok(log)
    }
}

impl EventLog {
    /// Ends the last line of a process that could not.
    fn end_line(&mut self) -> Result<()> {
        let bytes = files::read(&self.path).unwrap_or_default();
        match bytes.last() {
            None | Some(b'\n') => Ok(()),
            Some(_) => {
                self.file.write_all(b"\n").map_err(|error| Error::unwritten(&self.path, error))
            }
        }
    }
}

impl Sink for EventLog {
    fn event(&mut self, line: &EventLine) -> Result<()> {
        let text =
            serde_json::to_string(line).map_err(|error| Error::Internal(error.to_string()))?;
        self.file
            .write_all(format!("{text}\n").as_bytes())
            .map_err(|error| Error::unwritten(&self.path, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_takes_no_other_with_it() {
        let out = tempfile::tempdir().unwrap();
        let line = |text: &str| EventLine::now(3, EventKind::Saved, text);
        EventLog::begin(out.path(), false).unwrap().event(&line("first")).unwrap();
        let path = out.path().join(EventLog::NAME);
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str("{\"time\":1,\"st");
        std::fs::write(&path, text).unwrap();

        EventLog::begin(out.path(), true).unwrap().event(&line("second")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let read: Vec<EventLine> =
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        assert_eq!(
            read.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(),
            ["first", "second"]
        );
        EventLog::begin(out.path(), false).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }
}
