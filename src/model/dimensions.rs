//! The sizes that every layer is made from.

use super::architecture::EmbeddingScale;
use super::cross_entropy::LossSettings;
use super::parameter::FirstValues;
use super::rotary::Rope;
use super::{Architecture, AttentionBias, ModelConfig, Norm, TABLE_STD, clusters};
use crate::schedule::Tie;

/// The sizes that every layer is made from.
#[derive(Debug, Clone)]
pub struct Dimensions {
    pub layers: usize,
    pub d_model: i64,
    pub heads: i64,
    /// W, the width of a head.
    pub d_head: i64,
    /// Heads of keys and values, each for `heads / kv_heads` queries.
    pub kv_heads: i64,
    pub d_ff: i64,
    pub vocabulary: i64,
    pub sequence: i64,
    /// Rows of learned positions.
    pub positions: i64,
    pub dropout: f64,
    /// Tokens after which a new cluster of the vocabulary begins.
    pub cutoffs: Vec<i64>,
    pub div_val: i64,
    /// Every cluster's rows are projected, those that are D wide too.
    pub project_all: bool,
    /// The share of the text's tokens that falls in each cluster: of Zipf's law, unless the text is
    /// known.
    pub shares: Vec<f64>,
    /// Of the rows of the embedding's and the head's first cluster.
    pub embedding_width: i64,
    pub head_width: i64,
    /// Standard deviation of the first values of the embedding's tables.
    pub embedding_std: f64,
    /// Whether the head's matrix is the embedding's table.
    pub tied: bool,
    pub architecture: &'static Architecture,
    /// It is computed in f32 on a processor.
    pub on_processor: bool,
    /// M, the tokens that a layer remembers of earlier segments while training.
    pub mem_len: i64,
    /// Distances beyond this one count as this one.
    pub clamp_len: Option<i64>,
    /// Every query looks at as many keys.
    pub same_length: bool,
    /// All layers have the biases of their attention in common.
    pub shared_biases: bool,
    /// Normalisation before each branch, else after it.
    pub pre_norm: bool,
    /// Normalisation before the head.
    pub final_norm: bool,
    pub attention_dropout: f64,
    /// What normalisations add before they take a root.
    pub norm_eps: f64,
    /// Queries, keys and values have biases; the attention's output has one.
    pub qkv_bias: bool,
    pub out_bias: bool,
    /// Every head's queries and keys are normalised.
    pub qk_norm: bool,
    pub(super) rope: Rope,
    pub(super) loss: LossSettings,
    pub(super) first_values: FirstValues,
}

impl Dimensions {
    /// A, the width of all heads together.
    pub fn attention_width(&self) -> i64 {
        self.heads * self.d_head
    }

    /// G, the width of all heads of keys together.
    pub fn key_width(&self) -> i64 {
        self.kv_heads * self.d_head
    }

    /// What the embedding is multiplied by on its way in; none: it is not.
    pub fn embedding_scale(&self) -> Option<f64> {
        let scaled = match self.architecture.embedding_scale {
            EmbeddingScale::Always => true,
            EmbeddingScale::WhereTied => self.tied,
            EmbeddingScale::Never => false,
        };
        scaled.then(|| (self.d_model as f64).sqrt() * self.table_scales()[0])
    }

    /// What a tied table's rows are multiplied by, as embedding and as head. Rows that begin larger
    /// make the same embedding at first, of which a step of the same length moves less: a learning
    /// rate of its own, for optimizers whose steps do not depend on the gradient's length. A head
    /// that moved as much less would learn too slowly, so it takes the root of that. Families whose
    /// embedding is never scaled keep their tables as they are.
    pub fn table_scales(&self) -> [f64; 2] {
        let scaled = self.tied && self.architecture.embedding_scale != EmbeddingScale::Never;
        let scale = if scaled { TABLE_STD / self.embedding_std } else { 1.0 };
        [scale, scale.sqrt()]
    }

    /// The sizes of a config's model over `vocabulary` tokens and sequences of `sequence`.
    pub fn new(model: &ModelConfig, vocabulary: usize, sequence: usize) -> Dimensions {
        let cutoffs: Vec<i64> = model.cutoffs.iter().map(|cut| *cut as i64).collect();
        Dimensions {
            layers: model.layers,
            d_model: model.d_model as i64,
            heads: model.heads as i64,
            d_head: model.d_head.unwrap_or(model.d_model / model.heads) as i64,
            kv_heads: model.kv_heads.unwrap_or(model.heads) as i64,
            d_ff: model.d_ff as i64,

            vocabulary: vocabulary as i64,
            sequence: sequence as i64,
            positions: model.positions.unwrap_or(sequence) as i64,
            dropout: model.dropout,
            shares: clusters::zipf(&cutoffs, vocabulary as i64),
            cutoffs,
            div_val: model.div_val as i64,
            project_all: model.project_all,
            embedding_width: model.embedding_width.unwrap_or(model.d_model) as i64,
            head_width: model.head_width.unwrap_or(model.d_model) as i64,

            embedding_std: model.embedding_std,
            tied: model.tie != Tie::Untied,
            architecture: model.architecture(),
            on_processor: true,

            mem_len: model.mem_len as i64,
            clamp_len: model.clamp_len.filter(|clamp| *clamp > 0).map(|clamp| clamp as i64),
            same_length: model.same_length,
            shared_biases: model.shared_biases,
            pre_norm: model.norm() == Norm::Pre,
            final_norm: model.final_norm(),
            attention_dropout: model.attention_dropout,
            norm_eps: model.norm_eps(),
            qkv_bias: model.attention_bias != AttentionBias::None,
            out_bias: model.attention_bias == AttentionBias::All,
            qk_norm: model.qk_norm,
            rope: Rope { theta: model.rope_theta(), scaling: model.rope_scaling.clone() },
            loss: LossSettings { chunk: model.loss_chunk_mib << 20, z_loss: model.z_loss },
            first_values: FirstValues::new(
                model.init,
                model.init_std.unwrap_or(TABLE_STD),
                model.d_model as i64,
                model.layers,
            ),
        }
    }
}
