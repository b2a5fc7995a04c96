//! A first forward and backward that leave nothing behind.

use tch::Tensor;

use super::{Held, Input, MicrobatchId, Output, Stage, UsedVersions};
use crate::error::Result;
use crate::number::Number;
use crate::optim::norm;
use crate::wire::Wire;

impl Stage {
    /// Forward and backward of a microbatch that leaves nothing behind (but in the table's
    /// gradient): for what is loaded and taken when something is done for the first time.
    pub fn rehearse(&mut self, held: Held, input: &Input, wire: Wire) -> Result<()> {
        let memories = std::mem::take(&mut self.memories);
        // The last microbatch of a step is cut into buckets.
        let slot = MicrobatchId { step: 0, microbatch: self.settings.microbatches - 1 };
        let at = UsedVersions::newest(held);
        // The second time with a memory.
        for restart in [true, false] {
            let (x, targets) =
                (input.x.shallow_clone(), input.targets.as_ref().map(Tensor::shallow_clone));
            let documents = input.documents.as_ref().map(Tensor::shallow_clone);
            let input = Input { x, targets, restart, documents };
            self.evaluate(held, &input)?;
            let dy = match self.forward(slot, at, held, input)? {
                Output::Hidden(y) => Some(wire.cross(&y)?.f_zeros_like()?),
                Output::Loss(loss) => {
                    loss.plus(Number::Known(0.0))?.times(1.0)?.now()?;
                    None
                }
            };

            if let Some(dx) = self.backward(slot, held, dy, &mut |_| Ok(()))? {
                let _ = wire.cross(&dx)?;
            }
        }

        self.end_evaluation();
        let mut gradient = held.own.gradient(0).shallow_clone();
        norm(&gradient, self.settings.readback)?.now()?;
        let _ = gradient.f_zero_()?;
        self.memories = memories;
        Ok(())
    }
}
