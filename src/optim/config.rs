//! The section `[optimizer]`, and its check. Keys of one rule only are checked beside that rule.

use serde::{Deserialize, Serialize};

use super::{adamw, sgd};
use crate::error::{Error, Result};

/// The optimizers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    Adamw,
    Sgd,
}

impl OptimizerKind {
    /// All of them.
    pub const ALL: [OptimizerKind; 2] = [OptimizerKind::Adamw, OptimizerKind::Sgd];
}

/// What a norm is taken over when gradients are clipped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClipScope {
    /// Each stage by its own norm, after the replica all-reduce.
    Stage,
    /// All stages by one norm: refused, since stages have no common instant.
    Global,
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

/// Whether every key can be used.
///
/// # Errors
/// [`Error::Config`] for the first that cannot.
pub fn check(o: &OptimizerConfig) -> Result<()> {
    Error::unless(o.lr > 0.0, "optimizer.lr", o.lr, "must be above 0")?;
    Error::unless(
        o.min_lr >= 0.0 && o.min_lr <= o.lr,
        "optimizer.min_lr",
        o.min_lr,
        "must lie between 0 and optimizer.lr",
    )?;
    adamw::check(o)?;
    sgd::check(o)?;
    Error::unless(o.weight_decay >= 0.0, "optimizer.weight_decay", o.weight_decay, "must be 0 or more")?;

    let clip = o.clip.unwrap_or(1.0);
    Error::unless(clip > 0.0, "optimizer.clip", clip, "must be above 0; leave it out for no clipping")?;
    if o.clip_scope == ClipScope::Global {
        let remedy = "stages have no common instant for one norm; leave it out, or take \"stage\"";
        return Err(Error::config("optimizer.clip_scope", "`global`", remedy));
    }
    Ok(())
}
