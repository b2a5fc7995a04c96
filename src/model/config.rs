//! The section `[model]`, and its check.

use serde::{Deserialize, Serialize};

use super::TABLE_STD;
use super::architecture::{Architecture, Positions};
use crate::error::{Error, Result};
use crate::schedule::Tie;

/// The architectures; what each is stands in its [`Architecture`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Arch {
    /// Pre-LN decoder with learned positions, GELU and causal attention.
    Transformer,
    /// GPT-2 exactly: its GELU, and no scale of the embedding.
    Gpt2,
    /// Llama, Qwen2, Qwen3, Mistral, SmolLM2: RMSNorm, rotary positions, SwiGLU, shared keys and
    /// values.
    Llama,
    /// Segment recurrence, relative positions, ReLU; post-LN unless asked otherwise.
    #[serde(rename = "transformer-xl")]
    TransformerXl,
}

/// Where a layer normalises.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// Before each branch, and once more before the head.
    Pre,
    /// After each residual sum.
    Post,
}

/// How the parameters of a model begin; tables have `embedding_std`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InitKind {
    /// Matrices by the width of the model, those that end a residual branch smaller by the root of
    /// twice the layers.
    Scaled,
    /// Everything with one standard deviation, the weights of normalisations around 1, as the
    /// public code of Transformer-XL has it.
    Normal,
}

/// Which products of a Llama's attention have a bias.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum AttentionBias {
    /// None of them.
    #[default]
    None,
    /// Queries, keys and values, as in Qwen2.
    Qkv,
    /// The output too.
    All,
}

/// How rotary positions are stretched for texts that are longer than those a model began with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum RopeScaling {
    /// All frequencies by one factor.
    Linear {
        /// What they are divided by.
        factor: f64,
    },
    /// Slow waves by a factor, fast ones not at all, as in Llama 3.1.
    Llama3 {
        /// What slow frequencies are divided by.
        factor: f64,
        /// Waves of which fewer go into `original_positions` are slow.
        low_freq_factor: f64,
        /// Waves of which more go into them are fast.
        high_freq_factor: f64,
        /// The longest text that the model began with, tokens.
        original_positions: usize,
    },
}

fn is_false(value: &bool) -> bool {
    !value
}

/// The model's sizes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// The family.
    pub arch: Arch,
    /// Blocks, embedding and head not counted.
    pub layers: usize,
    /// Width of hidden states, D.
    pub d_model: usize,
    /// Heads of the attention, as wide as `d_model` together unless `d_head` is given.
    pub heads: usize,
    /// Width of a head; none: `d_model / heads`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_head: Option<usize>,
    /// Llama: heads of keys and values, each of which serves `heads / kv_heads` queries; none:
    /// `heads`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Width of the feed-forward, F.
    pub d_ff: usize,
    /// After the embedding and on both branches of every layer; in a Transformer-XL also on the
    /// positions, inside the position-wise network and before the head.
    pub dropout: f64,
    /// Tokens after which a new cluster of the vocabulary begins, for adaptive input and softmax;
    /// none: one cluster.
    pub cutoffs: Vec<usize>,
    /// Every cluster's rows are narrower than those of the one before by this factor.
    pub div_val: usize,
    /// With `div_val`: rows that are as wide as the model are projected, too, as in the public code
    /// of Transformer-XL.
    #[serde(skip_serializing_if = "is_false")]
    pub project_all: bool,
    /// Tokens that the tables have rows for; none: as many as the text has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<usize>,
    /// The longest text, tokens: rows of learned positions, and what an exported model says of
    /// rotary ones; none: `data.sequence`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positions: Option<usize>,
    /// Llama: the base of the rotary positions' frequencies; none: 10000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// Llama: how rotary positions are stretched, as in `{ kind = "linear", factor = 2.0 }` or
    /// `{ kind = "llama3", factor = 8.0, low_freq_factor = 1.0, high_freq_factor = 4.0,
    /// original_positions = 8192 }`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Llama: products of the attention that have a bias.
    pub attention_bias: AttentionBias,
    /// Llama: an RMSNorm of every head's queries and keys, as in Qwen3.
    #[serde(skip_serializing_if = "is_false")]
    pub qk_norm: bool,
    /// Width of the embedding's rows; none: `d_model`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_width: Option<usize>,
    /// Width of the head's rows; none: `d_model`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_width: Option<usize>,
    /// Standard deviation of the initial values of the embedding's tables, of the positions too.
    /// GPT-2's 0.02 suits small learning rates; delayed steps stand larger values (0.2) better. The
    /// embedding of a tied table is multiplied by 0.02 / `embedding_std`, its head by the root of
    /// that (not of a `gpt2` or `llama`, whose tables are used as they are).
    pub embedding_std: f64,
    /// Whether embedding and head share one table, and how it is updated under delay.
    pub tie: Tie,
    /// What a tied table's gradient is made of its two parts.
    pub tie_gradient: TieGradient,
    /// Tokens that every layer of a Transformer-XL remembers of earlier segments.
    pub mem_len: usize,
    /// Transformer-XL: distances beyond this one count as this one; none, or 0: they count as they
    /// are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clamp_len: Option<usize>,
    /// Transformer-XL: every query looks at `mem_len` keys.
    pub same_length: bool,
    /// Transformer-XL: all layers have the two biases of their attention in common, as in the
    /// paper's code. Layers of several stages cannot: it would be one parameter with a delay for
    /// each.
    #[serde(skip_serializing_if = "is_false")]
    pub shared_biases: bool,
    /// By default post for a Transformer-XL; a Transformer is pre.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<Norm>,
    /// What normalisations add before they take a root; none: 1e-5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm_eps: Option<f64>,
    /// Whether the head normalises once more; by default where the layers normalise before their
    /// branches. The public Transformer-XL does not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub final_norm: Option<bool>,
    /// How parameters begin.
    pub init: InitKind,
    /// Standard deviation of `init = "normal"`; none: 0.02.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_std: Option<f64>,
    /// Of the attention's probabilities (Transformer-XL).
    pub attention_dropout: f64,
    /// Logits are made for so many tokens at a time that they take no more than this, MiB (without
    /// `cutoffs`, whose softmaxes are short). Every chunk goes over the gradient of the whole head:
    /// with a large vocabulary more is faster.
    pub loss_chunk_mib: usize,
    /// What the square of the softmax's logarithmic normaliser costs: 1e-4 keeps logits from
    /// drifting away. It is in the gradient, not in the loss that is told.
    pub z_loss: f64,
}

impl ModelConfig {
    /// What its family is.
    pub fn architecture(&self) -> &'static Architecture {
        self.arch.architecture()
    }

    /// Where the layers normalise.
    pub fn norm(&self) -> Norm {
        self.norm.unwrap_or(self.architecture().norms[0])
    }

    /// Whether the head normalises once more.
    pub fn final_norm(&self) -> bool {
        self.final_norm.unwrap_or(self.norm() == Norm::Pre)
    }

    /// The same with what is meant where nothing is said; of rotary positions any length.
    pub fn settled(&self) -> ModelConfig {
        let rotary = self.architecture().is_rotary();
        ModelConfig {
            d_head: Some(self.d_head.unwrap_or(self.d_model / self.heads.max(1))),
            kv_heads: rotary.then(|| self.kv_heads.unwrap_or(self.heads)),
            rope_theta: rotary.then(|| self.rope_theta()),
            positions: self.positions.filter(|_| !rotary),
            norm: Some(self.norm()),
            norm_eps: Some(self.norm_eps()),
            final_norm: Some(self.final_norm()),
            ..self.clone()
        }
    }

    /// What normalisations add before they take a root.
    pub fn norm_eps(&self) -> f64 {
        self.norm_eps.unwrap_or(1e-5)
    }

    /// The base of the rotary positions' frequencies.
    pub fn rope_theta(&self) -> f64 {
        self.rope_theta.unwrap_or(10_000.0)
    }

    /// Whether every key can be used, by itself and with the others of the section.
    ///
    /// # Errors
    /// [`Error::Config`] for the first that cannot.
    pub fn check(&self) -> Result<()> {
        Error::unless_at_least_one("model.layers", self.layers)?;
        Error::unless_at_least_one("model.d_model", self.d_model)?;
        Error::unless_at_least_one("model.heads", self.heads)?;
        Error::unless_at_least_one("model.d_ff", self.d_ff)?;
        Error::unless_at_least_one("model.d_head", self.d_head.unwrap_or(1))?;
        if self.d_head.is_none() && !self.d_model.is_multiple_of(self.heads) {
            let remedy =
                format!("must be a multiple of model.heads = {}, or set model.d_head", self.heads);
            return Err(Error::config("model.d_model", self.d_model, remedy));
        }

        for (setting, rate) in
            [("model.dropout", self.dropout), ("model.attention_dropout", self.attention_dropout)]
        {
            Error::unless(
                (0.0..1.0).contains(&rate),
                setting,
                rate,
                "must be at least 0 and below 1",
            )?;
        }

        let std = self.embedding_std;
        Error::unless(std > 0.0, "model.embedding_std", std, "must be above 0")?;
        let init_std = self.init_std.unwrap_or(TABLE_STD);
        Error::unless(init_std > 0.0, "model.init_std", init_std, "must be above 0")?;
        if let Some(std) = self.init_std.filter(|_| self.init == InitKind::Scaled) {
            return Err(Error::config(
                "model.init_std",
                std,
                "means something with model.init = \"normal\" only",
            ));
        }

        Error::unless_at_least_one("model.vocabulary", self.vocabulary.unwrap_or(1))?;
        Error::unless_at_least_one("model.positions", self.positions.unwrap_or(1))?;
        Error::unless_at_least_one("model.loss_chunk_mib", self.loss_chunk_mib)?;
        Error::unless(self.norm_eps() > 0.0, "model.norm_eps", self.norm_eps(), "must be above 0")?;
        Error::unless(self.z_loss >= 0.0, "model.z_loss", self.z_loss, "must be 0 or more")?;
        if self.z_loss > 0.0 && !self.cutoffs.is_empty() {
            let remedy = "means something without model.cutoffs only";
            return Err(Error::config("model.z_loss", self.z_loss, remedy));
        }

        self.check_widths()?;
        self.check_architecture()?;
        self.check_rotary()
    }

    /// Widths of embedding and head, and what a tie needs of them.
    fn check_widths(&self) -> Result<()> {
        Error::unless_at_least_one("model.div_val", self.div_val)?;
        let widths = [
            ("model.embedding_width", self.embedding_width),
            ("model.head_width", self.head_width),
        ];

        for (setting, width) in widths {
            Error::unless_at_least_one(setting, width.unwrap_or(1))?;
        }

        if self.div_val > 1 && self.cutoffs.is_empty() {
            return Err(Error::config(
                "model.div_val",
                self.div_val,
                "means something with model.cutoffs only",
            ));
        }

        if self.project_all && self.div_val == 1 {
            return Err(Error::config(
                "model.project_all",
                true,
                "means something with model.div_val > 1 only",
            ));
        }

        let embedding = self.embedding_width.unwrap_or(self.d_model);
        let head = self.head_width.unwrap_or(self.d_model);
        let (narrowest, clusters) = (embedding.min(head), self.cutoffs.len() as u32);
        if self.div_val.checked_pow(clusters).is_none_or(|scale| scale > narrowest) {
            let remedy = format!(
                "{clusters} further clusters leave less than one value of a width of {narrowest}"
            );

            return Err(Error::config("model.div_val", self.div_val, remedy));
        }

        if self.tie != Tie::Untied && embedding != head {
            let found = format!("{embedding}, and a head_width of {head}");
            let remedy = "a tied table has one width: make them equal, or set model.tie = \"none\"";
            return Err(Error::config("model.embedding_width", found, remedy));
        }

        Ok(())
    }

    /// Heads and positions of a Llama.
    fn check_rotary(&self) -> Result<()> {
        let groups = self.kv_heads.unwrap_or(self.heads);
        let divides = groups > 0 && self.heads.is_multiple_of(groups);
        let remedy = format!("must divide model.heads = {}", self.heads);
        Error::unless(divides, "model.kv_heads", groups as f64, &remedy)?;

        let theta = self.rope_theta();
        let usable = theta > 0.0 && theta.is_finite();
        Error::unless(usable, "model.rope_theta", theta, "must be above 0")?;
        let width = self.d_head.unwrap_or(self.d_model / self.heads);
        if self.architecture().is_rotary() && !width.is_multiple_of(2) {
            let remedy = "rotary positions turn pairs of values: a head's width must be even";
            return Err(Error::config("model.d_head", width, remedy));
        }

        let (factor, waves) = match &self.rope_scaling {
            None => return Ok(()),
            Some(RopeScaling::Linear { factor }) => (*factor, None),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            }) => (*factor, Some((*low_freq_factor, *high_freq_factor, *original_positions))),
        };

        Error::unless(factor > 0.0, "model.rope_scaling.factor", factor, "must be above 0")?;
        let Some((low, high, original)) = waves else { return Ok(()) };
        Error::unless_at_least_one("model.rope_scaling.original_positions", original)?;
        let remedy = format!("must be above 0 and below high_freq_factor = {high}");
        Error::unless(low > 0.0 && low < high, "model.rope_scaling.low_freq_factor", low, &remedy)
    }

    /// Keys that only some architectures have.
    fn check_architecture(&self) -> Result<()> {
        let architecture = self.architecture();
        let given = |given: bool, value: String| given.then_some(value);
        let recurrent = [
            ("model.mem_len", given(self.mem_len > 0, self.mem_len.to_string())),
            ("model.clamp_len", self.clamp_len.map(|clamp| clamp.to_string())),
            ("model.same_length", given(self.same_length, "true".into())),
            ("model.shared_biases", given(self.shared_biases, "true".into())),
        ];

        for (setting, found) in recurrent.into_iter().filter(|_| !architecture.has_memory) {
            found.map_or(Ok(()), |found| {
                Err(Architecture::refuse(setting, found, |other| other.has_memory))
            })?;
        }

        let rotary = [
            ("model.kv_heads", self.kv_heads.map(|heads| heads.to_string())),
            ("model.rope_theta", self.rope_theta.map(|theta| theta.to_string())),
            (
                "model.rope_scaling",
                self.rope_scaling.as_ref().map(|scaling| format!("{scaling:?}")),
            ),
            (
                "model.attention_bias",
                given(self.attention_bias != AttentionBias::None, "a bias".into()),
            ),
            ("model.qk_norm", given(self.qk_norm, "true".into())),
        ];

        for (setting, found) in rotary.into_iter().filter(|_| !architecture.is_rotary()) {
            found.map_or(Ok(()), |found| {
                Err(Architecture::refuse(setting, found, Architecture::is_rotary))
            })?;
        }

        let has_positions = |other: &Architecture| other.positions != Positions::Relative;
        if let Some(positions) = self.positions.filter(|_| !has_positions(architecture)) {
            return Err(Architecture::refuse("model.positions", positions, has_positions));
        }

        if !architecture.norms.contains(&self.norm()) {
            let word = if self.norm() == Norm::Post { "post" } else { "pre" };
            return Err(Architecture::refuse("model.norm", word, |other| {
                other.norms.contains(&self.norm())
            }));
        }

        if self.attention_dropout > 0.0 && !architecture.has_attention_dropout {
            let rate = self.attention_dropout;
            return Err(Architecture::refuse("model.attention_dropout", rate, |other| {
                other.has_attention_dropout
            }));
        }

        Ok(())
    }

    /// Rows of the tables for a text of so many tokens.
    ///
    /// # Errors
    /// [`Error::Config`] about `model.vocabulary`, if there are fewer.
    pub fn table_rows(&self, tokens: usize) -> Result<usize> {
        match self.vocabulary {
            Some(rows) if rows < tokens => {
                let remedy = format!("the text has {tokens} tokens; make it as many, or more");
                Err(Error::config("model.vocabulary", rows, remedy))
            }
            rows => Ok(rows.unwrap_or(tokens)),
        }
    }

    /// Positions that are learned, of a model that begins with sequences of `sequence` tokens; none:
    /// any length can be read.
    pub fn learned_positions(&self, sequence: usize) -> Option<usize> {
        let learned = self.architecture().positions == Positions::Learned;
        learned.then(|| self.positions.unwrap_or(sequence))
    }

    /// Whether the clusters of the vocabulary fit it.
    ///
    /// # Errors
    /// [`Error::Config`] about `model.cutoffs`.
    pub fn check_cutoffs(&self, vocabulary: usize) -> Result<()> {
        let cutoffs = &self.cutoffs;
        let rising = cutoffs.windows(2).all(|pair| pair[0] < pair[1]);
        if rising
            && cutoffs.first() != Some(&0)
            && cutoffs.last().is_none_or(|last| *last < vocabulary)
        {
            return Ok(());
        }

        let remedy =
            format!("rising numbers above 0 and below the size of the vocabulary, {vocabulary}");
        Err(Error::config("model.cutoffs", format!("{cutoffs:?}"), remedy))
    }
}

/// How the two parts of a tied table's gradient are put together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
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
            d_head: None,
            kv_heads: None,
            d_ff: 512,
            dropout: 0.0,
            cutoffs: Vec::new(),
            div_val: 1,
            project_all: false,
            vocabulary: None,
            positions: None,
            rope_theta: None,
            rope_scaling: None,
            attention_bias: AttentionBias::None,
            qk_norm: false,
            embedding_width: None,
            head_width: None,
            embedding_std: TABLE_STD,
            tie: Tie::Aligned,
            tie_gradient: TieGradient::Sum,
            mem_len: 0,
            clamp_len: None,
            same_length: false,
            shared_biases: false,
            norm: None,
            norm_eps: None,
            final_norm: None,
            init: InitKind::Scaled,
            init_std: None,
            attention_dropout: 0.0,
            loss_chunk_mib: 16,
            z_loss: 0.0,
        }
    }
}
