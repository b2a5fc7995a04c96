//! The layers and the stack of them that a stage (or the oracle) holds.
//!
//! Shapes: B rows, T tokens a row, D = `d_model`, H heads of width W, A = H W (D, unless `d_head`
//! is given), F = `d_ff`, V tokens of the vocabulary. A stack's input is tokens [B, T] (int64) if
//! it holds the embedding, else hidden states [B, T, D]; its output is hidden states; the head
//! makes them a loss.
//!
//! Parameter names, as in saved weights (l counts layers of the whole model from 0; matrices are
//! [out, in]):
//!
//! ```text
//! embedding.tokens [V, D]          embedding.positions [T, D]
//! layers.l.norm1.weight, .bias [D] layers.l.attention.qkv.weight [3A, D], .bias     layers.l.attention.out.weight [D, A], .bias
//! layers.l.norm2.weight, .bias [D] layers.l.mlp.up.weight [F, D], .bias             layers.l.mlp.down.weight [D, F], .bias
//! head.norm.weight, .bias [D]      head.weight [V, D]; with a tie there is none: `embedding.tokens` takes its place,
//!                                  and is multiplied by sqrt(D) on its way in
//! ```
//!
//! and of a Transformer-XL, where they differ:
//!
//! ```text
//! embedding.tokens [V, D], multiplied by sqrt(D) on its way in; no positions
//! layers.l.attention.query.weight [A, D]                  layers.l.attention.key_value.weight [2A, D]: keys, then values
//! layers.l.attention.position.weight [A, D]: W_R          layers.l.attention.out.weight [D, A]; no biases
//! layers.l.attention.content_bias, .position_bias [A]: u and v, head by head; without l where all layers share them
//! head.bias [V]                                           head.norm only with `norm = "pre"`
//! ```
//!
//! and of a Llama, G wide in keys and values, where they differ:
//!
//! ```text
//! no positions; norm1, norm2, head.norm without biases
//! layers.l.attention.query.weight [A, D], .bias           layers.l.attention.key_value.weight [2G, D]: keys, then values; .bias
//! layers.l.attention.query_norm.weight, .key_norm.weight [W]       layers.l.attention.out.weight [D, A], .bias
//! layers.l.mlp.gate.weight, .up.weight [F, D]             layers.l.mlp.down.weight [D, F]
//! ```
//!
//! Where the rows of a table are not D wide, embedding.projection and head.projection stand beside
//! it. With cut-offs there is one of each for every cluster i of n tokens, w wide, and the entries
//! of the further clusters in the first softmax:
//!
//! ```text
//! embedding.tokens.i, head.weight.i [n, w]     embedding.projection.i, head.projection.i [D, w], where w is not D
//! head.bias.i [n]                              head.clusters.weight [clusters - 1, w of cluster 0], .bias
//! ```

mod parameter;
mod config;
mod architecture;
mod clusters;
mod dimensions;
mod dropout;
mod rotary;
mod cache;
mod documents;
mod memory;
mod attention;
mod linear;
mod cross_entropy;
mod embedding;
mod head;
mod gpt;
mod gpt2;
mod llama;
mod xl;
mod costs;

use std::ops::Range;

use tch::Tensor;

pub use architecture::{Architecture, Positions};
pub use config::{Arch, AttentionBias, ModelConfig, Norm, RopeScaling, TieGradient};
pub use costs::{LayerCosts, costs};
pub use cross_entropy::Loss;
pub use dimensions::Dimensions;
pub use documents::Documents;
pub use dropout::Dropout;
pub use memory::{Memory, Remembered};
pub use parameter::{Init, Parameter, Role, initial, initial_tensor};
use parameter::{TABLE_STD, fused, named};

use crate::error::Result;
use crate::schedule::TableEnd;

/// One layer of the model; its parameters are handed to it, in the order of `parameters`.
trait Layer: Send + Sync {
    /// As in the names of its parameters.
    fn name(&self) -> String;
    /// Those of one name in several layers are one parameter, which all of them use.
    fn parameters(&self) -> Vec<Parameter>;
    /// `memory` is what the layer remembers of earlier segments, and what it will remember.
    fn forward(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        memory: &mut Remembered,
        dropout: Option<Dropout>,
    ) -> Result<Tensor>;
    /// f32 values a token that autograd keeps of a forward: the layer's input, not its output.
    fn saved_per_token(&self) -> usize;
    /// f32 values a token that its backward needs for a moment besides those that are kept.
    fn transient_per_token(&self) -> usize;
    /// Values that autograd keeps of a forward of `tokens` tokens, however many they are.
    fn saved(&self, _tokens: usize) -> usize {
        0
    }
    /// Whether it remembers earlier segments.
    fn remembers(&self) -> bool {
        false
    }
    /// f32 values that its backward needs for a moment, whatever the tokens.
    fn transient(&self) -> usize {
        0
    }
}

/// Layers of a stack whose backward is made at one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRange {
    pub layers: Range<usize>,
    /// The number of their first parameter among those of [`Stack::own`].
    pub first: usize,
}

/// Which of a stack's parameters a layer uses.
struct Uses {
    /// In the order of its `parameters`.
    numbers: Vec<usize>,
    /// Those that no layer before it has.
    added: Range<usize>,
}

impl Uses {
    fn pick(&self, weights: &[Tensor]) -> Vec<Tensor> {
        self.numbers.iter().map(|number| weights[*number].shallow_clone()).collect()
    }
}

/// Whose a parameter of a stack is: its number among those of its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// [`Stack::own`].
    Own(usize),
    /// The table, as an end uses it.
    Table(TableEnd, usize),
}

/// A contiguous run of the model: blocks `a..b`, with the embedding if a = 0 and the head if b is
/// the last.
pub struct Stack {
    layers: Vec<(Box<dyn Layer>, Uses)>,
    head: Option<(head::Head, Uses)>,
    parameters: Vec<Parameter>,
    d_model: usize,
}

impl Stack {
    /// The blocks `run` of a model of `dimensions`.
    pub fn new(dimensions: &Dimensions, run: Range<usize>) -> Stack {
        let last = run.end == dimensions.layers;
        let d_model = dimensions.d_model as usize;
        let mut stack = Stack { layers: Vec::new(), head: None, parameters: Vec::new(), d_model };
        if run.start == 0 {
            stack.push(Box::new(embedding::Embedding::new(dimensions)));
        }

        for block in (dimensions.architecture.blocks)(dimensions, run) {
            stack.push(block);
        }

        if last {
            let head = head::Head::new(dimensions);
            let uses = stack.add(head.parameters());
            stack.head = Some((head, uses));
        }
        stack
    }

    fn push(&mut self, layer: Box<dyn Layer>) {
        let uses = self.add(layer.parameters());
        self.layers.push((layer, uses));
    }

    fn add(&mut self, parameters: Vec<Parameter>) -> Uses {
        let start = self.parameters.len();
        let mut numbers = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            let shared = self.parameters[..start]
                .iter()
                .position(|held| !held.tied && held.name == parameter.name);
            numbers.push(shared.unwrap_or(self.parameters.len()));
            if shared.is_none() {
                self.parameters.push(parameter);
            }
        }
        Uses { numbers, added: start..self.parameters.len() }
    }

    /// Whether layers have parameters in common.
    pub fn has_shared_parameters(&self) -> bool {
        self.layers.iter().any(|(_, uses)| uses.numbers.len() > uses.added.len())
    }

    /// All parameters, in the order in which `forward` and `loss` take their values.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The parameters that are not tied.
    pub fn own(&self) -> Vec<Parameter> {
        self.parameters.iter().filter(|p| !p.tied).cloned().collect()
    }

    /// The values of all parameters as `forward` and `loss` take them, from those of `own`, those
    /// of the table that the embedding uses and those that the head uses ([`table`]; none where the
    /// stack has no such end).
    pub fn weights(&self, own: &[Tensor], input: &[Tensor], output: &[Tensor]) -> Vec<Tensor> {
        let value = |owner| match owner {
            Owner::Own(number) => &own[number],
            Owner::Table(TableEnd::Input, number) => &input[number],
            Owner::Table(TableEnd::Output, number) => &output[number],
        };
        self.owners().into_iter().map(|owner| value(owner).shallow_clone()).collect()
    }

    /// Whose each of the parameters is.
    pub fn owners(&self) -> Vec<Owner> {
        let head = self.head.as_ref().map_or(self.parameters.len(), |(_, uses)| uses.added.start);
        let (mut own, mut input, mut output) = (0.., 0.., 0..);
        let mut owners = Vec::with_capacity(self.parameters.len());
        for (i, parameter) in self.parameters.iter().enumerate() {
            owners.push(match parameter.tied {
                false => Owner::Own(own.next().unwrap_or_default()),
                true if i < head => Owner::Table(TableEnd::Input, input.next().unwrap_or_default()),
                true => Owner::Table(TableEnd::Output, output.next().unwrap_or_default()),
            });
        }
        owners
    }

    /// The values that a run of the layers uses, each once, out of those of all parameters, and
    /// whose they are; with the last layer those of the head.
    pub fn used(&self, run: Range<usize>, weights: &[Tensor]) -> Vec<(Owner, Tensor)> {
        let with_head = run.end == self.layers.len();
        let layers = self.layers[run].iter().map(|(_, uses)| uses);
        let head = self.head.iter().filter(|_| with_head).map(|(_, uses)| uses);
        let mut numbers: Vec<usize> =
            layers.chain(head).flat_map(|uses| uses.numbers.iter().copied()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let owners = self.owners();
        numbers
            .into_iter()
            .map(|number| (owners[number], weights[number].shallow_clone()))
            .collect()
    }

    /// How many layers there are, the head not counted.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// D.
    pub fn d_model(&self) -> usize {
        self.d_model
    }

    /// Runs the layers on `x`: tokens [B, T] or hidden states [B, T, D] -> hidden states. `memory`
    /// is what the layers remember, and afterwards what they will remember.
    pub fn forward(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        memory: &mut Memory,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        self.forward_run(0..self.layers.len(), weights, x, memory, dropout)
    }

    /// The same for a run of the layers, counted in this stack; a run that starts later takes
    /// hidden states.
    pub fn forward_run(
        &self,
        run: Range<usize>,
        weights: &[Tensor],
        x: &Tensor,
        memory: &mut Memory,
        dropout: Option<Dropout>,
    ) -> Result<Tensor> {
        let mut x = x.shallow_clone();
        let memories = &mut memory.of(self.layers.len())[run.clone()];
        for ((layer, uses), memory) in self.layers[run].iter().zip(memories) {
            x = layer.forward(&uses.pick(weights), &x, memory, dropout)?;
        }

        Ok(x)
    }

    /// Cuts the layers, from the last to the first, into runs that hold at least `values` values of
    /// the parameters that are not tied (the first may hold fewer); the head belongs to the last
    /// run. In the order of the layers. Where layers share parameters, whose gradient is added up
    /// from the last layer to the first, a run is one layer (`values` = 0) or all.
    pub fn runs(&self, values: usize) -> Vec<LayerRange> {
        let values = if self.has_shared_parameters() && values > 0 { usize::MAX } else { values };
        let count = |uses: &Uses| {
            let own = self.parameters[uses.added.clone()].iter().filter(|p| !p.tied);
            own.map(Parameter::count).sum::<usize>()
        };

        let mut held = self.head.as_ref().map_or(0, |(_, uses)| count(uses));
        let (mut runs, mut end) = (Vec::new(), self.layers.len());
        for (i, (_, uses)) in self.layers.iter().enumerate().rev() {
            held += count(uses);
            if held >= values || i == 0 {
                let before = &self.parameters[..uses.added.start];
                runs.insert(
                    0,
                    LayerRange { layers: i..end, first: before.iter().filter(|p| !p.tied).count() },
                );

                (held, end) = (0, i);
            }
        }
        runs
    }

    /// Mean cross-entropy in nats per token of hidden states [B, T, D] and `targets` [B, T], with the
    /// gradients that are ready by the numbers of their parameters.
    pub fn loss(
        &self,
        weights: &[Tensor],
        hidden: &Tensor,
        targets: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<Loss> {
        let (head, uses) = self.head.as_ref().expect("only a stack with the head has a loss");
        let mut loss = head.loss(&uses.pick(weights), hidden, targets, dropout)?;
        loss.ready.iter_mut().for_each(|(number, _)| *number = uses.numbers[*number]);
        Ok(loss)
    }

    /// The losses of the targets that count, added up: nats.
    pub fn losses(&self, weights: &[Tensor], hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let (head, uses) = self.head.as_ref().expect("only a stack with the head has a loss");
        head.losses(&uses.pick(weights), hidden, targets)
    }

    /// Logarithms of the probabilities of the next token: hidden states [B, T, D] -> [B, T, V].
    pub fn log_probabilities(&self, weights: &[Tensor], hidden: &Tensor) -> Result<Tensor> {
        let (head, uses) =
            self.head.as_ref().expect("only a stack with the head has probabilities");
        head.log_probabilities(&uses.pick(weights), hidden)
    }

    /// Scores of the next token, of which the softmax is its distribution: hidden states [B, T, D] ->
    /// [B, T, V].
    pub fn scores(&self, weights: &[Tensor], hidden: &Tensor) -> Result<Tensor> {
        let (head, uses) = self.head.as_ref().expect("only a stack with the head has scores");
        head.scores(&uses.pick(weights), hidden)
    }

    /// Runs the layers one by one and names the first whose output is not finite.
    pub fn first_not_finite(
        &self,
        weights: &[Tensor],
        x: &Tensor,
        memory: &Memory,
        dropout: Option<Dropout>,
    ) -> Result<Option<String>> {
        let (mut x, mut memory) = (x.shallow_clone(), memory.shallow_clone());
        for ((layer, uses), memory) in self.layers.iter().zip(memory.of(self.layers.len())) {
            x = layer.forward(&uses.pick(weights), &x, memory, dropout)?;
            if x.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
                return Ok(Some(format!("output of {}", layer.name())));
            }
        }

        Ok(None)
    }

    /// Entries of the softmaxes that are kept of a token, which are f32 in any precision; none where
    /// tokens are taken in chunks, or without the head.
    pub fn entries_per_token(&self) -> usize {
        self.head.as_ref().map_or(0, |(head, _)| head.kept_entries())
    }

    /// f32 values that a microbatch keeps from its forward to its backward, however many tokens it
    /// has: gradients that are ready with the loss, and matrices that layers put together.
    pub fn saved(&self, tokens: usize) -> usize {
        let layers: usize = self.layers.iter().map(|(layer, _)| layer.saved(tokens)).sum();
        layers + self.head.as_ref().map_or(0, |(head, _)| head.saved())
    }

    /// f32 values of the logits of `tokens` tokens that there are at a time, with what is made of
    /// them.
    pub fn chunk(&self, tokens: usize) -> usize {
        self.head.as_ref().map_or(0, |(head, _)| head.chunk(tokens))
    }

    /// Values a token that a microbatch keeps from its forward to its backward.
    pub fn saved_per_token(&self) -> usize {
        let end = self.head.as_ref().map_or(self.d_model, |(head, _)| head.saved_per_token());
        self.layers.iter().map(|(layer, _)| layer.saved_per_token()).sum::<usize>() + end
    }

    /// Values a token that a backward holds at most beyond what its forward kept: from the last
    /// layer to the first, those that are not through yet still keep theirs.
    pub fn transient_per_token(&self) -> usize {
        let (mut kept, mut most) = (0, 0);
        for (layer, _) in &self.layers {
            kept += layer.saved_per_token();
            most = most.max(kept + layer.transient_per_token());
        }

        if let Some((head, _)) = &self.head {
            most = most.max(kept + head.saved_per_token() + head.transient_per_token());
        }

        most.saturating_sub(self.saved_per_token())
    }

    /// Values a token that an evaluation holds at most: the layer or the head that needs most.
    pub fn evaluation_per_token(&self) -> usize {
        let of = |layer: &dyn Layer| layer.saved_per_token() + layer.transient_per_token();
        let head = self
            .head
            .as_ref()
            .map_or(0, |(head, _)| head.saved_per_token() + head.transient_per_token());
        self.layers.iter().map(|(layer, _)| of(layer.as_ref())).fold(head, usize::max)
    }

    /// Values a token that the backward of one layer after the other holds at most, if each is run
    /// again when its turn comes: the last one together with the head.
    pub fn block_per_token(&self) -> usize {
        let last = self.layers.last().map_or(0, |(layer, _)| layer.saved_per_token());
        let head = self
            .head
            .as_ref()
            .map_or(0, |(head, _)| last + head.saved_per_token() + head.transient_per_token());
        self.evaluation_per_token().max(head)
    }

    /// How many layers remember earlier segments.
    pub fn remembering(&self) -> usize {
        self.layers.iter().filter(|(layer, _)| layer.remembers()).count()
    }

    /// What the layers remember, by their names.
    pub fn remembered<'a>(&self, memory: &'a Memory) -> Vec<(String, &'a Tensor)> {
        let layers = self.layers.iter().enumerate();
        layers.filter_map(|(i, (layer, _))| Some((layer.name(), memory.states(i)?))).collect()
    }

    /// A memory of up to `limit` tokens with what `states` says of each layer that remembers, by
    /// its name.
    ///
    /// # Errors
    /// Those of `states`.
    pub fn recalled(
        &self,
        limit: usize,
        states: impl Fn(&str) -> Result<Option<Tensor>>,
    ) -> Result<Memory> {
        let mut memory = Memory::new(limit);
        for ((layer, _), remembered) in self.layers.iter().zip(memory.of(self.layers.len())) {
            if layer.remembers()
                && let Some(states) = states(&layer.name())?
            {
                remembered.recall(states);
            }
        }

        Ok(memory)
    }

    /// f32 values that a backward holds for a moment, whatever the tokens.
    pub fn transient(&self) -> usize {
        let head = self.head.as_ref().map_or(0, |(head, _)| head.transient());
        self.layers.iter().map(|(layer, _)| layer.transient()).fold(head, usize::max)
    }
}

/// The parameters that embedding and head share, in the order in which both take them; none without
/// a tie.
pub fn table(dimensions: &Dimensions) -> Vec<Parameter> {
    embedding::Embedding::new(dimensions).parameters().into_iter().filter(|p| p.tied).collect()
}

/// Every parameter of the whole model, once.
pub fn parameters(dimensions: &Dimensions) -> Vec<Parameter> {
    let whole = Stack::new(dimensions, 0..dimensions.layers);
    table(dimensions).into_iter().chain(whole.own()).collect()
}

/// Values of all parameters.
pub fn count(dimensions: &Dimensions) -> usize {
    parameters(dimensions).iter().map(Parameter::count).sum()
}

/// Layer normalisation over the last dimension, with weight and bias.
fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(x.f_layer_norm(weight.size(), Some(weight), Some(bias), eps, true)?)
}

/// `x / sqrt(mean(x^2) + eps)` over the last dimension, times weights (Zhang and Sennrich 2019).
fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(x.f_rms_norm(weight.size(), Some(weight), eps)?)
}

#[cfg(test)]
mod tests {
    use super::config::InitKind;
    use super::*;
    use crate::schedule::Tie;

    fn dimensions() -> Dimensions {
        let config = ModelConfig {
            layers: 3,
            d_model: 8,
            heads: 2,
            d_ff: 16,
            tie: Tie::Untied,
            ..ModelConfig::default()
        };
        Dimensions::new(&config, 11, 5)
    }

    fn initial_values(parameters: &[Parameter]) -> Vec<Tensor> {
        parameters.iter().map(|p| initial_tensor(p, 3)).collect()
    }

    fn values(stack: &Stack) -> Vec<Tensor> {
        let table = initial_values(
            &stack.parameters.iter().filter(|p| p.tied).cloned().collect::<Vec<_>>(),
        );
        stack.weights(&initial_values(&stack.own()), &table, &table)
    }

    fn run(stack: &Stack, x: &Tensor, dropout: Option<Dropout>) -> Tensor {
        stack.forward(&values(stack), x, &mut Memory::new(0), dropout).unwrap()
    }

    #[test]
    fn a_model_cut_in_two_is_the_same_model() {
        let whole = Stack::new(&dimensions(), 0..3);
        let (a, b) = (Stack::new(&dimensions(), 0..1), Stack::new(&dimensions(), 1..3));
        let names = |s: &Stack| s.parameters.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&whole), [names(&a), names(&b)].concat());
        let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 10, 9, 8, 7, 6]).view([2, 5]);
        let y = run(&whole, &tokens, None);
        assert_eq!(run(&b, &run(&a, &tokens, None), None), y);
        assert_eq!(y.size(), [2, 5, 8]);
        assert_eq!(whole.log_probabilities(&values(&whole), &y).unwrap().size(), [2, 5, 11]);
    }

    #[test]
    fn runs_of_layers_hold_at_least_a_bucket() {
        let whole = Stack::new(&dimensions(), 0..3);
        let runs = |values| {
            whole.runs(values).into_iter().map(|run| (run.layers, run.first)).collect::<Vec<_>>()
        };
        assert_eq!(runs(1), [(0..1, 0), (1..2, 2), (2..3, 14), (3..4, 26)]);
        assert_eq!(
            runs(600),
            [(0..1, 0), (1..2, 2), (2..3, 14), (3..4, 26)],
            "the first run may hold fewer"
        );
        assert_eq!(runs(800), [(0..2, 0), (2..4, 14)]);
        assert_eq!(runs(usize::MAX), [(0..4, 0)]);
        let middle = Stack::new(&Dimensions { tied: true, ..dimensions() }, 1..2);
        assert_eq!(middle.runs(1), [LayerRange { layers: 0..1, first: 0 }]);
    }

    /// Rows of a tied table that begin a hundred times larger make the same hidden states at first,
    /// and logits that are ten times larger.
    #[test]
    fn a_tied_table_may_begin_larger() {
        let begins = |embedding_std: f64| {
            let tied = ModelConfig {
                arch: Arch::TransformerXl,
                tie: Tie::Aligned,
                embedding_std,
                ..ModelConfig::default()
            };
            let d = Dimensions::new(
                &ModelConfig { layers: 2, d_model: 8, heads: 2, d_ff: 16, ..tied },
                11,
                5,
            );
            let stack = Stack::new(&d, 0..2);
            let tokens = Tensor::from_slice(&[1i64, 5, 3, 3, 9]).view([1, 5]);
            let hidden = run(&stack, &tokens, None);
            let probabilities = stack.log_probabilities(&values(&stack), &hidden).unwrap();
            // Differences of logits.
            let logits = &probabilities - probabilities.narrow(-1, 0, 1);
            (hidden, logits)
        };
        let near =
            |one: &Tensor, other: &Tensor| (one - other).abs().max().double_value(&[]) < 1e-5;
        let ((hidden, logits), (of_larger, logits_of_larger)) = (begins(0.02), begins(2.0));
        assert!(near(&hidden, &of_larger));
        assert!(near(&(logits * 10.0), &logits_of_larger));
    }

    #[test]
    fn a_tied_model_has_its_table_once() {
        let tied = Dimensions { tied: true, ..dimensions() };
        let names: Vec<String> = parameters(&tied).into_iter().map(|p| p.name).collect();
        assert_eq!(names.iter().filter(|name| *name == "embedding.tokens").count(), 1);
        assert!(!names.contains(&"head.weight".to_owned()));
        assert_eq!(count(&dimensions()) - count(&tied), 11 * 8);
        assert!(table(&dimensions()).is_empty());
    }

    /// Layers that share their biases are layers with equal ones, and the gradient is the sum of
    /// theirs.
    #[test]
    fn shared_biases_are_one_parameter_of_all_layers() {
        let config = ModelConfig {
            arch: Arch::TransformerXl,
            layers: 3,
            d_model: 8,
            heads: 2,
            d_head: Some(3),
            d_ff: 16,
            tie: Tie::Untied,
            init: InitKind::Normal,
            init_std: Some(0.3),
            ..ModelConfig::default()
        };
        let stack = |shared_biases| {
            let config = ModelConfig { shared_biases, ..config.clone() };
            Stack::new(&Dimensions::new(&config, 11, 5), 0..3)
        };
        let (apart, shared) = (stack(false), stack(true));
        assert_eq!(apart.parameters.len() - shared.parameters.len(), 4);
        assert_eq!(shared.runs(1), shared.runs(usize::MAX), "one gradient, so one run");
        assert_eq!(shared.runs(0).len(), 4);

        let leaf = |value: Tensor| value.to_kind(tch::Kind::Double).set_requires_grad(true);
        let of_shared: Vec<Tensor> =
            initial_values(&shared.parameters).into_iter().map(leaf).collect();
        let number = |name: &str| shared.parameters.iter().position(|p| p.name == name).unwrap();
        let value = |p: &Parameter| {
            let name = match p.name.split_once(".attention.") {
                Some((_, bias)) if bias.ends_with("_bias") => format!("layers.attention.{bias}"),
                _ => p.name.clone(),
            };
            of_shared[number(&name)].detach()
        };
        let of_apart: Vec<Tensor> = apart.parameters.iter().map(|p| leaf(value(p))).collect();

        let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 10, 9, 8, 7, 6]).view([2, 5]);
        let output = |stack: &Stack, weights: &[Tensor]| {
            let y = stack.forward(weights, &tokens, &mut Memory::new(0), None).unwrap();
            y.square().sum(tch::Kind::Double).backward();
            y.detach()
        };
        assert_eq!(output(&shared, &of_shared), output(&apart, &of_apart));
        for short in ["attention.content_bias", "attention.position_bias"] {
            let of_layers =
                apart.parameters.iter().zip(&of_apart).filter(|(p, _)| p.name.ends_with(short));
            let sum =
                of_layers.map(|(_, weight)| weight.grad()).reduce(|sum, grad| sum + grad).unwrap();
            let far = (of_shared[number(&format!("layers.{short}"))].grad() - &sum)
                .abs()
                .max()
                .double_value(&[]);
            assert!(far < 1e-12 && sum.abs().max().double_value(&[]) > 1e-3, "{short}: {far:e}");
        }
    }

    #[test]
    fn a_token_sees_only_those_before_it() {
        let whole = Stack::new(&dimensions(), 0..3);
        let run =
            |last: i64| run(&whole, &Tensor::from_slice(&[1i64, 2, 3, 4, last]).view([1, 5]), None);
        let (y, z) = (run(5), run(9));
        assert_eq!(y.narrow(1, 0, 4), z.narrow(1, 0, 4));
        assert_ne!(y.narrow(1, 4, 1), z.narrow(1, 4, 1));
    }

    #[test]
    fn dropout_depends_on_its_key_only() {
        let whole = Stack::new(&dimensions(), 0..3);
        let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5]).view([1, 5]);
        let run = |step| {
            run(
                &whole,
                &tokens,
                Some(Dropout {
                    rate: 0.3,
                    attention_rate: 0.0,
                    seed: 1,
                    step,
                    replica: 0,
                    microbatch: 0,
                }),
            )
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
