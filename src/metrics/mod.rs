//! What a run tells: reports of the places, and the recorder on rank 0 that makes `metrics.jsonl`, the progress and
//! the last checkpoint's manifest of them.

pub mod clock;
pub mod limits;
pub mod memory;
mod bench;
mod copies;
mod lines;
mod pace;
mod progress;
mod states;
mod stragglers;
mod summary;
mod watchdog;
mod recorder;

use serde::{Deserialize, Serialize};

pub use progress::thousands;
pub use recorder::Recorder;
pub use summary::Summary;

use crate::checkpoint::Written;
use crate::data::Tokenizer;
use crate::emulation::Emulation;
use crate::error::Error;
use crate::grid::Place;
use crate::inject::Injection;
use crate::pulse::Beat;
use crate::stop::Limits;
use clock::Times;

/// How a run differs from plain training.
#[derive(Debug, Clone, Default)]
pub struct Mode {
    pub inject: Option<Injection>,
    /// Only measures: nothing is saved.
    pub bench: bool,
    pub emulation: Option<Emulation>,
    /// Heed signals, which belong to the whole process.
    pub signals: bool,
    pub limits: Limits,
}

/// What a loss in nats per token is called in the field: bits per byte or character, perplexity per word.
pub fn quality(loss: f64, tokenizer: Tokenizer) -> String {
    match tokenizer {
        Tokenizer::Words => format!("perplexity {:.2} per word", loss.exp()),
        _ => format!("{:.4} bits per {}", loss / std::f64::consts::LN_2, tokenizer.unit()),
    }
}

/// JSON knows no number that is not finite, and writes null.
fn or_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// What a place tells the recorder. Losses are in nats per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// All forwards of a step are made: the mean over the microbatches of a replica. From the last stage.
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
    /// An update of the tied table is made: the norm of its gradient before clipping. From stage 0 of replica 0.
    TableNorm {
        step: usize,
        #[serde(deserialize_with = "or_nan")]
        norm: f64,
    },
    /// The digest of a copy of the tied table after `step` updates.
    TableDigest { place: Place, step: usize, digest: u64 },
    /// The digest of a replica's weights after `step` updates.
    Digest { place: Place, step: usize, digest: u64 },
    /// The rank needed so many seconds of work for an update.
    Busy { rank: usize, seconds: f64 },
    /// What the rank is doing.
    Pulse { rank: usize, beat: Beat },
    /// The losses of the evaluation at step boundary `step`, added up over a replica's tokens. From the last stage.
    Eval {
        replica: usize,
        step: usize,
        #[serde(deserialize_with = "or_nan")]
        loss_sum: f64,
        tokens: usize,
    },
    /// The place has written its part of the state at sync point `step`.
    Saved { place: Place, step: usize, written: Written },
    /// Somebody asks the run to stop.
    Stop { reason: String },
    /// The rank has finished.
    Done { rank: usize, peak_bytes: Option<u64>, times: Option<Times> },
    /// The rank has failed, and waits to be ended.
    Failed { origin: String, error: Error },
}
