//! `places.json` in the run's folder: where the time of every rank went, lately and in all, and its
//! memory. It is replaced whole, every few seconds; `watch` and `report` read it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{PlaceLine, Sink, wall_time};
use crate::clock::{StageTimes, TimeKind, Times};
use crate::error::{Error, Result};
use crate::files;

/// Between two files.
const EVERY: Duration = Duration::from_secs(1);

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Places {
    /// Seconds since 1970.
    pub updated: f64,
    pub places: BTreeMap<usize, PlaceRecord>,
}

/// One rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlaceRecord {
    pub name: String,
    pub replica: usize,
    pub stages: Vec<usize>,
    /// The last update that is told of, and when that was, in seconds since 1970.
    pub step: usize,
    pub at: f64,
    /// Since the one told of before; since this process began.
    pub recent: Spent,
    pub total: Spent,
    /// Bytes: resident now; at most so far beyond what the program itself takes, and predicted of that.
    pub memory: Option<u64>,
    #[serde(default)]
    pub peak: Option<u64>,
    pub predicted: u64,
}

/// Where time went.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Spent {
    pub steps: usize,
    pub seconds: f64,
    /// Seconds by kind, as `bench` names them.
    pub kinds: BTreeMap<String, f64>,
    pub stages: Vec<StageTimes>,
}

impl Spent {
    fn new(times: &Times) -> Spent {
        let kind =
            |(kind, name): &(TimeKind, &str)| ((*name).to_owned(), times.shares[*kind as usize]);
        Spent {
            steps: times.steps,
            seconds: times.seconds,
            kinds: TimeKind::ALL.iter().map(kind).collect(),
            stages: times.stages.clone(),
        }
    }

    /// A kind's share of the time, from 0 to 1.
    pub fn share(&self, kind: &str) -> f64 {
        self.kinds.get(kind).map_or(0.0, |seconds| seconds / self.seconds.max(f64::MIN_POSITIVE))
    }
}

/// The file of a run.
pub struct PlacesFile {
    path: PathBuf,
    now: Places,
    totals: BTreeMap<usize, Times>,
    written: Option<Instant>,
}

impl PlacesFile {
    /// The name of the file.
    pub const NAME: &str = "places.json";

    /// That of a run's folder; one of an earlier process stays until there is something to tell, of an
    /// earlier run it is removed.
    pub fn begin(out: &Path, resumed: bool) -> PlacesFile {
        let (path, now) = (out.join(PlacesFile::NAME), Places::default());
        if !resumed {
            let _ = std::fs::remove_file(&path); // If it cannot, it tells when it was written.
        }
        PlacesFile { path, now, totals: BTreeMap::new(), written: None }
    }

    /// A process that has only evaluated leaves what an earlier one has told.
    fn has_steps(&self) -> bool {
        self.now.places.values().any(|place| place.total.steps > 0)
    }

    fn write(&mut self) -> Result<()> {
        self.written = Some(Instant::now());
        self.now.updated = wall_time();
        let text =
            serde_json::to_vec(&self.now).map_err(|error| Error::Internal(error.to_string()))?;
        files::replace(&self.path, &text).map_err(|error| Error::unwritten(&self.path, error))
    }
}

impl Sink for PlacesFile {
    fn place(&mut self, line: &PlaceLine) -> Result<()> {
        let total = self.totals.entry(line.rank).or_default();
        if total.stages.is_empty() {
            *total = line.times.clone();
        } else {
            total.add(line.times);
        }

        let record = PlaceRecord {
            name: line.name.to_owned(),
            replica: line.replica,
            stages: line.times.stages.iter().map(|times| times.stage).collect(),
            step: line.step,
            at: wall_time(),
            recent: Spent::new(line.times),
            total: Spent::new(total),
            memory: line.memory,
            peak: line.peak,
            predicted: line.predicted,
        };
        self.now.places.insert(line.rank, record);
        match self.written {
            _ if !self.has_steps() => Ok(()),
            Some(written) if written.elapsed() < EVERY => Ok(()),
            _ => self.write(),
        }
    }

    fn finish(&mut self) -> Result<()> {
        if self.has_steps() { self.write() } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_added_up() {
        let out = tempfile::tempdir().unwrap();
        let mut file = PlacesFile::begin(out.path(), false);
        let mut times = Times {
            steps: 2,
            seconds: 4.0,
            stages: vec![StageTimes { stage: 3, forward: 1.0, ..StageTimes::default() }],
            ..Times::default()
        };
        times.shares[TimeKind::Compute as usize] = 3.0;
        for step in [2, 4] {
            let line = PlaceLine {
                rank: 1,
                name: "stage 3, replica 0",
                replica: 0,
                step,
                times: &times,
                memory: None,
                peak: None,
                predicted: 5,
            };
            file.place(&line).unwrap();
        }
        file.finish().unwrap();
        let bytes = std::fs::read(out.path().join(PlacesFile::NAME)).unwrap();
        let found: Places = serde_json::from_slice(&bytes).unwrap();
        let place = &found.places[&1];
        assert_eq!((place.step, place.recent.steps, place.total.steps), (4, 2, 4));
        assert_eq!((place.total.seconds, place.total.kinds["compute"]), (8.0, 6.0));
        assert_eq!((place.total.share("compute"), place.total.stages[0].forward), (0.75, 2.0));
    }
}
