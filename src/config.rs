//! What is asked for: the keys of a config file. `setup` checks them once into values that nobody checks again.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::grid::{Grid, Placement};
use crate::schedule::{Kind, Tie};

/// A run. Every key has a default, so a config file holds only what differs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    pub schedule: Kind,
    /// Slack h per hop: 1, or 2 where messages take time.
    pub slack: usize,
    /// Keep only the stage input of a microbatch and run its forward again in the backward.
    pub recompute: bool,
    /// The first n steps are sync points: synchronous warm-up.
    pub sync_steps: usize,
    /// Further sync points, as step numbers.
    pub sync_at: Vec<usize>,
    /// Threads a rank.
    pub threads: usize,
    pub grid: GridConfig,
    pub model: ModelConfig,
    pub data: DataConfig,
    pub optimizer: OptimizerConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalConfig>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            name: "run".into(),
            seed: 1,
            steps: 500,
            batch: 32,
            microbatches: 4,
            schedule: Kind::Decoupled,
            slack: 1,
            recompute: false,
            sync_steps: 0,
            sync_at: Vec::new(),
            threads: 1,
            grid: GridConfig::default(),
            model: ModelConfig::default(),
            data: DataConfig::default(),
            optimizer: OptimizerConfig::default(),
            eval: None,
        }
    }
}

/// The grid and what stands on it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GridConfig {
    pub stages: usize,
    pub replicas: usize,
    /// `line`, or `ring`: the last stage on the first one's device.
    pub placement: Placement,
    pub layers_per_stage: LayersPerStage,
    /// Delays `D_k`, one a stage, where the least ones are not wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delays: Option<Vec<usize>>,
}

impl Default for GridConfig {
    fn default() -> GridConfig {
        GridConfig {
            stages: 1,
            replicas: 1,
            placement: Placement::Line,
            layers_per_stage: LayersPerStage::Word(Balanced::Balanced),
            delays: None,
        }
    }
}

/// `"balanced"`, or how many layers every stage has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "`\"balanced\"` or a list of layer counts such as [2, 3, 3]")]
pub enum LayersPerStage {
    Word(Balanced),
    Counts(Vec<usize>),
}

/// The word `balanced`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Balanced {
    Balanced,
}

/// The architectures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arch {
    /// Pre-LN decoder with learned positions, GELU and causal attention.
    Transformer,
    /// Segment recurrence, relative positions, ReLU; post-LN unless asked otherwise.
    #[serde(rename = "transformer-xl")]
    TransformerXl,
}

/// Where a layer normalises.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// Before each branch, and once more before the head.
    Pre,
    /// After each residual sum.
    Post,
}

/// The model's sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    pub arch: Arch,
    pub layers: usize,
    pub d_model: usize,
    pub heads: usize,
    pub d_ff: usize,
    /// After the embedding and on both branches of every layer; in a Transformer-XL also on the positions, inside the
    /// position-wise network and before the head.
    pub dropout: f64,
    /// Tokens after which a new cluster of the vocabulary begins, for adaptive input and softmax; none: one cluster.
    pub cutoffs: Vec<usize>,
    /// Every cluster's rows are narrower than those of the one before by this factor.
    pub div_val: usize,
    /// Width of the embedding's and of the head's rows; none: `d_model`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_width: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_width: Option<usize>,
    /// Whether embedding and head share one table, and how it is updated under delay.
    pub tie: Tie,
    /// What a tied table's gradient is made of its two parts.
    pub tie_gradient: TieGradient,
    /// Tokens that every layer of a Transformer-XL remembers of earlier segments.
    pub mem_len: usize,
    /// Transformer-XL: distances beyond this one count as this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clamp_len: Option<usize>,
    /// Transformer-XL: every query looks at `mem_len` keys.
    pub same_length: bool,
    /// By default post for a Transformer-XL; a Transformer is pre.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<Norm>,
    /// Of the attention's probabilities (Transformer-XL).
    pub attention_dropout: f64,
}

impl ModelConfig {
    /// Where the layers normalise.
    pub fn norm(&self) -> Norm {
        match self.arch {
            Arch::Transformer => Norm::Pre,
            Arch::TransformerXl => self.norm.unwrap_or(Norm::Post),
        }
    }
}

/// How the two parts of a tied table's gradient are put together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TieGradient {
    /// The true gradient.
    Sum,
    /// Half of it, as in the paper.
    Mean,
}

impl Default for ModelConfig {
    fn default() -> ModelConfig {
        ModelConfig {
            arch: Arch::Transformer,
            layers: 4,
            d_model: 128,
            heads: 4,
            d_ff: 512,
            dropout: 0.0,
            cutoffs: Vec::new(),
            div_val: 1,
            embedding_width: None,
            head_width: None,
            tie: Tie::Aligned,
            tie_gradient: TieGradient::Sum,
            mem_len: 0,
            clamp_len: None,
            same_length: false,
            norm: None,
            attention_dropout: 0.0,
        }
    }
}

/// The text to train on. With none of `path`, `paths`, `synthetic`: 4,000,000 synthetic bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Files read one after the other as one text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paths: Option<Vec<PathBuf>>,
    /// Bytes of the embedded text, whose entropy rate is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub synthetic: Option<usize>,
    pub tokenizer: Tokenizer,
    /// Words that stand more rarely in the training text become `<unk>`.
    pub min_count: usize,
    /// A list of words, one a line, instead of those of the training text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<PathBuf>,
    /// Tokens a sequence, T.
    pub sequence: usize,
    /// By default streams where the model has a memory, else shuffled windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<Order>,
    pub held_out: HeldOut,
}

/// In which order the rows of a batch read the text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Windows in an order that every epoch shuffles.
    Shuffled,
    /// Every row of the batch goes through a part of the text of its own, from one step to the next.
    Streams,
}

impl Default for DataConfig {
    fn default() -> DataConfig {
        DataConfig {
            path: None,
            paths: None,
            synthetic: None,
            tokenizer: Tokenizer::Bytes,
            min_count: 1,
            vocabulary: None,
            sequence: 128,
            order: None,
            held_out: HeldOut::Fraction(0.05),
        }
    }
}

/// How text becomes tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tokenizer {
    /// 256 tokens, one a byte.
    Bytes,
    /// The characters of the text.
    Characters,
    /// What stands between white space; every line ends in `<eos>`.
    Words,
}

impl Tokenizer {
    /// As in a config.
    pub fn word(self) -> &'static str {
        match self {
            Tokenizer::Bytes => "bytes",
            Tokenizer::Characters => "characters",
            Tokenizer::Words => "words",
        }
    }

    /// What one token is called.
    pub fn unit(self) -> &'static str {
        match self {
            Tokenizer::Bytes => "byte",
            Tokenizer::Characters => "character",
            Tokenizer::Words => "word",
        }
    }
}

/// What evaluation reads: the last part of the corpus, a file of its own, or a split of a prepared file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a fraction between 0 and 1, or the path of a file")]
pub enum HeldOut {
    Fraction(f64),
    File(PathBuf),
}

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

/// Evaluation on the held-out text while training; each one is a sync point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalConfig {
    /// Steps between two evaluations; one more stands at the end of the run.
    #[serde(default = "default_every")]
    pub every: usize,
    /// Tokens of the held-out text to read; none: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// Tokens a sequence; none: those of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<usize>,
    /// Tokens that a Transformer-XL remembers; none: those of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_len: Option<usize>,
    /// Streams that the held-out text is read in, all replicas together; none: as many as a batch has rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
}

fn default_every() -> usize {
    100
}

impl Config {
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
    /// What cannot be read, an unknown key, a value of the wrong type: [`Error::Config`] with the key's full name.
    pub fn load(path: &Path, sets: &[String], grid: Option<Grid>) -> Result<Config> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::config("CONFIG", path.display(), format!("cannot be read ({error})")))?;
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
        let mut table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
            Error::config("CONFIG", format!("not TOML in line {line}"), error.message())
        })?;
        for set in sets {
            apply(&mut table, set)?;
        }
        serde_path_to_error::deserialize(toml::Value::Table(table))
            .map_err(|error| describe(&error.path().to_string(), error.inner().message()))
    }

    /// The config as TOML, every key written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| format!("# {error}\n"))
    }

    /// The grid that is asked for.
    pub fn grid(&self) -> Grid {
        Grid { placement: self.grid.placement, ..Grid::line(self.grid.stages, self.grid.replicas) }
    }
}

/// Puts one `key=value` into the table. The value is TOML; what is not TOML is taken as a string.
fn apply(table: &mut toml::Table, set: &str) -> Result<()> {
    let wrong = |remedy: &str| Error::config("--set", format!("`{set}`"), remedy);
    let (key, value) = set.split_once('=').ok_or_else(|| wrong("write key=value, as in model.d_model=256"))?;
    let value = match format!("v = {value}").parse::<toml::Table>() {
        Ok(mut parsed) => parsed.remove("v").ok_or_else(|| wrong("write key=value"))?,
        Err(_) => toml::Value::String(value.to_owned()),
    };
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|last| !last.is_empty()).ok_or_else(|| wrong("the key is missing"))?;
    let mut inner = table;
    for part in parts {
        let entry = inner.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        inner = entry.as_table_mut().ok_or_else(|| wrong(&format!("`{part}` is not a section")))?;
    }
    inner.insert(last.to_owned(), value);
    Ok(())
}

/// Turns serde's message into setting, value and remedy.
fn describe(path: &str, message: &str) -> Error {
    let message = message.trim();
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let (key, expected) = rest.split_once("`, expected ").unwrap_or((rest, "another key"));
        let section = path.strip_suffix(key).unwrap_or(path).trim_matches('.');
        let setting = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
        return Error::config(setting, "an unknown key", format!("expected {expected}"));
    }
    match message.split_once(", expected ") {
        Some((found, "usize" | "u64")) => Error::config(path, found, "expected a whole number, 0 or more"),
        Some((found, "f64")) => Error::config(path, found, "expected a number"),
        Some((found, expected)) => Error::config(path, found, format!("expected {expected}")),
        None => Error::config(path, "a value that does not fit", message),
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
        assert_eq!(Config::parse(&config.to_toml(), &[]).unwrap(), config);
    }

    #[test]
    fn set_overrides_any_key() {
        let sets = ["model.d_model=256", "schedule=1f1b", "data.path=a b.txt", "eval.every=10", "optimizer.lr=3e-4"];
        let config = Config::parse("[model]\nd_model = 64", &sets.map(str::to_owned)).unwrap();
        assert_eq!(config.model.d_model, 256);
        assert_eq!(config.schedule, Kind::OneForwardOneBackward);
        assert_eq!(config.data.path, Some("a b.txt".into()));
        assert_eq!(config.eval.unwrap().every, 10);
        assert_eq!(config.optimizer.lr, 3e-4);
    }

    #[test]
    fn errors_name_setting_value_and_remedy() {
        insta::assert_snapshot!(error("[model]\nd_modle = 3", &[]), @r"
        setting `model.d_modle`: found an unknown key; expected one of `arch`, `layers`, `d_model`, `heads`, `d_ff`, `dropout`, `cutoffs`, `div_val`, `embedding_width`, `head_width`, `tie`, `tie_gradient`, `mem_len`, `clamp_len`, `same_length`, `norm`, `attention_dropout`
        ");
        insta::assert_snapshot!(error("stepz = 3", &[]), @r"
        setting `stepz`: found an unknown key; expected one of `name`, `seed`, `steps`, `batch`, `microbatches`, `schedule`, `slack`, `recompute`, `sync_steps`, `sync_at`, `threads`, `grid`, `model`, `data`, `optimizer`, `eval`
        ");
        insta::assert_snapshot!(error("", &["steps=many"]), @r#"
        setting `steps`: found invalid type: string "many"; expected a whole number, 0 or more
        "#);
        insta::assert_snapshot!(error("steps = -1", &[]), @r"
        setting `steps`: found invalid value: integer `-1`; expected a whole number, 0 or more
        ");
        insta::assert_snapshot!(error("schedule = \"fast\"", &[]), @r"
        setting `schedule`: found unknown variant `fast`; expected one of `decoupled`, `1f1b`, `gpipe`, `sequential`
        ");
        insta::assert_snapshot!(error("[grid]\nlayers_per_stage = \"even\"", &[]), @r#"
        setting `grid.layers_per_stage`: found a value that does not fit; `"balanced"` or a list of layer counts such as [2, 3, 3]
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
