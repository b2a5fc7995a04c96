//! A rank's part of a trace: a file beside the trace-to-be, an event a line, written by a thread of
//! its own. Only so much waits for that thread in memory; beyond it whoever has an event waits too.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::{Event, Window};
use crate::error::{Error, Result};
use crate::files;

/// Events that are handed over at once, and how many such hands may wait.
const BATCH: usize = 1 << 10;
const WAITING: usize = 16;

/// Writes the events of one rank.
pub struct Part {
    events: Vec<Event>,
    batches: SyncSender<Vec<Event>>,
    thread: JoinHandle<()>,
}

/// What becomes of a part: nothing more is written once it is told.
type Told = Box<dyn FnOnce(io::Result<()>) + Send>;

impl Part {
    /// The file of a rank.
    pub fn path(out: &Path, window: Window, rank: usize) -> PathBuf {
        out.join(format!(".trace-{}-{}.rank-{rank}.part", window.from, window.to))
    }

    /// An empty file, and the thread that writes it; `told` hears when it is complete, or why it
    /// cannot be.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn begin(
        path: PathBuf,
        told: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> Result<Part> {
        let (batches, received) = sync_channel(WAITING);
        let told: Told = Box::new(told);
        let body = move || told(write(&path, &received));
        let thread = std::thread::Builder::new().name("trace".into()).spawn(body);
        let thread =
            thread.map_err(|error| Error::Internal(format!("no thread for traces ({error})")))?;
        Ok(Part { events: Vec::with_capacity(BATCH), batches, thread })
    }

    /// Adds an event; false if it cannot be written.
    pub fn add(&mut self, event: Event) -> bool {
        self.events.push(event);
        if self.events.len() < BATCH {
            return true;
        }

        let batch = std::mem::replace(&mut self.events, Vec::with_capacity(BATCH));
        self.batches.send(batch).is_ok()
    }

    /// Hands the rest over; the thread, to wait for.
    pub fn end(self) -> JoinHandle<()> {
        let Part { events, batches, thread } = self;
        let _ = batches.send(events); // A thread that is gone has said why.
        thread
    }

    /// The events of a file, in the order in which they were added.
    ///
    /// # Errors
    /// What the system says, or what cannot be read.
    pub fn read(path: &Path) -> io::Result<impl Iterator<Item = io::Result<Event>> + use<>> {
        let lines = BufReader::new(files::open(path)?).lines();
        Ok(lines.map(|line| Ok(serde_json::from_str(&line?)?)))
    }
}

fn write(path: &Path, batches: &Receiver<Vec<Event>>) -> io::Result<()> {
    let mut file: BufWriter<File> = BufWriter::with_capacity(1 << 16, files::create(path)?);
    for event in batches.iter().flatten() {
        serde_json::to_writer(&mut file, &event)?;
        file.write_all(b"\n")?;
    }
    file.flush()
}

/// Removes the parts of runs that were killed.
///
/// # Errors
/// What the system says.
pub fn remove_left(out: &Path) -> io::Result<()> {
    for entry in fs::read_dir(out)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(".trace-") && (name.ends_with(".part") || name.ends_with(".tmp")) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::trace::{Count, Moment};

    fn event(value: u64) -> Event {
        Event::Count { stage: 0, count: Count::Versions, value, at: Moment(value) }
    }

    #[test]
    fn events_come_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = Part::path(folder.path(), Window { from: 3, to: 5 }, 1);
        let (told, hears) = channel();
        let mut part = Part::begin(path.clone(), move |end| told.send(end).unwrap()).unwrap();
        assert!((0..5000).all(|value| part.add(event(value))));
        part.end().join().unwrap();
        hears.recv().unwrap().unwrap();
        let found: Vec<Event> = Part::read(&path).unwrap().map(io::Result::unwrap).collect();
        assert_eq!(found, (0..5000).map(event).collect::<Vec<_>>());

        fs::write(folder.path().join("trace-3-5.json.gz"), "").unwrap();
        remove_left(folder.path()).unwrap();
        assert!(!path.exists() && folder.path().join("trace-3-5.json.gz").exists());
    }

    /// A disk that is full.
    #[test]
    fn what_cannot_be_written_is_told_once() {
        let (told, hears) = channel();
        let full = Path::new("/dev/full").to_owned();
        let mut part = Part::begin(full, move |end| told.send(end).unwrap()).unwrap();
        // The pipe takes some events before the thread is gone.
        assert!((0..1 << 20).any(|value| !part.add(event(value))));
        part.end().join().unwrap();
        assert!(hears.recv().unwrap().is_err() && hears.recv().is_err());
    }
}
