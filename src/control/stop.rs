//! What may ask a run to stop before its end, besides signals: a file `STOP` in the run's folder, a
//! limit of time, the end of a batch job. The run drains, saves and leaves with exit code 75.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The exit code of a run that was stopped and has saved: to be queued again.
pub const STOPPED: u8 = 75;

/// The time limits of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    pub max_minutes: Option<f64>,
    /// Seconds before the end of the batch job at which the run stops at the latest.
    pub margin_s: f64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { max_minutes: None, margin_s: 120.0 }
    }
}

/// The longest time that a limit can be, in its unit: more is a mistake.
const LONGEST: f64 = 1e8;

/// A limit of time, of minutes or seconds, as it is typed.
///
/// # Errors
/// What is wrong with it.
pub fn limit(text: &str) -> Result<f64, String> {
    match text.trim().parse() {
        Ok(value) if (0.0..=LONGEST).contains(&value) => Ok(value),
        _ => Err(format!("write a number from 0 to {LONGEST}")),
    }
}

/// How long the batch job still has; `end` is in seconds since 1970, as Slurm's
/// `SLURM_JOB_END_TIME`.
///
/// # Errors
/// An end that says nothing: what is wrong with it.
pub fn left_of_job(end: &str, now: SystemTime) -> Result<Duration, String> {
    let seconds: u64 =
        end.trim().parse().map_err(|_| "is no number of seconds since 1970".to_owned())?;
    let end = UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds))
        .filter(|_| seconds as f64 / 60.0 < LONGEST);

    let end = end.ok_or_else(|| "is too far away to be true".to_owned())?;
    end.duration_since(now).map_err(|past| {
        format!("was {:.0} s ago, by the clock of this machine", past.duration().as_secs_f64())
    })
}

/// What rank 0 looks at from time to time.
#[derive(Debug)]
pub struct Watch {
    file: PathBuf,
    started: Instant,
    limits: Limits,
    /// What the batch job has left at the start: later the clock may be set.
    job: Option<Duration>,
    looked: Option<Instant>,
}

/// Between two looks at the file: it may be far away.
const LOOK: Duration = Duration::from_secs(1);

impl Watch {
    /// A watch that starts now; `job` is what the batch job has left.
    pub fn new(out: &Path, limits: Limits, job: Option<Duration>) -> Watch {
        Watch { file: out.join("STOP"), started: Instant::now(), limits, job, looked: None }
    }

    /// Why the run is to stop, if it is; `needed` is the time that stopping takes.
    pub fn reason(&mut self, needed: Duration) -> Option<String> {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return None;
        }

        self.looked = Some(Instant::now());
        if self.file.is_file() {
            return Some(format!("the file {}", self.file.display()));
        }

        if let Some(minutes) = self.limits.max_minutes
            && self.started.elapsed() + needed >= Duration::from_secs_f64(minutes * 60.0)
        {
            return Some(format!("--max-minutes {minutes}"));
        }

        let margin = Duration::from_secs_f64(self.limits.margin_s).max(needed);
        match self.job {
            Some(left) if self.started.elapsed() + margin >= left => {
                Some(format!("the end of the batch job is {:.0} s away", margin.as_secs_f64()))
            }
            _ => None,
        }
    }

    /// The run has stopped: the file has done its work.
    pub fn done(&self) {
        if let Err(error) = std::fs::remove_file(&self.file)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "the file STOP cannot be removed, and will stop the next run too");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(limits: Limits, job: Option<u64>, file: bool, needed: u64) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        if file {
            std::fs::write(folder.path().join("STOP"), "").unwrap();
        }
        Watch::new(folder.path(), limits, job.map(Duration::from_secs))
            .reason(Duration::from_secs(needed))
    }

    #[test]
    fn files_and_deadlines_stop_a_run() {
        let minutes = |m| Limits { max_minutes: Some(m), ..Limits::default() };
        assert_eq!(reason(Limits::default(), Some(1000), false, 5), None);
        assert!(reason(Limits::default(), None, true, 5).unwrap().contains("STOP"));
        assert!(reason(minutes(0.0), None, false, 5).unwrap().contains("--max-minutes"));
        assert!(reason(minutes(1.0), None, false, 70).unwrap().contains("--max-minutes"));
        assert_eq!(reason(minutes(2.0), None, false, 70), None);
        assert!(reason(Limits::default(), Some(100), false, 5).unwrap().contains("batch job"));
        assert!(reason(Limits::default(), Some(200), false, 300).unwrap().contains("300 s"));
    }

    #[test]
    fn the_end_of_a_job_is_heeded_where_it_can_be_true() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        assert_eq!(left_of_job(" 1000060\n", now), Ok(Duration::from_secs(60)));
        assert_eq!(left_of_job("1000000", now), Ok(Duration::ZERO));
        for (end, what) in [
            ("999000", "was 1000 s ago"),
            ("0", "ago"),
            ("soon", "no number"),
            ("-5", "no number"),
            ("18446744073709551615", "too far"),
            ("9999999999999", "too far"),
        ] {
            let found = left_of_job(end, now).unwrap_err();
            assert!(found.contains(what), "{end}: {found}");
        }
    }

    #[test]
    fn limits_are_numbers_that_a_clock_can_count() {
        for (text, value) in [("0", 0.0), ("2.5", 2.5), ("1e8", 1e8)] {
            assert_eq!(limit(text), Ok(value));
        }
        for text in ["-1", "nan", "inf", "1e300", "-0.1", "soon", ""] {
            assert!(limit(text).unwrap_err().contains("from 0 to"), "{text}");
        }
    }
}
