//! Dropout as a function of where it stands.

use tch::Tensor;

use crate::device::sent;
use crate::error::Result;
use crate::random::{self, DropoutKey};

/// Dropout of one microbatch: the same masks whenever it is run. Evaluation has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    pub rate: f64,
    /// Of the probabilities of the attention.
    pub attention_rate: f64,
    pub seed: u64,
    pub step: usize,
    pub replica: usize,
    pub microbatch: usize,
}

impl Dropout {
    /// The same for the probabilities of the attention.
    pub(super) fn attention(self) -> Dropout {
        Dropout { rate: self.attention_rate, ..self }
    }

    pub(super) fn apply(self, x: Tensor, layer: usize, site: usize) -> Result<Tensor> {
        if self.rate == 0.0 {
            return Ok(x);
        }
        let Dropout { rate, seed, step, replica, microbatch, .. } = self;
        let key = DropoutKey { seed, step, replica, microbatch, layer, site };
        let mask = random::dropout_mask(key, rate, x.numel());
        let mask = Tensor::f_from_slice(&mask)?.f_view(&x.size()[..])?.f_to_kind(x.kind())?;
        Ok(x.f_mul(&sent(&mask, x.device())?)?)
    }
}
