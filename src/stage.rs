//! One stage at work: forward and backward of microbatches at a version of its weights. The only caller of autograd
//! besides the oracle.

use std::collections::VecDeque;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::grid::Place;
use crate::model::{self, Dropout, Stack};
use crate::params::Versions;

/// Which microbatch of which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    pub step: usize,
    pub microbatch: usize,
}

/// What a forward gives.
#[derive(Debug)]
pub enum Output {
    /// Hidden states for the next stage, [b, T, D].
    Hidden(Tensor),
    /// Mean loss of the microbatch, nats per token: the last stage.
    Loss(f64),
}

/// A forward that waits for its backward.
struct Saved {
    slot: Slot,
    version: usize,
    /// The stage input, a leaf unless it is tokens.
    input: Tensor,
    targets: Option<Tensor>,
    /// Hidden states or loss with the graph behind them; none under recompute.
    output: Option<Tensor>,
}

/// The layers of one place, their weights, and the microbatches under way.
pub struct Stage {
    place: Place,
    stack: Stack,
    pub versions: Versions,
    recompute: bool,
    dropout: f64,
    seed: u64,
    saved: VecDeque<Saved>,
}

impl Stage {
    /// A stage without microbatches under way. `dropout` is the rate.
    pub fn new(place: Place, stack: Stack, versions: Versions, recompute: bool, dropout: f64, seed: u64) -> Stage {
        Stage { place, stack, versions, recompute, dropout, seed, saved: VecDeque::new() }
    }

    /// Forward of a microbatch at a version of the weights. `x` is tokens [b, T] on the first stage, else hidden states
    /// [b, T, D]; `targets` [b, T] are needed on the last stage.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the output is not, and what libtorch reports.
    pub fn forward(&mut self, slot: Slot, version: usize, x: Tensor, targets: Option<Tensor>) -> Result<Output> {
        let input = if self.place.stage == 0 { x } else { x.f_detach()?.f_set_requires_grad(true)? };
        let mut saved = Saved { slot, version, input, targets, output: None };
        let output = match self.recompute {
            true => tch::no_grad(|| self.run(&saved))?,
            false => self.run(&saved)?,
        };
        let result = self.checked(&saved, &output)?;
        if !self.recompute {
            saved.output = Some(output);
        }
        self.saved.push_back(saved);
        Ok(result)
    }

    /// Backward of the oldest microbatch under way: adds to the gradient, gives the gradient of the stage input.
    /// `dy` is the gradient of its output, none on the last stage.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn backward(&mut self, slot: Slot, dy: Option<Tensor>) -> Result<Option<Tensor>> {
        let saved = self.saved.pop_front().filter(|saved| saved.slot == slot);
        let saved = saved.ok_or_else(|| Error::Internal(format!("{slot:?} on {} has no forward", self.place)))?;
        let output = match &saved.output {
            Some(output) => output.shallow_clone(),
            None => self.run(&saved)?,
        };
        match dy {
            // tch cannot seed a backward: the gradient of sum(y * dy) with respect to y is exactly dy.
            Some(dy) => output.f_mul(&dy)?.f_sum(Kind::Float)?.f_backward()?,
            None => output.f_backward()?,
        }
        if self.place.stage == 0 { Ok(None) } else { Ok(Some(saved.input.f_grad()?)) }
    }

    /// Forward of an evaluation at the newest version: hidden states, or the sum of the losses of all tokens.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn evaluate(&self, x: &Tensor, targets: Option<&Tensor>) -> Result<Output> {
        tch::no_grad(|| {
            let y = self.stack.forward(self.versions.parameters(self.versions.newest()), x, None)?;
            match targets {
                None => Ok(Output::Hidden(y)),
                Some(targets) => {
                    let mean = model::loss(&y, targets)?.f_double_value(&[])?;
                    Ok(Output::Loss(mean * targets.numel() as f64))
                }
            }
        })
    }

    fn dropout(&self, slot: Slot) -> Option<Dropout> {
        let Slot { step, microbatch } = slot;
        (self.dropout > 0.0).then_some(Dropout {
            rate: self.dropout,
            seed: self.seed,
            step,
            replica: self.place.replica,
            microbatch,
        })
    }

    /// Hidden states or loss of a microbatch, the same every time it is run.
    fn run(&self, saved: &Saved) -> Result<Tensor> {
        let weights = self.versions.parameters(saved.version);
        let y = self.stack.forward(weights, &saved.input, self.dropout(saved.slot))?;
        match &saved.targets {
            Some(targets) => model::loss(&y, targets),
            None => Ok(y),
        }
    }

    /// Looks at every output before it is sent, so that the first stage with a bad tensor is the one that says so.
    fn checked(&self, saved: &Saved, output: &Tensor) -> Result<Output> {
        let (result, finite) = match saved.targets {
            Some(_) => {
                let loss = output.f_double_value(&[])?;
                (Output::Loss(loss), loss.is_finite())
            }
            None => (Output::Hidden(output.f_detach()?), is_finite(output)?),
        };
        if finite {
            return Ok(result);
        }
        let weights = self.versions.parameters(saved.version);
        let named = self.versions.layout().entries.iter().zip(weights);
        let mut tensor = None;
        for (entry, weight) in named {
            if !is_finite(weight)? {
                tensor = Some(format!("weight {}", entry.parameter.name));
                break;
            }
        }
        if tensor.is_none() {
            let dropout = self.dropout(saved.slot);
            tensor = tch::no_grad(|| self.stack.first_not_finite(weights, &saved.input, dropout))?;
        }
        let tensor = tensor.unwrap_or_else(|| "the loss".to_owned());
        Err(Error::NotFinite { tensor, step: saved.slot.step, place: self.place })
    }
}

/// Whether every value of a tensor is finite.
///
/// # Errors
/// What libtorch reports.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    Ok(x.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}
