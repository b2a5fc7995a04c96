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
    /// What else there is to say of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
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
        let unknown = runs.len() > 1 && kinds.is_empty();
        let incomparable = (other_tokens && !known).then(|| {
            "the runs have other tokens, or it is not known which, and how many bytes of text a token stands for \
             is not known of all: their losses cannot be compared"
                .to_owned()
        });

        let per_byte = other_tokens && known;
        let none = runs.iter().find_map(|run| Some((run, run.no_training()?)));
        let mut notes = Vec::new();
        if unknown {
            notes.push("of no run it is known what its tokens are: losses are compared as if they were the same".to_owned());
        }
        if let Some((run, kind)) = none.filter(|_| runs.len() > 1) {
            notes.push(format!(
                "there is no time to a loss, because {} is a run of kind {kind}",
                run.name
            ));
        }
        Comparison {
            differences: differences(runs),
            per_byte,
            to_loss: match incomparable.is_none() && none.is_none() {
                true => to_loss(runs, per_byte),
                false => None,
            },
            incomparable,
            notes,
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

    /// A run of a folder: a loss that falls by a tenth a step from `first` on, of tokens of so many
    /// bytes.
    fn run(name: &str, first: f64, step_s: f64, facts: Value) -> Figures {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        let line = |step: usize| {
            let loss = first - step as f64 / 10.0;
            let line = serde_json::json!({
                "step": step, "loss": loss, "lr": 0.1, "tokens": 8 * step, "step_s": step_s, "tokens_per_s": 8.0 / step_s
            });
            format!("{line}\n")
        };
        std::fs::write(path.join("metrics.jsonl"), (1..=20).map(line).collect::<String>()).unwrap();
        std::fs::write(path.join("config.toml"), format!("seed = {first}\nname = \"same\"\n"))
            .unwrap();
        let start = serde_json::json!({"time": 0.0, "step": 0, "kind": "start", "text": "started", "facts": facts});
        std::fs::write(path.join("events.jsonl"), format!("{start}\n")).unwrap();
        Figures::read(&path).unwrap()
    }

    #[test]
    fn runs_are_compared_by_what_they_have_in_common() {
        let of = |tokens: &str, bytes: f64| serde_json::json!({"tokens": tokens, "bytes_per_token": bytes, "stages": 2});
        let (quick, slow) = (run("a", 4.0, 0.5, of("x", 2.0)), run("b", 5.0, 0.25, of("x", 2.0)));
        let found = Comparison::new(&[quick, slow]);
        assert!(!found.per_byte && found.incomparable.is_none());
        let differ: Vec<&str> = found.differences.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(differ, ["seed"]);
        // The second comes down to 3, which the first has after ten steps.
        let to_loss = found.to_loss.unwrap();
        assert!((to_loss.loss - 3.0).abs() < 1e-9 && !to_loss.held_out, "{to_loss:?}");
        let reached: Vec<(f64, f64)> =
            to_loss.runs.iter().map(|run| (run.steps.round(), run.seconds.round())).collect();
        assert_eq!(reached, [(10.0, 5.0), (20.0, 5.0)]);

        let other = run("c", 5.0, 0.5, of("y", 4.0));
        let found = Comparison::new(&[run("a", 4.0, 0.5, of("x", 2.0)), other]);
        assert!(found.per_byte && found.unit().contains("per byte"));
        let unknown = run("d", 5.0, 0.5, Value::Null);
        let found = Comparison::new(&[run("a", 4.0, 0.5, of("x", 2.0)), unknown]);
        assert!(found.incomparable.is_some() && found.to_loss.is_none());

        // What is no training on a grid takes no time that could be compared.
        let mut facts = of("x", 2.0);
        facts["oracle"] = true.into();
        let found = Comparison::new(&[run("a", 4.0, 0.5, of("x", 2.0)), run("e", 4.0, 0.5, facts)]);
        assert!(found.to_loss.is_none() && found.incomparable.is_none());
    }

    /// A name is text and nothing else on the page.
    #[test]
    fn names_do_not_become_markup() {
        let odd = run("<b>&\"'", 4.0, 0.5, serde_json::json!({"stages": 1, "grid": "<i>"}));
        let page = super::super::page::page(&[odd], &Comparison::new(&[]));
        assert!(!page.contains("<b>") && !page.contains("<i>"), "{page}");
        assert!(page.contains("&lt;b&gt;&amp;") && page.contains("\\u003cb>"));
    }

    #[test]
    fn a_curve_crosses_a_loss_between_its_points() {
        let points = [(10.0, 4.0), (20.0, 3.0), (30.0, 2.0)];
        assert_eq!(crossing(&points, 2.5), Some(25.0));
        assert_eq!((crossing(&points, 4.0), crossing(&points, 1.0)), (Some(10.0), None));
    }
}
