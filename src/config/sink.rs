//! Where the metrics of a run go.

use serde::{Deserialize, Serialize};

/// A place where metrics go.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum SinkKind {
    /// `metrics.jsonl` in the run's folder: an object a line.
    Jsonl,
    /// Progress for people.
    Terminal,
    /// An event file in the run's folder, for TensorBoard.
    Tensorboard,
    /// `metrics.prom` in the run's folder, for the textfile collector of Prometheus' node exporter.
    Prometheus,
}
