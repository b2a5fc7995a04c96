//! What a run begins with: initial weights, or those of the saved state that it is resumed from.

use std::collections::BTreeMap;
use std::ops::Range;

use tch::Tensor;

use super::Setup;
use crate::checkpoint::ShardKind;
use crate::config::Config;
use crate::delay::version;
use crate::error::Result;
use crate::model::{Memory, Stack};
use crate::optim::{Optimizer, horizon, predicts};
use crate::params::{Layout, Master, zeros};

impl Setup {
    /// The weights that a set of parameters begins with.
    ///
    /// # Errors
    /// Saved ones that cannot be read.
    pub fn first_weights(&self, layout: &Layout) -> Result<Tensor> {
        let flat = match self.resumed.as_ref().or(self.initial.as_ref()) {
            Some(saved) => saved.flat(&ShardKind::Weights, layout)?,
            None => layout.initial(self.config.seed)?,
        };
        Ok(flat.f_to_device(self.device)?)
    }

    /// The saved versions that steps with this delay still use, by their numbers: those before the
    /// first weights, and where weights are predicted that of the first weights too.
    ///
    /// # Errors
    /// Saved ones that cannot be read.
    pub fn older_weights(&self, layout: &Layout, delay: usize) -> Result<Vec<(usize, Tensor)>> {
        let sync = &self.schedule.sync;
        let numbers = self.versions_saved(sync.since, sync.start, delay);
        match &self.resumed {
            Some(saved) => numbers
                .map(|number| Ok((number, saved.older(layout, number)?.f_to_device(self.device)?)))
                .collect(),
            None => Ok(Vec::new()),
        }
    }

    /// The versions that a state at step `step` has to hold besides its weights, of weights with
    /// this delay; `since` is the sync point that delays count from. None at a sync point.
    pub fn versions_saved(&self, since: usize, step: usize, delay: usize) -> Range<usize> {
        // A predicted version cannot be made again.
        let predicted = since < step && predicts(&self.config.optimizer, delay);
        version(since, step, delay)..if predicted { step + 1 } else { step }
    }

    /// H of the version that the update of step `step` makes, of weights with this delay.
    pub fn horizon(&self, delay: usize, step: usize) -> f64 {
        let drained = self.schedule.sync.contains(step + 1);
        horizon(&self.config.optimizer, delay, step, self.config.steps, drained)
    }

    /// Whether the master weights of weights with this delay stand apart from their versions.
    pub fn master(&self, delay: usize) -> Master {
        if predicts(&self.config.optimizer, delay) { Master::Always } else { Master::WhereRounded }
    }

    /// The optimizer of a set of parameters with this delay, as far as it has come.
    ///
    /// # Errors
    /// Threads that cannot be started, or a saved state that cannot be read.
    pub fn optimizer(&self, layout: &Layout, delay: usize) -> Result<Optimizer> {
        let Config { optimizer, threads, precision, .. } = &self.config;
        let mut optimizer =
            Optimizer::new(optimizer, layout, delay, *precision, *threads, self.device)?;
        if let Some(saved) = self.resumed.as_ref().filter(|saved| saved.step() > 0) {
            let of =
                |name: &str, layout: &Layout| saved.flat(&ShardKind::State(name.into()), layout);
            optimizer.restore(saved.step(), of)?;
        }

        Ok(optimizer)
    }

    /// The input parts of the tied table's gradient that had not joined an update where the run was
    /// stopped, each with its step. The run of other replicas gives the first of them the sums.
    ///
    /// # Errors
    /// Saved ones that cannot be read.
    pub fn waiting_parts(&self, layout: &Layout, replica: usize) -> Result<Vec<(usize, Tensor)>> {
        let Some(saved) = &self.resumed else { return Ok(Vec::new()) };
        let before = &saved.manifest.config;
        let same = before.grid.replicas == self.grid.replicas;
        // A microbatch's gradient is its mean, and the sums will be divided by so many.
        let count = |config: &Config| (config.microbatches * config.grid.replicas) as f64;
        let scale = count(&self.config) / count(before);

        let part = |step: usize| -> Result<Tensor> {
            let mut sum = zeros(layout.len, tch::Device::Cpu)?;
            let of = if same { replica..replica + 1 } else { 0..before.grid.replicas };
            for from in of.filter(|_| same || replica == 0) {
                let _ = sum.f_add_(&saved.part(layout, step, from)?)?;
            }

            if scale != 1.0 {
                let _ = sum.f_mul_scalar_(scale)?;
            }

            Ok(sum.f_to_device(self.device)?)
        };

        saved.steps_of_parts().into_iter().map(|step| Ok((step, part(step)?))).collect()
    }

    /// What the layers of a stage remember of the rows of every microbatch.
    ///
    /// # Errors
    /// A saved state that cannot be read.
    pub fn memories(&self, stack: &Stack, replica: usize) -> Result<BTreeMap<usize, Memory>> {
        let Some(saved) = &self.resumed else { return Ok(BTreeMap::new()) };
        let kind = self.config.precision.kind();
        let states = |layer: &str, j| -> Result<Option<Tensor>> {
            let states = saved.memory(layer, self.train_rows(replica, j))?;
            Ok(states.map(|states| states.f_to_device(self.device)?.f_to_kind(kind)).transpose()?)
        };
        let of = |j| stack.recalled(self.config.model.mem_len, |layer| states(layer, j));
        (0..self.config.microbatches).map(|j| Ok((j, of(j)?))).collect()
    }
}
