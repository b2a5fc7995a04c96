//! `metrics.jsonl`: one object a line.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write};
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
    /// What an earlier process has written.
    pub const PREVIOUS: &str = "metrics.previous.jsonl";

    /// An empty file in the run's folder, or the lines of the run that goes on at `resumed`. What
    /// an earlier run has written is kept as `metrics.previous.jsonl`.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out`.
    pub fn begin(out: &Path, resumed: Option<usize>) -> Result<JsonLines> {
        let path = out.join("metrics.jsonl");
        let wrong = |error| unwritable(&path, error);
        let earlier = match files::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            read => Some(read.map_err(wrong)?),
        };
        let (mut before, mut damaged) = (Vec::new(), 0);
        if let (Some(earlier), Some(start)) = (&earlier, resumed) {
            (before, damaged) = lines_before(earlier, start);
        }

        // Whatever happens, what was written stands in one of both.
        if resumed.is_none() {
            JsonLines::put_aside(out)?;
        } else if let Some(earlier) = &earlier {
            files::replace(&out.join(JsonLines::PREVIOUS), earlier).map_err(wrong)?;
        }
        files::replace(&path, &before).map_err(wrong)?;
        if damaged > 0 {
            complain!(
                "note: {damaged} lines of {} cannot be read; they are in {}",
                path.display(),
                JsonLines::PREVIOUS
            );
        }

        let file = files::create_with(&path, OpenOptions::new().append(true)).map_err(wrong)?;
        Ok(JsonLines { path, file: BufWriter::new(file) })
    }

    /// What an earlier run has written, in the folder of a run that begins anew without this sink.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out`.
    pub fn put_aside(out: &Path) -> Result<()> {
        let path = out.join("metrics.jsonl");
        match std::fs::rename(&path, out.join(JsonLines::PREVIOUS)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(unwritable(&path, error)),
            _ => Ok(()),
        }
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
/// evaluations before it; and how many lines cannot be read. One without an end was cut by a kill.
fn lines_before(bytes: &[u8], start: usize) -> (Vec<u8>, usize) {
    let (mut kept, mut damaged) = (Vec::new(), 0);
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let read: Option<serde_json::Value> = serde_json::from_slice(line).ok();
        let step = read.as_ref().and_then(|value| value["step"].as_u64());
        let Some((value, step)) = read.as_ref().zip(step) else {
            damaged += usize::from(line.ends_with(b"\n"));
            continue;
        };

        let (step, start) = (step, start as u64);
        let stays = step < start || step == start && value.get("eval_loss").is_none();
        if stays {
            kept.extend_from_slice(line.trim_ascii_end());
            kept.push(b'\n');
        }
    }
    (kept, damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_will_be_written_again_are_left_out() {
        let text = "{\"step\":1,\"loss\":3}\n{\"step\":2,\"loss\":2}\n{\"step\":2,\"eval_loss\":2}\n{\"step\":3,\"loss\":1}\n{\"st";
        let kept =
            |start| lines_before(text.as_bytes(), start).0.split(|b| *b == b'\n').count() - 1;
        assert_eq!([kept(0), kept(1), kept(2), kept(3), kept(9)], [0, 1, 2, 4, 4]);
    }

    /// A line that a disk has damaged takes no other with it.
    #[test]
    fn nothing_is_lost_by_a_resume() {
        let out = tempfile::tempdir().unwrap();
        let (path, previous) =
            (out.path().join("metrics.jsonl"), out.path().join(JsonLines::PREVIOUS));
        let whole = b"{\"step\":1,\"loss\":3}\n{\"step\":2,\xff\xfe}\n{\"step\":3,\"loss\":1}\n";
        std::fs::write(&path, whole).unwrap();
        drop(JsonLines::begin(out.path(), Some(3)).unwrap());
        let kept = "{\"step\":1,\"loss\":3}\n{\"step\":3,\"loss\":1}\n";
        assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);
        assert_eq!(std::fs::read(&previous).unwrap(), whole);

        // A folder stands where the copy would be put: nothing has changed.
        std::fs::remove_file(&previous).unwrap();
        std::fs::create_dir(&previous).unwrap();
        std::fs::write(previous.join("file"), "").unwrap();
        assert!(JsonLines::begin(out.path(), Some(3)).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);
    }
}
