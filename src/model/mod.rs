//! The layers and the stack of them that a stage (or the oracle) holds.
//!
//! Shapes: B rows, T tokens a row, D = `d_model`, H heads, F = `d_ff`, V tokens of the vocabulary. A stack's input is
//! tokens [B, T] (int64) if it holds the embedding, else hidden states [B, T, D]; its output is logits [B, T, V] if it
//! holds the head, else hidden states.
//!
//! Parameter names, as in saved weights (l counts layers of the whole model from 0; matrices are [out, in]):
//!
//! ```text
//! embedding.tokens [V, D]          embedding.positions [T, D]
//! layers.l.norm1.weight, .bias [D] layers.l.attention.qkv.weight [3D, D], .bias     layers.l.attention.out.weight [D, D], .bias
//! layers.l.norm2.weight, .bias [D] layers.l.mlp.up.weight [F, D], .bias             layers.l.mlp.down.weight [D, F], .bias
//! head.norm.weight, .bias [D]      head.weight [V, D]
//! ```

mod block;
mod embedding;
mod head;

use std::ops::Range;

use tch::{Reduction, Tensor};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::random::{self, DropoutKey};

/// How a parameter begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    Zeros,
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
}

/// A parameter: its global name, shape and first values.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
}

impl Parameter {
    fn new(name: String, shape: &[i64], init: Init) -> Parameter {
        Parameter { name, shape: shape.to_vec(), init }
    }

    /// Elements.
    pub fn count(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }

    /// Whether weight decay applies: to matrices only.
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }
}

/// The sizes that every layer is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Dimensions {
    pub layers: usize,
    pub d_model: i64,
    pub heads: i64,
    pub d_ff: i64,
    pub vocabulary: i64,
    pub sequence: i64,
    pub dropout: f64,
}

impl Dimensions {
    /// The sizes of a config's model over `vocabulary` tokens and sequences of `sequence`.
    pub fn new(model: &ModelConfig, vocabulary: usize, sequence: usize) -> Dimensions {
        Dimensions {
            layers: model.layers,
            d_model: model.d_model as i64,
            heads: model.heads as i64,
            d_ff: model.d_ff as i64,
            vocabulary: vocabulary as i64,
            sequence: sequence as i64,
            dropout: model.dropout,
        }
    }
}

/// Dropout of one microbatch: the same masks whenever it is run. Evaluation has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    pub rate: f64,
    pub seed: u64,
    pub step: usize,
    pub replica: usize,
    pub microbatch: usize,
}

impl Dropout {
    fn apply(self, x: Tensor, layer: usize, site: usize) -> Result<Tensor> {
        if self.rate == 0.0 {
            return Ok(x);
        }
        let Dropout { rate, seed, step, replica, microbatch } = self;
        let key = DropoutKey { seed, step, replica, microbatch, layer, site };
        let mask = random::dropout_mask(key, rate, x.numel());
        Ok(x.f_mul(&Tensor::f_from_slice(&mask)?.f_view_as(&x)?)?)
    }
}

/// Standard deviation of the first values of tables and of the head, as in GPT-2 (Radford et al. 2019).
const TABLE_STD: f64 = 0.02;

/// Standard deviation of the first values of a layer's matrices: `sqrt(2 / (5 D))`, the "small init" of Nguyen and
/// Salazar 2019. It is GPT-2's 0.02 at D = 1000, and learns faster where D is small.
fn matrix_std(d_model: i64) -> f64 {
    (2.0 / (5.0 * d_model as f64)).sqrt()
}

/// One layer of the model; its parameters are handed to it, in the order of `parameters`.
trait Layer: Send + Sync {
    /// As in the names of its parameters.
    fn name(&self) -> String;
    fn parameters(&self) -> Vec<Parameter>;
    fn forward(&self, weights: &[Tensor], x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor>;
    /// f32 values a token that autograd keeps of a forward: the layer's input, not its output.
    fn saved_per_token(&self) -> usize;
    /// f32 values a token that its backward needs for a moment besides those that are kept.
    fn transient_per_token(&self) -> usize;
}

/// Multiply-adds a token of one forward: what the partition balances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerCosts {
    pub embedding: f64,
    pub block: f64,
    pub head: f64,
}

/// The stated costs: `4 D^2 + 2 D F` for a block's matrices and `T D` for its causal attention, `D V` for the head,
/// and the additions of the embedding, `2 D`.
pub fn costs(d: &Dimensions) -> LayerCosts {
    let (dm, f, v, t) = (d.d_model as f64, d.d_ff as f64, d.vocabulary as f64, d.sequence as f64);
    LayerCosts { embedding: 2.0 * dm, block: 4.0 * dm * dm + 2.0 * dm * f + t * dm, head: dm * v }
}

/// A contiguous run of the model: blocks `a..b`, with the embedding if a = 0 and the head if b is the last.
pub struct Stack {
    /// Each with the range of its parameters.
    layers: Vec<(Box<dyn Layer>, Range<usize>)>,
    parameters: Vec<Parameter>,
    has_head: bool,
    d_model: usize,
}

impl Stack {
    /// The blocks `run` of a model of `dimensions`.
    pub fn new(dimensions: &Dimensions, run: Range<usize>) -> Stack {
        let (first, last) = (run.start == 0, run.end == dimensions.layers);
        let mut stack =
            Stack { layers: Vec::new(), parameters: Vec::new(), has_head: last, d_model: dimensions.d_model as usize };
        if first {
            stack.push(Box::new(embedding::Embedding::new(dimensions)));
        }
        for layer in run {
            stack.push(Box::new(block::Block::new(dimensions, layer)));
        }
        if last {
            stack.push(Box::new(head::Head::new(dimensions)));
        }
        stack
    }

    fn push(&mut self, layer: Box<dyn Layer>) {
        let start = self.parameters.len();
        self.parameters.extend(layer.parameters());
        self.layers.push((layer, start..self.parameters.len()));
    }

    /// All parameters, in the order in which `forward` takes their values.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Whether the output is logits.
    pub fn has_head(&self) -> bool {
        self.has_head
    }

    /// Runs the layers on `x`; `weights` are the values of `parameters`.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn forward(&self, weights: &[Tensor], x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let mut x = x.shallow_clone();
        for (layer, range) in &self.layers {
            x = layer.forward(&weights[range.clone()], &x, dropout)?;
        }
        Ok(x)
    }

    /// Runs the layers one by one and names the first whose output is not finite.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn first_not_finite(&self, weights: &[Tensor], x: &Tensor, dropout: Option<Dropout>) -> Result<Option<String>> {
        let mut x = x.shallow_clone();
        for (layer, range) in &self.layers {
            x = layer.forward(&weights[range.clone()], &x, dropout)?;
            if x.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                return Ok(Some(format!("output of {}", layer.name())));
            }
        }
        Ok(None)
    }

    /// f32 values a token that a microbatch keeps from its forward to its backward.
    pub fn saved_per_token(&self) -> usize {
        let output = if self.has_head { 0 } else { self.d_model };
        self.layers.iter().map(|(layer, _)| layer.saved_per_token()).sum::<usize>() + output
    }

    /// f32 values a token that a backward holds at most beyond what its forward kept: from the last layer to the first,
    /// those that are not through yet still keep theirs.
    pub fn transient_per_token(&self) -> usize {
        let (mut kept, mut most) = (0, 0);
        for (layer, _) in &self.layers {
            kept += layer.saved_per_token();
            most = most.max(kept + layer.transient_per_token());
        }
        most.saturating_sub(self.saved_per_token())
    }
}

/// Mean cross-entropy in nats per token: `logits` [B, T, V], `targets` [B, T] -> a scalar.
///
/// # Errors
/// What libtorch reports.
pub fn loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let vocabulary = logits.size()[2];
    let rows = logits.f_view([-1, vocabulary])?;
    Ok(rows.f_cross_entropy_loss::<Tensor>(&targets.f_view([-1])?, None, Reduction::Mean, -100, 0.0)?)
}

/// The first values of a parameter: a pure function of the seed and the name.
pub fn initial(parameter: &Parameter, seed: u64) -> Vec<f32> {
    match parameter.init {
        Init::Zeros => vec![0.0; parameter.count()],
        Init::Ones => vec![1.0; parameter.count()],
        Init::Normal(std) => {
            let mut values = random::normal(seed, &parameter.name, parameter.count());
            values.iter_mut().for_each(|v| *v *= std as f32);
            values
        }
    }
}

/// Layer normalisation over the last dimension, with weight and bias.
fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    Ok(x.f_layer_norm(weight.size(), Some(weight), Some(bias), 1e-5, true)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dimensions() -> Dimensions {
        Dimensions { layers: 3, d_model: 8, heads: 2, d_ff: 16, vocabulary: 11, sequence: 5, dropout: 0.0 }
    }

    fn values(stack: &Stack) -> Vec<Tensor> {
        stack.parameters().iter().map(|p| Tensor::from_slice(&initial(p, 3)).view(&p.shape[..])).collect()
    }

    #[test]
    fn a_model_cut_in_two_is_the_same_model() {
        let whole = Stack::new(&dimensions(), 0..3);
        let (a, b) = (Stack::new(&dimensions(), 0..1), Stack::new(&dimensions(), 1..3));
        let names = |s: &Stack| s.parameters().iter().map(|p| p.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&whole), [names(&a), names(&b)].concat());
        let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 10, 9, 8, 7, 6]).view([2, 5]);
        let y = whole.forward(&values(&whole), &tokens, None).unwrap();
        let x = a.forward(&values(&a), &tokens, None).unwrap();
        assert_eq!(b.forward(&values(&b), &x, None).unwrap(), y);
        assert_eq!(y.size(), [2, 5, 11]);
    }

    #[test]
    fn a_token_sees_only_those_before_it() {
        let whole = Stack::new(&dimensions(), 0..3);
        let run = |last: i64| {
            let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, last]).view([1, 5]);
            whole.forward(&values(&whole), &tokens, None).unwrap()
        };
        let (y, z) = (run(5), run(9));
        assert_eq!(y.narrow(1, 0, 4), z.narrow(1, 0, 4));
        assert_ne!(y.narrow(1, 4, 1), z.narrow(1, 4, 1));
    }

    #[test]
    fn dropout_depends_on_its_key_only() {
        let whole = Stack::new(&dimensions(), 0..3);
        let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5]).view([1, 5]);
        let run = |step| {
            let dropout = Dropout { rate: 0.3, seed: 1, step, replica: 0, microbatch: 0 };
            whole.forward(&values(&whole), &tokens, Some(dropout)).unwrap()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
