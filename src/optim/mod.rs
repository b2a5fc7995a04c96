//! Optimizers over flat buffers. Each update reads the newest weights, writes the next ones and
//! clears the gradient.
//!
//! ```text
//! config, keys the section [optimizer], and its check
//! rule         what every rule says of itself: its state, its step; the list of them
//! adamw, sgd   rules that take every value by itself: formula, constants, check of its keys, tests by hand
//! muon, soap   rules that take matrices whole, and what is none as AdamW does
//! elementwise  the pass over chunks of the buffers on the processor, for what is taken value by value
//! kernel       the same pass on a GPU: update.cu, compiled when it is first needed
//! matrices     what is taken whole, in batches of one shape
//! products     of such batches, by the faster of libtorch's libraries
//! clip, rate   norms and clipping; the learning rate of a step
//! predict      how far ahead of the weights the versions are that delayed steps use
//! ```

mod config;
mod keys;
mod clip;
mod rate;
mod rule;
mod predict;
mod elementwise;
mod matrices;
mod products;
mod kernel;
mod adamw;
mod sgd;
mod muon;
mod soap;
#[cfg(test)]
mod reference;

use std::ops::Range;

use rayon::ThreadPool;
use tch::{Device, Kind, Tensor};

pub use adamw::Keys as AdamwKeys;
pub use clip::{clip_factor, norm};
pub use config::{
    ClipScope, Common, OptimizerConfig, OptimizerKind, Predict, RateKind, check, override_kind,
};
use kernel::UpdateKernel;
use matrices::{Batch, Target, batches};
pub use muon::Keys as MuonKeys;
pub use predict::{horizon, predicts};
pub use rate::learning_rate;
pub use rule::{Rule, Step, ValueRange, rule};
pub use sgd::Keys as SgdKeys;
pub use soap::{Keys as SoapKeys, Sides};

use crate::error::{Error, Result};
use crate::number::Number;
use crate::params::{Layout, UpdateBuffers, publish, slice, slice_mut, zeros};
use crate::precision::Precision;

/// What one update goes by.
pub struct UpdateScalars<'a> {
    pub lr: f64,
    /// Turns the sum over microbatches and replicas into the mean.
    pub mean: f64,
    /// Euclidean norm of the sum. If it is not finite the update is left out: the next version is
    /// the old one, the state stays.
    pub norm: &'a Number,
}

/// A flat buffer of state that a rule keeps.
pub struct StateBuffer {
    /// In saved states and in errors.
    pub name: &'static str,
    /// The parameters that it has values for.
    pub layout: Layout,
    pub values: Tensor,
}

/// A rule with its state, for one set of weights.
pub struct Optimizer {
    config: OptimizerConfig,
    rule: Box<dyn Rule>,
    /// What the rule takes value by value, and the matrices that it takes whole.
    runs: Vec<ValueRange>,
    batches: Vec<Batch>,
    /// Sorted, without gaps: which part of the buffer decays.
    decay: Vec<(Range<usize>, bool)>,
    state: Vec<StateBuffer>,
    updates: i32,
    pool: Option<ThreadPool>,
    /// On a GPU.
    kernel: Option<UpdateKernel>,
}

impl Optimizer {
    /// The optimizer of a set of weights with the given layout, whose gradients are `delay` updates
    /// old, in a model of this precision; on the processor more than one thread makes it parallel.
    ///
    /// # Errors
    /// If the threads cannot be started, or the pass cannot be compiled for the GPU.
    pub fn new(
        config: &OptimizerConfig,
        layout: &Layout,
        delay: usize,
        precision: Precision,
        threads: usize,
        device: Device,
    ) -> Result<Optimizer> {
        Optimizer::with(rule(config, delay, precision), config, layout, threads, device)
    }

    fn with(
        rule: Box<dyn Rule>,
        config: &OptimizerConfig,
        layout: &Layout,
        threads: usize,
        device: Device,
    ) -> Result<Optimizer> {
        let pool = pool(threads)?;
        let decay = decaying(layout);
        let kernel = match device {
            Device::Cuda(index) => Some(UpdateKernel::new(index, rule.kernel(), &decay)?),
            _ => None,
        };

        let mut state = Vec::new();
        for (name, layout) in rule.state(layout) {
            let values = zeros(layout.len, device)?;
            state.push(StateBuffer { name, layout, values });
        }

        let runs = runs(layout, rule.as_ref(), &state);
        let whole = layout.entries.iter().any(|entry| rule.takes_whole(&entry.parameter));
        let batches = if whole { batches(layout) } else { Vec::new() };
        Ok(Optimizer {
            config: config.clone(),
            rule,
            runs,
            batches,
            decay,
            state,
            updates: 0,
            pool,
            kernel,
        })
    }

    /// The state, one flat buffer a name.
    pub fn state(&self) -> &[StateBuffer] {
        &self.state
    }

    /// The state after `updates` updates: `saved` gives the values of each buffer by its name.
    ///
    /// # Errors
    /// Those of `saved`.
    pub fn restore(
        &mut self,
        updates: usize,
        saved: impl Fn(&str, &Layout) -> Result<Tensor>,
    ) -> Result<()> {
        for buffer in &mut self.state {
            buffer.values.f_copy_(&saved(buffer.name, &buffer.layout)?)?;
        }

        self.updates = i32::try_from(updates).unwrap_or(i32::MAX);
        self.rule.restored(&self.state)
    }

    /// The norm of a sum of gradients whose mean is `mean` times it, as updates go by it: no number
    /// where the rule cannot take the clipped mean.
    pub fn usable(&self, norm: Number, mean: f64) -> Result<Number> {
        let largest = match self.config.common.clip {
            _ if self.batches.is_empty() => return Ok(norm),
            Some(clip) if clip <= self.rule.largest() => return Ok(norm),
            _ => self.rule.largest() / mean,
        };

        Ok(match norm {
            Number::Known(norm) if norm > largest => Number::Known(f64::NAN),
            Number::Pending(norm) if largest.is_finite() => {
                let none = norm.f_full_like(f64::NAN)?;
                Number::Pending(norm.f_where_self(&norm.f_le(largest)?, &none)?)
            }
            norm => norm,
        })
    }

    /// Writes the next weights, publishes them where versions are not f32, and clears the gradient.
    pub fn update(&mut self, buffers: UpdateBuffers, scalars: &UpdateScalars) -> Result<()> {
        self.updates += 1;

        if self.kernel.is_some() {
            return self.update_on_gpu(buffers, scalars);
        }

        let UpdateBuffers { old, new, mut published, gradient } = buffers;
        let norm = scalars.norm.now()? * scalars.mean;
        let before = match &mut published {
            Some(published) if norm.is_finite() => Some(published.before(new)?),
            _ => None,
        };

        if norm.is_finite() {
            let step =
                self.step(scalars, scalars.mean * clip_factor(norm, self.config.common.clip));
            let buffers =
                UpdateBuffers { old, new: &mut *new, published: None, gradient: &mut *gradient };
            let weights =
                rule::Weights { runs: &self.runs, decay: &self.decay, pool: self.pool.as_ref() };
            self.rule.step(buffers, &mut self.state, &step, &weights)?;

            if !self.batches.is_empty() {
                let scale = Tensor::from(step.scale as f32);
                let (published, made) = (None, None);
                let target =
                    Target { old, new: &*new, published, gradient: &*gradient, scale, made };
                self.matrices(target, &step)?;
                slice_mut(gradient).fill(0.0);
            }
        } else {
            if let Some(old) = old {
                slice_mut(new).copy_from_slice(slice(old));
            }

            slice_mut(gradient).fill(0.0);
        }

        match (published, before) {
            (Some(published), Some(before)) => published.publish(new, before),
            (Some(published), None) => publish(new, published.version),
            (None, _) => Ok(()),
        }
    }

    /// The same where the host does not know the norm: what is not finite leaves everything as it
    /// is.
    fn update_on_gpu(&mut self, buffers: UpdateBuffers, scalars: &UpdateScalars) -> Result<()> {
        let Some(kernel) = &self.kernel else {
            return Err(Error::Internal("an update without its kernel".into()));
        };

        let constants = self.rule.constants(&self.step(scalars, 1.0));
        kernel.update(&buffers, &self.config, scalars, &constants, &self.state, &self.runs)?;
        if self.batches.is_empty() {
            return Ok(());
        }

        self.matrices_unread(buffers, scalars)
    }

    /// The matrices by a norm that only the device knows.
    fn matrices_unread(&mut self, buffers: UpdateBuffers, scalars: &UpdateScalars) -> Result<()> {
        let UpdateBuffers { old, new, published, gradient } = buffers;
        let Number::Pending(norm) = scalars.norm else {
            return Err(Error::Internal("the norm of a gradient on a GPU is not on it".into()));
        };

        let norm = norm.f_mul_scalar(scalars.mean)?;
        let scale = match self.config.common.clip {
            Some(clip) => {
                norm.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(clip)?.f_clamp_max(1.0)?
            }
            None => norm.f_ones_like()?,
        };

        let scale = scale.f_mul_scalar(scalars.mean)?.f_to_kind(Kind::Float)?;
        let made = Some(norm.f_isfinite()?);
        let target = Target { old, new: &*new, published, gradient: &*gradient, scale, made };
        self.matrices(target, &self.step(scalars, 1.0))?;
        let _ = gradient.f_zero_()?;
        Ok(())
    }

    /// What is done for matrices, on a gradient of zeros, of which nothing stays: for what is
    /// loaded when it is first used.
    pub fn rehearse(&mut self, gradient: &Tensor) -> Result<()> {
        if self.batches.is_empty() {
            return Ok(());
        }

        let options = (Kind::Float, gradient.device());
        let (scale, made) = (
            Tensor::f_ones([0i64; 0], options)?,
            Tensor::f_zeros([0i64; 0], (Kind::Bool, options.1))?,
        );

        // The weights of an update that is not made stay: those of the gradient are zeros.
        let target =
            Target { old: None, new: gradient, published: None, gradient, scale, made: Some(made) };
        let step = Step { n: 1, lr: 0.0, scale: 1.0, keep: 1.0 };
        self.rule.rehearse(&target, &mut self.state, &step, &self.batches)
    }

    fn matrices(&mut self, target: Target, step: &Step) -> Result<()> {
        self.rule.matrices(&target, &mut self.state, step, &self.batches)
    }

    /// The numbers of the update that is being made.
    fn step(&self, scalars: &UpdateScalars, scale: f64) -> Step {
        let keep = 1.0 - scalars.lr * self.config.common.weight_decay;
        Step { n: self.updates, lr: scalars.lr, scale, keep }
    }
}

/// The layouts of the buffers of state that a rule keeps of a set of weights.
pub fn state_layouts(config: &OptimizerConfig, layout: &Layout) -> Vec<Layout> {
    rule(config, 0, Precision::F32).state(layout).into_iter().map(|(_, layout)| layout).collect()
}

/// Values that an update of a set of weights needs for a moment, besides its buffers.
pub fn workspace(config: &OptimizerConfig, layout: &Layout) -> usize {
    rule(config, 0, Precision::F32).workspace(layout)
}

/// The parameters that a rule takes value by value, neighbours together: of the buffers and of its
/// state.
fn runs(layout: &Layout, rule: &dyn Rule, state: &[StateBuffer]) -> Vec<ValueRange> {
    let mut runs: Vec<ValueRange> = Vec::new();
    for (i, entry) in layout.entries.iter().enumerate() {
        if rule.takes_whole(&entry.parameter) {
            continue;
        }

        let end = layout.offset(i + 1);
        if let Some(run) = runs.last_mut().filter(|run| run.weights.end == entry.offset) {
            run.weights.end = end;
            continue;
        }

        let at = |buffer: &StateBuffer| {
            let mut entries = buffer.layout.entries.iter();
            entries.find(|of| of.parameter.name == entry.parameter.name).map(|of| of.offset)
        };

        runs.push(ValueRange {
            weights: entry.offset..end,
            state: state.iter().map_while(at).collect(),
        });
    }
    runs
}

/// Which parts of a flat buffer decay, sorted and without gaps.
fn decaying(layout: &Layout) -> Vec<(Range<usize>, bool)> {
    let part = |(i, entry): (usize, &crate::params::Entry)| {
        (entry.offset..layout.offset(i + 1), entry.parameter.role.decays())
    };
    layout.entries.iter().enumerate().map(part).collect()
}

fn pool(threads: usize) -> Result<Option<ThreadPool>> {
    if threads < 2 {
        return Ok(None);
    }

    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map(Some)
        .map_err(|error| Error::config("threads", threads, format!("cannot be started ({error})")))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::{Init, Parameter, Role};
    use crate::params::Published;

    /// A matrix that decays, longer than a chunk of the pass; a vector that does not; and a small
    /// matrix.
    pub(crate) fn layout() -> Layout {
        let parameter = |name: &str, shape: &[i64], role| Parameter {
            name: name.into(),
            shape: shape.into(),
            init: Init::Ones,
            role,
            tied: false,
            fused: 1,
        };

        Layout::new(&[
            parameter("matrix", &[160, 128], Role::Matrix),
            parameter("vector", &[9], Role::Vector),
            parameter("other", &[4, 4], Role::Matrix),
        ])
    }

    pub(crate) fn wave(len: usize, pace: f32, from: f32) -> Tensor {
        Tensor::from_slice(
            &(0..len).map(|i| ((i as f32 + from) * pace).sin()).collect::<Vec<f32>>(),
        )
    }

    /// Updates of weights that are all `w0` by gradients that are `g` everywhere after the mean of
    /// two: the first weight of the matrix, and of the vector.
    pub(crate) fn updated(
        config: &OptimizerConfig,
        w0: f64,
        g: f64,
        lr: f64,
        updates: usize,
    ) -> (f64, f64) {
        updated_by(config, 0, w0, &vec![g; updates], lr)
    }

    /// The same by one gradient after the other, which are `delay` updates old.
    pub(crate) fn updated_by(
        config: &OptimizerConfig,
        delay: usize,
        w0: f64,
        gradients: &[f64],
        lr: f64,
    ) -> (f64, f64) {
        let layout = layout();
        let mut optimizer =
            Optimizer::new(config, &layout, delay, Precision::F32, 1, Device::Cpu).unwrap();
        let mut weights = Tensor::from_slice(&vec![w0 as f32; layout.len]);

        for g in gradients {
            let mut gradient = Tensor::from_slice(&vec![2.0 * *g as f32; layout.len]);
            let scalars = UpdateScalars { lr, mean: 0.5, norm: &Number::Known(1.0) };
            let buffers = UpdateBuffers {
                old: None,
                new: &mut weights,
                published: None,
                gradient: &mut gradient,
            };

            optimizer.update(buffers, &scalars).unwrap();
        }

        let weights = slice(&weights);
        (f64::from(weights[0]), f64::from(weights[160 * 128]))
    }

    fn run(kind: OptimizerKind, threads: usize, in_place: bool) -> Vec<f32> {
        let layout = layout();
        let config = OptimizerConfig::of(Common { kind, weight_decay: 0.1, ..Common::default() });
        let mut optimizer =
            Optimizer::new(&config, &layout, 0, Precision::F32, threads, Device::Cpu).unwrap();
        let mut weights = wave(layout.len, 0.7, 0.0);
        for n in 0..3 {
            let mut gradient = wave(layout.len, 0.3, n as f32);
            let old = weights.f_detach_copy().unwrap();
            let old = if in_place { None } else { Some(&old) };
            if !in_place {
                // Between the parameters there is nothing but zeros.
                layout
                    .views(&weights)
                    .unwrap()
                    .iter_mut()
                    .for_each(|view| drop(view.fill_(f64::NAN)));
            }

            let scalars = UpdateScalars { lr: 0.01, mean: 0.5, norm: &Number::Known(1.0) };
            let buffers =
                UpdateBuffers { old, new: &mut weights, published: None, gradient: &mut gradient };
            optimizer.update(buffers, &scalars).unwrap();
            assert!(slice(&gradient).iter().all(|g| *g == 0.0));
        }

        slice(&weights).to_vec()
    }

    #[test]
    fn threads_and_buffers_do_not_change_a_bit() {
        for kind in OptimizerKind::ALL {
            let expected = run(kind, 1, true);
            assert_eq!(run(kind, 3, true), expected);
            assert_eq!(run(kind, 1, false), expected);
        }
    }

    /// What a GPU does with matrices, whose host does not know the norm, done here: the same bits,
    /// an update that is left out and the versions that are published ahead too.
    #[test]
    fn matrices_by_a_norm_that_is_not_read() {
        for kind in [OptimizerKind::Muon, OptimizerKind::Soap] {
            let layout = layout();
            let mut config =
                OptimizerConfig::of(Common { kind, weight_decay: 0.1, ..Common::default() });
            config.soap.soap_every = 2;
            let new =
                || Optimizer::new(&config, &layout, 1, Precision::F32, 1, Device::Cpu).unwrap();
            let (mut known, mut unread) = (new(), new());
            let mut weights = [wave(layout.len, 0.7, 0.0), wave(layout.len, 0.7, 0.0)];
            let mut versions = [0, 1].map(|_| zeros(layout.len, Device::Cpu).unwrap());

            for (n, norm) in [f64::NAN, 1.0, 1.0, f64::INFINITY, 1.0, 1.0].into_iter().enumerate() {
                // Nothing stays of a rehearsal.
                let nothing = zeros(layout.len, Device::Cpu).unwrap();
                unread.rehearse(&nothing).unwrap();
                assert!(slice(&nothing).iter().all(|value| *value == 0.0));

                let horizon = [0.0, 1.5][n % 2];
                let [mut one, mut other] =
                    [0, 1].map(|_| wave(layout.len, 0.31 + 0.01 * n as f32, n as f32));
                let [of_known, of_unread] = &mut versions;
                let [weights_known, weights_unread] = &mut weights;
                let norms = [Number::Known(norm), Number::Pending(Tensor::from(norm))];
                let scalars = |norm| UpdateScalars { lr: 0.01, mean: 0.5, norm };

                let published = Some(Published { version: of_known, horizon });
                let buffers =
                    UpdateBuffers { old: None, new: weights_known, published, gradient: &mut one };
                known.update(buffers, &scalars(&norms[0])).unwrap();
                let published = Some(Published { version: of_unread, horizon });
                let buffers = UpdateBuffers {
                    old: None,
                    new: weights_unread,
                    published,
                    gradient: &mut other,
                };

                unread.updates += 1;
                unread.matrices_unread(buffers, &scalars(&norms[1])).unwrap();

                for (of, pair) in [("weights", &weights), ("versions", &versions)] {
                    for entry in
                        layout.entries.iter().filter(|entry| entry.parameter.role == Role::Matrix)
                    {
                        let at = entry.offset..entry.offset + entry.parameter.count();
                        let [one, other] = [&slice(&pair[0])[at.clone()], &slice(&pair[1])[at]];
                        assert!(
                            one == other,
                            "{kind}, update {n}: {of} of {}",
                            entry.parameter.name
                        );
                    }
                }
            }
        }
    }

    /// A stage whose first updates were left out, read back beside one whose were not.
    #[test]
    fn a_matrix_without_a_basis_beside_others_is_not_turned() {
        let layout = layout();
        let config = OptimizerConfig::of(Common { kind: OptimizerKind::Soap, ..Common::default() });
        let mut optimizer =
            Optimizer::new(&config, &layout, 0, Precision::F32, 1, Device::Cpu).unwrap();
        let (mut weights, mut gradient) = (wave(layout.len, 0.7, 0.0), wave(layout.len, 0.3, 1.0));
        let buffers = UpdateBuffers {
            old: None,
            new: &mut weights,
            published: None,
            gradient: &mut gradient,
        };
        optimizer
            .update(buffers, &UpdateScalars { lr: 0.01, mean: 1.0, norm: &Number::Known(1.0) })
            .unwrap();

        let kept = |name: &str| {
            let of = optimizer.state().iter().find(|buffer| buffer.name == name).unwrap();
            (of.layout.clone(), of.values.f_detach_copy().unwrap())
        };

        let (squares, values) = kept("right_basis");
        let partly = values.f_detach_copy().unwrap();
        let last = squares.entries.len() - 1;
        let _ = squares.views(&partly).unwrap()[last].fill_(0.0);
        let read = |name: &str, _: &Layout| {
            Ok(if name == "right_basis" { partly.shallow_clone() } else { kept(name).1 })
        };

        let mut resumed =
            Optimizer::new(&config, &layout, 0, Precision::F32, 1, Device::Cpu).unwrap();
        resumed.restore(1, read).unwrap();
        let found =
            &resumed.state().iter().find(|buffer| buffer.name == "right_basis").unwrap().values;
        let views = squares.views(found).unwrap();
        assert_eq!(views[0], squares.views(&values).unwrap()[0]);
        assert_eq!(views[last], Tensor::eye(views[last].size()[0], (Kind::Float, Device::Cpu)));
    }

    #[test]
    fn a_gradient_too_large_for_a_product_is_left_out() {
        let usable = |kind, clip, norm: f64| {
            let config = OptimizerConfig::of(Common { kind, clip, ..Common::default() });
            let optimizer =
                Optimizer::new(&config, &layout(), 0, Precision::F32, 1, Device::Cpu).unwrap();
            let known = optimizer.usable(Number::Known(norm), 0.5).unwrap().now().unwrap();
            let pending =
                optimizer.usable(Number::Pending(Tensor::from(norm)), 0.5).unwrap().now().unwrap();
            assert_eq!(known.is_nan(), pending.is_nan(), "{kind} {clip:?} {norm:e}");
            known == norm
        };

        for kind in [OptimizerKind::Muon, OptimizerKind::Soap] {
            assert!(usable(kind, None, 1e19) && !usable(kind, None, 1e20));
            assert!(usable(kind, Some(1.0), 1e30));
        }

        assert!(usable(OptimizerKind::Adamw, None, 1e30));
    }

    /// A rule that takes whole matrices: steps along the sign of each row's sum, and counts in a
    /// state of its own shape.
    struct RowSigns;

    impl Rule for RowSigns {
        fn state(&self, layout: &Layout) -> Vec<(&'static str, Layout)> {
            let rows =
                layout.entries.iter().filter(|entry| entry.parameter.role == Role::Matrix).map(
                    |entry| {
                        let shape = vec![entry.parameter.shape[0]];
                        Parameter { shape, ..entry.parameter.clone() }
                    },
                );
            vec![("rows", Layout::new(&rows.collect::<Vec<_>>()))]
        }

        fn takes_whole(&self, parameter: &Parameter) -> bool {
            parameter.role == Role::Matrix
        }

        fn step(
            &self,
            _: UpdateBuffers,
            _: &mut [StateBuffer],
            _: &Step,
            _: &rule::Weights,
        ) -> Result<()> {
            Ok(())
        }

        fn matrices(
            &mut self,
            target: &Target,
            state: &mut [StateBuffer],
            step: &Step,
            batches: &[Batch],
        ) -> Result<()> {
            for batch in batches {
                let signs = target
                    .gradient(batch)?
                    .f_sum_dim_intlist([2i64].as_slice(), true, None)?
                    .f_sign()?;
                for (member, sign) in batch.members.iter().zip(signs.f_unbind(0)?) {
                    let entry = state[0]
                        .layout
                        .entries
                        .iter()
                        .find(|entry| entry.parameter.name == member.name);
                    let mut rows =
                        state[0].values.narrow(0, entry.unwrap().offset as i64, batch.rows as i64);
                    rows.f_copy_(&sign.f_view([-1])?)?;
                }

                target.advance(batch, |before| Ok(before.f_sub(&signs.f_mul_scalar(step.lr)?)?))?;
            }

            Ok(())
        }

        fn kernel(&self) -> &'static str {
            "none"
        }

        fn constants(&self, _: &Step) -> Vec<f32> {
            Vec::new()
        }
    }

    #[test]
    fn a_rule_may_work_on_whole_matrices_and_keep_a_state_of_its_own_shape() {
        let layout = layout();
        let rule = Box::new(RowSigns);
        let mut optimizer = Optimizer::with(
            rule,
            &OptimizerConfig::of(Common { weight_decay: 0.0, ..Common::default() }),
            &layout,
            1,
            Device::Cpu,
        )
        .unwrap();
        let shapes =
            optimizer.state()[0].layout.entries.iter().map(|entry| entry.parameter.shape.clone());
        assert_eq!(shapes.collect::<Vec<_>>(), [vec![160], vec![4]]);

        let (mut weights, mut gradient) = (wave(layout.len, 0.0, 0.0), wave(layout.len, 0.0, 0.0));
        let mut rows = layout.views(&gradient).unwrap();
        let _ = rows[2].narrow(0, 1, 1).fill_(-3.0);
        let _ = rows[1].fill_(5.0);
        let scalars = UpdateScalars { lr: 0.5, mean: 1.0, norm: &Number::Known(1.0) };
        let buffers = UpdateBuffers {
            old: None,
            new: &mut weights,
            published: None,
            gradient: &mut gradient,
        };

        optimizer.update(buffers, &scalars).unwrap();
        let moved: Vec<f32> = layout.views(&weights).unwrap()[2]
            .sum_dim_intlist([1i64].as_slice(), false, None)
            .try_into()
            .unwrap();
        assert_eq!(moved, [0.0, 2.0, 0.0, 0.0]);
        assert_eq!(
            slice(&weights)[160 * 128..160 * 128 + 9],
            [0.0; 9],
            "a vector is none of its business"
        );

        assert_eq!(slice(&optimizer.state()[0].values)[128 + 128 + 1], -1.0);
    }
}
