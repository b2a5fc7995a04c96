//! A rank's part of a trace: a file beside the trace-to-be, an event a line, written by a thread of
//! its own. Nobody waits for that thread: if the disk is too slow for it the trace ends, and it does
//! so while the disk still has room for the run.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use super::{Event, Window};
use crate::checkpoint::room;
use crate::error::{Error, Result};
use crate::files;

/// Events that are handed over at once, and how many such hands may wait.
const BATCH: usize = 1 << 10;
const WAITING: usize = 64;

/// Bytes that are written between two looks at the disk's room.
const LOOK: u64 = 1 << 20;

/// Bytes that the trace of so many ranks leaves free on the disk, beside those that the run's saves need:
/// what all write between two looks, and some.
pub fn reserve(saves: u64, ranks: usize) -> u64 {
    saves + (64 << 20) + ranks as u64 * LOOK
}

/// Writes the events of one rank.
pub struct Part {
    events: Vec<Event>,
    /// None once the disk has been too slow.
    batches: Option<SyncSender<Vec<Event>>>,
    slow: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// What becomes of a part: nothing more is written once it is told.
type Told = Box<dyn FnOnce(io::Result<()>) + Send>;

impl Part {
    /// The file of a rank.
    pub fn path(out: &Path, window: Window, rank: usize) -> PathBuf {
        out.join(format!(".trace-{}-{}.rank-{rank}.part", window.from, window.to))
    }

    /// An empty file, and the thread that writes it, as long as so many bytes of the disk stay free; `told` hears when it is complete, or why it
    /// cannot be: then it is gone.
    ///
    /// # Errors
    /// If there is no thread.
    pub fn begin(
        path: PathBuf,
        reserve: u64,
        told: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> Result<Part> {
        let (batches, received) = sync_channel(WAITING);
        let (told, slow): (Told, _) = (Box::new(told), Arc::new(AtomicBool::new(false)));
        let was_slow = Arc::clone(&slow);
        let body = move || {
            let mut end = write(&path, reserve, &received);
            if was_slow.load(Ordering::Relaxed) {
                end = Err(io::Error::other("the disk is too slow for it"));
            }
            if end.is_err() {
                let _ = fs::remove_file(&path); // The first error is the one to tell.
            }
            told(end);
        };
        let thread = std::thread::Builder::new().name("trace".into()).spawn(body);
        let thread =
            thread.map_err(|error| Error::Internal(format!("no thread for traces ({error})")))?;
        Ok(Part { events: Vec::with_capacity(BATCH), batches: Some(batches), slow, thread })
    }

    /// Adds an event; false if it cannot be written.
    pub fn add(&mut self, event: Event) -> bool {
        self.events.push(event);
        if self.events.len() < BATCH {
            return true;
        }

        let batch = std::mem::replace(&mut self.events, Vec::with_capacity(BATCH));
        match self.batches.as_ref().map(|batches| batches.try_send(batch)) {
            Some(Ok(())) => true,
            Some(Err(TrySendError::Full(_))) => {
                self.slow.store(true, Ordering::Relaxed);
                self.batches = None;
                false
            }
            _ => false,
        }
    }

    /// Hands the rest over; the thread, to wait for.
    pub fn end(self) -> JoinHandle<()> {
        let Part { events, batches, thread, .. } = self;
        // A thread that is gone has said why.
        batches.into_iter().for_each(|batches| drop(batches.send(events.clone())));
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

fn write(path: &Path, reserve: u64, batches: &Receiver<Vec<Event>>) -> io::Result<()> {
    let mut file: BufWriter<File> = BufWriter::with_capacity(1 << 16, files::create(path)?);
    let (mut written, mut looked) = (0, None);
    for event in batches.iter().flatten() {
        if looked.is_none_or(|looked| written - looked >= LOOK) {
            looked = Some(written);
            leave_room(path, reserve)?;
        }

        let line = serde_json::to_vec(&event)?;
        file.write_all(&line)?;
        file.write_all(b"\n")?;
        written += line.len() as u64 + 1;
    }
    file.flush()
}

/// Whether the disk of a file has so much room.
pub(super) fn leave_room(path: &Path, reserve: u64) -> io::Result<()> {
    let left = path.parent().and_then(room).unwrap_or(u64::MAX);
    if left >= reserve {
        return Ok(());
    }
    let told = format!("its disk has {} MiB left, which the run may need", left >> 20);
    Err(io::Error::new(io::ErrorKind::StorageFull, told))
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
        let mut part = Part::begin(path.clone(), 0, move |end| told.send(end).unwrap()).unwrap();
        assert!((0..5000).all(|value| part.add(event(value))));
        part.end().join().unwrap();
        hears.recv().unwrap().unwrap();
        let found: Vec<Event> = Part::read(&path).unwrap().map(io::Result::unwrap).collect();
        assert_eq!(found, (0..5000).map(event).collect::<Vec<_>>());

        fs::write(folder.path().join("trace-3-5.json.gz"), "").unwrap();
        remove_left(folder.path()).unwrap();
        assert!(!path.exists() && folder.path().join("trace-3-5.json.gz").exists());
    }

    /// A disk that is full: the file is gone, and the reason is told once.
    #[test]
    fn what_cannot_be_written_is_told_once() {
        let (told, hears) = channel();
        let nowhere = Path::new("/proc/nowhere").to_owned();
        let mut part = Part::begin(nowhere, 0, move |end| told.send(end).unwrap()).unwrap();
        let written = (0..1 << 18).all(|value| part.add(event(value)));
        part.end().join().unwrap();
        assert!(!written && hears.recv().unwrap().is_err() && hears.recv().is_err());
    }

    /// Nobody waits for a disk that does not keep up.
    #[test]
    fn a_slow_disk_ends_a_part() {
        let (batches, received) = sync_channel::<Vec<Event>>(1);
        let slow = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            drop(received);
        });
        let (events, was_slow) = (Vec::new(), Arc::clone(&slow));
        let mut part = Part { events, batches: Some(batches), slow, thread };
        let taken = (0..1 << 16).take_while(|value| part.add(event(*value))).count();
        assert!(taken < 3 * BATCH && was_slow.load(Ordering::Relaxed), "{taken}");
        assert!(!part.add(event(0)) || part.events.len() < BATCH);
        part.end().join().unwrap();
    }
}
