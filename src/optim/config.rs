//! The section `[optimizer]`, and its check. Keys of one rule stand in that rule's file, with their check.

use serde::{Deserialize, Deserializer, Serialize};

use super::adamw::Lead;
use super::keys::Keys;
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

/// Whether delayed steps use weights that are moved on to where they will be when their gradient arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Predict {
    Off,
    /// Along the last update, whoever made it.
    Update,
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

/// The optimizer and its learning rate: the keys of every rule, and those of some.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct OptimizerConfig {
    #[serde(flatten)]
    pub common: Common,
    #[serde(flatten)]
    pub adamw: adamw::Keys,
    #[serde(flatten)]
    pub sgd: sgd::Keys,
}

impl<'de> Deserialize<'de> for OptimizerConfig {
    fn deserialize<D: Deserializer<'de>>(section: D) -> std::result::Result<OptimizerConfig, D::Error> {
        let mut keys = Keys::read(section)?;
        let config = OptimizerConfig { common: keys.take()?, adamw: keys.take()?, sgd: keys.take()? };
        keys.finish()?;
        Ok(config)
    }
}

/// The keys of every rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Common {
    pub kind: OptimizerKind,
    pub lr: f64,
    /// Decoupled, on matrices only.
    pub weight_decay: f64,
    /// Largest norm of a gradient; none: no clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    pub clip_scope: ClipScope,
    /// `update`: stages with a delay use predicted weights; none: that of the optimizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predict: Option<Predict>,
    /// Of the horizon of a prediction.
    pub predict_scale: f64,
    pub schedule: RateKind,
    /// Steps over which the rate rises linearly from 0.
    pub warmup: usize,
    /// Where linear and cosine end.
    pub min_lr: f64,
}

impl Default for Common {
    fn default() -> Common {
        Common {
            kind: OptimizerKind::Adamw,
            lr: 1e-3,
            weight_decay: 0.1,
            clip: Some(1.0),
            clip_scope: ClipScope::Stage,
            predict: None,
            predict_scale: 1.0,
            schedule: RateKind::Cosine,
            warmup: 20,
            min_lr: 0.0,
        }
    }
}

impl OptimizerConfig {
    /// Whether delayed steps use predicted weights. With AdamW they do, unless it is said; of others it is not known to help.
    pub fn predict(&self) -> Predict {
        let default = match self.common.kind {
            OptimizerKind::Adamw => Predict::Update,
            OptimizerKind::Sgd => Predict::Off,
        };
        self.common.predict.unwrap_or(default)
    }

    /// The same with every default that may change written out, as it is saved.
    pub fn settled(&self) -> OptimizerConfig {
        let mut settled = self.clone();
        settled.common.predict = Some(self.predict());
        settled.adamw.lead = Some(self.adamw.lead());
        settled
    }

    /// That of a run that goes on from a state of `saved`: as it began, unless something else is asked for; off what was not
    /// known when it was saved.
    pub fn going_on(&self, saved: &OptimizerConfig) -> OptimizerConfig {
        let mut config = self.clone();
        config.common.predict.get_or_insert(saved.common.predict.unwrap_or(Predict::Off));
        config.adamw.lead.get_or_insert(saved.adamw.lead.unwrap_or(Lead::Off));
        config
    }

    /// These keys, and the defaults of every rule's own.
    pub fn of(common: Common) -> OptimizerConfig {
        OptimizerConfig { common, ..OptimizerConfig::default() }
    }
}

/// Whether every key can be used.
///
/// # Errors
/// [`Error::Config`] for the first that cannot.
pub fn check(config: &OptimizerConfig) -> Result<()> {
    let o = &config.common;
    Error::unless(o.lr > 0.0, "optimizer.lr", o.lr, "must be above 0")?;
    Error::unless(
        o.min_lr >= 0.0 && o.min_lr <= o.lr,
        "optimizer.min_lr",
        o.min_lr,
        "must lie between 0 and optimizer.lr",
    )?;
    config.adamw.check()?;
    config.sgd.check()?;
    Error::unless(o.weight_decay >= 0.0, "optimizer.weight_decay", o.weight_decay, "must be 0 or more")?;

    let clip = o.clip.unwrap_or(1.0);
    Error::unless(clip > 0.0, "optimizer.clip", clip, "must be above 0; leave it out for no clipping")?;
    if o.clip_scope == ClipScope::Global {
        let remedy = "stages have no common instant for one norm; leave it out, or take \"stage\"";
        return Err(Error::config("optimizer.clip_scope", "`global`", remedy));
    }

    let scale = o.predict_scale;
    Error::unless(scale > 0.0 && scale <= 4.0, "optimizer.predict_scale", scale, "must be above 0 and at most 4")
}
