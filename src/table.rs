//! The tied table at work: the versions of it that a device holds, the parts of its gradient that
//! wait for each other, and its updates. `schedule` has the rule and the picture.
//!
//! Both ends of a line hold a copy and make every update themselves, from the same sum, so the
//! copies stay equal bit for bit without ever being sent. On a ring, and with one stage, there is
//! one.

use std::collections::VecDeque;
use std::ops::Range;

use tch::{Kind, Tensor};
use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::number::{Number, Readback};
use crate::optim::{Optimizer, UpdateScalars, norm};
use crate::params::{Layout, Master, UpdateBuffers, Versions, bytes, to_host, zeros};
use crate::schedule::TableEnd;

/// The tied table of one device.
pub struct Table {
    versions: Versions,
    optimizer: Optimizer,
    /// The ends that are on this device, in the order of the versions' sides.
    ends: Vec<TableEnd>,
    /// Of the joiner: parts by step, complete and not yet used.
    inputs: VecDeque<(usize, Tensor)>,
    outputs: VecDeque<(usize, Tensor)>,
    /// The gradient of the update that is under way.
    whole: Option<Tensor>,
}

impl Table {
    /// A table whose version 0 is `initial`, `held` versions of a kind at most.
    pub fn new(
        layout: Layout,
        initial: Tensor,
        held: usize,
        ends: Vec<TableEnd>,
        optimizer: Optimizer,
        kind: Kind,
        master: Master,
    ) -> Result<Table> {
        let gradients =
            ends.iter().map(|_| zeros(layout.len, initial.device())).collect::<Result<_>>()?;
        let versions = Versions::with(layout, initial, held, gradients, kind, master)?;
        Ok(Table {
            versions,
            optimizer,
            ends,
            inputs: VecDeque::new(),
            outputs: VecDeque::new(),
            whole: None,
        })
    }

    /// Lets an end, if it is on this device, use the newest version as the update has made it,
    /// where versions are predicted.
    pub fn unpredicted(self, end: TableEnd) -> Result<Table> {
        match self.side(end) {
            Some(side) => Ok(Table { versions: self.versions.unpredicted(side)?, ..self }),
            None => Ok(self),
        }
    }

    /// The parameters of a version as an end uses them; none if that end is on another device.
    pub fn parameters(&self, version: usize, end: TableEnd) -> &[Tensor] {
        self.side(end).map_or(&[], |side| self.versions.parameters(version, side))
    }

    fn side(&self, end: TableEnd) -> Option<usize> {
        self.ends.iter().position(|held| *held == end)
    }

    /// Adds a backward's gradient of a parameter, as an end uses it, to the step's sum.
    pub fn add(&self, end: TableEnd, parameter: usize, part: &Tensor) -> Result<()> {
        let side = self
            .side(end)
            .ok_or_else(|| Error::Internal(format!("{end:?} of the table is not here")))?;
        self.versions.add(side, parameter, part)
    }

    /// Completes an end's part of a step: takes it out of the gradient, which begins anew.
    pub fn close(&mut self, end: TableEnd) -> Result<Tensor> {
        let side = self
            .side(end)
            .ok_or_else(|| Error::Internal(format!("{end:?} of the table is not here")))?;
        let mut gradient = self.versions.gradient(side).shallow_clone();
        let part = gradient.f_detach_copy()?;
        let _ = gradient.f_zero_()?;
        Ok(part)
    }

    /// Begins the gradients of all ends anew.
    pub fn forget(&mut self) -> Result<()> {
        self.ends.clone().into_iter().try_for_each(|end| self.close(end).map(drop))
    }

    /// Keeps a part until its update is made.
    pub fn keep(&mut self, end: TableEnd, step: usize, part: Tensor) {
        match end {
            TableEnd::Input => self.inputs.push_back((step, part)),
            TableEnd::Output => self.outputs.push_back((step, part)),
        }
    }

    /// Whether an end's part of a step is here.
    pub fn has(&self, end: TableEnd, step: usize) -> bool {
        let parts = match end {
            TableEnd::Input => &self.inputs,
            TableEnd::Output => &self.outputs,
        };
        parts.iter().any(|(of, _)| *of == step)
    }

    /// Puts the gradient of update `step` together: the head's part, then the input parts of
    /// `inputs` in order, and before them those of earlier steps that an earlier run, whose delays
    /// were others, has left.
    ///
    /// # Errors
    /// [`Error::Internal`] if a part is missing.
    pub fn join(&mut self, step: usize, inputs: Range<usize>) -> Result<Tensor> {
        let taken = |parts: &mut VecDeque<(usize, Tensor)>, step: usize| {
            let part = parts.pop_front().filter(|(of, _)| *of == step);
            part.map(|(_, part)| part)
                .ok_or_else(|| Error::Internal(format!("no part of step {step} of the table")))
        };

        let mut whole = taken(&mut self.outputs, step)?;
        let left = self.inputs.iter().take_while(|(of, _)| *of < inputs.start).count();
        for (_, part) in self.inputs.drain(..left) {
            let _ = whole.f_add_(&part)?;
        }

        for step in inputs {
            let _ = whole.f_add_(&taken(&mut self.inputs, step)?)?;
        }

        self.whole = Some(whole.shallow_clone());
        Ok(whole)
    }

    /// The input parts that have not joined an update yet, each with its step.
    pub fn waiting(&self) -> impl Iterator<Item = (usize, &Tensor)> {
        self.inputs.iter().map(|(step, part)| (*step, part))
    }

    /// A copy of the gradient of the update under way.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is none.
    pub fn sum(&self) -> Result<Tensor> {
        let whole = self
            .whole
            .as_ref()
            .ok_or_else(|| Error::Internal("no gradient of the table".into()))?;
        Ok(whole.f_detach_copy()?)
    }

    /// The gradient of the update under way.
    pub fn gradient(&self) -> Option<&Tensor> {
        self.whole.as_ref()
    }

    /// Takes the gradient of the next update from the other copy.
    pub fn set_sum(&mut self, sum: Tensor) {
        self.whole = Some(sum);
    }

    /// Writes the next version from the reduced gradient of the update under way; the norm of the
    /// gradient, whose mean is `mean` times the sum, before clipping. The version is `horizon`
    /// updates ahead. If the norm is not finite the update is left out.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is none.
    pub fn update(
        &mut self,
        lr: f64,
        horizon: f64,
        mean: f64,
        readback: Readback,
    ) -> Result<Number> {
        let mut gradient =
            self.whole.take().ok_or_else(|| Error::Internal("no gradient of the table".into()))?;
        let norm = self.optimizer.usable(norm(&gradient, readback)?, mean)?;
        let (optimizer, scalars) = (&mut self.optimizer, UpdateScalars { lr, mean, norm: &norm });
        self.versions.advance(horizon, |own| {
            let buffers = UpdateBuffers { gradient: &mut gradient, ..own };
            optimizer.update(buffers, &scalars)
        })?;

        norm.times(mean)
    }

    /// The same table as version `newest`.
    pub fn starting_at(self, newest: usize) -> Table {
        Table { versions: self.versions.starting_at(newest), ..self }
    }

    /// The versions that are held, to be saved or recalled.
    pub fn versions(&self) -> &Versions {
        &self.versions
    }

    pub fn versions_mut(&mut self) -> &mut Versions {
        &mut self.versions
    }

    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    pub fn layout(&self) -> &Layout {
        self.versions.layout()
    }

    /// The newest version: how many updates have been made.
    pub fn newest(&self) -> usize {
        self.versions.newest()
    }

    /// The newest version's values.
    pub fn flat(&self) -> &Tensor {
        self.versions.flat()
    }

    /// A digest of the newest version: equal copies have equal digests.
    pub fn digest(&self) -> Result<u64> {
        Ok(xxh3_64(bytes(&to_host(self.versions.flat())?)))
    }
}
