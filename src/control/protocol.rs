//! What ranks and rank 0 say to each other: reports go up, controls come down. Neither waits.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::HeartbeatReport;
use crate::checkpoint::Written;
use crate::clock::Times;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::staleness::Staleness;
use crate::trace::{ClockName, Moment, Window};

/// JSON knows no number that is not finite, and writes null.
fn or_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// What a place tells the coordinator. Losses are in nats per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// All forwards of a step are made: the mean over the microbatches of a replica. From the last
    /// stage.
    Loss {
        replica: usize,
        step: usize,
        #[serde(deserialize_with = "or_nan")]
        loss: f64,
    },
    /// An update is made: the norm of the stage's gradient before clipping. From replica 0.
    Norm {
        stage: usize,
        step: usize,
        #[serde(deserialize_with = "or_nan")]
        norm: f64,
    },
    /// An update of the tied table is made: the norm of its gradient before clipping. From stage 0
    /// of replica 0.
    TableNorm {
        step: usize,
        #[serde(deserialize_with = "or_nan")]
        norm: f64,
    },
    /// What was measured of the staleness of a stage's gradient, or the tied table's, at its update.
    /// From replica 0.
    Staleness { stage: Option<usize>, step: usize, measured: Staleness },
    /// The digest of a copy of the tied table after `step` updates.
    TableDigest { place: Place, step: usize, digest: u64 },
    /// The digest of a replica's weights after `step` updates.
    Digest { place: Place, step: usize, digest: u64 },
    /// The rank needed so many seconds of work for an update.
    Busy { rank: usize, seconds: f64 },
    /// Where the rank's time went since it last said so, up to an update; its resident bytes, and
    /// the measured peak.
    Times { rank: usize, step: usize, times: Times, memory: Option<u64>, peak: Option<u64> },
    /// What the rank is doing.
    Heartbeat { rank: usize, beat: HeartbeatReport },
    /// The losses of the evaluation at step boundary `step`, added up over a replica's tokens. From
    /// the last stage.
    Eval {
        replica: usize,
        step: usize,
        #[serde(deserialize_with = "or_nan")]
        loss_sum: f64,
        tokens: usize,
    },
    /// The place has written its part of the state at sync point `step`.
    Saved { place: Place, step: usize, written: Written },
    /// The rank has written its part of a trace, of the clock of this name; or why it cannot.
    Traced { rank: usize, window: Window, clock: ClockName, failed: Option<String> },
    /// What the rank's clock says, in answer to a question.
    Clock { rank: usize, number: u64, at: Moment },
    /// Somebody asks the run to stop.
    Stop { reason: String },
    /// The rank has finished.
    Done { rank: usize, peak_bytes: Option<u64>, times: Option<Times> },
    /// The rank has failed, and waits to be ended.
    Failed { origin: String, error: Error },
}

/// Takes the reports of a place to the coordinator on rank 0.
#[derive(Clone)]
pub struct Reporter(Arc<dyn Fn(Report) -> Result<()> + Send + Sync>);

impl Reporter {
    pub fn new(send: impl Fn(Report) -> Result<()> + Send + Sync + 'static) -> Reporter {
        Reporter(Arc::new(send))
    }

    /// Sends without waiting.
    ///
    /// # Errors
    /// If the coordinator is gone.
    pub fn send(&self, report: Report) -> Result<()> {
        (self.0)(report)
    }
}

/// What rank 0 tells all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Control {
    /// Steps before this one may be begun.
    Limit(usize),
    /// The run ends at this boundary, which is the last limit.
    Stop(usize),
    /// The heartbeat is asked for.
    Ask,
    /// These steps, which nobody has begun, are to be traced.
    Trace(Window),
    /// What the clock says is asked for; the question's number.
    Clock(u64),
    /// Nothing more will be told.
    Shutdown,
}

/// Tells all ranks; on rank 0.
pub struct Controls(Box<dyn Fn(Control) + Send>);

impl Controls {
    pub fn new(send: impl Fn(Control) + Send + 'static) -> Controls {
        Controls(Box::new(send))
    }

    /// Tells all ranks, this one too.
    pub fn send(&self, control: Control) {
        (self.0)(control);
    }
}

impl Drop for Controls {
    fn drop(&mut self) {
        self.send(Control::Shutdown);
    }
}
