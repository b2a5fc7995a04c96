//! Who of this host's ranks has died, and in what: the message that a killed process cannot give.
//!
//! When a rank has ended without leave, the launcher sends SIGTERM to all others, and a second
//! later SIGKILL. In that second the first rank that is left on the dead one's host tells its place
//! and what it was doing.
//!
//! ```text
//! every rank       makes a file in memory, and writes into it what it begins          (flight_recorder)
//! its neighbours   open it; then its name is removed, so that nothing can be left over
//! on SIGTERM       a neighbour whose process is gone is the cause, unless some file says that its rank has spoken: of its own
//!                  error, or of that neighbour
//! ```
//!
//! The last rule keeps a rank that comes late, when the launcher is killing already, from taking
//! the killed for the cause.

use std::fs::{File, OpenOptions, remove_file};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::FlightRecorder;

/// A file system in memory, where there is one.
const MEMORY: &str = "/dev/shm";

/// What the ranks tell of themselves.
#[derive(Debug, Serialize, Deserialize)]
pub struct Card {
    host: String,
    process: u32,
    /// Where the file is; none if it could not be made.
    path: Option<PathBuf>,
}

impl Card {
    /// This rank's card, and its file. A rank that cannot make one has no last words.
    pub fn new(host: &str) -> (Card, Option<FlightRecorder>) {
        let process = std::process::id();
        let folder = Some(Path::new(MEMORY)).filter(|path| path.is_dir()).map(Path::to_owned);
        let path = folder.unwrap_or_else(std::env::temp_dir).join(format!("ouroboros-{process}"));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        // What a dead process with the same number has left, if it died before the name was
        // removed.
        let _ = remove_file(&path);
        let file = options.open(&path);
        if let Err(error) = &file {
            tracing::warn!(%error, path = %path.display(), "no file for last words");
        }

        let recorder = file.ok().map(FlightRecorder::new);
        (Card { host: host.to_owned(), process, path: recorder.as_ref().map(|_| path) }, recorder)
    }

    /// Removes the name of the file: all that want it have it open.
    pub fn unlink(&self) {
        self.path.iter().for_each(|path| {
            let _ = remove_file(path); // The system does it when it starts again.
        });
    }
}

/// A rank on the same host.
#[derive(Debug)]
struct Neighbour {
    rank: usize,
    process: u32,
    recorder: Option<FlightRecorder>,
}

/// All ranks on a rank's host, itself among them.
#[derive(Debug)]
pub struct Neighbours {
    rank: usize,
    recorder: Option<FlightRecorder>,
    all: Vec<Neighbour>,
}

impl Neighbours {
    /// Opens the files of the ranks on the host of `rank`, whose own is `recorder`.
    pub fn new(rank: usize, recorder: Option<FlightRecorder>, cards: &[Card]) -> Neighbours {
        let host = cards.get(rank).map(|card| &card.host);
        let here = cards.iter().enumerate().filter(|(_, card)| Some(&card.host) == host);
        let all = here.map(|(rank, card)| {
            let file = card.path.as_deref().and_then(|path| File::open(path).ok());
            Neighbour { rank, process: card.process, recorder: file.map(FlightRecorder::new) }
        });

        // Processes of another container have numbers that mean nothing here.
        Neighbours {
            rank,
            recorder,
            all: all.filter(|neighbour| alive(neighbour.process)).collect(),
        }
    }

    /// The rank that has died without a word, and what it was doing, if this is the rank to tell
    /// it; to be told at once.
    pub fn dead(&self) -> Option<(usize, String)> {
        let first_alive = self.all.iter().find(|neighbour| alive(neighbour.process))?;
        let last =
            |neighbour: &Neighbour| neighbour.recorder.as_ref().and_then(FlightRecorder::read);
        let spoken = |neighbour| last(neighbour).as_deref() == Some(FlightRecorder::CLOSED);
        if first_alive.rank != self.rank || self.all.iter().any(spoken) {
            return None;
        }

        let dead = self.all.iter().find(|neighbour| !alive(neighbour.process))?;
        self.recorder.iter().for_each(FlightRecorder::close);
        Some((dead.rank, last(dead).unwrap_or_else(|| "an unknown action".into())))
    }

    /// Whether a neighbour has died, whoever tells it.
    pub fn lost(&self) -> bool {
        self.all.iter().any(|neighbour| !alive(neighbour.process))
    }
}

/// Whether a process runs: neither gone nor a zombie.
fn alive(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything.
    let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The card of a process: both tests are one.
    static PROCESS: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[test]
    fn the_first_one_left_names_the_dead_and_their_last_action() {
        let _alone = PROCESS.lock();
        let (mine, recorder) = Card::new("here");
        let other = Card { host: "there".into(), process: 1, path: None };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (file, path) = tempfile::NamedTempFile::new().unwrap().into_parts();
        let theirs = FlightRecorder::new(file);
        let dying =
            Card { host: "here".into(), process: child.id(), path: Some(path.to_path_buf()) };
        let cards = [other, mine, dying];
        let neighbours = Neighbours::new(1, recorder.clone(), &cards);
        let late = Neighbours::new(1, None, &cards);
        cards.iter().for_each(Card::unlink);
        drop(path);
        theirs.write("1B5.0");
        theirs.write("1U5");
        recorder.unwrap().write("0F6.0");
        assert!(neighbours.dead().is_none() && !neighbours.lost());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(neighbours.dead(), Some((2, "1U5".to_owned())));
        assert!(late.dead().is_none() && late.lost(), "it has been told");
    }

    #[test]
    fn nobody_speaks_for_a_rank_that_has_spoken() {
        let _alone = PROCESS.lock();
        let (mine, _) = Card::new("here");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let (file, path) = tempfile::NamedTempFile::new().unwrap().into_parts();
        let theirs = FlightRecorder::new(file);
        let cards = [
            mine,
            Card { host: "here".into(), process: child.id(), path: Some(path.to_path_buf()) },
        ];
        let mut neighbours = Neighbours::new(0, None, &cards);
        cards[0].unlink();
        // It may have ended before it was met.
        let recorder = Some(FlightRecorder::new(File::open(&path).unwrap()));
        neighbours.all.truncate(1);
        neighbours.all.push(Neighbour { rank: 1, process: child.id(), recorder });
        child.wait().unwrap();
        theirs.close();
        theirs.write("1F6.0");
        assert!(neighbours.dead().is_none() && neighbours.lost());
    }
}
