//! SGD with momentum, g the clipped mean gradient: `m = mu m + g;  w = w (1 - lr wd) - lr m`.
//!
//! Key: `momentum`. State: `first` (m).

use multiversion::multiversion;
use serde::{Deserialize, Serialize};

use super::StateBuffer;
use super::elementwise::{self, Chunk, Common};
use super::rule::{Rule, Step, Weights};
use crate::error::{Error, Result};
use crate::params::{Layout, UpdateBuffers};

/// Its key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct Keys {
    /// How much of the sum of gradients stays.
    pub momentum: f64,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { momentum: 0.9 }
    }
}

impl Keys {
    /// Whether it can be used.
    pub fn check(&self) -> Result<()> {
        let good = (0.0..1.0).contains(&self.momentum);
        Error::unless(good, "optimizer.momentum", self.momentum, "must be at least 0 and below 1")
    }
}

/// The rule.
pub struct Sgd {
    keys: Keys,
}

impl Sgd {
    pub fn new(keys: &Keys) -> Sgd {
        Sgd { keys: keys.clone() }
    }
}

impl Rule for Sgd {
    fn state(&self, layout: &Layout) -> Vec<(&'static str, Layout)> {
        vec![("first", layout.clone())]
    }

    fn step(
        &self,
        buffers: UpdateBuffers,
        state: &mut [StateBuffer],
        step: &Step,
        weights: &Weights,
    ) -> Result<()> {
        let (common, momentum, lr) =
            (Common::new(step, weights), self.keys.momentum as f32, step.lr as f32);
        elementwise::update(buffers, state, weights, |chunk| pass(chunk, &common, momentum, lr));
        Ok(())
    }

    fn kernel(&self) -> &'static str {
        "update_sgd"
    }

    fn constants(&self, step: &Step) -> Vec<f32> {
        vec![self.keys.momentum as f32, step.lr as f32]
    }
}

#[multiversion(targets("x86_64+avx2", "aarch64+neon"))]
fn pass(mut chunk: Chunk<1>, common: &Common, momentum: f32, lr: f32) {
    common.begin(&mut chunk);

    let Chunk { new, gradient, state: [first], .. } = chunk;
    for ((w, g), m) in new.iter_mut().zip(gradient.iter()).zip(first) {
        *m = momentum * *m + g;
        *w -= lr * *m;
    }

    gradient.fill(0.0);
}

#[cfg(test)]
mod tests {
    use crate::optim::tests::updated;
    use crate::optim::{Common, OptimizerConfig, OptimizerKind};

    /// Two updates by hand, in f64; the vector does not decay.
    #[test]
    fn first_updates_by_hand() {
        let (w0, g, lr, wd) = (0.8, 0.125, 0.01, 0.1);
        let kind = OptimizerKind::Sgd;
        let config =
            OptimizerConfig::of(Common { kind, weight_decay: wd, clip: None, ..Common::default() });
        let by_hand = |wd: f64| {
            let w = w0 * (1.0 - lr * wd) - lr * g;
            w * (1.0 - lr * wd) - lr * (0.9 * g + g)
        };
        let (matrix, vector) = updated(&config, w0, g, lr, 2);
        assert!((matrix - by_hand(wd)).abs() < 2e-7, "{matrix} {}", by_hand(wd));
        assert!((vector - by_hand(0.0)).abs() < 2e-7, "{vector} {}", by_hand(0.0));
    }
}
