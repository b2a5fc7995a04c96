//! Transformer-XL (Dai et al. 2019), layer by layer: attention over the segment and what the layer
//! remembers of the segments before, with relative positions, then a position-wise ReLU network.
//!
//! With M remembered tokens and L = M + T, query i of the segment and key j of memory and segment
//! stand `d = i + M - j` apart, and their score is
//!
//! ```text
//! score(i, j) = ((q_i + u) . k_j + (q_i + v) . (W_R R_d)) / sqrt(W)           for 0 <= d, else nothing
//! ```
//!
//! with R_d the sinusoid of the distance, and the biases u (content) and v (position) of each
//! layer. Shared biases, as in the paper's code (`shared_biases`), belong to one stage: they would
//! couple several at every step.
//!
//! The second product is made for all distances at once, P[i, p] = (q_i + v) . (W_R R_{L-1-p}) for
//! p = 0 ... L, where p = L is an empty row. Then score(i, j) needs P[i, j + T-1-i], and in the
//! memory of P, whose rows are L + 1 long, that is the element
//!
//! ```text
//! i (L+1) + j + T-1-i  =  (T-1) + i L + j
//! ```
//!
//! so the shifted scores are P from element T-1 on, read in rows of L: no copy.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use tch::Tensor;

use super::architecture::{Blocks, EmbeddingScale};
use super::linear::linear;
use super::parameter::FirstValues;
use super::{
    Architecture, Dimensions, Dropout, Init, Layer, Norm, Parameter, Positions, Remembered, fused,
    layer_norm, named,
};
use crate::error::Result;

/// Sites of dropout in a layer.
const ATTENTION: usize = 0;
const MLP: usize = 1;
const PROBABILITIES: usize = 2;
const INNER: usize = 3;

/// Of the positions, in the place of the embedding: the same mask in every layer, as in the paper's
/// code.
const POSITIONS: (usize, usize) = (0, 1);

/// The family.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "transformer-xl",
    positions: Positions::Relative,
    norms: &[Norm::Post, Norm::Pre],
    rms_norm: false,
    embedding_scale: EmbeddingScale::Always,
    head_bias: true,
    head_dropout: true,
    has_memory: true,
    has_attention_dropout: true,
    block_cost,
    blocks,
};

/// `4 D A + 2 D F` for the matrices, keys and values of the memory too, `2 D A M / T`, and three
/// products over the whole context, `3 (M + T) A`.
fn block_cost(d: &Dimensions) -> f64 {
    let (dm, a, f) = (d.d_model as f64, d.attention_width() as f64, d.d_ff as f64);
    let (t, m) = (d.sequence as f64, d.mem_len as f64);
    let attention = 2.0 * dm * a * m / t + 3.0 * (m + t) * a;
    4.0 * dm * a + 2.0 * dm * f + attention
}

fn blocks(d: &Dimensions, run: Range<usize>) -> Blocks {
    let constants: Arc<Constants> = Arc::default();
    let block = |layer| XlBlock { d: d.clone(), layer, constants: Arc::clone(&constants) };
    run.map(|layer| Box::new(block(layer)) as Box<dyn Layer>).collect()
}

/// The constants of a model's attention, shared by its layers.
#[derive(Default)]
struct Constants {
    made: Mutex<BTreeMap<Key, (Tensor, Tensor)>>,
}

/// Tokens remembered, T, M, and the number of the kind.
type Key = (i64, i64, i64, i32);

struct XlBlock {
    d: Dimensions,
    /// Number of the layer in the whole model, from 0.
    layer: usize,
    constants: Arc<Constants>,
}

impl XlBlock {
    /// R [L+1, D], the sinusoids of the distances L-1 ... 0 and a row of zeros, and what is added
    /// to the scores [T, L]: 0, or -inf where a query does not look.
    fn constants(&self, m: i64, t: i64, limit: i64, like: &Tensor) -> Result<(Tensor, Tensor)> {
        let key = (m, t, limit, like.kind() as i32);
        let mut made = self.constants.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((positions, mask)) = made.get(&key) {
            return Ok((positions.shallow_clone(), mask.shallow_clone()));
        }

        let positions =
            Tensor::f_from_slice(&self.sinusoids(m + t))?.f_view([m + t + 1, self.d.d_model])?;
        let mask = Tensor::f_from_slice(&self.mask(m, t, limit))?.f_view([t, m + t])?;
        let there = |constant: Tensor| constant.f_to_kind(like.kind())?.f_to_device(like.device());
        let pair = (there(positions)?, there(mask)?);
        // One entry in training, another in evaluation, and those of a memory that is still filling
        // up.
        if made.len() >= 64 {
            made.clear();
        }

        made.insert(key, (pair.0.shallow_clone(), pair.1.shallow_clone()));
        Ok(pair)
    }

    fn sinusoids(&self, length: i64) -> Vec<f64> {
        let d = self.d.d_model;
        let half = d.div_euclid(2) + d % 2;
        let mut values = Vec::with_capacity(((length + 1) * d) as usize);
        for p in 0..length {
            let distance = length - 1 - p;
            let distance = self.d.clamp_len.map_or(distance, |clamp| distance.min(clamp)) as f64;
            let angle = |i: i64| distance / 10000f64.powf(2.0 * i as f64 / d as f64);
            values.extend((0..half).map(|i| angle(i).sin()));
            values.extend((0..d - half).map(|i| angle(i).cos()));
        }

        values.resize(((length + 1) * d) as usize, 0.0);
        values
    }

    fn mask(&self, m: i64, t: i64, limit: i64) -> Vec<f64> {
        let seen = |i: i64, j: i64| {
            let distance = i + m - j;
            distance >= 0 && (!self.d.same_length || distance < limit)
        };

        let value = |seen| if seen { 0.0 } else { f64::NEG_INFINITY };
        (0..t)
            .flat_map(|i| (0..m + t).map(move |j| (i, j)))
            .map(|(i, j)| value(seen(i, j)))
            .collect()
    }

    /// `x` [B, T, D] and `context` [B, L, D], memory and `x` -> [B, T, D].
    fn attention(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        context: &Tensor,
        limit: i64,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let [query, key_value, position, u, v, out] = weights else {
            unreachable!("attention has six parameters")
        };

        let (b, t, l) = (x.size()[0], x.size()[1], context.size()[1]);
        let (h, w) = (self.d.heads, self.d.d_head);
        let (positions, mask) = self.constants(l - t, t, limit, x)?;
        let positions = match dropout {
            Some(dropout) => dropout.apply(positions, POSITIONS.0, POSITIONS.1)?,
            None => positions,
        };

        let scale = 1.0 / (w as f64).sqrt();
        let q = linear(x, query, None)?; // [B, T, A]
        let heads = linear(context, key_value, None)?.f_view([b, l, 2, h, w])?.f_unbind(2)?;
        let k = heads[0].f_permute([0, 2, 3, 1])?; // [B, H, W, L]
        let values = heads[1].f_transpose(1, 2)?; // [B, H, L, W]

        let content = q.f_add(u)?.f_mul_scalar(scale)?.f_view([b, t, h, w])?.f_transpose(1, 2)?;
        let mut scores = content.f_matmul(&k)?; // [B, H, T, L]

        let r = positions
            .f_linear::<Tensor>(position, None)?
            .f_view([l + 1, h, w])?
            .f_permute([1, 2, 0])?; // [H, W, L+1]
        let by_head = q.f_add(v)?.f_mul_scalar(scale)?.f_view([b * t, h, w])?.f_transpose(0, 1)?; // [H, BT, W]
        let shifted = by_head
            .f_bmm(&r)?
            .f_view([h, b, t * (l + 1)])?
            .f_narrow(2, t - 1, t * l)?
            .f_view([h, b, t, l])?;
        let _ = scores.f_add_(&shifted.f_transpose(0, 1)?)?;
        drop(shifted);
        let _ = scores.f_add_(&mask)?;

        let probabilities = scores.f_softmax(-1, x.kind())?;
        drop(scores);
        let probabilities = match dropout {
            Some(dropout) => {
                dropout.attention().apply(probabilities, self.layer + 1, PROBABILITIES)?
            }
            None => probabilities,
        };

        let y = probabilities.f_matmul(&values)?.f_transpose(1, 2)?.f_reshape([
            b,
            t,
            self.d.attention_width(),
        ])?;

        linear(&y, out, None)
    }

    fn mlp(&self, weights: &[Tensor], x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let [up, up_bias, down, down_bias] = weights else {
            unreachable!("the mlp has four parameters")
        };
        let inner = self.dropped(dropout, linear(x, up, Some(up_bias))?.f_relu()?, INNER)?;
        linear(&inner, down, Some(down_bias))
    }

    fn dropped(&self, dropout: Option<Dropout>, y: Tensor, site: usize) -> Result<Tensor> {
        match dropout {
            Some(dropout) => dropout.apply(y, self.layer + 1, site),
            None => Ok(y),
        }
    }
}

impl Layer for XlBlock {
    fn name(&self) -> String {
        format!("layers.{}", self.layer)
    }

    fn remembers(&self) -> bool {
        true
    }

    fn parameters(&self) -> Vec<Parameter> {
        let (d, a, f) = (self.d.d_model, self.d.attention_width(), self.d.d_ff);
        let FirstValues { matrix, residual, norm, attention_bias, .. } = self.d.first_values;
        let shapes: &[(&str, &[i64], Init)] = &[
            ("norm1.weight", &[d], norm),
            ("norm1.bias", &[d], Init::Zeros),
            ("attention.query.weight", &[a, d], matrix),
            ("attention.key_value.weight", &[2 * a, d], matrix),
            ("attention.position.weight", &[a, d], matrix),
            ("attention.content_bias", &[a], attention_bias),
            ("attention.position_bias", &[a], attention_bias),
            ("attention.out.weight", &[d, a], residual),
            ("norm2.weight", &[d], norm),
            ("norm2.bias", &[d], Init::Zeros),
            ("mlp.up.weight", &[f, d], matrix),
            ("mlp.up.bias", &[f], Init::Zeros),
            ("mlp.down.weight", &[d, f], residual),
            ("mlp.down.bias", &[d], Init::Zeros),
        ];

        let mut parameters = fused(named(&self.name(), shapes), "attention.key_value.weight", 2);
        if self.d.shared_biases {
            let biases =
                parameters.iter_mut().filter(|parameter| parameter.name.ends_with("_bias"));
            biases.for_each(|bias| bias.name = bias.name.replace(&self.name(), "layers"));
        }
        parameters
    }

    /// `x`: [B, T, D] -> [B, T, D]; remembers the last M rows of what it has been given.
    fn forward(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        memory: &mut Remembered,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let norm1 = |x: &Tensor| layer_norm(x, &weights[0], &weights[1], self.d.norm_eps);
        let norm2 = |x: &Tensor| layer_norm(x, &weights[8], &weights[9], self.d.norm_eps);
        let (attention, mlp) = (&weights[2..8], &weights[10..14]);
        let limit = memory.limit;
        let context = memory.extend(x)?;
        if self.d.pre_norm {
            let context = norm1(&context)?;
            let (l, t) = (context.size()[1], x.size()[1]);
            let y = self.attention(
                attention,
                &context.f_narrow(1, l - t, t)?,
                &context,
                limit,
                dropout,
            )?;

            let x = x.f_add(&self.dropped(dropout, y, ATTENTION)?)?;
            let y = self.mlp(mlp, &norm2(&x)?, dropout)?;
            return Ok(x.f_add(&self.dropped(dropout, y, MLP)?)?);
        }

        let y = self.attention(attention, x, &context, limit, dropout)?;
        let x = norm1(&x.f_add(&self.dropped(dropout, y, ATTENTION)?)?)?;
        let y = self.mlp(mlp, &x, dropout)?;
        norm2(&x.f_add(&self.dropped(dropout, y, MLP)?)?)
    }

    /// Post-LN: input, the input of either norm and the output of the first: 4 D; both queries,
    /// attention's output: 3 A; a token of the context, its keys and values: D + 2 A. Pre-LN:
    /// without the input and one norm, but the context twice. Probabilities: H L; the ReLU's
    /// output: F. With dropout the masks, and dropped values beside those that are kept.
    fn saved_per_token(&self) -> usize {
        let (d, f, h) = (self.d.d_model as usize, self.d.d_ff as usize, self.d.heads as usize);
        let a = self.d.attention_width() as usize;
        let (tokens, context) = if self.d.pre_norm {
            (2 * d + 3 * a, 2 * d + 2 * a)
        } else {
            (4 * d + 3 * a, d + 2 * a)
        };

        let length = (self.d.mem_len + self.d.sequence) as usize;
        let scores = h * length;
        let masks = if self.d.dropout > 0.0 { 2 * d + 2 * f } else { 0 };
        let attention_masks = if self.d.attention_dropout > 0.0 { 2 * scores } else { 0 };
        tokens
            + context * length / self.d.sequence as usize
            + scores
            + f
            + 4
            + masks
            + attention_masks
    }

    /// The gradient of the scores, of the shifted scores and its copy in full rows.
    fn transient_per_token(&self) -> usize {
        3 * (self.d.heads * (self.d.mem_len + self.d.sequence + 1)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Arch, Memory, ModelConfig, Stack, initial_tensor};
    use super::*;
    use crate::schedule::Tie;
    use tch::Kind;

    /// One layer that reads three segments with enough memory gives what it gives on all of them at
    /// once.
    #[test]
    fn a_memory_is_a_longer_context() {
        let config = ModelConfig {
            arch: Arch::TransformerXl,
            layers: 3,
            d_model: 16,
            heads: 2,
            d_ff: 24,
            tie: Tie::Untied,
            mem_len: 12,
            ..ModelConfig::default()
        };
        let stack = Stack::new(&Dimensions::new(&config, 5, 4), 1..2);
        let value = |p: &Parameter| initial_tensor(p, 1).to_kind(Kind::Double);
        let weights: Vec<Tensor> = stack.parameters().iter().map(value).collect();
        let x = Tensor::randn([2, 12, 16], (Kind::Double, tch::Device::Cpu));
        let whole = stack.forward(&weights, &x, &mut Memory::new(0), None).unwrap();
        let mut memory = Memory::new(12);
        for segment in 0..3 {
            let part =
                stack.forward(&weights, &x.narrow(1, 4 * segment, 4), &mut memory, None).unwrap();
            let far = (part - whole.narrow(1, 4 * segment, 4)).abs().max().double_value(&[]);
            assert!(far < 1e-12, "segment {segment}: {far:e}");
        }
    }
}
