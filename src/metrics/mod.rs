//! What a run tells: reports of the places, and the recorder on rank 0 that makes `metrics.jsonl`, the progress and
//! the last checkpoint's manifest of them.

pub mod memory;
mod progress;
mod recorder;

use serde::{Deserialize, Serialize};

pub use progress::thousands;
pub use recorder::{Recorder, Summary};

use crate::checkpoint::Shard;
use crate::grid::Place;

/// What a place tells the recorder. Losses are in nats per token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// An update was made. `loss` comes from the last stage, `grad_norm` (before clipping) from replica 0.
    Step { place: Place, step: usize, loss: Option<f64>, grad_norm: Option<f64> },
    /// The losses of the evaluation at step boundary `step`, added up over a replica's tokens.
    Eval { place: Place, step: usize, loss_sum: f64, tokens: usize },
    /// The place has finished; replica 0 has written its weights.
    Done { place: Place, shard: Option<Shard>, peak_bytes: Option<u64> },
}
