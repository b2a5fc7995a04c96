//! Optimizers over flat buffers: one pass that reads the newest weights, writes the next version and clears the
//! gradient; on the processor (`host`) or on a GPU (`kernel`, compiled when it is first needed).

mod clip;
mod rate;
mod host;
mod kernel;

use std::ops::Range;

use rayon::ThreadPool;
use tch::{Device, Tensor};

pub use clip::{clip_factor, norm};
use host::{Slices, Step};
use kernel::Kernel;
pub use rate::learning_rate;

use crate::config::{OptimizerConfig, OptimizerKind};
use crate::error::{Error, Result};
use crate::number::Number;
use crate::params::{Flats, Layout, slice, slice_mut, zeros};

/// What one update goes by.
pub struct Terms<'a> {
    pub lr: f64,
    /// Turns the sum over microbatches and replicas into the mean.
    pub mean: f64,
    /// Euclidean norm of the sum. If it is not finite the update is left out: the next version is the old one, the moments
    /// stay.
    pub norm: &'a Number,
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
    first: Tensor,
    /// Empty for SGD.
    second: Tensor,
    updates: i32,
    pool: Option<ThreadPool>,
    /// On a GPU.
    kernel: Option<Kernel>,
}

impl Optimizer {
    /// The optimizer of a stage with the given layout; on the processor more than one thread makes it parallel.
    ///
    /// # Errors
    /// If the threads cannot be started, or the pass cannot be compiled for the GPU.
    pub fn new(config: &OptimizerConfig, layout: &Layout, threads: usize, device: Device) -> Result<Optimizer> {
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
        let kernel = match device {
            Device::Cuda(index) => Some(Kernel::new(index, &decay)?),
            _ => None,
        };
        Ok(Optimizer {
            config: config.clone(),
            decay,
            first: zeros(layout.len, device)?,
            second: zeros(second, device)?,
            updates: 0,
            pool,
            kernel,
        })
    }

    /// Flat buffers of state that an optimizer of this kind keeps.
    pub fn state_buffers(kind: OptimizerKind) -> usize {
        match kind {
            OptimizerKind::Adamw => 2,
            OptimizerKind::Sgd => 1,
        }
    }

    /// The moments: names, and flat buffers with the layout of the weights.
    pub fn state(&self) -> Vec<(&'static str, &Tensor)> {
        let all = [("first", &self.first), ("second", &self.second)];
        all.into_iter().filter(|(_, values)| values.numel() > 0).collect()
    }

    /// The state after `updates` updates, each moment by its name.
    ///
    /// # Errors
    /// Those of `moment`.
    pub fn restore(&mut self, updates: usize, moment: impl Fn(&'static str) -> Result<Tensor>) -> Result<()> {
        for (name, values) in [("first", &mut self.first), ("second", &mut self.second)] {
            if values.numel() > 0 {
                values.f_copy_(&moment(name)?)?;
            }
        }
        self.updates = i32::try_from(updates).unwrap_or(i32::MAX);
        Ok(())
    }

    /// Writes the next version, rounded too where versions are not f32, and clears the gradient.
    ///
    /// # Errors
    /// What libtorch or the driver reports.
    pub fn update(&mut self, flats: Flats, terms: &Terms) -> Result<()> {
        self.updates += 1;
        match &self.kernel {
            Some(kernel) => kernel.update(flats, &self.config, self.updates, terms, [&self.first, &self.second]),
            None => self.update_here(flats, terms),
        }
    }

    fn update_here(&mut self, flats: Flats, terms: &Terms) -> Result<()> {
        let Flats { old, new, rounded, gradient } = flats;
        let norm = terms.norm.now()? * terms.mean;
        if norm.is_finite() {
            let scale = terms.mean * clip_factor(norm, self.config.clip);
            let step = Step::new(&self.config, self.updates, terms.lr, scale);
            let slices = Slices {
                old: old.map(slice),
                new: slice_mut(new),
                gradient: slice_mut(gradient),
                first: slice_mut(&mut self.first),
                second: slice_mut(&mut self.second),
            };
            host::update(slices, &step, &self.decay, self.pool.as_ref());
        } else {
            if let Some(old) = old {
                slice_mut(new).copy_from_slice(slice(old));
            }
            slice_mut(gradient).fill(0.0);
        }
        Ok(rounded.map_or(Ok(()), |rounded| rounded.f_copy_(new))?)
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
        let mut optimizer = Optimizer::new(&config, &layout, threads, Device::Cpu).unwrap();
        let mut weights = wave(layout.len, 0.7, 0.0);
        for n in 0..3 {
            let mut gradient = wave(layout.len, 0.3, n as f32);
            let old = weights.f_detach_copy().unwrap();
            let old = if in_place { None } else { Some(&old) };
            if !in_place {
                let _ = weights.fill_(f64::NAN);
            }
            let terms = Terms { lr: 0.01, mean: 0.5, norm: &Number::Known(1.0) };
            let flats = Flats { old, new: &mut weights, rounded: None, gradient: &mut gradient };
            optimizer.update(flats, &terms).unwrap();
            assert!(slice(&gradient).iter().all(|g| *g == 0.0));
        }
        slice(&weights).to_vec()
    }

    fn wave(len: usize, pace: f32, from: f32) -> Tensor {
        Tensor::from_slice(&(0..len).map(|i| ((i as f32 + from) * pace).sin()).collect::<Vec<f32>>())
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
            let config = OptimizerConfig { kind, weight_decay: wd, clip: None, ..OptimizerConfig::default() };
            let mut optimizer = Optimizer::new(&config, &layout, 1, Device::Cpu).unwrap();
            let mut weights = Tensor::from_slice(&vec![w0 as f32; layout.len]);
            let mut gradient = Tensor::from_slice(&vec![0.25f32; layout.len]);
            let terms = Terms { lr, mean: 0.5, norm: &Number::Known(1.0) };
            let flats = Flats { old: None, new: &mut weights, rounded: None, gradient: &mut gradient };
            optimizer.update(flats, &terms).unwrap();
            let weights = slice(&weights);
            assert!((f64::from(weights[0]) - expected).abs() < 1e-7, "{} {expected}", weights[0]);
            // The vector does not decay.
            let vector = f64::from(weights[160 * 128]);
            assert!((vector - expected - w0 * lr * wd).abs() < 1e-7, "{vector}");
        }
    }
}
