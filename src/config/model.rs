//! The keys of `[model]`.

use serde::{Deserialize, Serialize};

use crate::schedule::Tie;

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
