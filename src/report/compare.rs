//! Runs beside each other: what differs between their configs, whether their losses can be compared,
//! and how long each takes to the same loss.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;

use super::figures::Figures;

/// Several runs.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The keys of which not all runs have one value: the key, and each run's value.
    pub differences: Vec<(String, Vec<Option<Value>>)>,
    /// Losses are shown as bits per byte of the text, because the runs have other tokens.
    pub per_byte: bool,
    /// Why losses cannot be compared at all.
    pub incomparable: Option<String>,
    pub to_loss: Option<ToLoss>,
}

/// How long each run takes to a loss that all of them reach.
#[derive(Debug, Serialize)]
pub struct ToLoss {
    /// Held-out, or of training.
    pub held_out: bool,
    pub loss: f64,
    pub runs: Vec<Reached>,
}

/// One run's way there.
#[derive(Debug, Serialize)]
pub struct Reached {
    pub step_s: f64,
    pub steps: f64,
    /// Their product.
    pub seconds: f64,
}

impl Comparison {
    /// Of the runs of a report.
    pub fn new(runs: &[Figures]) -> Comparison {
        let tokens: Vec<Option<String>> = runs.iter().map(Figures::tokens).collect();
        let kinds: BTreeSet<&String> = tokens.iter().flatten().collect();
        let other_tokens = kinds.len() > 1 || !kinds.is_empty() && tokens.contains(&None);
        let known = runs.iter().all(|run| run.bits().is_some());
        let incomparable = (other_tokens && !known).then(|| {
            "the runs have other tokens, or it is not known which, and how many bytes of text a token stands for \
             is not known of all: their losses cannot be compared"
                .to_owned()
        });

        let per_byte = other_tokens && known;
        Comparison {
            differences: differences(runs),
            per_byte,
            to_loss: match incomparable.is_none()
                && runs.iter().all(|run| run.no_training().is_none())
            {
                true => to_loss(runs, per_byte),
                false => None,
            },
            incomparable,
        }
    }

    /// What a run's losses are multiplied with.
    pub fn scale(&self, run: &Figures) -> f64 {
        if self.per_byte { run.bits().unwrap_or(1.0) } else { 1.0 }
    }

    /// What they are then.
    pub fn unit(&self) -> &'static str {
        if self.per_byte { "loss, bits per byte" } else { "loss, nats per token" }
    }
}

fn differences(runs: &[Figures]) -> Vec<(String, Vec<Option<Value>>)> {
    let keys: BTreeSet<&String> = runs.iter().flat_map(|run| run.settings.keys()).collect();
    keys.into_iter()
        .map(|key| {
            let values = runs.iter().map(|run| run.settings.get(key).cloned()).collect();
            (key.clone(), values)
        })
        .filter(|(_, values): &(String, Vec<Option<Value>>)| {
            values.windows(2).any(|pair| pair[0] != pair[1])
        })
        .collect()
}

/// The held-out losses if all have some, else those of training.
fn to_loss(runs: &[Figures], per_byte: bool) -> Option<ToLoss> {
    let held_out = runs.iter().all(|run| run.curves.eval.len() > 1);
    let curve = |run: &Figures| -> Vec<(f64, f64)> {
        let scale = if per_byte { run.bits().unwrap_or(1.0) } else { 1.0 };
        let points = if held_out { &run.curves.eval } else { &run.curves.smooth };
        points.iter().map(|(step, loss)| (*step, loss * scale)).collect()
    };

    let curves: Vec<Vec<(f64, f64)>> = runs.iter().map(curve).collect();
    let best = |points: &Vec<(f64, f64)>| points.iter().map(|(_, loss)| *loss).reduce(f64::min);
    let loss =
        curves.iter().map(best).collect::<Option<Vec<f64>>>()?.into_iter().reduce(f64::max)?;
    let reached = |(run, curve): (&Figures, &Vec<(f64, f64)>)| {
        let (steps, step_s) = (crossing(curve, loss)?, run.step_s?);
        Some(Reached { step_s, steps, seconds: steps * step_s })
    };
    let runs = runs.iter().zip(&curves).map(reached).collect::<Option<_>>()?;
    Some(ToLoss { held_out, loss, runs })
}

/// Where a curve first comes down to a loss, between its points by a straight line.
fn crossing(points: &[(f64, f64)], loss: f64) -> Option<f64> {
    let at = points.iter().position(|(_, found)| *found <= loss)?;
    let (step, found) = points[at];
    let Some((before, above)) = at.checked_sub(1).map(|before| points[before]) else {
        return Some(step);
    };
    let share = if above > found { (above - loss) / (above - found) } else { 1.0 };
    Some(before + share * (step - before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_crosses_a_loss_between_its_points() {
        let points = [(10.0, 4.0), (20.0, 3.0), (30.0, 2.0)];
        assert_eq!(crossing(&points, 2.5), Some(25.0));
        assert_eq!((crossing(&points, 4.0), crossing(&points, 1.0)), (Some(10.0), None));
    }
}
