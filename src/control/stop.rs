//! What may ask a run to stop before its end, besides signals: a file `STOP` in the run's folder, a limit of time, the end
//! of a batch job. The run drains, saves and leaves with exit code 75.

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

/// What rank 0 looks at from time to time.
#[derive(Debug)]
pub struct Watch {
    file: PathBuf,
    started: Instant,
    limits: Limits,
    /// The end of the batch job.
    job_end: Option<SystemTime>,
    looked: Option<Instant>,
}

/// Between two looks at the file: it may be far away.
const LOOK: Duration = Duration::from_secs(1);

impl Watch {
    /// A watch that starts now; `job_end` is in seconds since 1970, as Slurm's `SLURM_JOB_END_TIME`.
    pub fn new(out: &Path, limits: Limits, job_end: Option<&str>) -> Watch {
        let job_end = job_end.and_then(|text| text.trim().parse().ok()).map(|s| UNIX_EPOCH + Duration::from_secs(s));
        Watch { file: out.join("STOP"), started: Instant::now(), limits, job_end, looked: None }
    }

    /// Why the run is to stop, if it is; `needed` is the time that stopping takes.
    pub fn reason(&mut self, needed: Duration) -> Option<String> {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return None;
        }
        self.looked = Some(Instant::now());
        if self.file.exists() {
            return Some(format!("the file {}", self.file.display()));
        }
        if let Some(minutes) = self.limits.max_minutes
            && self.started.elapsed() + needed >= Duration::from_secs_f64(minutes * 60.0)
        {
            return Some(format!("--max-minutes {minutes}"));
        }
        let margin = Duration::from_secs_f64(self.limits.margin_s).max(needed);
        match self.job_end {
            Some(end) if SystemTime::now() + margin >= end => {
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

    fn reason(limits: Limits, job_end: Option<String>, file: bool, needed: u64) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        if file {
            std::fs::write(folder.path().join("STOP"), "").unwrap();
        }
        Watch::new(folder.path(), limits, job_end.as_deref()).reason(Duration::from_secs(needed))
    }

    #[test]
    fn files_and_deadlines_stop_a_run() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let minutes = |m| Limits { max_minutes: Some(m), ..Limits::default() };
        let end = |s: u64| Some((now + s).to_string());
        assert_eq!(reason(Limits::default(), end(1000), false, 5), None);
        assert_eq!(reason(Limits::default(), Some("soon".into()), false, 5), None);
        assert!(reason(Limits::default(), None, true, 5).unwrap().contains("STOP"));
        assert!(reason(minutes(0.0), None, false, 5).unwrap().contains("--max-minutes"));
        assert!(reason(minutes(1.0), None, false, 70).unwrap().contains("--max-minutes"));
        assert_eq!(reason(minutes(2.0), None, false, 70), None);
        assert!(reason(Limits::default(), end(100), false, 5).unwrap().contains("batch job"));
        assert!(reason(Limits::default(), end(200), false, 300).unwrap().contains("300 s"));
    }
}
