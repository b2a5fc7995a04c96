//! The keys of `[optimizer]`.

use serde::{Deserialize, Serialize};

/// The optimizers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    Adamw,
    Sgd,
}

/// What a norm is taken over when gradients are clipped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClipScope {
    /// Each stage by its own norm, after the replica all-reduce.
    Stage,
}

/// Learning rate over steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RateKind {
    Constant,
    /// Down to `min_lr` in a straight line.
    Linear,
    /// Down to `min_lr` along half a cosine.
    Cosine,
    /// `lr * sqrt(warmup / step)` after the warm-up.
    InverseSqrt,
}

/// The optimizer and its learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    pub kind: OptimizerKind,
    pub lr: f64,
    /// AdamW.
    pub betas: [f64; 2],
    /// AdamW.
    pub eps: f64,
    /// SGD.
    pub momentum: f64,
    /// Decoupled, on matrices only.
    pub weight_decay: f64,
    /// Largest norm of a gradient; none: no clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    pub clip_scope: ClipScope,
    pub schedule: RateKind,
    /// Steps over which the rate rises linearly from 0.
    pub warmup: usize,
    /// Where linear and cosine end.
    pub min_lr: f64,
}

impl Default for OptimizerConfig {
    fn default() -> OptimizerConfig {
        OptimizerConfig {
            kind: OptimizerKind::Adamw,
            lr: 1e-3,
            betas: [0.9, 0.95],
            eps: 1e-8,
            momentum: 0.9,
            weight_decay: 0.1,
            clip: Some(1.0),
            clip_scope: ClipScope::Stage,
            schedule: RateKind::Cosine,
            warmup: 20,
            min_lr: 0.0,
        }
    }
}
