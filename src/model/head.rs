//! Hidden states to a loss: the last normalisation, where the layers need one, and an output matrix, which with a tie is
//! the embedding's table.

use tch::{Reduction, Tensor};

use super::{Dimensions, Dropout, Init, Parameter, TABLE_STD, layer_norm, table};
use crate::config::Arch;
use crate::error::Result;

pub(super) struct Head {
    d: Dimensions,
}

impl Head {
    pub(super) fn new(d: &Dimensions) -> Head {
        Head { d: d.clone() }
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let d = &self.d;
        let mut parameters = Vec::new();
        if d.pre_norm {
            parameters.push(Parameter::new("head.norm.weight".into(), &[d.d_model], Init::Ones));
            parameters.push(Parameter::new("head.norm.bias".into(), &[d.d_model], Init::Zeros));
        }
        match d.tied {
            true => parameters.extend(table(d)),
            false => {
                let shape = [d.vocabulary, d.d_model];
                parameters.push(Parameter::new("head.weight".into(), &shape, Init::Normal(TABLE_STD)));
            }
        }
        if d.arch == Arch::TransformerXl {
            parameters.push(Parameter::new("head.bias".into(), &[d.vocabulary], Init::Zeros));
        }
        parameters
    }

    /// `x`: [B, T, D] -> logits [B, T, V].
    fn logits(&self, weights: &[Tensor], x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let (x, weights) = match self.d.pre_norm {
            true => (layer_norm(x, &weights[0], &weights[1])?, &weights[2..]),
            false => (x.shallow_clone(), weights),
        };
        let x = match dropout {
            Some(dropout) if self.d.arch == Arch::TransformerXl => dropout.apply(x, self.d.layers + 1, 0)?,
            _ => x,
        };
        Ok(x.f_linear(&weights[0], weights.get(1))?)
    }

    /// Hidden states [B, T, D], `targets` [B, T] -> the mean cross-entropy in nats per token.
    pub(super) fn loss(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        targets: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let rows = self.logits(weights, x, dropout)?.f_view([-1, self.d.vocabulary])?;
        Ok(rows.f_cross_entropy_loss::<Tensor>(&targets.f_view([-1])?, None, Reduction::Mean, -100, 0.0)?)
    }

    /// [B, T, D] -> [B, T, V].
    pub(super) fn log_probabilities(&self, weights: &[Tensor], x: &Tensor) -> Result<Tensor> {
        Ok(self.logits(weights, x, None)?.f_log_softmax(-1, x.kind())?)
    }

    /// The input and its normalised form: 2 D; the logarithm of the softmax: V; mean and deviation.
    pub(super) fn saved_per_token(&self) -> usize {
        2 * self.d.d_model as usize + self.d.vocabulary as usize + 4
    }

    /// Logits and their gradient.
    pub(super) fn transient_per_token(&self) -> usize {
        2 * self.d.vocabulary as usize + self.d.d_model as usize
    }
}
