//! The section `[staleness]`.

use serde::{Deserialize, Serialize};

/// What is measured of the delay itself.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(deny_unknown_fields, default)]
pub struct StalenessConfig {
    /// Measure how old the applied gradients are, how far the weights have moved meanwhile, and how far
    /// those of the gradient are off, every so many steps, two more than the longest delay at least; none: never. Costs a flat buffer of weights
    /// on the ranks of replica 0, and with --oracle a second backward on those steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<usize>,
}

impl StalenessConfig {
    /// Whether there is nothing to write of it.
    pub fn is_default(&self) -> bool {
        *self == StalenessConfig::default()
    }
}
