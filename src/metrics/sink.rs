//! Where the metrics of a run go: a file, a terminal. A new one is a file beside this, and a line
//! where the coordinator makes its list.

use serde::Serialize;

use super::EventLine;
use crate::clock::Times;
use crate::error::Result;
use crate::staleness::Staleness;

/// About a step. `step` counts the updates made; `tokens` those read so far.
#[derive(Debug, Serialize)]
pub struct StepLine<'a> {
    pub step: usize,
    pub loss: f64,
    pub lr: f64,
    pub tokens: u64,
    pub step_s: f64,
    pub tokens_per_s: f64,
    /// Before clipping, one a stage.
    pub grad_norm: &'a [f64],
    /// Of the tied table, which no stage's norm holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table_norm: Option<f64>,
    /// Tokens that each source of a mixture has given so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_tokens: Option<Vec<usize>>,
    /// When it was complete, in seconds since 1970.
    pub time: f64,
}

/// About an evaluation after `step` updates.
#[derive(Debug, Serialize)]
pub struct EvalLine {
    pub step: usize,
    pub eval_loss: f64,
    /// Targets that the loss is the mean of.
    pub eval_tokens: usize,
    /// Bits per byte or character.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_bpc: Option<f64>,
    /// Perplexity per word, or token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_ppl: Option<f64>,
    /// Bits per byte of the text before it became tokens, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_bpb: Option<f64>,
}

/// What was measured of the staleness of the last update.
#[derive(Debug, Serialize)]
pub struct StalenessLine {
    pub step: usize,
    pub staleness: Vec<StageStaleness>,
}

/// Of one stage, or the tied table.
#[derive(Debug, Serialize)]
pub struct StageStaleness {
    /// A number, or "table".
    pub stage: serde_json::Value,
    #[serde(flatten)]
    pub measured: Staleness,
}

/// Where the time of a rank went lately.
#[derive(Debug)]
pub struct PlaceLine<'a> {
    pub rank: usize,
    pub name: &'a str,
    pub replica: usize,
    /// The last update.
    pub step: usize,
    pub times: &'a Times,
    /// Bytes: resident now; at most so far beyond what the program itself takes, and predicted of that.
    pub memory: Option<u64>,
    pub peak: Option<u64>,
    pub predicted: u64,
}

/// A place where metrics go. Steps and evaluations come in the order of the run; the names of the
/// fields are those of `metrics.jsonl`.
pub trait Sink {
    /// A step is complete.
    fn step(&mut self, _line: &StepLine) -> Result<()> {
        Ok(())
    }

    /// An evaluation is complete.
    fn eval(&mut self, _line: &EvalLine) -> Result<()> {
        Ok(())
    }

    /// The staleness of an update was measured.
    fn staleness(&mut self, _line: &StalenessLine) -> Result<()> {
        Ok(())
    }

    /// The times of a rank are told, every few seconds.
    fn place(&mut self, _line: &PlaceLine) -> Result<()> {
        Ok(())
    }

    /// Something has happened besides.
    fn event(&mut self, _line: &EventLine) -> Result<()> {
        Ok(())
    }

    /// The run is over.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}
