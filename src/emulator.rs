//! The oracle: the whole grid's arithmetic in one process, one autograd graph over the whole model per microbatch,
//! replicas one after the other. It is the definition of correct: it shares the layers, the formulas of `delay` and
//! the optimizers with the grid, but neither `stage` nor `worker` nor any message.
//!
//! ```text
//! for t:   w_k = W_k[max(s, t - D_k)]  for every stage k
//!          for r: for j:  gradients of loss(x^{t,r,j}; w_0, ..., w_{K-1}),  added up over j, then over r
//!          W_k[t+1] = W_k[t] + optimizer_k(mean gradient)
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tch::Tensor;

use crate::checkpoint;
use crate::comm::Reporter;
use crate::data::{Batch, Batches};
use crate::delay::version;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::metrics::Report;
use crate::model::{self, Dropout, Stack};
use crate::optim::{Optimizer, Update, clip_factor, learning_rate, norm};
use crate::params::{Layout, slice, slice_mut, zeros};
use crate::setup::Setup;

/// What one stage of the grid would hold.
struct EmulatedStage {
    layout: Layout,
    optimizer: Optimizer,
    /// Version number -> flat weights.
    versions: BTreeMap<usize, Tensor>,
}

/// The oracle of one run.
pub struct Emulator {
    setup: Arc<Setup>,
    model: Stack,
    stages: Vec<EmulatedStage>,
    batches: Batches,
    reports: Reporter,
    out: PathBuf,
}

impl Emulator {
    /// All stages of the grid with their initial weights.
    ///
    /// # Errors
    /// What libtorch reports, or threads that cannot be started.
    pub fn new(setup: Arc<Setup>, reports: Reporter, out: PathBuf) -> Result<Emulator> {
        let config = &setup.config;
        tch::set_num_threads(config.threads as i32);
        let stage = |stage: usize| -> Result<EmulatedStage> {
            let layout = Layout::new(setup.stack(stage).parameters());
            let optimizer = Optimizer::new(&config.optimizer, &layout, config.threads)?;
            let versions = BTreeMap::from([(0, layout.initial(config.seed)?)]);
            Ok(EmulatedStage { layout, optimizer, versions })
        };
        let stages = (0..setup.grid.stages).map(stage).collect::<Result<_>>()?;
        let model = Stack::new(&setup.dimensions, 0..setup.dimensions.layers);
        let batches = Batches::new(Arc::clone(&setup.corpus), config.seed, config.data.sequence, config.batch);
        Ok(Emulator { model, stages, batches, reports, out, setup })
    }

    /// The whole run.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, or a file that cannot be written.
    pub fn run(mut self) -> Result<()> {
        let setup = Arc::clone(&self.setup);
        let mut sync = 0;
        for t in 0..setup.config.steps {
            if setup.schedule.sync.contains(t) {
                sync = t;
            }
            if setup.schedule.evaluates_at(t) {
                self.evaluate(t)?;
            }
            self.step(t, sync)?;
        }
        if setup.schedule.evaluates_at(setup.config.steps) {
            self.evaluate(setup.config.steps)?;
        }
        for (stage, emulated) in self.stages.iter().enumerate() {
            let steps = setup.config.steps;
            let newest = emulated.newest()?;
            let shard = checkpoint::write_shard(&self.out, steps, stage, &emulated.layout, newest)?;
            let place = Place { stage, replica: 0 };
            self.reports.send(Report::Done { place, shard: Some(shard), peak_bytes: None })?;
        }
        Ok(())
    }

    fn step(&mut self, t: usize, sync: usize) -> Result<()> {
        let replicas = self.setup.grid.replicas;
        let numbers: Vec<usize> = self.setup.schedule.delays.iter().map(|delay| version(sync, t, *delay)).collect();
        let mut sums = self.gradients(t, 0, &numbers)?;
        for replica in 1..replicas {
            for (sum, gradient) in sums.iter_mut().zip(self.gradients(t, replica, &numbers)?) {
                let _ = sum.f_add_(&gradient)?;
            }
        }
        for (k, sum) in sums.iter_mut().enumerate() {
            self.update(t, k, sum)?;
        }
        Ok(())
    }

    /// The parameters of the whole model at the given version of every stage, as leaves.
    fn parameters(&self, numbers: &[usize]) -> Result<Vec<Tensor>> {
        let mut parameters = Vec::new();
        for (stage, number) in self.stages.iter().zip(numbers) {
            let flat = stage.versions.get(number);
            let flat = flat.ok_or_else(|| Error::Internal(format!("the oracle does not hold version {number}")))?;
            for view in stage.layout.views(flat)? {
                parameters.push(view.f_detach()?.f_set_requires_grad(true)?);
            }
        }
        Ok(parameters)
    }

    /// Flat gradients of every stage, added up over the microbatches of one replica.
    fn gradients(&mut self, t: usize, replica: usize, numbers: &[usize]) -> Result<Vec<Tensor>> {
        let parameters = self.parameters(numbers)?;
        let flats = self.stages.iter().map(|stage| zeros(stage.layout.len)).collect::<Result<Vec<_>>>()?;
        let mut sums = Vec::new();
        for (stage, flat) in self.stages.iter().zip(&flats) {
            sums.extend(stage.layout.views(flat)?);
        }
        let config = &self.setup.config;
        let mut total = 0.0;
        for microbatch in 0..config.microbatches {
            let Batch { tokens, targets } = self.batches.train(t, self.setup.train_rows(replica, microbatch));
            let (rate, seed) = (config.model.dropout, config.seed);
            let dropout = (rate > 0.0).then_some(Dropout { rate, seed, step: t, replica, microbatch });
            let loss = model::loss(&self.model.forward(&parameters, &tokens, dropout)?, &targets)?;
            total += self.finite(t, replica, loss.f_double_value(&[])?)?;
            let gradients = Tensor::f_run_backward(&[&loss], &parameters, false, false)?;
            for (sum, gradient) in sums.iter_mut().zip(&gradients) {
                let _ = sum.f_add_(gradient)?;
            }
        }
        let loss = total / config.microbatches as f64;
        self.reports.send(Report::Loss { replica, step: t, loss })?;
        Ok(flats)
    }

    fn finite(&self, step: usize, replica: usize, loss: f64) -> Result<f64> {
        if loss.is_finite() {
            return Ok(loss);
        }
        let place = Place { stage: self.setup.grid.stages - 1, replica };
        Err(Error::NotFinite { tensor: "the loss".into(), step, place })
    }

    fn update(&mut self, t: usize, k: usize, sum: &mut Tensor) -> Result<()> {
        let config = &self.setup.config;
        let mean = 1.0 / (config.microbatches * self.setup.grid.replicas) as f64;
        let norm = norm(slice(sum)) * mean;
        if !norm.is_finite() {
            let place = Place { stage: k, replica: 0 };
            return Err(Error::NotFinite { tensor: "the gradient".into(), step: t, place });
        }
        let lr = learning_rate(&config.optimizer, t, config.steps);
        let scale = mean * clip_factor(norm, config.optimizer.clip);
        let stage = &mut self.stages[k];
        let mut new = stage.newest()?.f_detach_copy()?;
        let update = Update { old: None, new: slice_mut(&mut new), gradient: slice_mut(sum), lr, scale };
        stage.optimizer.update(update);
        stage.versions.insert(t + 1, new);
        let oldest = (t + 1).saturating_sub(self.setup.schedule.delays[k]);
        stage.versions.retain(|number, _| *number >= oldest);
        self.reports.send(Report::Norm { stage: k, step: t, norm })
    }

    fn evaluate(&mut self, t: usize) -> Result<()> {
        let numbers = vec![t; self.stages.len()];
        let parameters = self.parameters(&numbers)?;
        for replica in 0..self.setup.grid.replicas {
            let (mut loss_sum, mut tokens) = (0.0, 0);
            for microbatch in 0..self.setup.schedule.evals.map_or(0, |evals| evals.microbatches) {
                let batch = self.batches.held_out(self.setup.eval_rows(replica, microbatch));
                let mean = tch::no_grad(|| -> Result<f64> {
                    let logits = self.model.forward(&parameters, &batch.tokens, None)?;
                    Ok(model::loss(&logits, &batch.targets)?.f_double_value(&[])?)
                })?;
                loss_sum += mean * batch.targets.numel() as f64;
                tokens += batch.targets.numel();
            }
            self.reports.send(Report::Eval { replica, step: t, loss_sum, tokens })?;
        }
        Ok(())
    }
}

impl EmulatedStage {
    fn newest(&self) -> Result<&Tensor> {
        let newest = self.versions.last_key_value().map(|(_, flat)| flat);
        newest.ok_or_else(|| Error::Internal("the oracle holds no version".into()))
    }
}
