//! Predicted weights: a step whose gradient will be applied D updates later runs on the weights
//! that are expected then,
//!
//! ```text
//! V[n+1] = W[n+1] + H (W[n+1] - W[n])        H = scale * sum over i = 1..D of lr[n+i] / lr[n],  at most 2 D
//! ```
//!
//! W are the master weights as updates make them, V what forward and backward use. With D = 1 and a
//! constant rate V moves by -2u + u_before (u: the step that the optimizer makes): error feedback
//! of a delay of one (arXiv 2606.30634). The version at a sync point serves steps of several ages,
//! so it is not predicted; nor is one whose update was left out.

use super::config::{OptimizerConfig, Predict};
use super::rate::learning_rate;

/// H of the version that the update of step `n` makes, of weights with this delay, in a run of
/// `steps` steps; `drained` says that a sync point comes right after the step. 0: the version is
/// the master.
pub fn horizon(
    config: &OptimizerConfig,
    delay: usize,
    n: usize,
    steps: usize,
    drained: bool,
) -> f64 {
    let now = learning_rate(config, n, steps);
    if !predicts(config, delay) || drained || now == 0.0 {
        return 0.0;
    }

    // Rates of steps that are not made any more count nothing.
    let later: f64 =
        (n + 1..=n + delay).filter(|t| *t < steps).map(|t| learning_rate(config, t, steps)).sum();
    (config.common.predict_scale * later / now).min(2.0 * delay as f64)
}

/// Whether weights with this delay are predicted.
pub fn predicts(config: &OptimizerConfig, delay: usize) -> bool {
    config.predict() == Predict::Update && delay > 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::{Common, RateKind};

    fn config(schedule: RateKind, scale: f64) -> OptimizerConfig {
        let common = Common { schedule, lr: 1.0, min_lr: 0.0, warmup: 4, ..Common::default() };
        OptimizerConfig::of(Common {
            predict: Some(Predict::Update),
            predict_scale: scale,
            ..common
        })
    }

    #[test]
    fn horizons_by_table() {
        let constant = config(RateKind::Constant, 1.0);
        let of = |delay, n| horizon(&constant, delay, n, 20, false);
        // Constant after the warm-up: D, and less where the run ends before the gradient would
        // arrive.
        assert_eq!(
            [of(1, 5), of(3, 5), of(3, 17), of(3, 18), of(3, 19)],
            [1.0, 3.0, 2.0, 1.0, 0.0]
        );
        // In the warm-up rates are 1/4, 2/4, 3/4, 1, 1 ...: (2/4) / (1/4), then (2/4 + 3/4) /
        // (1/4), which is above 2 D.
        assert_eq!([of(1, 0), of(2, 0), of(2, 1)], [2.0, 4.0, 3.5]);
        assert_eq!(horizon(&config(RateKind::Constant, 0.5), 2, 0, 20, false), 2.5);
        // Linear from 1 at step 4 to 0 at step 20.
        let linear = config(RateKind::Linear, 1.0);
        assert_eq!(horizon(&linear, 2, 12, 20, false), (7.0 + 6.0) / 8.0);
    }

    #[test]
    fn what_is_not_predicted() {
        let constant = config(RateKind::Constant, 1.0);
        assert_eq!(horizon(&constant, 0, 5, 20, false), 0.0, "no delay");
        assert_eq!(horizon(&constant, 2, 5, 20, true), 0.0, "a sync point");
        let off = OptimizerConfig::of(Common { predict: Some(Predict::Off), ..constant.common });
        assert_eq!(horizon(&off, 2, 5, 20, false), 0.0);
    }
}
