//! Tokens to hidden states: rows of a table, and in a Transformer the learned positions.

use tch::Tensor;

use super::{Dimensions, Dropout, Init, Layer, Parameter, Remembered, TABLE_STD};
use crate::config::Arch;
use crate::error::Result;

/// Layer 0 of the dropout keys.
const LAYER: usize = 0;

pub(super) struct Embedding {
    d: Dimensions,
}

impl Embedding {
    pub(super) fn new(d: &Dimensions) -> Embedding {
        Embedding { d: d.clone() }
    }
}

impl Layer for Embedding {
    fn name(&self) -> String {
        "embedding".to_owned()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let table = |name: &str, rows| {
            Parameter::new(format!("embedding.{name}"), &[rows, self.d.d_model], Init::Normal(TABLE_STD))
        };
        let tokens = Parameter { tied: self.d.tied, ..table("tokens", self.d.vocabulary) };
        match self.d.arch {
            Arch::Transformer => vec![tokens, table("positions", self.d.sequence)],
            Arch::TransformerXl => vec![tokens],
        }
    }

    /// `x`: [B, t] with t <= T -> [B, t, D].
    fn forward(&self, weights: &[Tensor], x: &Tensor, _: &mut Remembered, dropout: Option<Dropout>) -> Result<Tensor> {
        let hidden = Tensor::f_embedding(&weights[0], x, -1, false, false)?;
        let hidden = match weights.get(1) {
            Some(positions) => hidden.f_add(&positions.f_narrow(0, 0, x.size()[1])?)?,
            // As in the paper's code: the table is small where it serves as the head's matrix.
            None => hidden.f_mul_scalar((self.d.d_model as f64).sqrt())?,
        };
        match dropout {
            Some(dropout) => dropout.apply(hidden, LAYER, 0),
            None => Ok(hidden),
        }
    }

    /// The tokens, int64, and the mask; the sum that it multiplies is not kept.
    fn saved_per_token(&self) -> usize {
        2 + if self.d.dropout > 0.0 { self.d.d_model as usize } else { 0 }
    }

    /// The gradient of the output, and the sum before the positions are added.
    fn transient_per_token(&self) -> usize {
        2 * self.d.d_model as usize
    }
}
