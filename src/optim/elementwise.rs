//! One pass over the flat buffers of an update on the processor, for rules that take every value by itself.
//!
//! The buffers are cut in chunks that stay in the cache between the loops over them; threads share the chunks out. Every
//! operation is IEEE's and alone, so neither threads nor the width of vectors change a bit.

use std::ops::Range;

use rayon::ThreadPool;
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
        for (range, decays) in self.decay[from..].iter().take_while(|(range, _)| range.start < end) {
            if *decays {
                new[range.start.max(start) - start..range.end.min(end) - start]
                    .iter_mut()
                    .for_each(|w| *w *= self.keep);
            }
        }
    }
}

/// Runs `pass` on every chunk of the buffers of a rule with N buffers of state; then the gradient is clear.
pub fn update<const N: usize>(
    buffers: UpdateBuffers,
    state: &mut [StateBuffer],
    pool: Option<&ThreadPool>,
    pass: impl Fn(Chunk<N>) + Send + Sync,
) {
    let old = buffers.old.map(slice);
    let mut state = state.iter_mut().map(|buffer| slice_mut(&mut buffer.values).chunks_mut(CHUNK));
    let mut state: [_; N] =
        std::array::from_fn(|_| state.next().unwrap_or_else(|| <&mut [f32]>::default().chunks_mut(CHUNK)));

    let pieces = slice_mut(buffers.new).chunks_mut(CHUNK).zip(slice_mut(buffers.gradient).chunks_mut(CHUNK));
    let chunks = pieces.enumerate().map(|(index, (new, gradient))| {
        let start = index * CHUNK;
        let old = old.map(|old| &old[start..start + new.len()]);
        let state = state.each_mut().map(|chunks| chunks.next().unwrap_or_default());
        Chunk { start, old, new, gradient, state }
    });

    match pool {
        None => chunks.for_each(pass),
        Some(pool) => {
            let chunks: Vec<_> = chunks.collect();
            pool.install(|| chunks.into_par_iter().for_each(pass));
        }
    }
}
