//! Tokens to hidden states: a table of tokens plus a table of learned positions.

use tch::Tensor;

use super::{Dimensions, Dropout, Init, Layer, Parameter, TABLE_STD};
use crate::error::Result;

/// Layer 0 of the dropout keys.
const LAYER: usize = 0;

pub(super) struct Embedding {
    vocabulary: i64,
    sequence: i64,
    d_model: i64,
    dropout: f64,
    tied: bool,
}

impl Embedding {
    pub(super) fn new(d: &Dimensions) -> Embedding {
        Embedding {
            vocabulary: d.vocabulary,
            sequence: d.sequence,
            d_model: d.d_model,
            dropout: d.dropout,
            tied: d.tied,
        }
    }
}

impl Layer for Embedding {
    fn name(&self) -> String {
        "embedding".to_owned()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let table = |name: &str, rows| {
            Parameter::new(format!("embedding.{name}"), &[rows, self.d_model], Init::Normal(TABLE_STD))
        };
        vec![Parameter { tied: self.tied, ..table("tokens", self.vocabulary) }, table("positions", self.sequence)]
    }

    /// `x`: [B, t] with t <= T -> [B, t, D].
    fn forward(&self, weights: &[Tensor], x: &Tensor, _: &mut Option<Tensor>, dropout: Option<Dropout>) -> Result<Tensor> {
        let [tokens, positions] = weights else { unreachable!("embedding has two parameters") };
        let hidden = Tensor::f_embedding(tokens, x, -1, false, false)?;
        let hidden = hidden.f_add(&positions.f_narrow(0, 0, x.size()[1])?)?;
        match dropout {
            Some(dropout) => dropout.apply(hidden, LAYER, 0),
            None => Ok(hidden),
        }
    }

    /// The tokens, int64, and the mask; the sum that it multiplies is not kept.
    fn saved_per_token(&self) -> usize {
        2 + if self.dropout > 0.0 { self.d_model as usize } else { 0 }
    }

    /// The gradient of the output, and the sum before the positions are added.
    fn transient_per_token(&self) -> usize {
        2 * self.d_model as usize
    }
}
