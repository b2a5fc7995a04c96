//! Hidden states to a loss: the last normalisation and an output matrix, which with a tie is the embedding's table.

use tch::{Kind, Reduction, Tensor};

use super::{Dimensions, Dropout, Init, Parameter, TABLE_STD, layer_norm, table};
use crate::error::Result;

pub(super) struct Head {
    dimensions: Dimensions,
}

impl Head {
    pub(super) fn new(d: &Dimensions) -> Head {
        Head { dimensions: d.clone() }
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let d = &self.dimensions;
        let mut parameters = vec![
            Parameter::new("head.norm.weight".into(), &[d.d_model], Init::Ones),
            Parameter::new("head.norm.bias".into(), &[d.d_model], Init::Zeros),
        ];
        match d.tied {
            true => parameters.extend(table(d)),
            false => {
                parameters.push(Parameter::new("head.weight".into(), &[d.vocabulary, d.d_model], Init::Normal(TABLE_STD)))
            }
        }
        parameters
    }

    /// `x`: [B, T, D] -> logits [B, T, V].
    fn logits(&self, weights: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let [norm, bias, matrix] = weights else { unreachable!("the head has three parameters") };
        Ok(layer_norm(x, norm, bias)?.f_linear::<Tensor>(matrix, None)?)
    }

    /// Hidden states [B, T, D], `targets` [B, T] -> the mean cross-entropy in nats per token.
    pub(super) fn loss(&self, weights: &[Tensor], x: &Tensor, targets: &Tensor, _dropout: Option<Dropout>) -> Result<Tensor> {
        let logits = self.logits(weights, x)?;
        let rows = logits.f_view([-1, self.dimensions.vocabulary])?;
        Ok(rows.f_cross_entropy_loss::<Tensor>(&targets.f_view([-1])?, None, Reduction::Mean, -100, 0.0)?)
    }

    /// [B, T, D] -> [B, T, V].
    pub(super) fn log_probabilities(&self, weights: &[Tensor], x: &Tensor) -> Result<Tensor> {
        Ok(self.logits(weights, x)?.f_log_softmax(-1, Kind::Float)?)
    }

    /// The input and its normalised form: 2 D; the logarithm of the softmax: V; mean and deviation.
    pub(super) fn saved_per_token(&self) -> usize {
        2 * self.dimensions.d_model as usize + self.dimensions.vocabulary as usize + 4
    }

    /// Logits and their gradient.
    pub(super) fn transient_per_token(&self) -> usize {
        2 * self.dimensions.vocabulary as usize + self.dimensions.d_model as usize
    }
}
