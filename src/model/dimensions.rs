//! The sizes that every layer is made from.

use super::parameter::FirstValues;
use super::{Architecture, ModelConfig, Norm, TABLE_STD, clusters};
use crate::schedule::Tie;

/// The sizes that every layer is made from.
#[derive(Debug, Clone)]
pub struct Dimensions {
    pub layers: usize,
    pub d_model: i64,
    pub heads: i64,
    /// W, the width of a head.
    pub d_head: i64,
    pub d_ff: i64,
    pub vocabulary: i64,
    pub sequence: i64,
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
    pub(super) first_values: FirstValues,
}

impl Dimensions {
    /// A, the width of all heads together.
    pub fn attention_width(&self) -> i64 {
        self.heads * self.d_head
    }

    /// What a tied table's rows are multiplied by, as embedding and as head. Rows that begin larger
    /// make the same embedding at first, of which a step of the same length moves less: a learning
    /// rate of its own, for optimizers whose steps do not depend on the gradient's length. A head
    /// that moved as much less would learn too slowly, so it takes the root of that.
    pub fn table_scales(&self) -> [f64; 2] {
        let scale = if self.tied { TABLE_STD / self.embedding_std } else { 1.0 };
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
            d_ff: model.d_ff as i64,

            vocabulary: vocabulary as i64,
            sequence: sequence as i64,
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

            mem_len: model.mem_len as i64,
            clamp_len: model.clamp_len.filter(|clamp| *clamp > 0).map(|clamp| clamp as i64),
            same_length: model.same_length,
            shared_biases: model.shared_biases,
            pre_norm: model.norm() == Norm::Pre,
            final_norm: model.final_norm(),
            attention_dropout: model.attention_dropout,
            first_values: FirstValues::new(
                model.init,
                model.init_std.unwrap_or(TABLE_STD),
                model.d_model as i64,
                model.layers,
            ),
        }
    }
}
