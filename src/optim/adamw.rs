//! AdamW (Loshchilov and Hutter 2019), n counting updates from 1, g the clipped mean gradient:
//!
//! ```text
//! m = b1 m + (1-b1) g;   v = b2 v + (1-b2) g^2
//! w = w (1 - lr wd) - lr / (1-b1^n) * m / (sqrt(v / (1-b2^n)) + eps)
//! ```
//!
//! Keys: `betas`, `eps`. State: `first` (m), `second` (v).

use multiversion::multiversion;

use super::StateBuffer;
use super::config::OptimizerConfig;
use super::elementwise::{self, Chunk, Common};
use super::rule::{Rule, Step, Weights};
use crate::error::{Error, Result};
use crate::params::{Layout, UpdateBuffers};

/// The rule.
pub struct Adamw {
    betas: [f64; 2],
    eps: f64,
}

/// Whether its keys can be used.
pub fn check(config: &OptimizerConfig) -> Result<()> {
    for beta in config.betas {
        Error::unless((0.0..1.0).contains(&beta), "optimizer.betas", beta, "must be at least 0 and below 1")?;
    }
    Error::unless(config.eps > 0.0, "optimizer.eps", config.eps, "must be above 0")
}

impl Adamw {
    pub fn new(config: &OptimizerConfig) -> Adamw {
        Adamw { betas: config.betas, eps: config.eps }
    }

    fn numbers(&self, step: &Step) -> Numbers {
        let [beta1, beta2] = self.betas;
        Numbers {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            step: (step.lr / (1.0 - beta1.powi(step.n))) as f32,
            root: (1.0 - beta2.powi(step.n)).sqrt() as f32,
            eps: self.eps as f32,
        }
    }
}

/// The constants of one update.
struct Numbers {
    beta1: f32,
    beta2: f32,
    step: f32,
    root: f32,
    eps: f32,
}

impl Rule for Adamw {
    fn state(&self, layout: &Layout) -> Vec<(&'static str, Layout)> {
        vec![("first", layout.clone()), ("second", layout.clone())]
    }

    fn step(&self, buffers: UpdateBuffers, state: &mut [StateBuffer], step: &Step, weights: &Weights) -> Result<()> {
        let (common, numbers) = (Common::new(step, weights), self.numbers(step));
        elementwise::update(buffers, state, weights.pool, |chunk| pass(chunk, &common, &numbers));
        Ok(())
    }

    fn kernel(&self) -> &'static str {
        "update_adamw"
    }

    fn constants(&self, step: &Step) -> Vec<f32> {
        let Numbers { beta1, beta2, step, root, eps } = self.numbers(step);
        vec![beta1, beta2, step, root, eps]
    }
}

#[multiversion(targets("x86_64+avx2", "aarch64+neon"))]
fn pass(mut chunk: Chunk<2>, common: &Common, numbers: &Numbers) {
    common.begin(&mut chunk);

    let Chunk { new, gradient, state: [first, second], .. } = chunk;
    let Numbers { beta1, beta2, step, root, eps } = *numbers;
    for (((w, g), m), v) in new.iter_mut().zip(gradient.iter()).zip(first).zip(second) {
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * g * g;
        *w -= step * *m / (v.sqrt() / root + eps);
    }

    gradient.fill(0.0);
}

#[cfg(test)]
mod tests {
    use crate::optim::OptimizerConfig;
    use crate::optim::tests::updated;

    /// Three updates by hand, in f64; the vector does not decay.
    #[test]
    fn first_updates_by_hand() {
        let (w0, g, lr, wd) = (0.8, 0.125, 0.01, 0.1);
        let config = OptimizerConfig { weight_decay: wd, clip: None, ..OptimizerConfig::default() };
        let by_hand = |wd: f64| {
            let (mut w, mut m, mut v) = (w0, 0.0f64, 0.0f64);
            for n in 1..=3 {
                m = 0.9 * m + 0.1 * g;
                v = 0.95 * v + 0.05 * g * g;
                let (m, v) = (m / (1.0 - 0.9f64.powi(n)), v / (1.0 - 0.95f64.powi(n)));
                w = w * (1.0 - lr * wd) - lr * m / (v.sqrt() + 1e-8);
            }
            w
        };
        let (matrix, vector) = updated(&config, w0, g, lr, 3);
        assert!((matrix - by_hand(wd)).abs() < 2e-7, "{matrix} {}", by_hand(wd));
        assert!((vector - by_hand(0.0)).abs() < 2e-7, "{vector} {}", by_hand(0.0));
    }
}
