//! AdamW (Loshchilov and Hutter 2019), n counting updates from 1, g the clipped mean gradient:
//!
//! ```text
//! m = b1 m + (1-b1) g;   v = b2 v + (1-b2) g^2
//! w = w (1 - lr wd) - lr / (1-b1^n) * m / (sqrt(v / (1-b2^n)) + eps)
//! ```
//!
//! With a lead the step is taken where the average is going (spike compensation, Kosson et al.,
//! arXiv 2003.11666; Nesterov's is c = b1): the numerator is
//!
//! ```text
//! u = (c m + (1-c) g) / (1 - c b1^n)        c = b1 ("one"; "where-delayed": if D > 0), or b1^max(D, 1) ("delay")
//! ```
//!
//! Keys: `betas`, `eps`, `lead`. State: `first` (m), `second` (v).

use multiversion::multiversion;
use serde::{Deserialize, Serialize};

use super::StateBuffer;
use super::elementwise::{self, Chunk, Common};
use super::rule::{Rule, Step, Weights};
use crate::error::{Error, Result};
use crate::params::{Layout, UpdateBuffers};

/// Its keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct Keys {
    /// How much of the first and of the second moment stays.
    pub betas: [f64; 2],
    /// Keeps the step of a small gradient small.
    pub eps: f64,
    /// Whether steps lead the average of gradients: by one update, or by the delay; none: where
    /// there is a delay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lead: Option<Lead>,
}

/// By how many updates a step leads the average of gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Lead {
    Off,
    One,
    /// By one on stages with a delay, not at all on others: what is not delayed keeps every bit.
    WhereDelayed,
    /// By `D_k` of the stage, also right after a sync point; by one where that is 0.
    Delay,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { betas: [0.9, 0.95], eps: 1e-8, lead: None }
    }
}

impl Keys {
    /// By how many updates steps lead.
    pub fn lead(&self) -> Lead {
        self.lead.unwrap_or(Lead::WhereDelayed)
    }

    /// Whether they can be used.
    pub fn check(&self) -> Result<()> {
        for beta in self.betas {
            let good = (0.0..1.0).contains(&beta);
            Error::unless(good, "optimizer.betas", beta, "must be at least 0 and below 1")?;
        }
        Error::unless(self.eps > 0.0, "optimizer.eps", self.eps, "must be above 0")
    }
}

/// The rule.
pub struct Adamw {
    keys: Keys,
    /// c; none: no lead.
    lead: Option<f64>,
}

impl Adamw {
    pub fn new(keys: &Keys, delay: usize) -> Adamw {
        let beta1 = keys.betas[0];
        let lead = match keys.lead() {
            Lead::Off => None,
            Lead::WhereDelayed if delay == 0 => None,
            Lead::One | Lead::WhereDelayed => Some(beta1),
            Lead::Delay => Some(beta1.powi(delay.max(1) as i32)),
        };
        Adamw { keys: keys.clone(), lead }
    }

    /// c; none: no lead.
    pub fn lead(&self) -> Option<f64> {
        self.lead
    }

    fn numbers(&self, step: &Step) -> Numbers {
        let [beta1, beta2] = self.keys.betas;
        let lead = self.lead.unwrap_or(1.0);
        Numbers {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            lead: lead as f32,
            step: (step.lr / (1.0 - lead * beta1.powi(step.n))) as f32,
            root: (1.0 - beta2.powi(step.n)).sqrt() as f32,
            eps: self.keys.eps as f32,
        }
    }
}

/// The constants of one update.
struct Numbers {
    beta1: f32,
    beta2: f32,
    /// c, or 1 without a lead.
    lead: f32,
    step: f32,
    root: f32,
    eps: f32,
}

impl Rule for Adamw {
    fn state(&self, layout: &Layout) -> Vec<(&'static str, Layout)> {
        vec![("first", layout.clone()), ("second", layout.clone())]
    }

    fn step(
        &self,
        buffers: UpdateBuffers,
        state: &mut [StateBuffer],
        step: &Step,
        weights: &Weights,
    ) -> Result<()> {
        let (common, numbers) = (Common::new(step, weights), self.numbers(step));
        elementwise::update(buffers, state, weights, |chunk| pass(chunk, &common, &numbers));
        Ok(())
    }

    fn kernel(&self) -> &'static str {
        "update_adamw"
    }

    fn constants(&self, step: &Step) -> Vec<f32> {
        let Numbers { beta1, beta2, lead, step, root, eps } = self.numbers(step);
        vec![beta1, beta2, lead, step, root, eps]
    }
}

#[multiversion(targets("x86_64+avx2", "aarch64+neon"))]
fn pass(mut chunk: Chunk<2>, common: &Common, numbers: &Numbers) {
    common.begin(&mut chunk);

    let Chunk { new, gradient, state: [first, second], .. } = chunk;
    let Numbers { beta1, beta2, lead, step, root, eps } = *numbers;
    let values = new.iter_mut().zip(gradient.iter()).zip(first).zip(second);
    if lead == 1.0 {
        for (((w, g), m), v) in values {
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *w -= step * *m / (v.sqrt() / root + eps);
        }
    } else {
        for (((w, g), m), v) in values {
            *m = beta1 * *m + (1.0 - beta1) * g;
            *v = beta2 * *v + (1.0 - beta2) * g * g;
            *w -= step * (lead * *m + (1.0 - lead) * g) / (v.sqrt() / root + eps);
        }
    }

    gradient.fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::Lead;
    use crate::optim::tests::{updated, updated_by};
    use crate::optim::{Common, OptimizerConfig};

    /// Three updates by hand, in f64; the vector does not decay.
    #[test]
    fn first_updates_by_hand() {
        let (w0, g, lr, wd) = (0.8, 0.125, 0.01, 0.1);
        let config =
            OptimizerConfig::of(Common { weight_decay: wd, clip: None, ..Common::default() });
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

    /// The same with a lead, in f64: of one, and of a delay of three.
    #[test]
    fn updates_that_lead_by_hand() {
        let (w0, g, lr) = (0.8f64, 0.125f64, 0.01f64);
        for (lead, delay, c) in [
            (Lead::One, 3, 0.9f64),
            (Lead::Delay, 3, 0.9f64.powi(3)),
            (Lead::Delay, 0, 0.9),
            (Lead::Off, 3, 1.0),
        ] {
            let mut config =
                OptimizerConfig::of(Common { weight_decay: 0.0, clip: None, ..Common::default() });
            config.adamw.lead = Some(lead);
            let (mut w, mut m, mut v) = (w0, 0.0f64, 0.0f64);
            for n in 1..=3 {
                // The second gradient has the other sign.
                let g = if n == 2 { -g } else { g };
                m = 0.9 * m + 0.1 * g;
                v = 0.95 * v + 0.05 * g * g;
                let u = (c * m + (1.0 - c) * g) / (1.0 - c * 0.9f64.powi(n));
                w -= lr * u / ((v / (1.0 - 0.95f64.powi(n))).sqrt() + 1e-8);
            }
            let found = updated_by(&config, delay, w0, &[g, -g, g], lr).1;
            assert!((found - w).abs() < 2e-7, "{lead:?} {delay}: {found} {w}");
        }
    }
}
