//! The section `[grid]`, and its check.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::grid::{self, Placement};

/// The grid and what stands on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GridConfig {
    /// Pipeline stages, K.
    pub stages: usize,
    /// Data-parallel replicas, R.
    pub replicas: usize,
    /// `line`, or `ring`: the last stage on the first one's device.
    pub placement: Placement,
    /// `replica-major`: the stages of a replica are neighbouring ranks; or `stage-major`: the
    /// replicas of a stage.
    pub order: grid::Order,
    /// `"balanced"`, by the costs of the layers, or their counts, one a stage.
    pub layers_per_stage: LayersPerStage,
    /// Delays `D_k`, one a stage, where the least ones are not wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delays: Option<Vec<usize>>,
    /// Updates that every stage's delay is longer than the least one, the last stage's included, so
    /// that its all-reduce goes on under the next forward.
    #[serde(skip_serializing_if = "is_zero")]
    pub reduce_delay: usize,
}

fn is_zero(value: &usize) -> bool {
    *value == 0
}

impl Default for GridConfig {
    fn default() -> GridConfig {
        GridConfig {
            stages: 1,
            replicas: 1,
            placement: Placement::Line,
            order: grid::Order::default(),
            layers_per_stage: LayersPerStage::Balanced,
            delays: None,
            reduce_delay: 0,
        }
    }
}

impl GridConfig {
    /// Whether every key can be used by itself.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that cannot.
    pub fn check(&self) -> Result<()> {
        Error::unless_at_least_one("grid.stages", self.stages)?;
        Error::unless_at_least_one("grid.replicas", self.replicas)?;
        if self.reduce_delay > 1 {
            return Err(Error::config("grid.reduce_delay", self.reduce_delay, "must be 0 or 1"));
        }
        self.placement
            .check(self.stages)
            .map_err(|remedy| Error::config("grid.placement", "`ring`", remedy))
    }
}

/// How many layers every stage has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(from = "LayersKey", into = "LayersKey")]
pub enum LayersPerStage {
    /// By their costs: `"balanced"`.
    Balanced,
    Counts(Vec<usize>),
}

/// The key as it is written.
#[derive(Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged, expecting = "`\"balanced\"` or a list of layer counts such as [2, 3, 3]")]
enum LayersKey {
    Word(Balanced),
    Counts(Vec<usize>),
}

#[derive(Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Balanced {
    Balanced,
}

impl From<LayersKey> for LayersPerStage {
    fn from(key: LayersKey) -> LayersPerStage {
        match key {
            LayersKey::Word(Balanced::Balanced) => LayersPerStage::Balanced,
            LayersKey::Counts(counts) => LayersPerStage::Counts(counts),
        }
    }
}

impl From<LayersPerStage> for LayersKey {
    fn from(layers: LayersPerStage) -> LayersKey {
        match layers {
            LayersPerStage::Balanced => LayersKey::Word(Balanced::Balanced),
            LayersPerStage::Counts(counts) => LayersKey::Counts(counts),
        }
    }
}
