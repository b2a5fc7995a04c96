//! One pass over the flat buffers of an update on the processor, over the runs of values that a
//! rule takes one by one.
//!
//! The runs are cut in chunks that stay in the cache between the loops over them; threads share the
//! chunks out. Every operation is IEEE's and alone, so neither threads nor the width of vectors
//! change a bit.

use std::ops::Range;

use rayon::prelude::*;

use super::StateBuffer;
use super::rule::{Step, Weights};
use crate::params::{UpdateBuffers, slice, slice_mut};

/// Values of a chunk.
const CHUNK: usize = 1 << 14;

/// A chunk of every buffer, which starts at `start` of them.
pub struct Chunk<'a, const N: usize> {
    start: usize,
    /// None where `new` holds the newest weights.
    old: Option<&'a [f32]>,
    pub new: &'a mut [f32],
    pub gradient: &'a mut [f32],
    pub state: [&'a mut [f32]; N],
}

/// What is the same in every rule: decay, scale of the gradient.
pub struct Common<'a> {
    scale: f32,
    keep: f32,
    decay: &'a [(Range<usize>, bool)],
}

impl<'a> Common<'a> {
    pub fn new(step: &Step, weights: &Weights<'a>) -> Common<'a> {
        Common { scale: step.scale as f32, keep: step.keep as f32, decay: weights.decay }
    }

    /// The newest weights, decayed, in `new`; and the clipped mean in `gradient`.
    #[inline(always)]
    pub fn begin<const N: usize>(&self, chunk: &mut Chunk<N>) {
        if let Some(old) = chunk.old {
            chunk.new.copy_from_slice(old);
        }

        self.shrink(chunk.new, chunk.start);
        chunk.gradient.iter_mut().for_each(|g| *g *= self.scale);
    }

    /// Decoupled weight decay of the part of the buffer that starts at `start`.
    #[inline(always)]
    fn shrink(&self, new: &mut [f32], start: usize) {
        let end = start + new.len();
        let from = self.decay.partition_point(|(range, _)| range.end <= start);
        for (range, decays) in self.decay[from..].iter().take_while(|(range, _)| range.start < end)
        {
            if *decays {
                new[range.start.max(start) - start..range.end.min(end) - start]
                    .iter_mut()
                    .for_each(|w| *w *= self.keep);
            }
        }
    }
}

/// Runs `pass` on every chunk of the runs of a rule with N buffers of state; then their gradient is
/// clear.
pub fn update<const N: usize>(
    buffers: UpdateBuffers,
    state: &mut [StateBuffer],
    weights: &Weights,
    pass: impl Fn(Chunk<N>) + Send + Sync,
) {
    let old = buffers.old.map(slice);
    let (mut new, mut gradient) =
        (Rest::of(slice_mut(buffers.new)), Rest::of(slice_mut(buffers.gradient)));
    let mut state = state.iter_mut().map(|buffer| Rest::of(slice_mut(&mut buffer.values)));
    let mut state: [Rest; N] =
        std::array::from_fn(|_| state.next().unwrap_or_else(|| Rest::of(&mut [])));

    let chunks = weights.runs.iter().flat_map(|run| {
        let length = run.weights.len();
        (0..length).step_by(CHUNK).map(move |from| (run, from, CHUNK.min(length - from)))
    });

    let chunks = chunks.map(|(run, from, length)| {
        let start = run.weights.start + from;
        let old = old.map(|old| &old[start..start + length]);
        let (new, gradient) = (new.take(start, length), gradient.take(start, length));
        let mut starts = run.state.iter();
        let state = state
            .each_mut()
            .map(|rest| starts.next().map_or(&mut [][..], |at| rest.take(at + from, length)));
        Chunk { start, old, new, gradient, state }
    });

    match weights.pool {
        None => chunks.for_each(pass),
        Some(pool) => {
            let chunks: Vec<_> = chunks.collect();
            pool.install(|| chunks.into_par_iter().for_each(pass));
        }
    }
}

/// What is left of a buffer of which parts are taken from its beginning on.
struct Rest<'a> {
    start: usize,
    values: &'a mut [f32],
}

impl<'a> Rest<'a> {
    fn of(values: &'a mut [f32]) -> Rest<'a> {
        Rest { start: 0, values }
    }

    /// `length` values from `start` on, which nothing before has taken.
    fn take(&mut self, start: usize, length: usize) -> &'a mut [f32] {
        let values = std::mem::take(&mut self.values);
        let (taken, rest) = values[start - self.start..].split_at_mut(length);
        (self.start, self.values) = (start + length, rest);
        taken
    }
}
