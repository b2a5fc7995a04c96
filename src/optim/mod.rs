//! Optimizers over flat buffers: one pass that reads the newest weights, writes the next version and clears the
//! gradient.

mod clip;
mod rate;

use std::ops::Range;

use rayon::ThreadPool;
use rayon::prelude::*;

pub use clip::{clip_factor, norm};
pub use rate::learning_rate;

use crate::config::{OptimizerConfig, OptimizerKind};
use crate::error::{Error, Result};
use crate::params::Layout;

/// Values that one task of the pass works on: small enough to stay in the cache between its loops.
const CHUNK: usize = 1 << 14;

/// One update of a flat buffer.
pub struct Update<'a> {
    /// The newest weights, `None` if `new` holds them.
    pub old: Option<&'a [f32]>,
    pub new: &'a mut [f32],
    /// The sum over microbatches and replicas; cleared by the update.
    pub gradient: &'a mut [f32],
    pub lr: f64,
    /// Turns the sum into the mean, and clips it.
    pub scale: f64,
}

/// The state of the optimizer of one stage.
///
/// AdamW (Loshchilov and Hutter 2019), n counting updates from 1, g the scaled gradient:
/// `m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w = w (1 - lr wd) - lr / (1-b1^n) * m / (sqrt(v / (1-b2^n)) + eps)`.
///
/// SGD with momentum: `m = mu m + g; w = w (1 - lr wd) - lr m`. Weight decay applies to matrices only.
pub struct Optimizer {
    config: OptimizerConfig,
    /// Sorted, without gaps: which part of the buffer decays.
    decay: Vec<(Range<usize>, bool)>,
    first: Vec<f32>,
    /// Empty for SGD.
    second: Vec<f32>,
    updates: i32,
    pool: Option<ThreadPool>,
}

impl Optimizer {
    /// The optimizer of a stage with the given layout; more than one thread makes it parallel.
    ///
    /// # Errors
    /// If the threads cannot be started.
    pub fn new(config: &OptimizerConfig, layout: &Layout, threads: usize) -> Result<Optimizer> {
        let mut decay = Vec::new();
        for (i, entry) in layout.entries.iter().enumerate() {
            let end = layout.entries.get(i + 1).map_or(layout.len, |next| next.offset);
            decay.push((entry.offset..end, entry.parameter.decays()));
        }
        let pool = match threads {
            0 | 1 => None,
            n => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(n)
                    .build()
                    .map_err(|error| Error::config("threads", n, format!("cannot be started ({error})")))?,
            ),
        };
        let second = if config.kind == OptimizerKind::Adamw { layout.len } else { 0 };
        Ok(Optimizer {
            config: config.clone(),
            decay,
            first: vec![0.0; layout.len],
            second: vec![0.0; second],
            updates: 0,
            pool,
        })
    }

    /// Flat buffers of state that an optimizer of this kind keeps.
    pub fn state_buffers(kind: OptimizerKind) -> usize {
        match kind {
            OptimizerKind::Adamw => 2,
            OptimizerKind::Sgd => 1,
        }
    }

    /// The moments: names, and values in the order of the weights.
    pub fn state(&self) -> Vec<(&'static str, &[f32])> {
        let all = [("first", &self.first), ("second", &self.second)];
        all.into_iter().filter(|(_, values)| !values.is_empty()).map(|(name, values)| (name, &values[..])).collect()
    }

    /// The state after `updates` updates, each moment by its name.
    ///
    /// # Errors
    /// Those of `moment`.
    pub fn restore(&mut self, updates: usize, moment: impl Fn(&'static str) -> Result<Vec<f32>>) -> Result<()> {
        for (name, values) in [("first", &mut self.first), ("second", &mut self.second)] {
            if !values.is_empty() {
                *values = moment(name)?;
            }
        }
        self.updates = i32::try_from(updates).unwrap_or(i32::MAX);
        Ok(())
    }

    /// Leaves an update out: the next version is the old one, the moments stay, the gradient is cleared.
    pub fn skip(&mut self, update: Update) {
        self.updates += 1;
        if let Some(old) = update.old {
            update.new.copy_from_slice(old);
        }
        update.gradient.fill(0.0);
    }

    /// Writes the next version and clears the gradient. Every value is computed by itself, so the result does not
    /// depend on the number of threads.
    pub fn update(&mut self, update: Update) {
        self.updates += 1;
        let n = self.updates;
        let Optimizer { config, decay, first, second, pool, .. } = self;
        let rule = match config.kind {
            OptimizerKind::Adamw => Rule::adamw(config, &update, n),
            OptimizerKind::Sgd => Rule::Sgd { lr: update.lr as f32, momentum: config.momentum as f32 },
        };
        let (scale, keep) = (update.scale as f32, (1.0 - update.lr * config.weight_decay) as f32);
        let old = update.old;
        let task = |index: usize, new: &mut [f32], gradient: &mut [f32], first: &mut [f32], second: &mut [f32]| {
            let start = index * CHUNK;
            if let Some(old) = old {
                new.copy_from_slice(&old[start..start + new.len()]);
            }
            shrink(new, start, decay, keep);
            gradient.iter_mut().for_each(|g| *g *= scale);
            rule.apply(new, gradient, first, second);
            gradient.fill(0.0);
        };
        // SGD has no second moments: an empty slice for every chunk.
        let chunks = update.new.chunks_mut(CHUNK).zip(update.gradient.chunks_mut(CHUNK)).zip(first.chunks_mut(CHUNK));
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
}

/// Decoupled weight decay of the part of the buffer that starts at `start`.
fn shrink(new: &mut [f32], start: usize, decay: &[(Range<usize>, bool)], keep: f32) {
    let end = start + new.len();
    let from = decay.partition_point(|(range, _)| range.end <= start);
    for (range, decays) in decay[from..].iter().take_while(|(range, _)| range.start < end) {
        if *decays {
            new[range.start.max(start) - start..range.end.min(end) - start].iter_mut().for_each(|w| *w *= keep);
        }
    }
}

/// The numbers of one update, ready for the inner loop.
enum Rule {
    Adamw { beta1: f32, beta2: f32, step: f32, root: f32, eps: f32 },
    Sgd { lr: f32, momentum: f32 },
}

impl Rule {
    fn adamw(config: &OptimizerConfig, update: &Update, n: i32) -> Rule {
        let [beta1, beta2] = config.betas;
        Rule::Adamw {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            step: (update.lr / (1.0 - beta1.powi(n))) as f32,
            root: (1.0 - beta2.powi(n)).sqrt() as f32,
            eps: config.eps as f32,
        }
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Init, Parameter};

    fn layout() -> Layout {
        let parameter = |name: &str, shape: &[i64]| Parameter {
            name: name.into(),
            shape: shape.into(),
            init: Init::Ones,
            tied: false,
        };
        Layout::new(&[parameter("matrix", &[160, 128]), parameter("vector", &[9]), parameter("other", &[4, 4])])
    }

    fn run(kind: OptimizerKind, threads: usize, in_place: bool) -> Vec<f32> {
        let layout = layout();
        let config = OptimizerConfig { kind, weight_decay: 0.1, ..OptimizerConfig::default() };
        let mut optimizer = Optimizer::new(&config, &layout, threads).unwrap();
        let mut weights: Vec<f32> = (0..layout.len).map(|i| (i as f32 * 0.7).sin()).collect();
        for n in 0..3 {
            let mut gradient: Vec<f32> = (0..layout.len).map(|i| ((i + n) as f32 * 0.3).cos()).collect();
            let old = weights.clone();
            let old = if in_place { None } else { Some(&old[..]) };
            if !in_place {
                weights.fill(f32::NAN);
            }
            optimizer.update(Update { old, new: &mut weights, gradient: &mut gradient, lr: 0.01, scale: 0.5 });
            assert!(gradient.iter().all(|g| *g == 0.0));
        }
        weights
    }

    #[test]
    fn threads_and_buffers_do_not_change_a_bit() {
        for kind in [OptimizerKind::Adamw, OptimizerKind::Sgd] {
            let expected = run(kind, 1, true);
            assert_eq!(run(kind, 3, true), expected);
            assert_eq!(run(kind, 1, false), expected);
        }
    }

    /// One AdamW and one SGD update by hand, in f64.
    #[test]
    fn first_updates_by_hand() {
        let (w0, g, lr, wd) = (0.8, 0.5 * 0.25, 0.01, 0.1);
        for (kind, expected) in [
            // After one update m / (1-b1) = g and sqrt(v / (1-b2)) = |g|.
            (OptimizerKind::Adamw, w0 * (1.0 - lr * wd) - lr * g / (g + 1e-8)),
            (OptimizerKind::Sgd, w0 * (1.0 - lr * wd) - lr * g),
        ] {
            let layout = layout();
            let config = OptimizerConfig { kind, weight_decay: wd, ..OptimizerConfig::default() };
            let mut optimizer = Optimizer::new(&config, &layout, 1).unwrap();
            let mut weights = vec![w0 as f32; layout.len];
            let mut gradient = vec![0.25; layout.len];
            optimizer.update(Update { old: None, new: &mut weights, gradient: &mut gradient, lr, scale: 0.5 });
            assert!((f64::from(weights[0]) - expected).abs() < 1e-7, "{} {expected}", weights[0]);
            // The vector does not decay.
            let vector = f64::from(weights[160 * 128]);
            assert!((vector - expected - w0 * lr * wd).abs() < 1e-7, "{vector}");
        }
    }
}
