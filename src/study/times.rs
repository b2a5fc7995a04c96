//! What a step of a variant takes, by the simulation of its schedule, and what that is worth to a
//! loss.
//!
//! ```text
//! times       of a row (given, or measured by `ouroboros bench`)  x  rows of a microbatch  ->  simulation  ->  time of a step
//! one device  forward, backward and update of all stages, one after the other
//! 1F1B, GPipe on the variant's devices, with the number of microbatches that makes their step shortest
//! to a loss   a reference needs 1 / tax of the variant's steps to its loss: speed-up = (time of a reference's step / own) / tax
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::emulated_compute::{Profile, StageTime};
use crate::error::{Error, Result};
use crate::schedule::{Schedule, ScheduleKind, StageCosts, Violation, step_time};
use crate::setup::plan::schedule;

/// The section `[time]` of a study: times of one row on a device that holds one stage, in any unit,
/// or those of a profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeConfig {
    /// Rows of a step, a replica; none: those of the config.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    #[serde(default = "one")]
    pub forward: f64,
    #[serde(default = "two")]
    pub backward: f64,
    /// Of one update of a stage.
    #[serde(default)]
    pub update: f64,
    /// Of one message, whatever its size.
    #[serde(default)]
    pub message: f64,
    /// A bench.json of `ouroboros bench` instead, relative to the study's folder; times are seconds
    /// then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<PathBuf>,
}

fn one() -> f64 {
    1.0
}

fn two() -> f64 {
    2.0
}

impl Default for TimeConfig {
    fn default() -> TimeConfig {
        TimeConfig {
            rows: None,
            forward: one(),
            backward: two(),
            update: 0.0,
            message: 0.0,
            profile: None,
        }
    }
}

/// What is simulated: more microbatches make no schedule better, and simulating more of either
/// takes minutes.
const MICROBATCHES: usize = 128;
const STAGES: usize = 32;
const ROWS: usize = 1 << 16;

/// Times of a row on every stage.
pub struct RowTimes {
    stages: Vec<StageCosts>,
    message: f64,
}

/// The steps of a variant beside those of others on the same rows, in the unit of the times.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepTimes {
    /// Rows of a step, a replica.
    pub rows: usize,
    pub step: f64,
    /// Of one device that holds the whole model.
    pub one_device: f64,
    /// Each with the microbatches that make it shortest.
    pub one_f_one_b: (f64, usize),
    pub gpipe: (f64, usize),
}

impl TimeConfig {
    /// Whether the times can be used.
    ///
    /// # Errors
    /// [`Error::Config`] about `time`.
    pub fn check(&self) -> Result<()> {
        let times = [
            ("forward", self.forward),
            ("backward", self.backward),
            ("update", self.update),
            ("message", self.message),
        ];

        for (key, value) in times {
            let least = if matches!(key, "forward" | "backward") { f64::MIN_POSITIVE } else { 0.0 };
            Error::unless(
                value >= least,
                &format!("time.{key}"),
                value,
                "must be 0 or more, forward and backward above 0",
            )?;
        }

        let rows = self.rows.unwrap_or(1);
        if !(1..=ROWS).contains(&rows) {
            return Err(Error::config("time.rows", rows, format!("from 1 to {ROWS}")));
        }

        Ok(())
    }

    /// The times of a row on each stage of a schedule.
    ///
    /// # Errors
    /// [`Error::Config`] about `time.profile`.
    fn of_row(&self, folder: &Path, schedule: &Schedule) -> Result<RowTimes> {
        let message = self.message;
        let Some(profile) = &self.profile else {
            let of = |stage: usize| {
                let share = schedule.device_fraction(stage);
                StageCosts {
                    forward: self.forward * share,
                    backward: self.backward * share,
                    update: self.update,
                }
            };

            return Ok(RowTimes { stages: (0..schedule.stages).map(of).collect(), message });
        };

        let path = folder.join(profile);
        let wrong = |problem: String| Error::config("time.profile", path.display(), problem);
        let profile = Profile::read(&path).map_err(wrong)?;
        let rows = profile.rows.filter(|rows| *rows > 0);
        let rows = rows.ok_or_else(|| {
            wrong("does not tell its `rows`; measure it again with `ouroboros bench`".into())
        })?;

        if profile.stages.len() != schedule.stages {
            let (found, wanted) = (profile.stages.len(), schedule.stages);
            return Err(wrong(format!(
                "has {found} stages, the variant {wanted}; measure that grid"
            )));
        }

        let of_row = |stage: &StageTime| {
            let StageCosts { forward, backward, update } = stage.costs();
            StageCosts { forward: forward / rows as f64, backward: backward / rows as f64, update }
        };

        Ok(RowTimes { stages: profile.stages.iter().map(of_row).collect(), message })
    }
}

impl RowTimes {
    /// What a step takes under a schedule of `rows` rows a replica. A microbatch of b rows takes b
    /// times as long as one.
    fn step(&self, schedule: &Schedule, rows: usize) -> Result<f64> {
        let b = rows as f64 / schedule.microbatches as f64;
        let of_microbatch = |stage: &StageCosts| StageCosts {
            forward: stage.forward * b,
            backward: stage.backward * b,
            ..*stage
        };

        let fault = |fault: Violation| Error::Internal(format!("schedule: {fault}"));
        step_time(schedule, self.stages.iter().map(of_microbatch).collect(), self.message)
            .map_err(fault)
    }

    /// The shortest step of a synchronous schedule, and its number of microbatches.
    fn best(&self, config: &Config, kind: ScheduleKind, rows: usize) -> Result<(f64, usize)> {
        let mut best = (f64::INFINITY, 1);
        for microbatches in (1..=rows.min(MICROBATCHES)).filter(|m| rows.is_multiple_of(*m)) {
            let mut other = Config { schedule: kind, microbatches, ..config.clone() };
            (other.grid.delays, other.grid.reduce_delay) = (None, 0);
            let step = self.step(&schedule(&other)?, rows)?;
            if step < best.0 {
                best = (step, microbatches);
            }
        }

        Ok(best)
    }
}

impl StepTimes {
    /// Of a variant.
    ///
    /// # Errors
    /// [`Error::Config`] about `time.rows` or `time.profile`.
    pub fn new(time: &TimeConfig, folder: &Path, config: &Config) -> Result<StepTimes> {
        let rows = time.rows.unwrap_or(config.batch / config.grid.replicas);
        let m = config.microbatches;
        if !rows.is_multiple_of(m) {
            return Err(Error::config(
                "time.rows",
                rows,
                format!("must be a multiple of microbatches = {m}"),
            ));
        }

        for (setting, value, most) in
            [("microbatches", m, MICROBATCHES), ("grid.stages", config.grid.stages, STAGES)]
        {
            if value > most {
                return Err(Error::config(
                    setting,
                    value,
                    format!("a study simulates at most {most}"),
                ));
            }
        }

        let own = schedule(config)?;
        let times = time.of_row(folder, &own)?;
        // It has all replicas' rows, and one update of everything.
        let all = (rows * config.grid.replicas) as f64;
        let of_device = |stage: &StageCosts| (stage.forward + stage.backward) * all + stage.update;
        Ok(StepTimes {
            rows,
            step: times.step(&own, rows)?,
            one_device: times.stages.iter().map(of_device).sum(),
            one_f_one_b: times.best(config, ScheduleKind::OneForwardOneBackward, rows)?,
            gpipe: times.best(config, ScheduleKind::Gpipe, rows)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(sets: &[&str]) -> Config {
        let text = "batch = 8\n[model]\nlayers = 4\ntie = \"none\"\n[grid]\nstages = 4";
        Config::parse(text, &sets.iter().map(|set| (*set).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    fn times(time: &TimeConfig, sets: &[&str]) -> StepTimes {
        StepTimes::new(time, Path::new("."), &config(sets)).unwrap()
    }

    /// Eight rows on four devices: 1F1B is best with rows one by one, whose bubble is 3 of 11;
    /// decoupled has none.
    #[test]
    fn steps_of_eight_rows_on_four_devices() {
        let found = times(&TimeConfig::default(), &["microbatches=4"]);
        assert_eq!((found.rows, found.step, found.one_device), (8, 24.0, 96.0));
        assert_eq!((found.one_f_one_b, found.gpipe), ((33.0, 8), (33.0, 8)));
        assert_eq!(found.one_f_one_b.0 / found.step, 1.375);
        // One microbatch of all rows: everything in turn.
        assert_eq!(times(&TimeConfig::default(), &["microbatches=1", "schedule=1f1b"]).step, 96.0);
    }

    #[test]
    fn updates_count() {
        let found =
            times(&TimeConfig { update: 3.0, ..TimeConfig::default() }, &["microbatches=4"]);
        assert_eq!((found.step, found.one_device, found.one_f_one_b.0), (27.0, 108.0, 36.0));
    }

    /// A ring's ends share a device, and have half a share of the work each; one device has the
    /// rows of all replicas.
    #[test]
    fn rings_and_replicas() {
        let found = times(&TimeConfig::default(), &["microbatches=4", "grid.placement=ring"]);
        assert_eq!((found.step, found.one_device), (24.0, 72.0));
        let found = times(&TimeConfig::default(), &["microbatches=2", "grid.replicas=2"]);
        assert_eq!((found.rows, found.step, found.one_device), (4, 12.0, 96.0));
    }

    #[test]
    fn rows_of_their_own() {
        let time = TimeConfig { rows: Some(16), ..TimeConfig::default() };
        assert_eq!(times(&time, &["microbatches=4"]).step, 48.0);
        let odd = TimeConfig { rows: Some(6), ..TimeConfig::default() };
        let error = StepTimes::new(&odd, Path::new("."), &config(&["microbatches=4"]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`time.rows`: found 6; must be a multiple of microbatches = 4"),
            "{error}"
        );
    }
}
