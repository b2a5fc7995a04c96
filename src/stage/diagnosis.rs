//! What is wrong where an output is not finite.

use super::{Graph, Held, Output, Saved, Stage, is_finite};
use crate::config::OnNonfinite;
use crate::error::{Error, Result};
use crate::number::{Number, Readback};

impl Stage {
    /// Looks at every output before it is sent, so that the first stage with a bad tensor is the
    /// one that says so.
    pub(super) fn checked(&self, saved: &Saved, graphs: &[Graph], held: Held) -> Result<Output> {
        let end = graphs.last();
        let end = end.ok_or_else(|| Error::Internal(format!("{} has no layers", self.place)))?;
        let deferred = self.settings.readback == Readback::Deferred;
        let (result, finite) = match &end.loss {
            Some(loss) => {
                let loss = Number::from_tensor(loss, self.settings.readback)?;
                // One that is not known yet is looked at when it is.
                let finite = deferred || loss.now()?.is_finite();
                (Output::Loss(loss), finite)
            }
            None => (Output::Hidden(end.output.f_detach()?), deferred || is_finite(&end.output)?),
        };

        if finite || self.settings.on_nonfinite == OnNonfinite::Skip {
            return Ok(result);
        }

        let tensor = tch::no_grad(|| self.bad_tensor(saved, held))?;
        Err(Error::NotFinite {
            tensor,
            step: saved.slot.step,
            place: self.place,
            data: String::new(),
        })
    }

    /// The first weight, layer or memory that is not finite.
    fn bad_tensor(&self, saved: &Saved, held: Held) -> Result<String> {
        let weights = self.weights(saved.at, held);
        for (parameter, weight) in self.stack.parameters().iter().zip(&weights) {
            if !is_finite(weight)? {
                return Ok(format!("weight {}", parameter.name));
            }
        }

        let dropout = self.dropout(saved.slot);
        let layer = self.stack.first_not_finite(&weights, &saved.input, &saved.memory, dropout)?;
        Ok(layer.unwrap_or_else(|| "the loss".to_owned()))
    }
}
