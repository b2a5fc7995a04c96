//! One stage at work: forward and backward of microbatches at a version of its weights. The only caller of autograd
//! besides the oracle.

use std::collections::{BTreeMap, VecDeque};

use tch::{Kind, Tensor};

use crate::config::{Config, OnNonfinite, Recompute};
use crate::emulation::Sleep;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::model::{Dropout, Memory, Run, Stack};
use crate::number::Number;
use crate::optim::norm;
use crate::params::Versions;
use crate::table::{End, Table};
use crate::wire::Wire;

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

/// The layers of one place, their weights, and the microbatches under way.
pub struct Stage {
    place: Place,
    stack: Stack,
    pub versions: Versions,
    settings: Settings,
    /// The layers at one go; those of the last microbatch of a step; one by one.
    whole: Vec<Run>,
    buckets: Vec<Run>,
    blocks: Vec<Run>,
    saved: VecDeque<Saved>,
    /// What the layers remember, a microbatch of rows each; of the evaluation.
    memories: BTreeMap<usize, Memory>,
    eval_memory: Memory,
    /// Sleeps instead of computing; what it gives then.
    emulated: Option<(Sleep, Option<Tensor>)>,
}

/// How a stage works.
#[derive(Debug, Clone)]
pub struct Settings {
    pub recompute: Recompute,
    /// Rates of dropout: of hidden states, of the attention's probabilities.
    pub dropout: f64,
    pub attention_dropout: f64,
    pub seed: u64,
    /// Tokens that the layers remember, in training and in evaluation.
    pub mem_len: usize,
    pub eval_mem_len: usize,
    /// m, and the values of a bucket of gradients; none where nothing is reduced.
    pub microbatches: usize,
    pub bucket: Option<usize>,
    /// Outputs that are not finite are sent on.
    goes_on: bool,
    /// Losses are not waited for: nothing is known of an output when it is sent.
    late: bool,
}

impl Settings {
    /// Those of a config; with losses that are read `late` or waited for.
    pub fn new(config: &Config, late: bool) -> Settings {
        Settings {
            late,
            goes_on: config.on_nonfinite == OnNonfinite::Skip,
            recompute: config.recompute,
            dropout: config.model.dropout,
            attention_dropout: config.model.attention_dropout,
            seed: config.seed,
            mem_len: config.model.mem_len,
            eval_mem_len: config.eval_mem_len(),
            microbatches: config.microbatches,
            bucket: (config.grid.replicas > 1).then_some(config.bucket_kib * 1024 / size_of::<f32>()),
        }
    }

    /// Dropout of one microbatch; none if both rates are 0.
    pub fn dropout(&self, slot: Slot, replica: usize) -> Option<Dropout> {
        let Slot { step, microbatch } = slot;
        let Settings { dropout: rate, attention_dropout: attention_rate, seed, .. } = *self;
        let any = rate > 0.0 || attention_rate > 0.0;
        any.then_some(Dropout { rate, attention_rate, seed, step, replica, microbatch })
    }
}

impl Stage {
    /// A stage without microbatches under way.
    pub fn new(place: Place, stack: Stack, versions: Versions, settings: Settings) -> Stage {
        let eval_memory = Memory::new(settings.eval_mem_len);
        let (whole, buckets) = (stack.runs(usize::MAX), stack.runs(settings.bucket.unwrap_or(usize::MAX)));
        let (blocks, saved, memories) = (stack.runs(0), VecDeque::new(), BTreeMap::new());
        Stage { place, stack, versions, settings, whole, buckets, blocks, saved, memories, eval_memory, emulated: None }
    }

    /// From now on sleeps instead of computing: losses and gradients are 0.
    pub fn emulate(&mut self, sleep: Sleep) {
        self.emulated = Some((sleep, None));
    }

    fn emulated_forward(&mut self, slot: Slot, at: At, input: Input) -> Result<Output> {
        let Some((sleep, blank)) = &mut self.emulated else {
            return Err(Error::Internal("no emulated compute".into()));
        };
        std::thread::sleep(sleep.forward);
        let Input { x, targets, .. } = input;
        let output = match (&targets, &blank) {
            (Some(_), _) => Output::Loss(Number::Known(0.0)),
            (None, Some(blank)) => Output::Hidden(blank.shallow_clone()),
            (None, None) => {
                let shape = [x.size()[0], x.size()[1], self.stack.d_model() as i64];
                let zeros = Tensor::f_zeros(shape, (Kind::Float, x.device()))?;
                *blank = Some(zeros.shallow_clone());
                Output::Hidden(zeros)
            }
        };
        let memory = Memory::new(0);
        self.saved.push_back(Saved { slot, at, input: x, targets, memory, graphs: Vec::new(), inputs: Vec::new() });
        Ok(output)
    }

    fn emulated_backward(
        &mut self,
        saved: &Saved,
        sleep: Sleep,
        ready: &mut dyn FnMut(Bucket) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let last = saved.slot.microbatch + 1 == self.settings.microbatches;
        let runs = if last { &self.buckets } else { &self.whole };
        let mut end = self.versions.layout().len;
        for run in runs.iter().rev() {
            std::thread::sleep(sleep.backward / runs.len() as u32);
            let offset = self.versions.layout().offset(run.first);
            if offset > 0 {
                let values = self.versions.gradient(0).f_narrow(0, offset as i64, (end - offset) as i64)?;
                ready(Bucket { offset, values })?;
                end = offset;
            }
        }
        // A stage's input is as large as its output.
        if self.place.stage == 0 { Ok(None) } else { Ok(Some(saved.input.shallow_clone())) }
    }

    /// Forward of a microbatch at the given versions. `table` is the tied table if this stage uses one.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the output is not, and what libtorch reports.
    pub fn forward(&mut self, slot: Slot, at: At, table: Option<&Table>, input: Input) -> Result<Output> {
        if self.emulated.is_some() {
            return self.emulated_forward(slot, at, input);
        }
        let Input { x, targets, restart } = input;
        let input = if self.place.stage == 0 { x } else { x.f_detach()?.f_set_requires_grad(true)? };
        let remembered = self.memories.remove(&slot.microbatch).filter(|_| !restart);
        let memory = remembered.unwrap_or_else(|| Memory::new(self.settings.mem_len));
        let mut saved = Saved { slot, at, input, targets, memory, graphs: Vec::new(), inputs: Vec::new() };
        let mut memory = saved.memory.shallow_clone();
        let runs = self.runs(slot);
        let graphs = match self.settings.recompute {
            Recompute::Nothing => self.run(&saved, runs, &mut memory, table)?,
            Recompute::Stage => tch::no_grad(|| self.run(&saved, runs, &mut memory, table))?,
            Recompute::Layers => tch::no_grad(|| self.run(&saved, &self.blocks, &mut memory, table))?,
        };
        self.memories.insert(slot.microbatch, memory);
        let result = self.checked(&saved, &graphs, table)?;
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
        table: Option<&Table>,
        mut dy: Option<Tensor>,
        ready: &mut dyn FnMut(Bucket) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let saved = self.saved.pop_front().filter(|saved| saved.slot == slot);
        let mut saved = saved.ok_or_else(|| Error::Internal(format!("{slot:?} on {} has no forward", self.place)))?;
        if let Some((sleep, _)) = self.emulated {
            return self.emulated_backward(&saved, sleep, ready);
        }
        let mut graphs = match self.settings.recompute {
            Recompute::Nothing => std::mem::take(&mut saved.graphs),
            Recompute::Stage => self.run(&saved, self.runs(slot), &mut saved.memory.shallow_clone(), table)?,
            Recompute::Layers => Vec::new(),
        };
        let layout = self.versions.layout();
        let bounds: Vec<usize> = self.runs(slot).iter().map(|run| layout.offset(run.first)).collect();
        // What is added up ends here; what is reduced, there.
        let (mut collected, mut end) = (layout.len, layout.len);
        loop {
            let next = match saved.inputs.pop() {
                Some(input) => Some(self.block(&saved, saved.inputs.len(), input, table)?),
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
            self.versions.collect(0, offset..collected)?;
            collected = offset;
            if offset > 0 && bounds.contains(&offset) {
                let values = self.versions.gradient(0).f_narrow(0, offset as i64, (end - offset) as i64)?;
                ready(Bucket { offset, values })?;
                end = offset;
            }
        }
        table.map_or(Ok(()), Table::collect)?;
        Ok(dy)
    }

    /// Forward and backward of a microbatch that leaves nothing behind (but in the table's gradient): for what is loaded and
    /// taken when something is done for the first time.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn rehearse(&mut self, table: Option<&Table>, input: &Input, wire: Wire) -> Result<()> {
        let memories = std::mem::take(&mut self.memories);
        // The last microbatch of a step is cut into buckets.
        let slot = Slot { step: 0, microbatch: self.settings.microbatches - 1 };
        let at = At { own: self.versions.newest(), table: table.map_or(0, Table::newest) };
        // The second time with a memory.
        for restart in [true, false] {
            let (x, targets) = (input.x.shallow_clone(), input.targets.as_ref().map(Tensor::shallow_clone));
            let input = Input { x, targets, restart };
            self.evaluate(table, &input)?;
            let dy = match self.forward(slot, at, table, input)? {
                Output::Hidden(y) => Some(wire.cross(&y)?.f_zeros_like()?),
                Output::Loss(loss) => {
                    loss.plus(Number::Known(0.0))?.times(1.0)?.now()?;
                    None
                }
            };
            if let Some(dx) = self.backward(slot, table, dy, &mut |_| Ok(()))? {
                let _ = wire.cross(&dx)?;
            }
        }
        self.end_evaluation();
        let gradient = self.versions.gradient(0);
        norm(gradient, self.settings.late)?.now()?;
        let _ = gradient.f_zero_()?;
        self.memories = memories;
        Ok(())
    }

    /// Forward of an evaluation at the newest versions: hidden states, or the sum of the losses of all tokens.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn evaluate(&mut self, table: Option<&Table>, input: &Input) -> Result<Output> {
        let at = At { own: self.versions.newest(), table: table.map_or(0, Table::newest) };
        if input.restart {
            self.eval_memory = Memory::new(self.settings.eval_mem_len);
        }
        tch::no_grad(|| {
            let weights = self.weights(at, table);
            let y = self.stack.forward(&weights, &input.x, &mut self.eval_memory, None)?;
            match &input.targets {
                None => Ok(Output::Hidden(y)),
                Some(targets) => {
                    let mean = Number::of(&self.stack.loss(&weights, &y, targets, None)?, self.settings.late)?;
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
    fn weights(&self, at: At, table: Option<&Table>) -> Vec<Tensor> {
        let end = |end| table.map_or(&[][..], |table| table.parameters(at.table, end));
        self.stack.weights(self.versions.parameters(at.own, 0), end(End::Input), end(End::Output))
    }

    /// How the layers are cut in the backward of a microbatch.
    fn runs(&self, slot: Slot) -> &[Run] {
        if slot.microbatch + 1 == self.settings.microbatches { &self.buckets } else { &self.whole }
    }

    /// The graph of one layer, and with the last one the loss.
    fn block(&self, saved: &Saved, number: usize, input: Tensor, table: Option<&Table>) -> Result<Graph> {
        let (weights, dropout) = (self.weights(saved.at, table), self.dropout(saved.slot));
        let input = if number == 0 { input } else { input.f_detach()?.f_set_requires_grad(true)? };
        let (run, mut memory) = (&self.blocks[number], saved.memory.shallow_clone());
        let mut output = self.stack.forward_run(run.layers.clone(), &weights, &input, &mut memory, dropout)?;
        if let Some(targets) = saved.targets.as_ref().filter(|_| number + 1 == self.blocks.len()) {
            output = self.stack.loss(&weights, &output, targets, dropout)?;
        }
        Ok(Graph { input, output, offset: self.versions.layout().offset(run.first) })
    }

    /// Hidden states or loss of a microbatch, the same every time it is run with the same memory.
    fn run(&self, saved: &Saved, runs: &[Run], memory: &mut Memory, table: Option<&Table>) -> Result<Vec<Graph>> {
        let (weights, dropout) = (self.weights(saved.at, table), self.dropout(saved.slot));
        let mut graphs: Vec<Graph> = Vec::with_capacity(runs.len());
        for run in runs {
            let input = match graphs.last() {
                None => saved.input.shallow_clone(),
                Some(before) => before.output.f_detach()?.f_set_requires_grad(true)?,
            };
            let output = self.stack.forward_run(run.layers.clone(), &weights, &input, memory, dropout)?;
            let offset = self.versions.layout().offset(run.first);
            graphs.push(Graph { input, output, offset });
        }
        if let (Some(targets), Some(end)) = (&saved.targets, graphs.last_mut()) {
            end.output = self.stack.loss(&weights, &end.output, targets, dropout)?;
        }
        Ok(graphs)
    }

    /// Looks at every output before it is sent, so that the first stage with a bad tensor is the one that says so.
    fn checked(&self, saved: &Saved, graphs: &[Graph], table: Option<&Table>) -> Result<Output> {
        let output = graphs.last().map(|graph| &graph.output);
        let output = output.ok_or_else(|| Error::Internal(format!("{} has no layers", self.place)))?;
        let late = self.settings.late;
        let (result, finite) = match saved.targets {
            Some(_) => {
                let loss = Number::of(output, late)?;
                // One that is not known yet is looked at when it is.
                let finite = late || loss.now()?.is_finite();
                (Output::Loss(loss), finite)
            }
            None => (Output::Hidden(output.f_detach()?), late || is_finite(output)?),
        };
        if finite || self.settings.goes_on {
            return Ok(result);
        }
        let tensor = tch::no_grad(|| self.bad_tensor(saved, table))?;
        Err(Error::NotFinite { tensor, step: saved.slot.step, place: self.place, data: String::new() })
    }

    /// The first weight, layer or memory that is not finite.
    fn bad_tensor(&self, saved: &Saved, table: Option<&Table>) -> Result<String> {
        let weights = self.weights(saved.at, table);
        for (parameter, weight) in self.stack.parameters().iter().zip(&weights) {
            if !is_finite(weight)? {
                return Ok(format!("weight {}", parameter.name));
            }
        }
        let dropout = self.dropout(saved.slot);
        let layer = self.stack.first_not_finite(&weights, &saved.input, &saved.memory, dropout)?;
        Ok(layer.unwrap_or_else(|| "the loss".to_owned()))
    }
}

/// Whether every value of a tensor is finite.
///
/// # Errors
/// What libtorch reports.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(x.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}
