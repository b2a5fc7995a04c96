//! The section `[eval]`, and its check.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Evaluation on the held-out text while training; without the section there is none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Steps between two evaluations; one more stands at the end of the run.
    pub every: usize,
    /// Whether each evaluation is a sync point; else the weights are read as they stand, which only
    /// the oracle can.
    pub drain: bool,
    /// Tokens of the held-out text to read; none: all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// Tokens a sequence; none: those of training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence: Option<usize>,
    /// Tokens that a Transformer-XL remembers; none: those of training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_len: Option<usize>,
    /// Streams that the held-out text is read in, all replicas together; none: as many as a batch
    /// has rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
}

impl Default for EvalConfig {
    fn default() -> EvalConfig {
        EvalConfig {
            every: 100,
            drain: true,
            tokens: None,
            sequence: None,
            mem_len: None,
            batch: None,
        }
    }
}

impl EvalConfig {
    /// Whether every key can be used by itself.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that cannot.
    pub fn check(&self) -> Result<()> {
        Error::unless_at_least_one("eval.every", self.every)?;
        Error::unless_at_least_one("eval.tokens", self.tokens.unwrap_or(1))?;
        Error::unless_at_least_one("eval.sequence", self.sequence.unwrap_or(1))?;
        Error::unless_at_least_one("eval.batch", self.batch.unwrap_or(1))
    }
}
