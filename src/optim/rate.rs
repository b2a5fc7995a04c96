//! The learning rate as a function of the step.

use std::f64::consts::PI;

use super::config::{Common, OptimizerConfig, RateKind};

/// The rate of step `t` (from 0) of a run of `steps` steps.
pub fn learning_rate(config: &OptimizerConfig, t: usize, steps: usize) -> f64 {
    let Common { lr, min_lr, warmup, schedule, .. } = config.common;
    if t < warmup {
        return lr * (t + 1) as f64 / warmup as f64;
    }

    let progress = (t - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
    match schedule {
        RateKind::Constant => lr,
        RateKind::Linear => lr + (min_lr - lr) * progress,
        RateKind::Cosine => min_lr + 0.5 * (lr - min_lr) * (1.0 + (PI * progress).cos()),
        RateKind::InverseSqrt => lr * (warmup.max(1) as f64 / (t + 1) as f64).sqrt(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_by_table() {
        let rate = |schedule, t| {
            let config = OptimizerConfig::of(Common {
                schedule,
                lr: 1.0,
                min_lr: 0.2,
                warmup: 10,
                ..Common::default()
            });
            learning_rate(&config, t, 110)
        };
        let table = [
            (RateKind::Constant, [0.1, 1.0, 1.0, 1.0]),
            (RateKind::Linear, [0.1, 1.0, 1.0, 0.6]),
            (RateKind::Cosine, [0.1, 1.0, 1.0, 0.6]),
            (RateKind::InverseSqrt, [0.1, 1.0, (10.0f64 / 11.0).sqrt(), (10.0f64 / 61.0).sqrt()]),
        ];
        for (schedule, expected) in table {
            for (t, value) in [0, 9, 10, 60].into_iter().zip(expected) {
                assert!(
                    (rate(schedule, t) - value).abs() < 1e-12,
                    "{schedule:?} at {t}: {}",
                    rate(schedule, t)
                );
            }
        }
        assert!((rate(RateKind::Cosine, 109) - 0.2).abs() < 1e-3);
    }

    #[test]
    fn a_run_may_be_shorter_than_its_warm_up() {
        let config = OptimizerConfig::of(Common { warmup: 10, ..Common::default() });
        assert!((learning_rate(&config, 4, 5) - 5e-4).abs() < 1e-12);
    }
}
