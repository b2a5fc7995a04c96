//! What is asked for: the keys of a config file, and whether they can be used. `setup` makes values
//! of them that nobody checks again. The sections `[model]`, `[data]` and `[optimizer]` stand with
//! those that use them, the others here.

use std::path::Path;

use serde::{Deserialize, Serialize};

mod bounds;
mod check;
mod checkpoint;
mod eval;
mod grid;
mod parse;
mod recompute;
mod sink;
mod staleness;

pub use checkpoint::CheckpointConfig;
pub use eval::EvalConfig;
pub use grid::{GridConfig, LayersPerStage};
pub use recompute::Recompute;
pub use sink::SinkKind;
pub use staleness::StalenessConfig;

use crate::data::{DataConfig, Order, Reading, Shape};
use crate::device::DeviceSetting;
use crate::error::{Error, Result};
use crate::grid::Grid;
use crate::model::ModelConfig;
use crate::optim::{OptimizerConfig, OptimizerKind, Predict, Sides};
use crate::precision::Precision;
use crate::schedule::ScheduleKind;
use crate::wire::Wire;

/// A run. Every key has a default, so a config file holds only what differs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Names the run and its folder under `runs/`.
    pub name: String,
    /// The origin of all randomness: weights, batches, dropout.
    pub seed: u64,
    /// Updates of every stage.
    pub steps: usize,
    /// Sequences a step, all replicas together.
    pub batch: usize,
    /// Microbatches m, a replica and step.
    pub microbatches: usize,
    /// In which order stages do forwards and backwards, and whether every step is a sync point.
    pub schedule: ScheduleKind,
    /// Slack h per hop: 1, or 2 where messages take time.
    pub slack: usize,
    /// Keep only the stage input of a microbatch and run its forward again in the backward;
    /// `blocks`: keep the input of every layer, and run them again one by one.
    pub recompute: Recompute,
    /// The first n steps are sync points: synchronous warm-up.
    pub sync_steps: usize,
    /// Further sync points, as step numbers.
    pub sync_at: Vec<usize>,
    /// Threads a rank.
    pub threads: usize,
    /// `cpu`; `cuda`, one GPU a rank; or `auto`, a GPU where there is one.
    pub device: DeviceSetting,
    /// Several ranks may share one GPU: for tests.
    pub allow_shared_gpu: bool,
    /// On a GPU only what gives the same bits every time; the processor always does.
    pub deterministic: bool,
    /// What the model computes with: `f32`, `tf32` on GPUs, or `bf16` over f32 master weights.
    pub precision: Precision,
    /// How activations, gradients and the all-reduce travel between devices: `f32`, or `bf16` in
    /// half the bytes.
    pub wire: Wire,
    /// KiB of gradients that are reduced at once, as soon as the backward has made them.
    pub bucket_kib: usize,
    /// Seconds without any action anywhere after which the run ends, and the place is named that
    /// everybody waits for.
    pub stall_seconds: f64,
    /// What a loss or a gradient that is not finite does: `stop` ends the run; `skip` leaves the
    /// step's update out on every stage whose gradient is not finite, replicas alike.
    pub on_nonfinite: OnNonfinite,
    /// Replicas compare digests of their weights after every so many steps; none: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify_every: Option<usize>,
    /// Where the metrics go.
    pub sink: Vec<SinkKind>,
    pub grid: GridConfig,
    pub model: ModelConfig,
    pub data: DataConfig,
    #[schemars(with = "crate::optim::Common")]
    pub optimizer: OptimizerConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalConfig>,
    pub checkpoint: CheckpointConfig,
    #[serde(skip_serializing_if = "StalenessConfig::is_default")]
    pub staleness: StalenessConfig,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            name: "run".into(),
            seed: 1,
            steps: 500,
            batch: 32,
            microbatches: 4,
            schedule: ScheduleKind::Decoupled,
            slack: 1,
            recompute: Recompute::Nothing,
            sync_steps: 0,
            sync_at: Vec::new(),
            threads: 1,
            device: DeviceSetting::Cpu,
            allow_shared_gpu: false,
            deterministic: false,
            precision: Precision::F32,
            wire: Wire::F32,
            bucket_kib: 4096,
            stall_seconds: 300.0,
            on_nonfinite: OnNonfinite::Stop,
            verify_every: None,
            sink: vec![SinkKind::Jsonl, SinkKind::Terminal],
            grid: GridConfig::default(),
            model: ModelConfig::default(),
            data: DataConfig::default(),
            optimizer: OptimizerConfig::default(),
            eval: None,
            checkpoint: CheckpointConfig::default(),
            staleness: StalenessConfig::default(),
        }
    }
}

/// What a loss or a gradient that is not finite does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnNonfinite {
    Stop,
    Skip,
}

impl Config {
    /// Whether every setting can be used, as far as that is known without the corpus.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that cannot.
    pub fn check(&self) -> Result<()> {
        check::check(self)
    }

    /// The keys that have a value, each with it, as `--set` names them.
    pub fn settings(&self) -> Vec<(String, serde_json::Value)> {
        let mut settings = Vec::new();
        let whole = serde_json::to_value(self).unwrap_or_default();
        flatten("", whole, &mut settings);
        settings
    }

    /// What can be done but is hardly meant, for the user to know.
    pub fn notes(&self) -> Vec<String> {
        self.harmful_prediction().into_iter().chain(self.sides_without_basis()).collect()
    }

    fn harmful_prediction(&self) -> Option<String> {
        let optimizer = &self.optimizer;
        let sgd = optimizer.common.kind == OptimizerKind::Sgd && optimizer.sgd.momentum == 0.0;
        let harmful = sgd && optimizer.predict() == Predict::Update;
        let text = "note: optimizer.predict = \"update\" with kind = \"sgd\" and momentum = 0: a prediction along single \
                    gradients harms; set optimizer.momentum, or predict = \"off\"";
        harmful.then(|| text.to_owned())
    }

    /// Of SOAP: which sides of matrices are too long.
    fn sides_without_basis(&self) -> Option<String> {
        let limit = self.optimizer.soap.soap_limit;
        let sides = [self.model.d_model, self.model.d_ff];
        let long: Vec<String> =
            sides.iter().filter(|side| **side > limit).map(ToString::to_string).collect();
        // With the smaller sides alone the longer one keeps none anyway.
        let shorter = self.model.d_model.min(self.model.d_ff);
        let wanted = self.optimizer.soap.soap_sides == Sides::Both || shorter > limit;
        let told = self.optimizer.common.kind == OptimizerKind::Soap && wanted && !long.is_empty();
        let sides = long.join(" and ");
        told.then(|| {
            format!("note: optimizer.soap_limit = {limit}: sides of {sides} keep no basis, and take AdamW's steps along them")
        })
    }

    /// How the corpus is read.
    pub fn reading(&self) -> Reading {
        let train = Shape { rows: self.batch, sequence: self.data.sequence };
        let eval = Shape { rows: self.eval_batch(), sequence: self.eval_sequence() };
        let eval_tokens = self.eval.as_ref().and_then(|eval| eval.tokens);
        Reading { seed: self.seed, order: self.order(), train, eval, eval_tokens }
    }

    /// In which order rows read the text.
    pub fn order(&self) -> Order {
        let by_memory = if self.model.mem_len > 0 { Order::Streams } else { Order::Shuffled };
        self.data.order.unwrap_or(by_memory)
    }

    /// Tokens a sequence of an evaluation.
    pub fn eval_sequence(&self) -> usize {
        self.eval.as_ref().and_then(|eval| eval.sequence).unwrap_or(self.data.sequence)
    }

    /// Tokens that the layers remember in an evaluation.
    pub fn eval_mem_len(&self) -> usize {
        self.eval.as_ref().and_then(|eval| eval.mem_len).unwrap_or(self.model.mem_len)
    }

    /// Streams of an evaluation, all replicas together.
    pub fn eval_batch(&self) -> usize {
        self.eval.as_ref().and_then(|eval| eval.batch).unwrap_or(self.batch)
    }

    /// Reads a config file, then `--set key=value` pairs over it, then `--grid` over both.
    ///
    /// # Errors
    /// What cannot be read, an unknown key, a value of the wrong type: [`Error::Config`] with the
    /// key's full name.
    pub fn load(path: &Path, sets: &[String], grid: Option<Grid>) -> Result<Config> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::config("CONFIG", path.display(), format!("cannot be read ({error})"))
        })?;

        let mut config = Config::parse(&text, sets).map_err(|error| match error {
            Error::Config { setting, found, remedy } if setting == "CONFIG" => {
                Error::Config { setting, found: format!("{} {found}", path.display()), remedy }
            }
            other => other,
        })?;

        if let Some(grid) = grid {
            config.grid.stages = grid.stages;
            config.grid.replicas = grid.replicas;
        }

        Ok(config)
    }

    /// The same from text; for files that are not files.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, sets: &[String]) -> Result<Config> {
        parse::parse(text, sets)
    }

    /// The same with every default that may change written out, as it is saved.
    pub fn settled(&self) -> Config {
        Config { optimizer: self.optimizer.settled(), ..self.clone() }
    }

    /// The config as TOML, every key written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(&self.settled()).unwrap_or_else(|error| format!("# {error}\n"))
    }

    /// What differs from the defaults, and the model's family and sizes in any case.
    pub fn to_short_toml(&self) -> String {
        let table = |config: &Config| toml::Table::try_from(config).unwrap_or_default();
        let mut table_of = table(self);
        let mut default = table(&Config::default());
        if let Some(model) = default.get_mut("model").and_then(toml::Value::as_table_mut) {
            let sizes = ["arch", "layers", "d_model", "heads", "d_ff", "tie"];
            model.retain(|key, _| !sizes.contains(&key));
        }
        leave_out(&mut table_of, &default);
        toml::to_string(&table_of).unwrap_or_else(|error| format!("# {error}\n"))
    }

    /// The grid that is asked for.
    pub fn grid(&self) -> Grid {
        let (placement, order) = (self.grid.placement, self.grid.order);
        Grid { placement, order, ..Grid::line(self.grid.stages, self.grid.replicas) }
    }
}

/// Takes out of a table what is as in another, and what is empty then.
fn leave_out(table: &mut toml::Table, default: &toml::Table) {
    table.retain(|key, value| match (value, default.get(key)) {
        (toml::Value::Table(inner), Some(toml::Value::Table(default))) => {
            leave_out(inner, default);
            !inner.is_empty()
        }
        (value, default) => default != Some(&*value),
    });
}

/// The values of a tree, each by its keys from the root on, as `--set` names them.
pub fn flatten(key: &str, value: serde_json::Value, into: &mut Vec<(String, serde_json::Value)>) {
    match value {
        serde_json::Value::Object(section) => {
            for (name, value) in section {
                let key = if key.is_empty() { name } else { format!("{key}.{name}") };
                flatten(&key, value, into);
            }
        }
        serde_json::Value::Null => {}
        value => into.push((key.to_owned(), value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str, sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Config::parse(text, &sets).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_config_is_the_default() {
        assert_eq!(Config::parse("", &[]).unwrap(), Config::default());
    }

    #[test]
    fn the_written_config_reads_back() {
        let text = "steps = 7\n[grid]\nlayers_per_stage = [1, 3]\n[data]\nheld_out = \"x.txt\"\n[eval]\nevery = 5\n";
        let config = Config::parse(text, &[]).unwrap();
        let read = Config::parse(&config.to_toml(), &[]).unwrap();
        assert_eq!((&read, &read.settled()), (&config.settled(), &read));
    }

    #[test]
    fn a_harmful_prediction_is_told() {
        let notes = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
            Config::parse("[optimizer]\nkind = \"sgd\"\npredict = \"update\"", &sets)
                .unwrap()
                .notes()
        };
        assert!(notes(&[]).is_empty());
        assert!(notes(&["optimizer.momentum=0.0"])[0].contains("optimizer.predict"));
        assert!(notes(&["optimizer.momentum=0.0", "optimizer.predict=off"]).is_empty());
    }

    #[test]
    fn sides_that_keep_no_basis_are_told() {
        let notes = |kind: &str, limit: usize| {
            let text = format!(
                "[model]\nd_model = 32\nd_ff = 128\n[optimizer]\nkind = \"{kind}\"\nsoap_limit = {limit}"
            );
            Config::parse(&text, &[]).unwrap().notes()
        };
        assert!(notes("soap", 64)[0].contains("sides of 128 keep no basis"));
        assert!(notes("soap", 16)[0].contains("sides of 32 and 128"));
        assert!(notes("soap", 128).is_empty());

        // With the smaller sides alone the longer one keeps none anyway.
        assert!(
            notes("soap", 64).len() == 1 && notes("soap\"\nsoap_sides = \"smaller", 64).is_empty()
        );
        assert!(notes("soap\"\nsoap_sides = \"smaller", 16)[0].contains("sides of 32 and 128"));
    }

    /// A key of a rule that is not asked for does nothing: refused, unless the file is for another
    /// kind than `--set` says.
    #[test]
    fn a_key_of_another_rule_is_refused() {
        let refused = |text: &str, sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
            let config = Config::parse(&format!("[optimizer]\n{text}"), &sets).unwrap();
            crate::optim::check(&config.optimizer).err().map(|error| error.to_string())
        };
        insta::assert_snapshot!(refused("momentum = 0.5", &[]).unwrap(), @r#"
        setting `optimizer.momentum`: found 0.5; a key of kind = "sgd"; with kind = "adamw" leave it out
        "#);
        insta::assert_snapshot!(refused("kind = \"sgd\"\nbetas = [0.8, 0.9]", &[]).unwrap(), @r#"
        setting `optimizer.betas`: found [0.8, 0.9]; a key of kind = "adamw", "muon", "soap"; with kind = "sgd" leave it out
        "#);
        assert!(
            refused("kind = \"muon\"\nsoap_every = 5", &[])
                .unwrap()
                .contains("`optimizer.soap_every`: found 5")
        );
        assert!(
            refused("", &["optimizer.muon_momentum=0.5"])
                .unwrap()
                .contains("`optimizer.muon_momentum`")
        );
        assert_eq!(refused("kind = \"soap\"\nbetas = [0.8, 0.9]\nsoap_every = 5", &[]), None);

        assert_eq!(refused("betas = [0.8, 0.9]", &["optimizer.kind=sgd"]), None);
        assert_eq!(
            refused("kind = \"soap\"\nsoap_every = 5\neps = 1e-6", &["optimizer.kind=\"muon\""]),
            None
        );
        assert!(
            refused("momentum = 0.5", &["optimizer.kind=soap"])
                .unwrap()
                .contains("`optimizer.momentum`")
        );
        assert!(
            refused("betas = [0.8, 0.9]", &["optimizer.kind=sgd", "optimizer.eps=1e-6"]).is_some()
        );
    }

    #[test]
    fn set_overrides_any_key() {
        let sets = [
            "model.d_model=256",
            "schedule=1f1b",
            "data.path=a b.txt",
            "eval.every=10",
            "optimizer.lr=3e-4",
        ];
        let config = Config::parse("[model]\nd_model = 64", &sets.map(str::to_owned)).unwrap();
        assert_eq!(config.model.d_model, 256);
        assert_eq!(config.schedule, ScheduleKind::OneForwardOneBackward);
        assert_eq!(config.data.path, Some("a b.txt".into()));
        assert_eq!(config.eval.unwrap().every, 10);
        assert_eq!(config.optimizer.common.lr, 3e-4);
    }

    #[test]
    fn errors_name_setting_value_and_remedy() {
        insta::assert_snapshot!(error("[model]\nd_modle = 3", &[]), @r"
        setting `model.d_modle`: found an unknown key; expected one of `arch`, `layers`, `d_model`, `heads`, `d_head`, `kv_heads`, `d_ff`, `dropout`, `cutoffs`, `div_val`, `project_all`, `vocabulary`, `positions`, `rope_theta`, `rope_scaling`, `attention_bias`, `qk_norm`, `embedding_width`, `head_width`, `embedding_std`, `tie`, `tie_gradient`, `mem_len`, `clamp_len`, `same_length`, `shared_biases`, `norm`, `norm_eps`, `final_norm`, `init`, `init_std`, `attention_dropout`, `loss_chunk_mib`, `z_loss`
        ");
        insta::assert_snapshot!(error("stepz = 3", &[]), @r"
        setting `stepz`: found an unknown key; expected one of `name`, `seed`, `steps`, `batch`, `microbatches`, `schedule`, `slack`, `recompute`, `sync_steps`, `sync_at`, `threads`, `device`, `allow_shared_gpu`, `deterministic`, `precision`, `wire`, `bucket_kib`, `stall_seconds`, `on_nonfinite`, `verify_every`, `sink`, `grid`, `model`, `data`, `optimizer`, `eval`, `checkpoint`, `staleness`
        ");
        insta::assert_snapshot!(error("", &["steps=many"]), @r#"
        setting `steps`: found invalid type: string "many"; expected a whole number, 0 or more
        "#);
        insta::assert_snapshot!(error("steps = -1", &[]), @r"
        setting `steps`: found invalid value: integer `-1`; expected a whole number, 0 or more
        ");
        insta::assert_snapshot!(error("[optimizer]\nlr = \"fast\"", &[]), @r#"
        setting `optimizer.lr`: found invalid type: string "fast"; expected a number
        "#);
        insta::assert_snapshot!(error("", &["optimizer.betas=[0.9, true]"]), @r"
        setting `optimizer.betas[1]`: found invalid type: boolean `true`; expected a number
        ");
        insta::assert_snapshot!(error("[optimizer]\nbeta = 0.9", &[]), @r"
        setting `optimizer.beta`: found an unknown key; expected one of `kind`, `lr`, `weight_decay`, `clip`, `clip_scope`, `predict`, `predict_scale`, `schedule`, `warmup`, `min_lr`, `decay_steps`, `decay`, `betas`, `eps`, `lead`, `momentum`, `muon_momentum`, `soap_sides`, `soap_every`, `soap_limit`
        ");
        assert!(
            error("[optimizer]\noptimizer = 1", &[])
                .starts_with("setting `optimizer.optimizer`: found an unknown key")
        );
        assert!(
            error("[optimizer]\nr = 1", &[])
                .starts_with("setting `optimizer.r`: found an unknown key")
        );
        insta::assert_snapshot!(error("[optimizer]\nkind = \"adam\"", &[]), @r"
        setting `optimizer.kind`: found unknown variant `adam`; expected one of `adamw`, `sgd`, `muon`, `soap`
        ");
        insta::assert_snapshot!(error("schedule = \"fast\"", &[]), @r"
        setting `schedule`: found unknown variant `fast`; expected one of `decoupled`, `1f1b`, `gpipe`, `sequential`
        ");
        insta::assert_snapshot!(error("[grid]\nlayers_per_stage = \"even\"", &[]), @r#"
        setting `grid.layers_per_stage`: found a value that does not fit; `"balanced"` or a list of layer counts such as [2, 3, 3]
        "#);
        insta::assert_snapshot!(error("recompute = \"layers\"", &[]), @r#"
        setting `recompute`: found a value that does not fit; `true`, `false` or `"blocks"`
        "#);
        insta::assert_snapshot!(error("steps = \n", &[]), @r"
        setting `CONFIG`: found not TOML in line 1; string values must be quoted, expected literal string
        ");
        insta::assert_snapshot!(error("", &["steps"]), @r"
        setting `--set`: found `steps`; write key=value, as in model.d_model=256
        ");
        insta::assert_snapshot!(error("steps = 3", &["steps.x=1"]), @r"
        setting `--set`: found `steps.x=1`; `steps` is not a section
        ");
    }
}
