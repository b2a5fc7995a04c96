//! The section `[optimizer]`, and its check. Keys of one rule stand in that rule's file, with their
//! check.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::adamw::Lead;
use super::keys::{Keys, names};
use super::{adamw, muon, sgd, soap};
use crate::error::{Error, Result};

/// The optimizers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    Adamw,
    Sgd,
    Muon,
    Soap,
}

impl OptimizerKind {
    /// All of them.
    pub const ALL: [OptimizerKind; 4] =
        [OptimizerKind::Adamw, OptimizerKind::Sgd, OptimizerKind::Muon, OptimizerKind::Soap];
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OptimizerKind::Adamw => "adamw",
            OptimizerKind::Sgd => "sgd",
            OptimizerKind::Muon => "muon",
            OptimizerKind::Soap => "soap",
        })
    }
}

/// The kinds that go by the keys of a rule's file.
mod kinds {
    use super::OptimizerKind::{self, Adamw, Muon, Sgd, Soap};

    /// Muon and SOAP take AdamW's steps with what is no matrix.
    pub const OF_ADAMW: &[OptimizerKind] = &[Adamw, Muon, Soap];
    pub const OF_SGD: &[OptimizerKind] = &[Sgd];
    pub const OF_MUON: &[OptimizerKind] = &[Muon];
    pub const OF_SOAP: &[OptimizerKind] = &[Soap];
}

/// What a norm is taken over when gradients are clipped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClipScope {
    /// Each stage by its own norm, after the replica all-reduce.
    Stage,
    /// All stages by one norm: refused, since stages have no common instant.
    Global,
}

/// Whether delayed steps use weights that are moved on to where they will be when their gradient
/// arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Predict {
    Off,
    /// Along the last update, whoever made it.
    Update,
}

/// Learning rate over steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RateKind {
    Constant,
    /// Down to `min_lr` in a straight line.
    Linear,
    /// Down to `min_lr` along half a cosine.
    Cosine,
    /// `lr * sqrt(warmup / step)` after the warm-up, of which `lr` is the end and so the peak.
    InverseSqrt,
    /// Warm-up, stable, decay: `lr` until the last `decay_steps` steps, then down to `min_lr` (Hu et
    /// al., MiniCPM, 2024).
    Wsd,
}

/// How the rate goes down at the end of `wsd`, p of the decay behind.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Decay {
    /// `1 - p`.
    #[serde(rename = "linear")]
    Linear,
    /// `1 - sqrt(p)` (Hägele et al., 2024).
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
    /// `(1 + cos(pi p)) / 2`.
    #[serde(rename = "cosine")]
    Cosine,
}

/// The word for an option that is off.
const NONE: &str = "none";

fn number_or_none<S: Serializer>(
    value: &Option<f64>,
    out: S,
) -> std::result::Result<S::Ok, S::Error> {
    match value {
        Some(value) => out.serialize_f64(*value),
        None => out.serialize_str(NONE),
    }
}

fn read_number_or_none<'de, D: Deserializer<'de>>(
    from: D,
) -> std::result::Result<Option<f64>, D::Error> {
    match NumberOrNone::deserialize(from)? {
        NumberOrNone::Number(value) => Ok(Some(value)),
        NumberOrNone::None(text) if text == NONE => Ok(None),
        NumberOrNone::None(text) => {
            Err(serde::de::Error::custom(format!("`{text}`, expected a number, or \"none\"")))
        }
    }
}

/// The key as it is written.
#[derive(Deserialize, schemars::JsonSchema)]
#[serde(untagged, expecting = "a number, or \"none\"")]
enum NumberOrNone {
    Number(f64),
    None(String),
}

/// The optimizer and its learning rate: the keys of every rule, and those of some.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OptimizerConfig {
    pub common: Common,
    pub adamw: adamw::Keys,
    pub sgd: sgd::Keys,
    pub muon: muon::Keys,
    pub soap: soap::Keys,
    /// Keys of rules that its kind does not go by.
    foreign: Vec<Foreign>,
}

/// A key of another rule.
#[derive(Debug, Clone, PartialEq)]
struct Foreign {
    key: String,
    value: String,
    kinds: &'static [OptimizerKind],
}

impl<'de> Deserialize<'de> for OptimizerConfig {
    fn deserialize<D: Deserializer<'de>>(
        section: D,
    ) -> std::result::Result<OptimizerConfig, D::Error> {
        let mut keys = Keys::read(section)?;
        let common: Common = keys.take()?;
        let kind = common.kind;

        let mut foreign = Vec::new();
        let mut set_aside = |others: Vec<(String, String)>, kinds| {
            foreign.extend(others.into_iter().map(|(key, value)| Foreign { key, value, kinds }));
        };

        let adamw = keys.take_if(kinds::OF_ADAMW.contains(&kind), |others| {
            set_aside(others, kinds::OF_ADAMW)
        })?;

        let sgd =
            keys.take_if(kinds::OF_SGD.contains(&kind), |others| set_aside(others, kinds::OF_SGD))?;
        let muon = keys
            .take_if(kinds::OF_MUON.contains(&kind), |others| set_aside(others, kinds::OF_MUON))?;
        let soap = keys
            .take_if(kinds::OF_SOAP.contains(&kind), |others| set_aside(others, kinds::OF_SOAP))?;
        keys.finish()?;
        Ok(OptimizerConfig { common, adamw, sgd, muon, soap, foreign })
    }
}

impl Serialize for OptimizerConfig {
    /// The keys that its kind goes by.
    fn serialize<S: Serializer>(&self, section: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Written<'a> {
            #[serde(flatten)]
            common: &'a Common,
            #[serde(flatten)]
            adamw: Option<&'a adamw::Keys>,
            #[serde(flatten)]
            sgd: Option<&'a sgd::Keys>,
            #[serde(flatten)]
            muon: Option<&'a muon::Keys>,
            #[serde(flatten)]
            soap: Option<&'a soap::Keys>,
        }

        let of = |kinds: &[OptimizerKind]| kinds.contains(&self.common.kind);
        let written = Written {
            common: &self.common,
            adamw: of(kinds::OF_ADAMW).then_some(&self.adamw),
            sgd: of(kinds::OF_SGD).then_some(&self.sgd),
            muon: of(kinds::OF_MUON).then_some(&self.muon),
            soap: of(kinds::OF_SOAP).then_some(&self.soap),
        };

        written.serialize(section)
    }
}

/// The keys of every rule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct Common {
    /// The rule. Muon and SOAP take matrices whole, and AdamW's steps with the rest, by AdamW's
    /// keys.
    pub kind: OptimizerKind,
    /// The peak of the learning rate, at the end of the warm-up.
    pub lr: f64,
    /// Decoupled, on matrices only.
    pub weight_decay: f64,
    /// Gradients with a larger norm are scaled down to it: each stage by its own norm, after the
    /// all-reduce, and a tied table by its own, on one stage too; `"none"`: no clipping.
    #[serde(serialize_with = "number_or_none", deserialize_with = "read_number_or_none")]
    #[schemars(with = "NumberOrNone")]
    pub clip: Option<f64>,
    /// What the norm is taken over.
    pub clip_scope: ClipScope,
    /// Whether stages with a delay use predicted weights; by default `update`, with SGD `off`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predict: Option<Predict>,
    /// Multiplies how far ahead weights are predicted.
    pub predict_scale: f64,
    /// The learning rate over steps.
    pub schedule: RateKind,
    /// Steps over which the rate rises linearly: the first has `lr / warmup`, the last of them
    /// `lr`.
    pub warmup: usize,
    /// Where linear, cosine and wsd end: what the step after the last would have.
    pub min_lr: f64,
    /// Steps of the decay of wsd; 0: none, for a run whose states others decay from; by default a
    /// tenth of the steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<usize>,
    /// The form of the decay of wsd; by default `1-sqrt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay: Option<Decay>,
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
            decay_steps: None,
            decay: None,
        }
    }
}

impl OptimizerConfig {
    /// Whether delayed steps use predicted weights. They do, unless it is said; of SGD it is not
    /// known to help.
    pub fn predict(&self) -> Predict {
        let default = match self.common.kind {
            OptimizerKind::Adamw | OptimizerKind::Muon | OptimizerKind::Soap => Predict::Update,
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

    /// That of a run that goes on from a state of `saved`: as it began, unless something else is
    /// asked for; off what was not known when it was saved.
    pub fn going_on(&self, saved: &OptimizerConfig) -> OptimizerConfig {
        let mut config = self.clone();
        config.common.predict.get_or_insert(saved.common.predict.unwrap_or(Predict::Off));
        config.adamw.lead.get_or_insert(saved.adamw.lead.unwrap_or(Lead::Off));
        config
    }

    /// The same without the keys of other rules, as earlier versions of the program wrote them into
    /// states.
    pub fn known(self) -> OptimizerConfig {
        OptimizerConfig { foreign: Vec::new(), ..self }
    }

    /// These keys, and the defaults of every rule's own.
    pub fn of(common: Common) -> OptimizerConfig {
        OptimizerConfig { common, ..OptimizerConfig::default() }
    }
}

/// Takes the keys out of the section of a file that go with its kind and not with `kind`, which
/// stands over it.
pub fn override_kind(section: &mut toml::Table, kind: &str) {
    let parsed = |word: &str| OptimizerKind::ALL.into_iter().find(|kind| kind.to_string() == word);
    let of_file =
        section.get("kind").map_or(Some(Common::default().kind), |word| parsed(word.as_str()?));
    let (Some(of_file), Some(kind)) = (of_file, parsed(kind)) else { return };

    let owners = [
        (kinds::OF_ADAMW, names::<adamw::Keys>()),
        (kinds::OF_SGD, names::<sgd::Keys>()),
        (kinds::OF_MUON, names::<muon::Keys>()),
        (kinds::OF_SOAP, names::<soap::Keys>()),
    ];

    for (kinds, names) in owners {
        if kinds.contains(&of_file) && !kinds.contains(&kind) {
            names.iter().for_each(|name| drop(section.remove(*name)));
        }
    }
}

/// Whether every key can be used.
///
/// # Errors
/// [`Error::Config`] for the first that cannot.
pub fn check(config: &OptimizerConfig) -> Result<()> {
    let o = &config.common;
    if let Some(Foreign { key, value, kinds }) = config.foreign.first() {
        let kinds: Vec<String> = kinds.iter().map(|kind| format!("\"{kind}\"")).collect();
        let remedy = format!(
            "a key of kind = {}; with kind = \"{}\" leave it out",
            kinds.join(", "),
            config.common.kind
        );

        return Err(Error::config(format!("optimizer.{key}"), value, remedy));
    }

    Error::unless(o.lr > 0.0, "optimizer.lr", o.lr, "must be above 0")?;
    Error::unless(
        o.min_lr >= 0.0 && o.min_lr <= o.lr,
        "optimizer.min_lr",
        o.min_lr,
        "must lie between 0 and optimizer.lr",
    )?;

    let found = o.decay_steps.map(|steps| ("optimizer.decay_steps", steps.to_string()));
    let found = found.or(o.decay.map(|decay| ("optimizer.decay", format!("{decay:?}"))));
    if let Some((key, value)) = found.filter(|_| o.schedule != RateKind::Wsd) {
        let remedy = "only optimizer.schedule = \"wsd\" has it; leave it out";
        return Err(Error::config(key, value, remedy));
    }

    config.adamw.check()?;
    config.sgd.check()?;
    config.muon.check()?;
    config.soap.check()?;
    Error::unless(
        o.weight_decay >= 0.0,
        "optimizer.weight_decay",
        o.weight_decay,
        "must be 0 or more",
    )?;

    let clip = o.clip.unwrap_or(1.0);
    Error::unless(clip > 0.0, "optimizer.clip", clip, "must be above 0; \"none\" for no clipping")?;
    if o.clip_scope == ClipScope::Global {
        let remedy = "stages have no common instant for one norm; leave it out, or take \"stage\"";
        return Err(Error::config("optimizer.clip_scope", "`global`", remedy));
    }

    let scale = o.predict_scale;
    Error::unless(
        scale > 0.0 && scale <= 4.0,
        "optimizer.predict_scale",
        scale,
        "must be above 0 and at most 4",
    )
}
