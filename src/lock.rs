//! The lock on a run's folder: two runs that write into one folder would destroy each other's
//! states.
//!
//! ```text
//! the file system has locks    a lock of fcntl on DIR/lock, which the kernel takes away with the process; over NFS too
//! it has none                  DIR/lock holds a beat that its owner changes; whoever finds one watches it for a while with his
//!                              own monotonic clock: a beat that changes is of a run, one that does not is of a dead one
//! ```
//!
//! The file's text also tells all ranks of a run that they see the same folder.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::files;

const NAME: &str = "lock";
/// Bytes of its text.
const TEXT: usize = 256;

/// Between two beats, and how long a beat that does not change is watched.
const BEAT: Duration = Duration::from_secs(2);
const WATCH: Duration = Duration::from_secs(7);

/// A run whose launcher was killed needs so long to end at most.
const ENDING: Duration = Duration::from_secs(3);

/// A folder's lock; given back when it is dropped, or when the process ends.
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    file: File,
    owner: String,
    beating: Option<(Sender<()>, JoinHandle<()>)>,
}

impl FolderLock {
    /// Takes the lock of a folder, which is there. A run that is ending is waited for a moment.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out` if another run has it, or its file cannot be written.
    pub fn take(folder: &Path) -> Result<FolderLock> {
        FolderLock::take_with(folder, |file| {
            let begun = Instant::now();
            loop {
                match fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
                    Err(Errno::AGAIN | Errno::ACCESS) if begun.elapsed() < ENDING => {
                        std::thread::sleep(ENDING / 20)
                    }
                    locked => return locked,
                }
            }
        })
    }

    fn take_with(
        folder: &Path,
        lock: impl FnOnce(&File) -> rustix::io::Result<()>,
    ) -> Result<FolderLock> {
        let path = folder.join(NAME);
        let wrong = |error: io::Error| {
            let remedy =
                format!("its file `{NAME}` cannot be written ({error}); choose another folder");
            Error::config("--out", folder.display(), remedy)
        };

        let file =
            files::create_with(&path, OpenOptions::new().read(true).write(true)).map_err(wrong)?;
        let beats = match lock(&file) {
            Ok(()) => false,
            Err(Errno::AGAIN | Errno::ACCESS) => return Err(taken(folder, &read(&file))),
            // No locks here.
            Err(_) => {
                if changes(&path) {
                    return Err(taken(folder, &read(&file)));
                }
                true
            }
        };

        let me = owner();
        write(&file, &me).map_err(wrong)?;
        let beating =
            if beats { Some(beat(file.try_clone().map_err(wrong)?, me.clone())) } else { None };
        Ok(FolderLock { path, file, owner: me, beating })
    }

    /// How this run calls itself in the file.
    pub fn owner(&self) -> &str {
        &self.owner
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.beating.take() {
            drop(stop);
            let _ = thread.join();
        }
        // The name stays: another run may be waiting at the same file.
        if let Err(error) = self.file.set_len(0) {
            tracing::warn!(%error, path = %self.path.display(), "the lock's owner cannot be taken out");
        }
    }
}

/// Whether this process sees a folder's lock to be `owner`'s. Not for that process itself: a file
/// that it closes takes its locks away.
pub fn is_of(folder: &Path, owner: &str) -> bool {
    File::open(folder.join(NAME)).is_ok_and(|file| read(&file).starts_with(owner))
}

fn taken(folder: &Path, owner: &str) -> Error {
    let owner =
        owner.split(", beat").next().filter(|text| !text.is_empty()).unwrap_or("another run");
    let remedy =
        format!("{owner} writes into it; wait for its end, stop it, or choose another folder");
    Error::config("--out", folder.display(), remedy)
}

/// Process, host, and when it was taken: no two runs are the same.
fn owner() -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!(
        "process {} on {host} (since {}.{:09} s of 1970)",
        std::process::id(),
        now.as_secs(),
        now.subsec_nanos()
    )
}

fn read(file: &File) -> String {
    let mut bytes = [0; TEXT];
    let count = file.read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..count]).trim_end().to_owned()
}

/// Always as many bytes, in one write: whoever reads meanwhile sees the text before or this one.
fn write(file: &File, text: &str) -> io::Result<()> {
    file.write_all_at(format!("{text:<TEXT$}").as_bytes(), 0)?;
    file.sync_all()
}

/// Whether somebody changes the file.
fn changes(path: &Path) -> bool {
    let look = || File::open(path).map(|file| read(&file)).unwrap_or_default();
    let (first, begun) = (look(), Instant::now());
    while !first.is_empty() && begun.elapsed() < WATCH {
        std::thread::sleep(BEAT / 4);
        if look() != first {
            return true;
        }
    }
    false
}

/// A thread that changes the file until the sender is dropped.
fn beat(file: File, owner: String) -> (Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = channel();
    let thread = std::thread::spawn(move || {
        let mut number = 0u64;
        while stopped.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
            number += 1;
            if let Err(error) = write(&file, &format!("{owner}, beat {number}")) {
                tracing::warn!(%error, "the beat of the folder's lock cannot be written");
            }
        }
    });

    (stop, thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_locks(folder: &Path) -> Result<FolderLock> {
        FolderLock::take_with(folder, |_| Err(Errno::NOLCK))
    }

    #[test]
    fn a_beat_is_a_lock_where_there_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let first = without_locks(folder.path()).unwrap();
        let error = without_locks(folder.path()).unwrap_err().to_string();
        let me = format!("process {}", std::process::id());
        assert!(
            error.contains(&me) && error.contains("writes into it") && !error.contains("beat"),
            "{error}"
        );
        drop(first);
        drop(without_locks(folder.path()).unwrap());

        // A dead run's beat does not change.
        std::fs::write(folder.path().join(NAME), "process 1 on a node, beat 7").unwrap();
        assert!(without_locks(folder.path()).is_ok());
    }

    #[test]
    fn the_owner_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let lock = FolderLock::take(folder.path()).unwrap();
        let owner = lock.owner().to_owned();
        assert!(is_of(folder.path(), &owner) && !is_of(folder.path(), "process 1 on another"));
        drop(lock);
        assert!(!is_of(folder.path(), &owner));
    }
}
