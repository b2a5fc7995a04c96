//! What computes at a place: its stage, or one that sleeps instead.

use std::collections::{BTreeMap, VecDeque};

use tch::{Device, Kind, Tensor};

use crate::emulated_compute::Sleep;
use crate::error::{Error, Result};
use crate::model::{Memory, Stack};
use crate::number::Number;
use crate::params::Layout;
use crate::stage::{Bucket, Held, Input, MicrobatchId, Output, Settings, Stage, UsedVersions};

/// A stage.
pub(super) enum Compute {
    Real(Box<Stage>),
    Asleep(SleepingStage),
}

impl Compute {
    /// As [`Stage::forward`].
    pub(super) fn forward(
        &mut self,
        slot: MicrobatchId,
        at: UsedVersions,
        held: Held,
        input: Input,
    ) -> Result<Output> {
        match self {
            Compute::Real(stage) => stage.forward(slot, at, held, input),
            Compute::Asleep(stage) => stage.forward(slot, input),
        }
    }

    /// As [`Stage::backward`].
    pub(super) fn backward(
        &mut self,
        slot: MicrobatchId,
        held: Held,
        dy: Option<Tensor>,
        ready: &mut dyn FnMut(Bucket) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        match self {
            Compute::Real(stage) => stage.backward(slot, held, dy, ready),
            Compute::Asleep(stage) => stage.backward(slot, held, ready),
        }
    }

    /// How many microbatches wait for their backward, and the first of them.
    pub(super) fn under_way(&self) -> (usize, Option<MicrobatchId>) {
        match self {
            Compute::Real(stage) => stage.under_way(),
            Compute::Asleep(stage) => {
                (stage.saved.len(), stage.saved.front().map(|(slot, _)| *slot))
            }
        }
    }

    /// The stage that evaluates.
    ///
    /// # Errors
    /// If there is none: a run that sleeps has no evaluations.
    pub(super) fn real(&mut self) -> Result<&mut Stage> {
        match self {
            Compute::Real(stage) => Ok(stage.as_mut()),
            Compute::Asleep(_) => {
                Err(Error::Internal("a stage that sleeps has nothing to evaluate".into()))
            }
        }
    }

    /// What the layers remember of each microbatch's rows, by the layers' names.
    pub(super) fn remembered(&self) -> Vec<(usize, Vec<(String, &Tensor)>)> {
        let Compute::Real(stage) = self else { return Vec::new() };
        let memories = stage.memories().iter();
        memories
            .map(|(microbatch, memory)| (*microbatch, stage.stack().remembered(memory)))
            .collect()
    }

    /// What they are to remember, of a run that is resumed.
    pub(super) fn recall(&mut self, memories: BTreeMap<usize, Memory>) {
        if let Compute::Real(stage) = self {
            stage.recall(memories);
        }
    }
}

/// A stage that sleeps instead of computing: losses and gradients are 0, messages and buckets are
/// as large as they would be.
pub(super) struct SleepingStage {
    sleep: Sleep,
    first: bool,
    device: Device,
    d_model: i64,
    microbatches: usize,
    /// Where the runs of layers begin in the flat buffer: of the last microbatch of a step, and of
    /// the others.
    buckets: Vec<usize>,
    whole: Vec<usize>,
    /// Inputs of the microbatches under way.
    saved: VecDeque<(MicrobatchId, Tensor)>,
    /// Hidden states, once they were made.
    blank: Option<Tensor>,
}

impl SleepingStage {
    /// The layers of `stack`, which is the first of the model or not, on a device.
    pub(super) fn new(
        sleep: Sleep,
        stack: &Stack,
        first: bool,
        settings: &Settings,
        device: Device,
    ) -> SleepingStage {
        let layout = Layout::new(&stack.own());
        let starts =
            |values: usize| stack.runs(values).iter().map(|run| layout.offset(run.first)).collect();
        SleepingStage {
            sleep,
            first,
            device,
            d_model: stack.d_model() as i64,
            microbatches: settings.microbatches,
            buckets: starts(settings.bucket.unwrap_or(usize::MAX)),
            whole: starts(usize::MAX),
            saved: VecDeque::new(),
            blank: None,
        }
    }

    fn forward(&mut self, slot: MicrobatchId, input: Input) -> Result<Output> {
        std::thread::sleep(self.sleep.forward);

        let Input { x, targets, .. } = input;
        let output = match (&targets, &self.blank) {
            (Some(_), _) => Output::Loss(Number::Known(0.0)),
            (None, Some(blank)) => Output::Hidden(blank.shallow_clone()),
            (None, None) => {
                let shape = [x.size()[0], x.size()[1], self.d_model];
                let zeros = Tensor::f_zeros(shape, (Kind::Float, self.device))?;
                self.blank = Some(zeros.shallow_clone());
                Output::Hidden(zeros)
            }
        };

        self.saved.push_back((slot, x));
        Ok(output)
    }

    fn backward(
        &mut self,
        slot: MicrobatchId,
        held: Held,
        ready: &mut dyn FnMut(Bucket) -> Result<()>,
    ) -> Result<Option<Tensor>> {
        let saved = self.saved.pop_front().filter(|(saved, _)| *saved == slot);
        let (_, input) =
            saved.ok_or_else(|| Error::Internal(format!("{slot:?} has no forward")))?;

        let last = slot.microbatch + 1 == self.microbatches;
        let starts = if last { &self.buckets } else { &self.whole };
        let mut end = held.own.layout().len;
        for offset in starts.iter().rev() {
            std::thread::sleep(self.sleep.backward / starts.len() as u32);
            if *offset > 0 {
                let values =
                    held.own.gradient(0).f_narrow(0, *offset as i64, (end - offset) as i64)?;
                ready(Bucket { offset: *offset, values })?;
                end = *offset;
            }
        }

        // A stage's input is as large as its output.
        Ok((!self.first).then_some(input))
    }
}
