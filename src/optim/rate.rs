//! The learning rate as a function of the step.

use std::f64::consts::PI;

use super::config::{Common, Decay, OptimizerConfig, RateKind};

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
        RateKind::Wsd => {
            let decay = decay_steps(&config.common, steps);
            let behind = (t + decay).saturating_sub(steps) as f64 / decay.max(1) as f64;
            let left = match config.common.decay.unwrap_or(Decay::OneMinusSqrt) {
                Decay::Linear => 1.0 - behind,
                Decay::OneMinusSqrt => 1.0 - behind.sqrt(),
                Decay::Cosine => 0.5 * (1.0 + (PI * behind).cos()),
            };
            min_lr + (lr - min_lr) * left
        }
    }
}

/// Steps at the end of a run over which the rate of `wsd` goes down.
pub fn decay_steps(config: &Common, steps: usize) -> usize {
    config.decay_steps.unwrap_or(steps.div_ceil(10))
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

    /// Up, level, and down over the last steps in each form.
    #[test]
    fn wsd_decays_at_the_end() {
        let rate = |decay, decay_steps, t| {
            let config = OptimizerConfig::of(Common {
                schedule: RateKind::Wsd,
                lr: 1.0,
                min_lr: 0.2,
                warmup: 10,
                decay,
                decay_steps,
                ..Common::default()
            });
            learning_rate(&config, t, 110)
        };
        for (decay, half) in [
            (Some(Decay::Linear), 0.5),
            (Some(Decay::Cosine), 0.5),
            (Some(Decay::OneMinusSqrt), 1.0 - 0.5f64.sqrt()),
            (None, 1.0 - 0.5f64.sqrt()),
        ] {
            for (t, left) in [(9, 1.0), (10, 1.0), (89, 1.0), (90, 1.0), (100, half)] {
                let expected = 0.2 + 0.8 * left;
                let found = rate(decay, Some(20), t);
                assert!((found - expected).abs() < 1e-12, "{decay:?} at {t}: {found}");
            }
            assert!(rate(decay, Some(20), 109) < 0.25);
        }
        assert!((rate(None, None, 98) - 1.0).abs() < 1e-12 && rate(None, None, 100) < 1.0);
        assert!((rate(None, Some(0), 109) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_run_may_be_shorter_than_its_warm_up() {
        let config = OptimizerConfig::of(Common { warmup: 10, ..Common::default() });
        assert!((learning_rate(&config, 4, 5) - 5e-4).abs() < 1e-12);
    }
}
