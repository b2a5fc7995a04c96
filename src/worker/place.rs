//! The state of a place that a device holds.

use std::collections::BTreeMap;
use std::time::Instant;

use tch::Tensor;

use super::compute::{Compute, SleepingStage};
use super::context::Context;
use crate::comm::{Endpoints, Reduction};
use crate::data::Batch;
use crate::delay::version;
use crate::emulated_compute::EmulatedCompute;
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::number::Number;
use crate::optim::Optimizer;
use crate::params::{Versions, zeros};
use crate::schedule::{Action, Schedule, TableEnd};
use crate::setup::Setup;
use crate::stage::{Held, Input, MicrobatchId, Output, Settings, Stage, UsedVersions, is_finite};
use crate::staleness::{AtUpdate, Meter, Staleness};
use crate::table::Table;

/// A place with what is its own; the registers hold what one action leaves for the next.
pub(super) struct PlaceState {
    pub(super) place: Place,
    pub(super) ends: Endpoints,
    pub(super) compute: Compute,
    pub(super) versions: Versions,
    pub(super) optimizer: Optimizer,
    /// Of replica 0, where staleness is measured; when the steps that are measured have begun.
    pub(super) meter: Option<Meter>,
    pub(super) begun: BTreeMap<usize, Instant>,
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

/// The weights that a place's stage works with.
pub(super) fn held<'a>(own: &'a Versions, table: Option<&'a Table>) -> Held<'a> {
    Held { own, table }
}

impl PlaceState {
    /// A place at the beginning of the run, or where it is resumed; with `emulated` its stage
    /// sleeps instead of computing.
    pub(super) fn new(
        setup: &Setup,
        place: Place,
        ends: Endpoints,
        emulated: Option<&EmulatedCompute>,
    ) -> Result<PlaceState> {
        let config = &setup.config;
        let stack = setup.stack(place.stage);
        let layout = setup.layout(place.stage);
        let delay = setup.schedule.delays[place.stage];
        let (initial, optimizer) =
            (setup.first_weights(&layout)?, setup.optimizer(&layout, delay)?);
        let memories = setup.memories(&stack, place.replica)?;

        let (gradient, shared) = match ends.group.as_ref().and_then(|group| group.memory()) {
            Some(gradient) => (gradient, size_of::<f32>() * layout.len),
            None => (zeros(layout.len, setup.device)?, 0),
        };

        let (held, kind) = (setup.schedule.versions_held(place.stage), config.precision.kind());
        let versions = Versions::with(
            layout.clone(),
            initial,
            held,
            vec![gradient],
            kind,
            setup.master(delay),
        )?;

        let mut versions = versions.starting_at(setup.start());
        for (number, values) in setup.older_weights(&layout, delay)? {
            versions.recall(number, &values)?;
        }

        let mut meter = setup.meter(&layout, place.replica)?.filter(|_| emulated.is_none());
        if let Some(meter) = &mut meter {
            let used = setup.measured_version(meter, setup.start(), delay);
            meter.made(setup.start(), versions.flat(), used)?;
        }

        let settings = Settings::new(config, setup.readback);
        let mut compute = match emulated {
            None => Compute::Real(Box::new(Stage::new(place, stack, settings))),
            Some(emulated) => {
                let sleep = emulated.sleep(&setup.schedule, place.stage);
                let first = place.stage == 0;
                let stage = SleepingStage::new(sleep, &stack, first, &settings, setup.device);
                Compute::Asleep(stage)
            }
        };

        compute.recall(memories);

        Ok(PlaceState {
            place,
            ends,
            compute,
            versions,
            optimizer,
            meter,
            begun: BTreeMap::new(),
            shared,
            sync: setup.schedule.sync.since,
            reductions: Vec::new(),
            unreduced: layout.len,
            registers: Registers::default(),
            loss: Number::Known(0.0),
            eval: (Number::Known(0.0), 0),
        })
    }

    /// Forward of a microbatch, at the versions of its step.
    pub(super) fn train(
        &mut self,
        context: &Context,
        table: Option<&Table>,
        action: &Action,
        input: Input,
    ) -> Result<Output> {
        let (step, microbatch) = (action.step, action.microbatch);
        let schedule = &context.setup.schedule;
        if microbatch == 0 && step > context.setup.start() && schedule.sync.contains(step) {
            self.sync = step;
        }

        if microbatch == 0 && self.meter.as_ref().is_some_and(|meter| meter.measures(step)) {
            self.begun.insert(step, Instant::now());
        }

        let at = |delay| version(self.sync, step, delay);
        let of_table = |of| {
            schedule
                .ends(self.place.stage)
                .find(|end| *end == of)
                .map(|end| at(schedule.table_delay(end)))
        };

        let own = at(schedule.delays[self.place.stage]);
        let at = UsedVersions {
            own,
            input: of_table(TableEnd::Input),
            output: of_table(TableEnd::Output),
        };

        self.compute.forward(
            MicrobatchId { step, microbatch },
            at,
            held(&self.versions, table),
            input,
        )
    }

    /// What there is to tell of the staleness of a step's gradient, before its update.
    pub(super) fn measure(
        &mut self,
        schedule: &Schedule,
        step: usize,
    ) -> Result<Option<Staleness>> {
        let Some(meter) = &mut self.meter else { return Ok(None) };
        let number = version(self.sync, step, schedule.delays[self.place.stage]);
        let used = self.versions.used(number..number + 1).next().map(|(_, flat)| flat);
        let (newest, gradient) = (self.versions.flat(), self.versions.gradient(0));
        let at = AtUpdate { version: number, used, newest, gradient };
        let seconds = self.begun.remove(&step).map(|begun| begun.elapsed().as_secs_f64());
        let measured = meter.before(step, &at)?;
        Ok(measured.map(|measured| Staleness { seconds, ..measured }))
    }

    /// Forward of a microbatch of an evaluation, at the newest versions.
    pub(super) fn evaluate(
        &mut self,
        context: &Context,
        table: Option<&Table>,
        action: &Action,
        input: &Input,
    ) -> Result<Output> {
        let stage = self.compute.real()?;
        let output = stage.evaluate(held(&self.versions, table), input)?;
        if context.setup.ends_evaluation(action.microbatch) {
            stage.end_evaluation();
        }

        Ok(output)
    }

    /// Names the first parameter whose gradient is not finite.
    pub(super) fn bad_gradient(&self, step: usize) -> Result<Error> {
        let layout = self.versions.layout();
        let mut tensor = "norm of the gradient".to_owned();
        for (entry, view) in layout.entries.iter().zip(layout.views(self.versions.gradient(0))?) {
            if !is_finite(&view)? {
                tensor = format!("gradient of {}", entry.parameter.name);
                break;
            }
        }

        Ok(Error::NotFinite { tensor, step, place: self.place, data: String::new() })
    }
}
