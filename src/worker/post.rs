//! What a device has for each of its places.

use tch::Tensor;

use crate::comm::{Ends, Reduction};
use crate::data::Batch;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::number::Number;
use crate::optim::Optimizer;
use crate::params::{Versions, zeros};
use crate::setup::Setup;
use crate::stage::{Settings, Stage, is_finite};

/// A place with what is its own; the registers hold what one action leaves for the next.
pub(super) struct Post {
    pub(super) place: Place,
    pub(super) ends: Ends,
    pub(super) stage: Stage,
    pub(super) optimizer: Optimizer,
    /// Bytes of the gradient that the other replicas see too.
    pub(super) shared: usize,
    /// The last sync point at or before the step that is being forwarded.
    pub(super) sync: usize,
    /// The all-reduces under way, and where the part of the gradient ends that none of them holds.
    pub(super) reductions: Vec<Reduction>,
    pub(super) unreduced: usize,
    pub(super) registers: Registers,
    /// Losses of the step's microbatches so far, of the evaluation's so far.
    pub(super) loss: Number,
    pub(super) eval: (Number, usize),
}

#[derive(Default)]
pub(super) struct Registers {
    pub(super) batch: Option<Batch>,
    /// Hidden states that came down or go down.
    pub(super) activation: Option<Tensor>,
    /// Gradients that came up or go up.
    pub(super) gradient: Option<Tensor>,
}

impl Post {
    /// A place at the beginning of the run, or where it goes on.
    ///
    /// # Errors
    /// What libtorch reports, or a saved state that cannot be read.
    pub(super) fn new(setup: &Setup, place: Place, ends: Ends) -> Result<Post> {
        let config = &setup.config;
        let stack = setup.stack(place.stage);
        let layout = setup.layout(place.stage);
        let (initial, optimizer) = (setup.first_weights(&layout)?, setup.optimizer(&layout)?);
        let memories = setup.memories(&stack, place.replica)?;
        let (gradient, shared) = match ends.group.as_ref().and_then(|group| group.memory()) {
            Some(gradient) => (gradient, size_of::<f32>() * layout.len),
            None => (zeros(layout.len, setup.device)?, 0),
        };
        let (held, kind) = (setup.schedule.versions_held(place.stage), config.precision.kind());
        let versions = Versions::with(layout.clone(), initial, held, vec![gradient], kind)?;
        let mut versions = versions.at(setup.start());
        for (number, values) in setup.older_weights(&layout, setup.schedule.delays[place.stage])? {
            versions.recall(number, &values)?;
        }
        let mut stage = Stage::new(place, stack, versions, Settings::new(config, setup.late));
        stage.recall(memories);
        let (reductions, unreduced) = (Vec::new(), stage.versions.layout().len);
        let registers = Registers::default();
        let (loss, eval) = (Number::Known(0.0), (Number::Known(0.0), 0));
        let sync = setup.schedule.sync.since;
        Ok(Post { place, ends, stage, optimizer, shared, sync, reductions, unreduced, registers, loss, eval })
    }

    /// Names the first parameter whose gradient is not finite.
    pub(super) fn bad_gradient(&mut self, step: usize) -> Result<Error> {
        let layout = self.stage.versions.layout().clone();
        let views = layout.views(self.stage.versions.gradient(0))?;
        for (entry, view) in layout.entries.iter().zip(&views) {
            if !is_finite(view)? {
                let tensor = format!("gradient of {}", entry.parameter.name);
                return Ok(Error::NotFinite { tensor, step, place: self.place, data: String::new() });
            }
        }
        let tensor = "norm of the gradient".into();
        Ok(Error::NotFinite { tensor, step, place: self.place, data: String::new() })
    }
}
