//! What an update rule says of itself, and the list of them. A new rule is a file beside this one with its keys, a word and
//! its keys in `config`, a line here; and to run on a GPU a struct and an entry in `update.cu`.

use std::ops::Range;

use rayon::ThreadPool;

use super::config::{OptimizerConfig, OptimizerKind};
use super::{StateBuffer, adamw, sgd};
use crate::error::Result;
use crate::params::{Layout, UpdateBuffers};

/// The rule that a config asks for, of weights whose gradients are `delay` updates old.
pub fn rule(config: &OptimizerConfig, delay: usize) -> Box<dyn Rule> {
    match config.common.kind {
        OptimizerKind::Adamw => Box::new(adamw::Adamw::new(&config.adamw, delay)),
        OptimizerKind::Sgd => Box::new(sgd::Sgd::new(&config.sgd)),
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

/// The weights that a rule works on: views of the flat buffers for rules that take matrices, parts that decay for those
/// that take values.
pub struct Weights<'a> {
    pub layout: &'a Layout,
    /// Sorted, without gaps: which part of the buffer decays.
    pub decay: &'a [(Range<usize>, bool)],
    pub pool: Option<&'a ThreadPool>,
}

/// An update rule.
pub trait Rule: Send {
    /// The state that it keeps of a set of weights: the name of each flat buffer, and the layout of its values, which
    /// begin as zeros.
    fn state(&self, layout: &Layout) -> Vec<(&'static str, Layout)>;

    /// One update on the processor: reads `old` (where it is none, `new` holds the newest weights), writes `new` and the
    /// state, and clears the gradient, which is the sum that `step.scale` makes the clipped mean of. What it publishes is
    /// none of its business.
    fn step(&self, buffers: UpdateBuffers, state: &mut [StateBuffer], step: &Step, weights: &Weights) -> Result<()>;

    /// The entry of `update.cu` that makes the same update on a GPU; one that is not there is an error when it is loaded.
    fn kernel(&self) -> &'static str;

    /// The constants of that entry, in the order of its struct.
    fn constants(&self, step: &Step) -> Vec<f32>;

    /// Values that an update needs for a moment besides its buffers.
    fn workspace(&self, _layout: &Layout) -> usize {
        0
    }
}
