//! Emulated compute: stages sleep instead of computing, while the schedule, the messages (at their
//! real sizes), the reductions and the bookkeeping stay what they are. Norms and optimizers, which
//! are computing too, are left out. So the runtime's own efficiency can be measured on grids that
//! are larger than the machine.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::DeviceSetting;
use crate::error::{Error, Result};
use crate::files;
use crate::schedule::{Schedule, StageCosts};

/// How long the stages sleep for one microbatch.
#[derive(Debug, Clone, PartialEq)]
pub enum EmulatedCompute {
    /// The same on every device; a stage that has half a device takes half of it. Seconds.
    Uniform { forward: f64, backward: f64 },
    /// Of every stage, as `ouroboros bench` has measured them.
    Profile(Vec<StageTime>),
}

/// Times of one stage, means over its replicas, in milliseconds: a part of the file that `ouroboros
/// bench` writes.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StageTime {
    /// Of a microbatch.
    pub forward_ms: f64,
    pub backward_ms: f64,
    /// Reading batches and handing messages over, a microbatch.
    pub copies_ms: f64,
    pub update_ms: f64,
    /// The work on the tied table, an update.
    pub table_ms: f64,
    /// Least wait for the sum over the replicas, an update.
    pub reduce_ms: f64,
}

impl StageTime {
    /// What the simulation takes, in seconds: copies go with the forward, the table with the
    /// update.
    pub fn costs(&self) -> StageCosts {
        StageCosts {
            forward: (self.forward_ms + self.copies_ms) / 1e3,
            backward: self.backward_ms / 1e3,
            update: (self.update_ms + self.reduce_ms + self.table_ms) / 1e3,
        }
    }
}

/// What `ouroboros bench` has measured of every stage.
#[derive(Debug, Deserialize)]
pub struct Profile {
    /// Of a microbatch; none of a profile that does not tell.
    pub rows: Option<usize>,
    /// What it was measured on; none of a profile that does not tell.
    pub device: Option<DeviceSetting>,
    pub stages: Vec<StageTime>,
}

impl Profile {
    /// Reads a bench.json.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(path: &Path) -> std::result::Result<Profile, String> {
        let text = files::read_text(path).map_err(|error| format!("cannot be read ({error})"))?;
        let profile: Profile =
            serde_json::from_str(&text).map_err(|error| format!("is no profile ({error})"))?;
        if profile.device == Some(DeviceSetting::Cuda) {
            return Err("has the times of a GPU's host, which does not wait for the GPU".into());
        }

        let good = profile
            .stages
            .iter()
            .all(|stage| possible(stage.forward_ms) && possible(stage.backward_ms));
        if good {
            Ok(profile)
        } else {
            Err(format!("has times that are not between 0 and {LONGEST_MS} ms"))
        }
    }
}

/// How long one stage sleeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sleep {
    pub forward: Duration,
    pub backward: Duration,
}

const OPTION: &str = "--emulated-compute";
/// The longest that a stage may be told to sleep: a day is a mistake.
const LONGEST_MS: f64 = 60_000.0;

impl EmulatedCompute {
    /// Reads `F,B` in milliseconds a microbatch, or the name of a file.
    ///
    /// # Errors
    /// [`Error::Config`] if it is neither.
    pub fn read(text: &str) -> Result<EmulatedCompute> {
        let numbers: Option<Vec<f64>> = text.split(',').map(|n| n.trim().parse().ok()).collect();
        match numbers.as_deref() {
            Some([forward, backward]) if [*forward, *backward].iter().all(|ms| possible(*ms)) => {
                Ok(EmulatedCompute::Uniform { forward: forward / 1e3, backward: backward / 1e3 })
            }
            Some(_) => {
                let remedy = format!(
                    "write forward,backward in milliseconds from 0 to {LONGEST_MS}, as in 10,20"
                );

                Err(Error::config(OPTION, text, remedy))
            }
            None => EmulatedCompute::of_file(Path::new(text)),
        }
    }

    fn of_file(path: &Path) -> Result<EmulatedCompute> {
        let wrong = |problem: String| {
            Error::config(
                OPTION,
                path.display(),
                format!("{problem}; write F,B or name a bench.json of `ouroboros bench`"),
            )
        };
        Profile::read(path).map(|profile| EmulatedCompute::Profile(profile.stages)).map_err(wrong)
    }

    /// Whether there is a time for every stage.
    ///
    /// # Errors
    /// [`Error::Config`] if the profile is of another number of stages.
    pub fn check(&self, stages: usize) -> Result<()> {
        match self {
            EmulatedCompute::Profile(times) if times.len() != stages => {
                let remedy = format!("the grid has {stages}; measure one that has as many");
                Err(Error::config(OPTION, format!("a profile of {} stages", times.len()), remedy))
            }
            _ => Ok(()),
        }
    }

    /// How long a stage sleeps.
    pub fn sleep(&self, schedule: &Schedule, stage: usize) -> Sleep {
        let (forward, backward) = match self {
            EmulatedCompute::Uniform { forward, backward } => (
                forward * schedule.device_fraction(stage),
                backward * schedule.device_fraction(stage),
            ),
            EmulatedCompute::Profile(times) => {
                (times[stage].forward_ms / 1e3, times[stage].backward_ms / 1e3)
            }
        };
        Sleep {
            forward: Duration::from_secs_f64(forward),
            backward: Duration::from_secs_f64(backward),
        }
    }
}

fn possible(ms: f64) -> bool {
    (0.0..=LONGEST_MS).contains(&ms)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delay::SyncPoints;
    use crate::grid::Placement;
    use crate::schedule::ScheduleKind;

    #[test]
    fn times_or_a_profile_are_read() {
        let uniform = EmulatedCompute::read("10, 20.5").unwrap();
        assert_eq!(uniform, EmulatedCompute::Uniform { forward: 0.01, backward: 0.0205 });
        let mut schedule = Schedule::new(ScheduleKind::Decoupled, 3, 1, 1, SyncPoints::ends(1));
        schedule.placement = Placement::Ring;
        assert_eq!(uniform.sleep(&schedule, 1).forward, Duration::from_millis(10));
        assert_eq!(uniform.sleep(&schedule, 2).forward, Duration::from_millis(5));
        let file = tempfile::NamedTempFile::new().unwrap();
        let text =
            r#"{"stages": [{"forward_ms": 3, "backward_ms": 6.5, "update_ms": 1}], "more": 1}"#;
        std::fs::write(file.path(), text).unwrap();
        let profile = EmulatedCompute::read(file.path().to_str().unwrap()).unwrap();
        let stage =
            StageTime { forward_ms: 3.0, backward_ms: 6.5, update_ms: 1.0, ..StageTime::default() };
        assert_eq!(profile, EmulatedCompute::Profile(vec![stage]));
        let of_gpu = text.replace("\"more\": 1", "\"device\": \"cuda\"");
        std::fs::write(file.path(), of_gpu).unwrap();
        let error = EmulatedCompute::read(file.path().to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("has the times of a GPU's host"), "{error}");
        assert!(profile.check(1).is_ok());
        assert!(
            profile
                .check(2)
                .unwrap_err()
                .to_string()
                .contains("a profile of 1 stages; the grid has 2")
        );
    }

    #[test]
    fn what_is_neither_is_refused() {
        for (text, expected) in [
            ("10", "write forward,backward in milliseconds"),
            ("10,-1", "write forward,backward in milliseconds"),
            ("1,2,3", "write forward,backward in milliseconds"),
            ("1,nan", "write forward,backward in milliseconds"),
            ("no/such.json", "cannot be read"),
            ("Cargo.toml", "is no profile"),
        ] {
            let error = EmulatedCompute::read(text).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(expected), "{text}: {error}");
        }
    }
}
