//! An update on the processor.

use std::ops::Range;

use multiversion::multiversion;
use rayon::ThreadPool;
use rayon::prelude::*;

use crate::config::{OptimizerConfig, OptimizerKind};

/// Values that one task of the pass works on: small enough to stay in the cache between its loops.
const CHUNK: usize = 1 << 14;

/// Flat buffers of one update: `old` is none where `new` holds the newest weights; SGD has no second moments.
pub struct Slices<'a> {
    pub old: Option<&'a [f32]>,
    pub new: &'a mut [f32],
    pub gradient: &'a mut [f32],
    pub first: &'a mut [f32],
    pub second: &'a mut [f32],
}

/// The numbers of one update, ready for the inner loop.
pub struct Step {
    rule: Rule,
    /// Turns the sum of gradients into the mean, and clips it.
    scale: f32,
    /// What decay leaves of a weight.
    keep: f32,
}

enum Rule {
    Adamw { beta1: f32, beta2: f32, step: f32, root: f32, eps: f32 },
    Sgd { lr: f32, momentum: f32 },
}

impl Step {
    /// The numbers of the n-th update.
    pub fn new(config: &OptimizerConfig, n: i32, lr: f64, scale: f64) -> Step {
        let rule = match config.kind {
            OptimizerKind::Adamw => {
                let [beta1, beta2] = config.betas;
                Rule::Adamw {
                    beta1: beta1 as f32,
                    beta2: beta2 as f32,
                    step: (lr / (1.0 - beta1.powi(n))) as f32,
                    root: (1.0 - beta2.powi(n)).sqrt() as f32,
                    eps: config.eps as f32,
                }
            }
            OptimizerKind::Sgd => Rule::Sgd { lr: lr as f32, momentum: config.momentum as f32 },
        };
        Step { rule, scale: scale as f32, keep: (1.0 - lr * config.weight_decay) as f32 }
    }
}

/// Writes the next version and clears the gradient. Every value is computed by itself, so the result does not depend on the
/// number of threads. `decay` says, sorted and without gaps, which parts of the buffer decay.
pub fn update(slices: Slices, step: &Step, decay: &[(Range<usize>, bool)], pool: Option<&ThreadPool>) {
    let Slices { old, new, gradient, first, second } = slices;
    let task = |index: usize, new: &mut [f32], gradient: &mut [f32], first: &mut [f32], second: &mut [f32]| {
        let start = index * CHUNK;
        let old = old.map(|old| &old[start..start + new.len()]);
        pass(Slices { old, new, gradient, first, second }, start, step, decay);
    };
    // SGD has no second moments: an empty slice for every chunk.
    let chunks = new.chunks_mut(CHUNK).zip(gradient.chunks_mut(CHUNK)).zip(first.chunks_mut(CHUNK));
    let mut seconds = second.chunks_mut(CHUNK);
    let tasks = chunks.map(|((new, gradient), first)| (new, gradient, first, seconds.next().unwrap_or_default()));
    match pool {
        None => tasks.enumerate().for_each(|(i, (w, g, m, v))| task(i, w, g, m, v)),
        Some(pool) => {
            let tasks: Vec<_> = tasks.collect();
            pool.install(|| tasks.into_par_iter().enumerate().for_each(|(i, (w, g, m, v))| task(i, w, g, m, v)));
        }
    }
}

/// One chunk of an update, which starts at `start` of the buffers. Every operation is IEEE's and alone, so vectors of any width
/// make the same bits.
#[multiversion(targets("x86_64+avx2", "aarch64+neon"))]
fn pass(chunk: Slices, start: usize, step: &Step, decay: &[(Range<usize>, bool)]) {
    let Slices { old, new, gradient, first, second } = chunk;
    if let Some(old) = old {
        new.copy_from_slice(old);
    }
    shrink(new, start, decay, step.keep);
    gradient.iter_mut().for_each(|g| *g *= step.scale);
    step.rule.apply(new, gradient, first, second);
    gradient.fill(0.0);
}

/// Decoupled weight decay of the part of the buffer that starts at `start`.
#[inline(always)]
fn shrink(new: &mut [f32], start: usize, decay: &[(Range<usize>, bool)], keep: f32) {
    let end = start + new.len();
    let from = decay.partition_point(|(range, _)| range.end <= start);
    for (range, decays) in decay[from..].iter().take_while(|(range, _)| range.start < end) {
        if *decays {
            new[range.start.max(start) - start..range.end.min(end) - start].iter_mut().for_each(|w| *w *= keep);
        }
    }
}

impl Rule {
    #[inline(always)]
    fn apply(&self, new: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        match *self {
            Rule::Adamw { beta1, beta2, step, root, eps } => {
                for (((w, g), m), v) in new.iter_mut().zip(gradient).zip(first).zip(second) {
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *w -= step * *m / (v.sqrt() / root + eps);
                }
            }
            Rule::Sgd { lr, momentum } => {
                for ((w, g), m) in new.iter_mut().zip(gradient).zip(first) {
                    *m = momentum * *m + g;
                    *w -= lr * *m;
                }
            }
        }
    }
}
