//! One stage at work: forward and backward of microbatches at a version of its weights. The only caller of autograd
//! besides the oracle.

mod diagnosis;
mod rehearse;
mod settings;

use std::collections::{BTreeMap, VecDeque};

use tch::{Kind, Tensor};

pub use settings::Settings;

use crate::config::Recompute;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::model::{Dropout, Memory, Run, Stack};
use crate::number::Number;
use crate::params::Versions;
use crate::table::{End, Table};

/// Which microbatch of which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub step: usize,
    pub microbatch: usize,
}

/// What a forward gives.
#[derive(Debug)]
pub enum Output {
    /// Hidden states for the next stage, [b, T, D].
    Hidden(Tensor),
    /// Mean loss of the microbatch, nats per token (of an evaluation the sum over its tokens): the last stage.
    Loss(Number),
}

/// The versions that a step uses: of the stage's own weights, of the tied table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    pub own: usize,
    pub table: usize,
}

/// The weights that a stage works with: its own, and the tied table if it uses it.
#[derive(Clone, Copy)]
pub struct Held<'a> {
    pub own: &'a Versions,
    pub table: Option<&'a Table>,
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
}

/// A part of a step's gradient that is complete: `values` of the flat buffer from `offset` on.
pub struct Bucket {
    pub offset: usize,
    pub values: Tensor,
}

/// A forward that waits for its backward.
struct Saved {
    slot: Slot,
    at: At,
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

/// The graph of a run of layers, from its input to its output. The last microbatch of a step has one for every bucket of
/// gradients, so that a bucket can be reduced while the backward of the layers before it is made:
///
/// ```text
/// forward     x -> [ run 0 ] -> y0 | x1 -> [ run 1 ] -> loss         x1 is y0, a leaf
/// backward                                 [ run 1 ]  dx1            bucket 1 is complete: its all-reduce starts
///             dx <- [ run 0 ] <- sum(y0 dx1)                         bucket 0
/// ```
///
/// With `recompute = "blocks"` every layer is a run, whose graph is made, from its input, when its backward comes.
struct Graph {
    input: Tensor,
    output: Tensor,
    /// Where its gradients begin in the flat buffer.
    offset: usize,
}

/// The layers of one place and the microbatches under way.
pub struct Stage {
    place: Place,
    stack: Stack,
    settings: Settings,
    /// The layers at one go; those of the last microbatch of a step; one by one.
    whole: Vec<Run>,
    buckets: Vec<Run>,
    blocks: Vec<Run>,
    saved: VecDeque<Saved>,
    /// What the layers remember, a microbatch of rows each; of the evaluation.
    memories: BTreeMap<usize, Memory>,
    eval_memory: Memory,
}

impl Stage {
    /// A stage without microbatches under way.
    pub fn new(place: Place, stack: Stack, settings: Settings) -> Stage {
        let eval_memory = Memory::new(settings.eval_mem_len);
        let (whole, buckets) = (stack.runs(usize::MAX), stack.runs(settings.bucket.unwrap_or(usize::MAX)));
        let (blocks, saved, memories) = (stack.runs(0), VecDeque::new(), BTreeMap::new());
        Stage { place, stack, settings, whole, buckets, blocks, saved, memories, eval_memory }
    }

    /// Forward of a microbatch at the given versions.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the output is not, and what libtorch reports.
    pub fn forward(&mut self, slot: Slot, at: At, held: Held, input: Input) -> Result<Output> {
        let Input { x, targets, restart } = input;
        let input = if self.place.stage == 0 { x } else { x.f_detach()?.f_set_requires_grad(true)? };
        let remembered = self.memories.remove(&slot.microbatch).filter(|_| !restart);
        let memory = remembered.unwrap_or_else(|| Memory::new(self.settings.mem_len));
        let mut saved = Saved { slot, at, input, targets, memory, graphs: Vec::new(), inputs: Vec::new() };
        let mut memory = saved.memory.shallow_clone();
        let runs = self.runs(slot);
        let graphs = match self.settings.recompute {
            Recompute::Nothing => self.run(&saved, runs, &mut memory, held)?,
            Recompute::Stage => tch::no_grad(|| self.run(&saved, runs, &mut memory, held))?,
            Recompute::Layers => tch::no_grad(|| self.run(&saved, &self.blocks, &mut memory, held))?,
        };
        self.memories.insert(slot.microbatch, memory);
        let result = self.checked(&saved, &graphs, held)?;
        match self.settings.recompute {
            Recompute::Nothing => saved.graphs = graphs,
            Recompute::Stage => {}
            Recompute::Layers => saved.inputs = graphs.into_iter().map(|graph| graph.input).collect(),
        }
        self.saved.push_back(saved);
        Ok(result)
    }

    /// Backward of the oldest microbatch under way: adds to the gradients, gives the gradient of the stage input.
    /// `dy` is the gradient of its output, none on the last stage. `ready` is given the buckets of the step's gradient
    /// that are complete while layers are left.
    ///
    /// # Errors
    /// What libtorch reports, and those of `ready`.
    pub fn backward(
        &mut self,
        slot: Slot,
        held: Held,
        mut dy: Option<Tensor>,
        ready: &mut dyn FnMut(Bucket) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let saved = self.saved.pop_front().filter(|saved| saved.slot == slot);
        let mut saved = saved.ok_or_else(|| Error::Internal(format!("{slot:?} on {} has no forward", self.place)))?;
        let mut graphs = match self.settings.recompute {
            Recompute::Nothing => std::mem::take(&mut saved.graphs),
            Recompute::Stage => self.run(&saved, self.runs(slot), &mut saved.memory.shallow_clone(), held)?,
            Recompute::Layers => Vec::new(),
        };
        let layout = held.own.layout();
        let bounds: Vec<usize> = self.runs(slot).iter().map(|run| layout.offset(run.first)).collect();
        // What is added up ends here; what is reduced, there.
        let (mut collected, mut end) = (layout.len, layout.len);
        loop {
            let next = match saved.inputs.pop() {
                Some(input) => Some(self.block(&saved, saved.inputs.len(), input, held)?),
                None => graphs.pop(),
            };
            let Some(Graph { input, output, offset }) = next else { break };
            match dy.take() {
                // tch cannot seed a backward: the gradient of sum(y * dy) with respect to y is exactly dy.
                Some(dy) => output.f_mul(&dy)?.f_sum(Kind::Float)?.f_backward()?,
                None => output.f_backward()?,
            }
            if input.requires_grad() {
                dy = Some(input.f_grad()?);
            }
            held.own.collect(0, offset..collected)?;
            collected = offset;
            if offset > 0 && bounds.contains(&offset) {
                let values = held.own.gradient(0).f_narrow(0, offset as i64, (end - offset) as i64)?;
                ready(Bucket { offset, values })?;
                end = offset;
            }
        }
        held.table.map_or(Ok(()), Table::collect)?;
        Ok(dy)
    }

    /// Forward of an evaluation at the newest versions: hidden states, or the sum of the losses of all tokens.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn evaluate(&mut self, held: Held, input: &Input) -> Result<Output> {
        let at = At { own: held.own.newest(), table: held.table.map_or(0, Table::newest) };
        if input.restart {
            self.eval_memory = Memory::new(self.settings.eval_mem_len);
        }
        tch::no_grad(|| {
            let weights = self.weights(at, held);
            let y = self.stack.forward(&weights, &input.x, &mut self.eval_memory, None)?;
            match &input.targets {
                None => Ok(Output::Hidden(y)),
                Some(targets) => {
                    let mean = Number::of(&self.stack.loss(&weights, &y, targets, None)?, self.settings.readback)?;
                    Ok(Output::Loss(mean.times(targets.numel() as f64)?))
                }
            }
        })
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

    fn dropout(&self, slot: Slot) -> Option<Dropout> {
        self.settings.dropout(slot, self.place.replica)
    }

    /// The values of all parameters of the layers, as leaves.
    fn weights(&self, at: At, held: Held) -> Vec<Tensor> {
        let end = |end| held.table.map_or(&[][..], |table| table.parameters(at.table, end));
        self.stack.weights(held.own.parameters(at.own, 0), end(End::Input), end(End::Output))
    }

    /// How the layers are cut in the backward of a microbatch.
    fn runs(&self, slot: Slot) -> &[Run] {
        if slot.microbatch + 1 == self.settings.microbatches { &self.buckets } else { &self.whole }
    }

    /// The graph of one layer, and with the last one the loss.
    fn block(&self, saved: &Saved, number: usize, input: Tensor, held: Held) -> Result<Graph> {
        let (weights, dropout) = (self.weights(saved.at, held), self.dropout(saved.slot));
        let input = if number == 0 { input } else { input.f_detach()?.f_set_requires_grad(true)? };
        let (run, mut memory) = (&self.blocks[number], saved.memory.shallow_clone());
        let mut output = self.stack.forward_run(run.layers.clone(), &weights, &input, &mut memory, dropout)?;
        if let Some(targets) = saved.targets.as_ref().filter(|_| number + 1 == self.blocks.len()) {
            output = self.stack.loss(&weights, &output, targets, dropout)?;
        }
        Ok(Graph { input, output, offset: held.own.layout().offset(run.first) })
    }

    /// Hidden states or loss of a microbatch, the same every time it is run with the same memory.
    fn run(&self, saved: &Saved, runs: &[Run], memory: &mut Memory, held: Held) -> Result<Vec<Graph>> {
        let (weights, dropout) = (self.weights(saved.at, held), self.dropout(saved.slot));
        let mut graphs: Vec<Graph> = Vec::with_capacity(runs.len());
        for run in runs {
            let input = match graphs.last() {
                None => saved.input.shallow_clone(),
                Some(before) => before.output.f_detach()?.f_set_requires_grad(true)?,
            };
            let output = self.stack.forward_run(run.layers.clone(), &weights, &input, memory, dropout)?;
            let offset = held.own.layout().offset(run.first);
            graphs.push(Graph { input, output, offset });
        }
        if let (Some(targets), Some(end)) = (&saved.targets, graphs.last_mut()) {
            end.output = self.stack.loss(&weights, &end.output, targets, dropout)?;
        }
        Ok(graphs)
    }
}

/// Whether every value of a tensor is finite.
///
/// # Errors
/// What libtorch reports.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(x.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}
