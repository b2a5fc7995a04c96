//! What a rank does, in a file in memory that outlives it: the last words of a rank that is killed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

/// What a rank does, in a file that outlives it.
#[derive(Debug, Clone)]
pub struct FlightRecorder {
    file: Arc<File>,
    /// Nothing is written any more.
    closed: Arc<Mutex<bool>>,
}

impl FlightRecorder {
    /// Bytes of the file: an action is shorter.
    const LENGTH: usize = 48;
    /// The last words of a rank that has said why it, or a neighbour, ends.
    pub const CLOSED: &str = "told";

    pub fn new(file: File) -> FlightRecorder {
        FlightRecorder { file: Arc::new(file), closed: Arc::default() }
    }

    /// Replaces what is written. A file that fails is as good as none: these are last words only.
    pub fn write(&self, text: &str) {
        let closed = self.closed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !*closed {
            self.put(text);
        }
    }

    /// The rank has spoken: whatever its threads still do, its neighbours need not.
    pub fn close(&self) {
        let mut closed = self.closed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *closed = true;
        self.put(FlightRecorder::CLOSED);
    }

    fn put(&self, text: &str) {
        let _ =
            self.file.write_all_at(format!("{text:<0$.0$}", FlightRecorder::LENGTH).as_bytes(), 0);
    }

    /// What is written, if anything.
    pub fn read(&self) -> Option<String> {
        let mut bytes = [0; FlightRecorder::LENGTH];
        self.file.read_exact_at(&mut bytes, 0).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    }
}
