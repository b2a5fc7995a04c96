//! What an update rule says of itself, and the list of them. A new rule is a file beside this one
//! with its keys, a word and its keys in `config`, a line here; and to run on a GPU, if it takes
//! values, a struct and an entry in `update.cu`.

use std::ops::Range;

use rayon::ThreadPool;

use super::config::{OptimizerConfig, OptimizerKind};
use super::matrices::{Batch, Target};
use super::{StateBuffer, adamw, muon, sgd, soap};
use crate::error::Result;
use crate::model::Parameter;
use crate::params::{Layout, UpdateBuffers};
use crate::precision::Precision;

/// The rule that a config asks for, of weights whose gradients are `delay` updates old, in a model
/// of this precision.
pub fn rule(config: &OptimizerConfig, delay: usize, precision: Precision) -> Box<dyn Rule> {
    let OptimizerConfig { adamw, sgd, muon, soap, .. } = config;
    match config.common.kind {
        OptimizerKind::Adamw => Box::new(adamw::Adamw::new(adamw, delay)),
        OptimizerKind::Sgd => Box::new(sgd::Sgd::new(sgd)),
        OptimizerKind::Muon => Box::new(muon::Muon::new(muon, adamw, delay, precision)),
        OptimizerKind::Soap => Box::new(soap::Soap::new(soap, adamw, delay)),
    }
}

/// The numbers of one update.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Counts updates from 1.
    pub n: i32,
    pub lr: f64,
    /// Turns the sum of gradients into the mean, and clips it.
    pub scale: f64,
    /// What decay leaves of a weight that decays.
    pub keep: f64,
}

/// A part of the flat buffers whose values are taken one by one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ValueRange {
    /// Of the weights and their gradient.
    pub weights: Range<usize>,
    /// Where it begins in the buffers of state that hold it, in their order.
    pub state: Vec<usize>,
}

/// What the pass over the values of a set of weights goes by.
pub struct Weights<'a> {
    /// Sorted.
    pub runs: &'a [ValueRange],
    /// Sorted, without gaps: which part of the buffer decays.
    pub decay: &'a [(Range<usize>, bool)],
    pub pool: Option<&'a ThreadPool>,
}

/// An update rule. It takes parameters value by value, in one pass over the runs of them; or whole,
/// as matrices; or some so and some so.
pub trait Rule: Send {
    /// The state that it keeps of a set of weights: the name of each flat buffer, and the layout of
    /// its values, which begin as zeros. Those of the values that are taken one by one come first.
    fn state(&self, layout: &Layout) -> Vec<(&'static str, Layout)>;

    /// Whether it takes a parameter whole.
    fn takes_whole(&self, _: &Parameter) -> bool {
        false
    }

    /// One update of the values on the processor: reads `old` (where it is none, `new` holds the
    /// newest weights), writes `new` and the state, and clears the gradient, which is the sum that
    /// `step.scale` makes the clipped mean of. What it publishes is none of its business.
    fn step(
        &self,
        buffers: UpdateBuffers,
        state: &mut [StateBuffer],
        step: &Step,
        weights: &Weights,
    ) -> Result<()>;

    /// One update of what it takes whole, by operations of libtorch on any device.
    fn matrices(
        &mut self,
        _target: &Target,
        _state: &mut [StateBuffer],
        _step: &Step,
        _batches: &[Batch],
    ) -> Result<()> {
        Ok(())
    }

    /// The same of an update that is not made, with everything that updates do now and then: so
    /// that a GPU has loaded it.
    fn rehearse(
        &mut self,
        target: &Target,
        state: &mut [StateBuffer],
        step: &Step,
        batches: &[Batch],
    ) -> Result<()> {
        self.matrices(target, state, step, batches)
    }

    /// The state has been read back.
    fn restored(&mut self, _state: &[StateBuffer]) -> Result<()> {
        Ok(())
    }

    /// The largest norm of a clipped mean gradient that it can take: the update of a larger one is
    /// left out, as that of one that is not finite.
    fn largest(&self) -> f64 {
        f64::INFINITY
    }

    /// The entry of `update.cu` that makes the same update of the values on a GPU; one that is not
    /// there is an error when it is loaded.
    fn kernel(&self) -> &'static str;

    /// The constants of that entry, in the order of its struct.
    fn constants(&self, step: &Step) -> Vec<f32>;

    /// Values that an update needs for a moment besides its buffers.
    fn workspace(&self, _layout: &Layout) -> usize {
        0
    }
}
