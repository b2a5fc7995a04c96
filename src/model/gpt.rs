//! A decoder as GPT-2 (Radford et al. 2019): learned positions, pre-LN layers `x +=
//! attention(norm(x)); x += mlp(norm(x))` with causal attention and GELU.

use std::ops::Range;

use tch::Tensor;

use super::architecture::{Blocks, EmbeddingScale};
use super::attention::{causal, kept_per_token};
use super::linear::linear;
use super::parameter::FirstValues;
use super::{
    Architecture, Dimensions, Dropout, Init, Layer, Norm, Parameter, Positions, Remembered, fused,
    layer_norm, named,
};
use crate::error::Result;

/// The family.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "transformer",
    positions: Positions::Learned,
    norms: &[Norm::Pre],
    rms_norm: false,
    embedding_scale: EmbeddingScale::WhereTied,
    head_bias: false,
    head_dropout: false,
    has_memory: false,
    has_attention_dropout: false,
    block_cost,
    blocks: |d, run| blocks(d, run, Gelu::Exact),
};

/// How GELU is computed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Gelu {
    /// By the error function.
    Exact,
    /// By a hyperbolic tangent near it, as in GPT-2's code.
    Tanh,
}

impl Gelu {
    /// libtorch's name.
    fn approximate(self) -> &'static str {
        match self {
            Gelu::Exact => "none",
            Gelu::Tanh => "tanh",
        }
    }
}

/// `4 D A + 2 D F` for the matrices, `T A` for causal attention.
fn block_cost(d: &Dimensions) -> f64 {
    let (dm, a, f, t) =
        (d.d_model as f64, d.attention_width() as f64, d.d_ff as f64, d.sequence as f64);
    4.0 * dm * a + 2.0 * dm * f + t * a
}

pub(super) fn blocks(d: &Dimensions, run: Range<usize>, gelu: Gelu) -> Blocks {
    run.map(|layer| Box::new(Block { d: d.clone(), layer, gelu }) as Box<dyn Layer>).collect()
}

struct Block {
    d: Dimensions,
    /// Number of the layer in the whole model, from 0.
    layer: usize,
    gelu: Gelu,
}

impl Block {
    /// [B, T, D] -> [B, T, D]: causal multi-head attention, `softmax(q k' / sqrt(W)) v` a head.
    fn attention(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        remembered: &mut Remembered,
    ) -> Result<Tensor> {
        let [qkv, qkv_bias, out, out_bias] = weights else {
            unreachable!("attention has four parameters")
        };

        let (b, t) = (x.size()[0], x.size()[1]);
        let heads =
            linear(x, qkv, Some(qkv_bias))?.f_view([b, t, 3, self.d.heads, self.d.d_head])?;
        // At once: of single parts the backward would make three whole gradients, zeros but for one
        // part, and add them up.
        let parts = heads.f_unbind(2)?;
        let part = |i: usize| parts[i].f_transpose(1, 2); // [B, H, T, W]
        let y = causal(&part(0)?, &part(1)?, &part(2)?, remembered)?;
        let y = y.f_transpose(1, 2)?.f_reshape([b, t, self.d.attention_width()])?;
        linear(&y, out, Some(out_bias))
    }

    fn mlp(&self, weights: &[Tensor], x: &Tensor) -> Result<Tensor> {
        let [up, up_bias, down, down_bias] = weights else {
            unreachable!("the mlp has four parameters")
        };
        let inner = linear(x, up, Some(up_bias))?.f_gelu(self.gelu.approximate())?;
        linear(&inner, down, Some(down_bias))
    }
}

impl Layer for Block {
    fn name(&self) -> String {
        format!("layers.{}", self.layer)
    }

    fn parameters(&self) -> Vec<Parameter> {
        let (d, a, f) = (self.d.d_model, self.d.attention_width(), self.d.d_ff);
        let FirstValues { matrix, residual, norm, .. } = self.d.first_values;
        let shapes: &[(&str, &[i64], Init)] = &[
            ("norm1.weight", &[d], norm),
            ("norm1.bias", &[d], Init::Zeros),
            ("attention.qkv.weight", &[3 * a, d], matrix),
            ("attention.qkv.bias", &[3 * a], Init::Zeros),
            ("attention.out.weight", &[d, a], residual),
            ("attention.out.bias", &[d], Init::Zeros),
            ("norm2.weight", &[d], norm),
            ("norm2.bias", &[d], Init::Zeros),
            ("mlp.up.weight", &[f, d], matrix),
            ("mlp.up.bias", &[f], Init::Zeros),
            ("mlp.down.weight", &[d, f], residual),
            ("mlp.down.bias", &[d], Init::Zeros),
        ];

        fused(named(&self.name(), shapes), "attention.qkv.weight", 3)
    }

    /// `x`: [B, T, D] -> [B, T, D].
    fn forward(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        remembered: &mut Remembered,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let drop = |y: Tensor, site| match dropout {
            Some(dropout) => dropout.apply(y, self.layer + 1, site),
            None => Ok(y),
        };

        let norm = |x: &Tensor, first: usize| {
            layer_norm(x, &weights[first], &weights[first + 1], self.d.norm_eps)
        };

        let y = self.attention(&weights[2..6], &norm(x, 0)?, remembered)?;
        let x = x.f_add(&drop(y, 0)?)?;
        let y = self.mlp(&weights[8..12], &norm(&x, 6)?)?;
        Ok(x.f_add(&drop(y, 1)?)?)
    }

    /// The input, norm1, the middle state, norm2: 4 D; q k v, the attention's output: 4 A, and what
    /// else it keeps; both sides of the GELU: 2 F; mean and deviation of two norms: 4; with dropout
    /// two masks: 2 D.
    fn saved_per_token(&self) -> usize {
        let (d, a, f) =
            (self.d.d_model as usize, self.d.attention_width() as usize, self.d.d_ff as usize);
        let masks = if self.d.dropout > 0.0 { 2 * d } else { 0 };
        let kept = kept_per_token(self.d.heads, self.d.sequence, self.d.on_processor);
        4 * d + 4 * a + 2 * f + kept + 4 + masks
    }

    /// Backward of the mlp: the gradient of one side of the GELU beside those of output and input.
    fn transient_per_token(&self) -> usize {
        self.d.d_ff as usize + 2 * self.d.d_model as usize
    }
}
