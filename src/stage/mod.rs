//! One stage at work: forward and backward of microbatches at a version of its weights. The only
//! caller of autograd besides the oracle.

mod diagnosis;
mod rehearse;
mod settings;

use std::collections::{BTreeMap, VecDeque};

use tch::{Kind, Tensor};

pub use settings::Settings;

use crate::config::Recompute;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::model::{Documents, Dropout, LayerRange, Loss, Memory, Owner, Stack};
use crate::number::Number;
use crate::params::Versions;
use crate::schedule::TableEnd;
use crate::table::Table;

/// Which microbatch of which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicrobatchId {
    pub step: usize,
    pub microbatch: usize,
}

/// What a forward gives.
#[derive(Debug)]
pub enum Output {
    /// Hidden states for the next stage, [b, T, D].
    Hidden(Tensor),
    /// Mean loss of the microbatch, nats per token (of an evaluation the sum over its tokens): the
    /// last stage.
    Loss(Number),
}

/// The versions that a step uses: of the stage's own weights, of the tied table as each end that
/// the stage has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedVersions {
    pub own: usize,
    pub input: Option<usize>,
    pub output: Option<usize>,
}

impl UsedVersions {
    /// The newest of each.
    fn newest(held: Held) -> UsedVersions {
        let table = held.table.map(Table::newest);
        UsedVersions { own: held.own.newest(), input: table, output: table }
    }
}

/// The weights that a stage works with: its own, and the tied table if it uses it.
#[derive(Clone, Copy)]
pub struct Held<'a> {
    pub own: &'a Versions,
    pub table: Option<&'a Table>,
}

impl Held<'_> {
    /// Adds a gradient to that of the step.
    fn add(self, owner: Owner, gradient: &Tensor) -> Result<()> {
        match (owner, self.table) {
            (Owner::Own(number), _) => self.own.add(0, number, gradient),
            (Owner::Table(end, number), Some(table)) => table.add(end, number, gradient),
            (Owner::Table(..), None) => Err(Error::Internal("a graph without its table".into())),
        }
    }
}

/// What a microbatch brings to a stage.
#[derive(Debug)]
pub struct Input {
    /// Tokens [b, T] on the first stage, else hidden states [b, T, D].
    pub x: Tensor,
    /// [b, T], on the last stage.
    pub targets: Option<Tensor>,
    /// The rows begin anew: nothing is remembered of the segment before.
    pub restart: bool,
    /// [b, T], int64, on the host: where in the row each token's document begins, where attention
    /// ends at their borders.
    pub documents: Option<Tensor>,
}

/// A part of a step's gradient that is complete: `values` of the flat buffer from `offset` on.
pub struct Bucket {
    pub offset: usize,
    pub values: Tensor,
}

/// A forward that waits for its backward.
struct Saved {
    slot: MicrobatchId,
    at: UsedVersions,
    /// The stage input, a leaf unless it is tokens.
    input: Tensor,
    targets: Option<Tensor>,
    /// What the layers remembered before: the forward that is run again sees the same.
    memory: Memory,
    /// Hidden states or loss with the graph behind them; none under recompute.
    graphs: Vec<Graph>,
    /// The inputs of the layers, where those are run again one by one.
    inputs: Vec<Tensor>,
}

/// The graph of a run of layers, from its input to its output. The last microbatch of a step has
/// one for every bucket of gradients, so that a bucket can be reduced while the backward of the
/// layers before it is made:
///
/// ```text
/// forward     x -> [ run 0 ] -> y0 | x1 -> [ run 1 ] -> loss         x1 is y0, a leaf
/// backward                                 [ run 1 ]  dx1            bucket 1 is complete: its all-reduce starts
///             dx <- [ run 0 ] <- sum(y0 dx1)                         bucket 0
/// ```
///
/// With `recompute = "blocks"` every layer is a run, whose graph is made, from its input, when its
/// backward comes.
struct Graph {
    input: Tensor,
    output: Tensor,
    /// Where its gradients begin in the flat buffer.
    offset: usize,
    /// The values that it uses of parameters whose gradients do not add up by themselves.
    used: Vec<(Owner, Tensor)>,
    /// Of the last run: its loss, whose gradient `output` has, and gradients that are ready with it.
    loss: Option<Tensor>,
    ready: Vec<(Owner, Tensor)>,
}

/// Gradients of parameters that layers have in common, as far as a backward that runs those one by
/// one has come: added up as one graph of them all would.
type Shared = BTreeMap<usize, Tensor>;

impl Graph {
    /// Adds the gradients of what it uses to those of the step, by that of its output, none of a
    /// loss; gives that of its input.
    fn backward(
        self,
        dy: Option<Tensor>,
        held: Held,
        shared: &mut Shared,
    ) -> Result<Option<Tensor>> {
        let Graph { input, output, offset, used, ready, .. } = self;
        for (owner, gradient) in ready {
            held.add(owner, &gradient)?;
        }

        // tch cannot seed a backward: the gradient of sum(y * dy) with respect to y is exactly dy.
        let root = match dy {
            Some(dy) => output.f_mul(&dy)?.f_sum(Kind::Float)?,
            None => output,
        };

        if used.is_empty() {
            root.f_backward()?;
            return input.requires_grad().then(|| Ok(input.f_grad()?)).transpose();
        }

        let mut leaves: Vec<&Tensor> = used.iter().map(|(_, value)| value).collect();
        leaves.extend(input.requires_grad().then_some(&input));
        let mut gradients = Tensor::f_run_backward(&[&root], &leaves, false, false)?;
        let dx = input.requires_grad().then(|| gradients.pop()).flatten();
        for ((owner, _), gradient) in used.iter().zip(&gradients) {
            match owner {
                Owner::Own(number) => {
                    let sum = match shared.remove(number) {
                        Some(mut sum) => sum.f_add_(gradient)?,
                        None => gradient.shallow_clone(),
                    };

                    // The layer that has it is yet to come.
                    if held.own.layout().offset(*number) < offset {
                        shared.insert(*number, sum);
                    } else {
                        held.own.add(0, *number, &sum)?;
                    }
                }
                Owner::Table(..) => held.add(*owner, gradient)?,
            }
        }

        Ok(dx)
    }
}

/// The layers of one place and the microbatches under way.
pub struct Stage {
    place: Place,
    stack: Stack,
    settings: Settings,
    /// The layers at one go; those of the last microbatch of a step; one by one.
    whole: Vec<LayerRange>,
    buckets: Vec<LayerRange>,
    blocks: Vec<LayerRange>,
    saved: VecDeque<Saved>,
    /// What the layers remember, a microbatch of rows each; of the evaluation.
    memories: BTreeMap<usize, Memory>,
    eval_memory: Memory,
}

impl Stage {
    /// A stage without microbatches under way.
    pub fn new(place: Place, stack: Stack, settings: Settings) -> Stage {
        let eval_memory = Memory::new(settings.eval_mem_len);
        let (whole, buckets) =
            (stack.runs(usize::MAX), stack.runs(settings.bucket.unwrap_or(usize::MAX)));
        let (blocks, saved, memories) = (stack.runs(0), VecDeque::new(), BTreeMap::new());
        Stage { place, stack, settings, whole, buckets, blocks, saved, memories, eval_memory }
    }

    /// How many microbatches wait for their backward, and the first of them.
    pub fn under_way(&self) -> (usize, Option<MicrobatchId>) {
        (self.saved.len(), self.saved.front().map(|saved| saved.slot))
    }

    /// Forward of a microbatch at the given versions.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the output is not, and what libtorch reports.
    pub fn forward(
        &mut self,
        slot: MicrobatchId,
        at: UsedVersions,
        held: Held,
        input: Input,
    ) -> Result<Output> {
        let Input { x, targets, restart, documents } = input;
        let input =
            if self.place.stage == 0 { x } else { x.f_detach()?.f_set_requires_grad(true)? };
        let remembered = self.memories.remove(&slot.microbatch).filter(|_| !restart);
        let memory = match documents {
            Some(starts) => Memory::of_documents(Documents::new(&starts, self.device(held))?),
            None => remembered.unwrap_or_else(|| Memory::new(self.settings.mem_len)),
        };
        let mut saved =
            Saved { slot, at, input, targets, memory, graphs: Vec::new(), inputs: Vec::new() };
        let mut memory = saved.memory.shallow_clone();
        let runs = self.runs(slot);
        let graphs = match self.settings.recompute {
            Recompute::Nothing => self.run(&saved, runs, &mut memory, held)?,
            Recompute::Stage => tch::no_grad(|| self.run(&saved, runs, &mut memory, held))?,
            Recompute::Layers => {
                tch::no_grad(|| self.run(&saved, &self.blocks, &mut memory, held))?
            }
        };

        self.memories.insert(slot.microbatch, memory.without_documents());
        let result = self.checked(&saved, &graphs, held)?;
        match self.settings.recompute {
            Recompute::Nothing => saved.graphs = graphs,
            Recompute::Stage => {}
            Recompute::Layers => {
                saved.inputs = graphs.into_iter().map(|graph| graph.input).collect()
            }
        }

        self.saved.push_back(saved);
        Ok(result)
    }

    /// Backward of the oldest microbatch under way: adds to the gradients, gives the gradient of
    /// the stage input. `dy` is the gradient of its output, none on the last stage. `ready` is
    /// given the buckets of the step's gradient that are complete while layers are left.
    ///
    /// # Errors
    /// What libtorch reports, and those of `ready`.
    pub fn backward(
        &mut self,
        slot: MicrobatchId,
        held: Held,
        mut dy: Option<Tensor>,
        ready: &mut dyn FnMut(Bucket) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let saved = self.saved.pop_front().filter(|saved| saved.slot == slot);
        let mut saved = saved
            .ok_or_else(|| Error::Internal(format!("{slot:?} on {} has no forward", self.place)))?;
        let mut graphs = match self.settings.recompute {
            Recompute::Nothing => std::mem::take(&mut saved.graphs),
            Recompute::Stage => {
                self.run(&saved, self.runs(slot), &mut saved.memory.shallow_clone(), held)?
            }
            Recompute::Layers => Vec::new(),
        };

        let layout = held.own.layout();
        let bounds: Vec<usize> =
            self.runs(slot).iter().map(|run| layout.offset(run.first)).collect();
        let (mut end, mut shared) = (layout.len, Shared::new());
        loop {
            let next = match saved.inputs.pop() {
                Some(input) => Some(self.block(&saved, saved.inputs.len(), input, held)?),
                None => graphs.pop(),
            };

            let Some(graph) = next else { break };
            let offset = graph.offset;
            dy = graph.backward(dy.take(), held, &mut shared)?;
            if offset > 0 && bounds.contains(&offset) {
                let values =
                    held.own.gradient(0).f_narrow(0, offset as i64, (end - offset) as i64)?;
                ready(Bucket { offset, values })?;
                end = offset;
            }
        }

        Ok(dy)
    }

    /// Forward of an evaluation at the newest versions: hidden states, or the sum of the losses of
    /// all tokens.
    pub fn evaluate(&mut self, held: Held, input: &Input) -> Result<Output> {
        let at = UsedVersions::newest(held);
        if input.restart {
            self.eval_memory = Memory::new(self.settings.eval_mem_len);
        }

        if let Some(starts) = &input.documents {
            self.eval_memory = Memory::of_documents(Documents::new(starts, self.device(held))?);
        }

        tch::no_grad(|| {
            let weights = self.weights(at, held);
            let y = self.stack.forward(&weights, &input.x, &mut self.eval_memory, None)?;
            match &input.targets {
                None => Ok(Output::Hidden(y)),
                Some(targets) => {
                    let sum = self.stack.losses(&weights, &y, targets)?;
                    Ok(Output::Loss(Number::from_tensor(&sum, self.settings.readback)?))
                }
            }
        })
    }

    /// Where its weights are.
    fn device(&self, held: Held) -> tch::Device {
        held.own.gradient(0).device()
    }

    /// What the layers remember of each microbatch's rows.
    pub fn memories(&self) -> &BTreeMap<usize, Memory> {
        &self.memories
    }

    /// What they are to remember, for a run that goes on.
    pub fn recall(&mut self, memories: BTreeMap<usize, Memory>) {
        self.memories = memories;
    }

    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    /// Forgets what an evaluation has remembered.
    pub fn end_evaluation(&mut self) {
        self.eval_memory = Memory::new(self.settings.eval_mem_len);
    }

    fn dropout(&self, slot: MicrobatchId) -> Option<Dropout> {
        self.settings.dropout(slot, self.place.replica)
    }

    /// The values of all parameters of the layers, as leaves.
    fn weights(&self, at: UsedVersions, held: Held) -> Vec<Tensor> {
        let of_end = |end, version: Option<usize>| match (held.table, version) {
            (Some(table), Some(version)) => table.parameters(version, end),
            _ => &[],
        };
        let (input, output) =
            (of_end(TableEnd::Input, at.input), of_end(TableEnd::Output, at.output));
        self.stack.weights(held.own.parameters(at.own, 0), input, output)
    }

    /// How the layers are cut in the backward of a microbatch.
    fn runs(&self, slot: MicrobatchId) -> &[LayerRange] {
        if slot.microbatch + 1 == self.settings.microbatches { &self.buckets } else { &self.whole }
    }

    /// The graph of one layer, and with the last one the loss.
    fn block(&self, saved: &Saved, number: usize, input: Tensor, held: Held) -> Result<Graph> {
        let (weights, dropout) = (self.weights(saved.at, held), self.dropout(saved.slot));
        let input =
            if number == 0 { input } else { input.f_detach()?.f_set_requires_grad(true)? };
        let (run, mut memory) = (&self.blocks[number], saved.memory.shallow_clone());
        let output =
            self.stack.forward_run(run.layers.clone(), &weights, &input, &mut memory, dropout)?;
        let mut graph = self.graph(run, &weights, held, input, output);
        if let Some(targets) = saved.targets.as_ref().filter(|_| number + 1 == self.blocks.len()) {
            self.lose(&mut graph, &weights, targets, dropout)?;
        }

        Ok(graph)
    }

    /// The graph of a run from its input to its output.
    fn graph(
        &self,
        run: &LayerRange,
        weights: &[Tensor],
        held: Held,
        input: Tensor,
        output: Tensor,
    ) -> Graph {
        let (offset, used) = (held.own.layout().offset(run.first), self.used(run, weights, held));
        Graph { input, output, offset, used, loss: None, ready: Vec::new() }
    }

    /// Leads the graph of the last run on to the loss.
    fn lose(
        &self,
        graph: &mut Graph,
        weights: &[Tensor],
        targets: &Tensor,
        dropout: Option<Dropout>,
    ) -> Result<()> {
        let Loss { value, root, ready } =
            self.stack.loss(weights, &graph.output, targets, dropout)?;
        let owners = self.stack.owners();
        graph.ready =
            ready.into_iter().map(|(number, gradient)| (owners[number], gradient)).collect();
        let is_ready = |owner: &Owner| graph.ready.iter().any(|(ready, _)| ready == owner);
        graph.used.retain(|(owner, _)| !is_ready(owner));
        (graph.output, graph.loss) = (root, Some(value));
        Ok(())
    }

    /// The values of a run whose gradients are added up here: those that autograd would not add to
    /// the step's, or would add one by one where layers that have them in common run one by one.
    fn used(&self, run: &LayerRange, weights: &[Tensor], held: Held) -> Vec<(Owner, Tensor)> {
        let one_by_one = self.settings.recompute == Recompute::Layers;
        let shared = one_by_one && self.stack.has_shared_parameters();
        match held.own.adds_itself() && !shared {
            true => Vec::new(),
            false => self.stack.used(run.layers.clone(), weights),
        }
    }

    /// Hidden states or loss of a microbatch, the same every time it is run with the same memory.
    fn run(
        &self,
        saved: &Saved,
        runs: &[LayerRange],
        memory: &mut Memory,
        held: Held,
    ) -> Result<Vec<Graph>> {
        let (weights, dropout) = (self.weights(saved.at, held), self.dropout(saved.slot));
        let mut graphs: Vec<Graph> = Vec::with_capacity(runs.len());
        for run in runs {
            let input = match graphs.last() {
                None => saved.input.shallow_clone(),
                Some(before) => before.output.f_detach()?.f_set_requires_grad(true)?,
            };

            let output =
                self.stack.forward_run(run.layers.clone(), &weights, &input, memory, dropout)?;
            graphs.push(self.graph(run, &weights, held, input, output));
        }

        if let (Some(targets), Some(end)) = (&saved.targets, graphs.last_mut()) {
            self.lose(end, &weights, targets, dropout)?;
        }

        Ok(graphs)
    }
}

/// Whether every value of a tensor is finite.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(x.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, OnNonfinite};
    use crate::model::{Dimensions, initial_tensor};
    use crate::number::Readback;
    use crate::params::{Layout, slice};
    use crate::schedule::Tie;

    const ROWS: i64 = 2;
    const SEQUENCE: i64 = 4;

    fn config(sets: &[&str]) -> Config {
        let text = "microbatches = 2\n[model]\nlayers = 3\nd_model = 8\nheads = 2\nd_ff = 16\ntie = \"none\"\n\
                    [data]\nsequence = 4\n[grid]\nreplicas = 2";
        Config::parse(text, &sets.iter().map(|set| (*set).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    /// The last stage of two, with its weights.
    fn last_stage(config: &Config) -> (Stage, Versions) {
        let dimensions = Dimensions::new(&config.model, 11, SEQUENCE as usize);
        let stack = Stack::new(&dimensions, 1..3);
        let layout = Layout::new(&stack.own());
        let versions =
            Versions::new(layout.clone(), layout.initial(1).unwrap(), 1, 1, Kind::Float).unwrap();
        let place = Place { stage: 1, replica: 0 };
        (Stage::new(place, stack, Settings::new(config, Readback::Now)), versions)
    }

    fn input() -> Input {
        let x = Tensor::arange(ROWS * SEQUENCE * 8, (Kind::Float, tch::Device::Cpu))
            .sin()
            .view([ROWS, SEQUENCE, 8]);
        let targets = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6, 7, 8]).view([ROWS, SEQUENCE]);
        Input { x, targets: Some(targets), restart: true, documents: None }
    }

    const AT: UsedVersions = UsedVersions { own: 0, input: None, output: None };

    /// Loss, gradient of the input and of all weights of the last microbatch; and the buckets that
    /// were ready.
    fn run(config: &Config) -> (f64, Tensor, Vec<f32>, Vec<(usize, i64)>) {
        let (mut stage, versions) = last_stage(config);
        let held = Held { own: &versions, table: None };
        let slot = MicrobatchId { step: 0, microbatch: 1 };
        let Output::Loss(loss) = stage.forward(slot, AT, held, input()).unwrap() else {
            panic!("no loss")
        };
        let mut buckets = Vec::new();
        let mut ready = |bucket: Bucket| {
            buckets.push((bucket.offset, bucket.values.numel() as i64));
            Ok(())
        };
        let dx = stage.backward(slot, held, None, &mut ready).unwrap().unwrap();
        (loss.now().unwrap(), dx, slice(versions.gradient(0)).to_vec(), buckets)
    }

    /// One graph over the layers, without a stage: the same bits.
    #[test]
    fn a_stage_gives_what_autograd_gives() {
        let config = config(&["bucket_kib=1"]);
        let (loss, dx, gradient, buckets) = run(&config);

        let dimensions = Dimensions::new(&config.model, 11, SEQUENCE as usize);
        let stack = Stack::new(&dimensions, 1..3);
        let layout = Layout::new(&stack.own());
        let leaf = |p: &crate::model::Parameter| initial_tensor(p, 1).set_requires_grad(true);
        let weights: Vec<Tensor> = stack.parameters().iter().map(leaf).collect();
        let Input { x, targets, .. } = input();
        let x = x.set_requires_grad(true);
        let hidden = stack.forward(&weights, &x, &mut Memory::new(0), None).unwrap();
        let whole = stack.loss(&weights, &hidden, &targets.unwrap(), None).unwrap();
        whole.root.backward();
        assert_eq!((loss, dx), (whole.value.double_value(&[]), x.grad()));
        for (number, gradient) in &whole.ready {
            assert!(!weights[*number].grad().defined());
            assert_eq!(gradient.size(), weights[*number].size());
        }
        for (entry, weight) in layout.entries.iter().zip(&weights) {
            let number = weights.iter().position(|other| std::ptr::eq(other, weight)).unwrap();
            let ready = whole.ready.iter().find(|(ready, _)| *ready == number);
            let expected = ready.map_or_else(|| weight.grad(), |(_, ready)| ready.shallow_clone());
            let expected = expected.contiguous().view([-1]);
            let found = &gradient[entry.offset..entry.offset + entry.parameter.count()];
            assert_eq!(Tensor::from_slice(found), expected, "{}", entry.parameter.name);
        }

        // From the last layers to the first; what is left at the end is the caller's.
        assert!(!buckets.is_empty());
        let mut end = layout.len;
        for (offset, length) in buckets {
            assert_eq!(offset + length as usize, end);
            end = offset;
        }
        assert!(end > 0);
    }

    #[test]
    fn what_is_run_again_gives_the_same_bits() {
        let plain = run(&config(&["model.dropout=0.2"]));
        for recompute in ["recompute=true", "recompute=blocks"] {
            assert_eq!(run(&config(&["model.dropout=0.2", recompute])), plain, "{recompute}");
        }
    }

    #[test]
    fn only_the_last_microbatch_of_a_step_has_buckets() {
        let (mut stage, versions) = last_stage(&config(&["bucket_kib=1"]));
        let held = Held { own: &versions, table: None };
        let slot = MicrobatchId { step: 0, microbatch: 0 };
        stage.forward(slot, AT, held, input()).unwrap();
        stage
            .backward(slot, held, None, &mut |bucket| panic!("a bucket at {}", bucket.offset))
            .unwrap();
    }

    #[test]
    fn a_backward_out_of_turn_is_a_fault_of_the_schedule() {
        let (mut stage, versions) = last_stage(&config(&[]));
        let held = Held { own: &versions, table: None };
        stage.forward(MicrobatchId { step: 0, microbatch: 0 }, AT, held, input()).unwrap();
        let error = stage
            .backward(MicrobatchId { step: 0, microbatch: 1 }, held, None, &mut |_| Ok(()))
            .unwrap_err();
        assert!(error.to_string().contains("has no forward"), "{error}");
    }

    /// The first weight that is not finite is named.
    #[test]
    fn what_is_not_finite_is_named() {
        let forward = |config: &Config, spoil: &dyn Fn(&mut Tensor)| {
            let (mut stage, mut versions) = last_stage(config);
            let change = |weight: &mut Tensor| {
                spoil(weight);
                Ok(())
            };
            versions.alter(change).unwrap();
            let held = Held { own: &versions, table: None };
            stage.forward(MicrobatchId { step: 3, microbatch: 0 }, AT, held, input())
        };
        let nan = |weight: &mut Tensor| drop(weight.fill_(f64::NAN));
        let Err(Error::NotFinite { tensor, step, place, .. }) = forward(&config(&[]), &nan) else {
            panic!("not found")
        };
        assert_eq!((tensor.as_str(), step, place.stage), ("weight layers.1.norm1.weight", 3, 1));

        let skip = Config { on_nonfinite: OnNonfinite::Skip, ..config(&[]) };
        assert!(forward(&skip, &nan).is_ok(), "it is sent on, and its update left out");
    }

    /// A memory is what the layers were given a step before, unless the rows begin anew.
    #[test]
    fn a_memory_lives_from_step_to_step() {
        let config =
            config(&["model.arch=transformer-xl", "model.mem_len=4", "data.order=streams"]);
        assert_eq!(config.model.tie, Tie::Untied);
        let (mut stage, versions) = last_stage(&config);
        let held = Held { own: &versions, table: None };
        let mut loss = |step, restart| {
            let slot = MicrobatchId { step, microbatch: 0 };
            let output = stage.forward(slot, AT, held, Input { restart, ..input() }).unwrap();
            stage.backward(slot, held, None, &mut |_| Ok(())).unwrap();
            let Output::Loss(loss) = output else { panic!("no loss") };
            loss.now().unwrap()
        };
        let (first, second, again) = (loss(0, true), loss(1, false), loss(2, true));
        assert_eq!(first, again);
        assert_ne!(first, second);
        assert_eq!(stage.memories().len(), 1);
    }
}
