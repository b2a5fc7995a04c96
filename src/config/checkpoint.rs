//! The section `[checkpoint]`, and its check.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// When the whole state of the run is saved, and what is kept; each save is a sync point. The end
/// of a run is saved always.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Steps between two saves; none: only the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<usize>,
    /// How many of the newest are kept.
    pub keep_last: usize,
    /// Those at multiples of so many steps are kept for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<usize>,
}

impl Default for CheckpointConfig {
    fn default() -> CheckpointConfig {
        CheckpointConfig { every: None, keep_last: 2, keep_every: None }
    }
}

impl CheckpointConfig {
    /// Whether every key can be used by itself.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that cannot.
    pub fn check(&self) -> Result<()> {
        Error::unless_at_least_one("checkpoint.every", self.every.unwrap_or(1))?;
        Error::unless_at_least_one("checkpoint.keep_last", self.keep_last)?;
        Error::unless_at_least_one("checkpoint.keep_every", self.keep_every.unwrap_or(1))
    }
}
