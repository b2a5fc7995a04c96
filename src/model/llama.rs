//! The Llama family (Touvron et al. 2023), as its models of today have it: RMSNorm, rotary
//! positions, queries in groups that share keys and values, SwiGLU, no biases. Qwen2 adds biases of
//! queries, keys and values, Qwen3 an RMSNorm of every head's queries and keys.
//!
//! ```text
//! x += out(attention(turn(norm(query(n))), turn(norm(key(n))), value(n)))      n = norm1(x)
//! x += down(silu(gate(n)) up(n))                                               n = norm2(x)
//! ```

use std::ops::Range;
use std::sync::Arc;

use tch::Tensor;

use super::architecture::{Blocks, EmbeddingScale};
use super::attention::{causal, kept_per_token};
use super::linear::linear;
use super::parameter::FirstValues;
use super::rotary::{Tables, turn};
use super::{
    Architecture, Dimensions, Dropout, Init, Layer, Norm, Parameter, Positions, Remembered, fused,
    named, rms_norm,
};
use crate::error::Result;

/// The family.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "llama",
    positions: Positions::Rotary,
    norms: &[Norm::Pre],
    rms_norm: true,
    embedding_scale: EmbeddingScale::Never,
    head_bias: false,
    head_dropout: false,
    has_memory: false,
    has_attention_dropout: false,
    block_cost,
    blocks,
};

/// `2 D A + 2 D G` for the matrices of the attention, G wide in keys and values, `3 D F` for the
/// feed-forward, `T A` for causal attention.
fn block_cost(d: &Dimensions) -> f64 {
    let (dm, a, g) = (d.d_model as f64, d.attention_width() as f64, d.key_width() as f64);
    let (f, t) = (d.d_ff as f64, d.sequence as f64);
    2.0 * dm * a + 2.0 * dm * g + 3.0 * dm * f + t * a
}

fn blocks(d: &Dimensions, run: Range<usize>) -> Blocks {
    let tables: Arc<Tables> = Arc::default();
    let block = |layer| Block { d: d.clone(), layer, tables: Arc::clone(&tables) };
    run.map(|layer| Box::new(block(layer)) as Box<dyn Layer>).collect()
}

/// Tokens from which on queries, keys and values are one product.
const TOGETHER: i64 = 1024;

struct Block {
    d: Dimensions,
    /// Number of the layer in the whole model, from 0.
    layer: usize,
    tables: Arc<Tables>,
}

/// The values of a layer's parameters, sorted out.
struct Weights<'a> {
    norm1: &'a Tensor,
    query: Product<'a>,
    key_value: Product<'a>,
    /// Of every head's queries and keys.
    head_norms: Option<[&'a Tensor; 2]>,
    out: Product<'a>,
    norm2: &'a Tensor,
    gate: Product<'a>,
    up: Product<'a>,
    down: Product<'a>,
}

/// A matrix and its bias.
struct Product<'a> {
    weight: &'a Tensor,
    bias: Option<&'a Tensor>,
}

impl Product<'_> {
    fn of(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, self.weight, self.bias)
    }
}

impl Block {
    fn sorted<'a>(&self, weights: &'a [Tensor]) -> Weights<'a> {
        let mut weights = weights.iter();
        let mut next = || weights.next().expect("as many values as parameters");
        let mut product = |bias: bool| Product { weight: next(), bias: bias.then(&mut next) };
        let (qkv, out) = (self.d.qkv_bias, self.d.out_bias);

        let norm1 = product(false).weight;
        let (query, key_value) = (product(qkv), product(qkv));
        let head_norms = self.d.qk_norm.then(|| [product(false).weight, product(false).weight]);
        let out = product(out);

        let norm2 = product(false).weight;
        let (gate, up, down) = (product(false), product(false), product(false));
        Weights { norm1, query, key_value, head_norms, out, norm2, gate, up, down }
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        rms_norm(x, weight, self.d.norm_eps)
    }

    /// Queries [B, T, H, W], keys and values [B, T, H / n, W] of `x` [B, T, D]. Of many tokens by one
    /// product, whose matrix is put together: a tall one is the faster.
    fn heads(&self, weights: &Weights, x: &Tensor) -> Result<[Tensor; 3]> {
        let (b, t, w) = (x.size()[0], x.size()[1], self.d.d_head);
        let (h, g) = (self.d.heads, self.d.kv_heads);
        let Weights { query, key_value, .. } = weights;
        if b * t < TOGETHER {
            let q = query.of(x)?.f_view([b, t, h, w])?;
            // At once: of single parts the backward would make two whole gradients.
            let parts = key_value.of(x)?.f_view([b, t, 2, g, w])?.f_unbind(2)?;
            return Ok([q, parts[0].shallow_clone(), parts[1].shallow_clone()]);
        }

        let weight = Tensor::f_cat(&[query.weight, key_value.weight], 0)?;
        let bias = match (query.bias, key_value.bias) {
            (Some(one), Some(other)) => Some(Tensor::f_cat(&[one, other], 0)?),
            _ => None,
        };
        let all = linear(x, &weight, bias.as_ref())?.f_view([b, t, h + 2 * g, w])?;
        let parts = all.f_split_with_sizes([h, g, g], 2)?;
        Ok([parts[0].shallow_clone(), parts[1].shallow_clone(), parts[2].shallow_clone()])
    }

    /// `x` [B, T, D], normalised -> [B, T, D].
    fn attention(
        &self,
        weights: &Weights,
        x: &Tensor,
        remembered: &mut Remembered,
    ) -> Result<Tensor> {
        let (b, t) = (x.size()[0], x.size()[1]);
        let [mut q, mut k, v] = self.heads(weights, x)?;
        if let Some([of_queries, of_keys]) = weights.head_norms {
            (q, k) = (self.norm(&q, of_queries)?, self.norm(&k, of_keys)?);
        }

        let places = remembered.places(t, x.device())?;
        let rows = self.tables.rows(&self.d.rope, &places, t, &q)?;
        let by_head = |x: &Tensor| x.f_transpose(1, 2); // [B, heads, T, W]
        let q = by_head(&turn(&q, &rows)?)?;
        let k = by_head(&turn(&k, &rows)?)?;

        let y = causal(&q, &k, &by_head(&v)?, remembered)?;
        let y = y.f_transpose(1, 2)?.f_reshape([b, t, self.d.attention_width()])?;
        weights.out.of(&y)
    }

    fn mlp(&self, weights: &Weights, x: &Tensor) -> Result<Tensor> {
        weights.down.of(&weights.gate.of(x)?.f_silu()?.f_mul(&weights.up.of(x)?)?)
    }
}

impl Layer for Block {
    fn name(&self) -> String {
        format!("layers.{}", self.layer)
    }

    fn parameters(&self) -> Vec<Parameter> {
        let (d, a, g) = (self.d.d_model, self.d.attention_width(), self.d.key_width());
        let (f, w) = (self.d.d_ff, self.d.d_head);
        let (qkv, out) = (self.d.qkv_bias, self.d.out_bias);
        let FirstValues { matrix, residual, norm, .. } = self.d.first_values;
        let norms = self.d.qk_norm;
        let shapes: &[(bool, &str, &[i64], Init)] = &[
            (true, "norm1.weight", &[d], norm),
            (true, "attention.query.weight", &[a, d], matrix),
            (qkv, "attention.query.bias", &[a], Init::Zeros),
            (true, "attention.key_value.weight", &[2 * g, d], matrix),
            (qkv, "attention.key_value.bias", &[2 * g], Init::Zeros),
            (norms, "attention.query_norm.weight", &[w], norm),
            (norms, "attention.key_norm.weight", &[w], norm),
            (true, "attention.out.weight", &[d, a], residual),
            (out, "attention.out.bias", &[d], Init::Zeros),
            (true, "norm2.weight", &[d], norm),
            (true, "mlp.gate.weight", &[f, d], matrix),
            (true, "mlp.up.weight", &[f, d], matrix),
            (true, "mlp.down.weight", &[d, f], residual),
        ];

        let there: Vec<(&str, &[i64], Init)> = shapes
            .iter()
            .filter(|(there, ..)| *there)
            .map(|(_, name, shape, init)| (*name, *shape, *init))
            .collect();
        fused(named(&self.name(), &there), "attention.key_value.weight", 2)
    }

    /// `x`: [B, T, D] -> [B, T, D].
    fn forward(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        remembered: &mut Remembered,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let weights = self.sorted(weights);
        let drop = |y: Tensor, site| match dropout {
            Some(dropout) => dropout.apply(y, self.layer + 1, site),
            None => Ok(y),
        };

        let y = self.attention(&weights, &self.norm(x, weights.norm1)?, remembered)?;
        let x = x.f_add(&drop(y, 0)?)?;
        let y = self.mlp(&weights, &self.norm(&x, weights.norm2)?)?;
        Ok(x.f_add(&drop(y, 1)?)?)
    }

    /// The input, the middle state, and of each what is normalised before and after its weights:
    /// 6 D; turned queries, keys and values for every query, the attention's output: 4 A (keys and
    /// values once where they are not shared), and what else it keeps; both halves of the SwiGLU,
    /// its SiLU and their product: 4 F; deviations: 2. Normalised heads are kept before and after
    /// their weights: 2 A + 2 G. With dropout two masks: 2 D.
    fn saved_per_token(&self) -> usize {
        let (d, a) = (self.d.d_model as usize, self.d.attention_width() as usize);
        let (g, f) = (self.d.key_width() as usize, self.d.d_ff as usize);
        let heads = if self.d.qk_norm { 2 * a + 2 * g } else { 0 };
        let masks = if self.d.dropout > 0.0 { 2 * d } else { 0 };
        let kept = kept_per_token(self.d.heads, self.d.sequence, self.d.on_processor);
        6 * d + 4 * a + 4 * f + kept + 2 + heads + masks
    }

    /// The matrix of queries, keys and values.
    fn saved(&self, tokens: usize) -> usize {
        let width = (self.d.attention_width() + 2 * self.d.key_width()) * self.d.d_model;
        if tokens as i64 >= TOGETHER { width as usize } else { 0 }
    }

    /// Backward of the mlp: the gradients of the product, of both halves and of the SiLU beside
    /// those of output and input.
    fn transient_per_token(&self) -> usize {
        4 * self.d.d_ff as usize + 2 * self.d.d_model as usize
    }
}
