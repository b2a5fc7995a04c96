//! What a run begins with: initial weights, or those of the saved state that it is resumed from.

use std::collections::BTreeMap;

use tch::Tensor;

use super::Setup;
use crate::checkpoint::ShardKind;
use crate::delay::version;
use crate::error::Result;
use crate::model::{Memory, Stack};
use crate::optim::Optimizer;
use crate::params::Layout;

impl Setup {
    /// The weights that a set of parameters begins with.
    ///
    /// # Errors
    /// Saved ones that cannot be read.
    pub fn first_weights(&self, layout: &Layout) -> Result<Tensor> {
        let flat = match &self.resumed {
            Some(saved) => saved.flat(&ShardKind::Weights, layout)?,
            None => layout.initial(self.config.seed)?,
        };
        Ok(flat.f_to_device(self.device)?)
    }

    /// The versions before the first weights that steps with this delay still use, by their numbers.
    ///
    /// # Errors
    /// Saved ones that cannot be read.
    pub fn older_weights(&self, layout: &Layout, delay: usize) -> Result<Vec<(usize, Tensor)>> {
        let sync = &self.schedule.sync;
        match &self.resumed {
            Some(saved) => (version(sync.since, sync.start, delay)..sync.start)
                .map(|number| Ok((number, saved.older(layout, number)?.f_to_device(self.device)?)))
                .collect(),
            None => Ok(Vec::new()),
        }
    }

    /// The optimizer of a set of parameters, as far as it has come.
    ///
    /// # Errors
    /// Threads that cannot be started, or a saved state that cannot be read.
    pub fn optimizer(&self, layout: &Layout) -> Result<Optimizer> {
        let mut optimizer = Optimizer::new(&self.config.optimizer, layout, self.config.threads, self.device)?;
        if let Some(saved) = self.resumed.as_ref().filter(|saved| saved.step() > 0) {
            let of = |name: &str, layout: &Layout| saved.flat(&ShardKind::State(name.into()), layout);
            optimizer.restore(saved.step(), of)?;
        }
        Ok(optimizer)
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
