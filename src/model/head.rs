//! Hidden states to logits: the last normalisation and an output matrix of its own.

use tch::Tensor;

use super::{Dimensions, Dropout, Init, Layer, Parameter, TABLE_STD, layer_norm};
use crate::error::Result;

pub(super) struct Head {
    vocabulary: i64,
    d_model: i64,
}

impl Head {
    pub(super) fn new(d: &Dimensions) -> Head {
        Head { vocabulary: d.vocabulary, d_model: d.d_model }
    }
}

impl Layer for Head {
    fn name(&self) -> String {
        "head".to_owned()
    }

    fn parameters(&self) -> Vec<Parameter> {
        vec![
            Parameter::new("head.norm.weight".into(), &[self.d_model], Init::Ones),
            Parameter::new("head.norm.bias".into(), &[self.d_model], Init::Zeros),
            Parameter::new("head.weight".into(), &[self.vocabulary, self.d_model], Init::Normal(TABLE_STD)),
        ]
    }

    /// `x`: [B, T, D] -> logits [B, T, V].
    fn forward(&self, weights: &[Tensor], x: &Tensor, _dropout: Option<Dropout>) -> Result<Tensor> {
        let [norm, bias, matrix] = weights else { unreachable!("the head has three parameters") };
        Ok(layer_norm(x, norm, bias)?.f_linear::<Tensor>(matrix, None)?)
    }

    /// The input and its normalised form: 2 D; the logarithm of the softmax: V; mean and deviation.
    fn saved_per_token(&self) -> usize {
        2 * self.d_model as usize + self.vocabulary as usize + 4
    }

    /// Logits and their gradient.
    fn transient_per_token(&self) -> usize {
        2 * self.vocabulary as usize + self.d_model as usize
    }
}
