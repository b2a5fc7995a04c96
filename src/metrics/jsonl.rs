//! `metrics.jsonl`: one object a line.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{EvalLine, Sink, StalenessLine, StepLine};
use crate::error::{Error, Result};
use crate::files;

/// The file, whole lines at any moment.
pub struct JsonLines {
    path: PathBuf,
    file: BufWriter<File>,
}

impl JsonLines {
    /// An empty file in the run's folder, or the lines of the run that goes on at `resumed`. What
    /// an earlier run has written is kept as `metrics.previous.jsonl`.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out`.
    pub fn begin(out: &Path, resumed: Option<usize>) -> Result<JsonLines> {
        let path = out.join("metrics.jsonl");
        let wrong = |error| unwritable(&path, error);
        let earlier = files::read_text(&path).unwrap_or_default();
        let before = resumed.map(|start| lines_before(&earlier, start)).unwrap_or_default();
        if path.exists() {
            std::fs::rename(&path, out.join("metrics.previous.jsonl")).map_err(wrong)?;
        }

        let mut file = BufWriter::new(files::create(&path).map_err(wrong)?);
        file.write_all(before.as_bytes()).and_then(|()| file.flush()).map_err(wrong)?;
        Ok(JsonLines { path, file })
    }

    /// Adds a line.
    fn add(&mut self, line: &impl Serialize) -> Result<()> {
        let text =
            serde_json::to_string(line).map_err(|error| Error::Internal(error.to_string()))?;
        writeln!(self.file, "{text}")
            .and_then(|()| self.file.flush())
            .map_err(|error| Error::unwritten(&self.path, error))
    }
}

impl Sink for JsonLines {
    fn step(&mut self, line: &StepLine) -> Result<()> {
        self.add(line)
    }

    fn eval(&mut self, line: &EvalLine) -> Result<()> {
        self.add(line)
    }

    fn staleness(&mut self, line: &StalenessLine) -> Result<()> {
        self.add(line)
    }
}

fn unwritable(path: &Path, error: std::io::Error) -> Error {
    Error::config(
        "--out",
        path.display(),
        format!("cannot be written ({error}); choose another folder"),
    )
}

/// The lines that a run which goes on at `start` will not write again: steps up to it, and
/// evaluations before it.
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
