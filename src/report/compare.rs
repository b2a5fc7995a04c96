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

/// How long each run takes to a loss that all of them reach, those that are no training on a grid left
/// out.
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
    /// Which of the runs.
    pub run: usize,
    /// The mean of the steps up to there.
    pub step_s: f64,
    pub steps: f64,
    /// Their product.
    pub seconds: f64,
    /// It was there when its loss was first told: at most so many steps, then.
    pub at_first: bool,
}

impl Comparison {
    /// Of the runs of a report.
    pub fn new(runs: &[Figures]) -> Comparison {
        let tokens: Vec<Option<String>> = runs.iter().map(Figures::tokens).collect();
        let kinds: BTreeSet<&String> = tokens.iter().flatten().collect();
        let other_tokens = kinds.len() > 1 || !kinds.is_empty() && tokens.contains(&None);
        let known = runs.iter().all(|run| run.bits(false).is_some() && run.bits(true).is_some());
        let unknown = runs.len() > 1 && kinds.is_empty();
        let incomparable = (other_tokens && !known).then(|| {
            "the runs have other tokens, or it is not known which, and how many bytes of text a token stands for \
             is not known of all: their losses cannot be compared"
                .to_owned()
        });

        let per_byte = other_tokens && known;
        let mut notes = Vec::new();
        if unknown {
            notes.push("of no run it is known what its tokens are: losses are compared as if they were the same".to_owned());
        }
        notes.extend(runs.iter().filter(|_| runs.len() > 1).filter_map(|run| {
            let kind = run.no_training()?;
            Some(format!("{} is a run of kind {kind}: it takes no time to a loss", run.name))
        }));
        let texts = Texts::new(runs, per_byte);
        notes.extend(texts.note().filter(|_| incomparable.is_none() && runs.len() > 1));

        Comparison {
            differences: differences(runs),
            per_byte,
            to_loss: incomparable.is_none().then(|| to_loss(runs, per_byte, texts)).flatten(),
            incomparable,
            notes,
        }
    }

    /// What a run's losses are multiplied with, held-out ones or those of training.
    pub fn scale(&self, run: &Figures, held_out: bool) -> f64 {
        if self.per_byte { run.bits(held_out).unwrap_or(1.0) } else { 1.0 }
    }

    /// What they are then.
    pub fn unit(&self) -> &'static str {
        if self.per_byte { "loss, bits per byte" } else { "loss, nats per token" }
    }
}

/// Whether runs have the same texts, as far as that is known: losses on others do not compare.
#[derive(Debug, Clone, Copy)]
struct Texts {
    train: bool,
    held_out: bool,
    unknown: bool,
}

impl Texts {
    /// Of runs of other tokens nobody can tell.
    fn new(runs: &[Figures], per_byte: bool) -> Texts {
        let evaluated = runs.iter().filter(|run| run.eval_tokens.is_some());
        let held_out: Vec<&Value> = evaluated.clone().map(|run| &run.facts["held_out"]).collect();
        let train: Vec<&Value> = runs.iter().map(|run| &run.facts["train"]).collect();
        let same = |values: &[&Value]| {
            let known: Vec<&&Value> = values.iter().filter(|value| !value.is_null()).collect();
            per_byte || known.windows(2).all(|pair| pair[0] == pair[1])
        };
        let counts: BTreeSet<Option<u64>> = evaluated.map(|run| run.eval_tokens).collect();
        let null = |values: &[&Value]| values.iter().any(|value| value.is_null());
        Texts {
            train: same(&train),
            held_out: same(&held_out) && (per_byte || counts.len() < 2),
            unknown: per_byte || null(&train) || null(&held_out),
        }
    }

    /// What is to be said of it.
    fn note(self) -> Option<String> {
        let text = match (self.train, self.held_out) {
            (true, true) if self.unknown => "whether the runs have the same texts is not known",
            (true, true) => return None,
            (false, true) => "the runs are trained on other texts: only held-out losses compare",
            (true, false) => {
                "the runs are evaluated on other texts, or on other parts of one: only losses of training compare"
            }
            (false, false) => "the runs have other texts: their losses do not compare",
        };
        Some(text.to_owned())
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

/// The held-out losses if all have some, else those of training, where they compare.
fn to_loss(runs: &[Figures], per_byte: bool, texts: Texts) -> Option<ToLoss> {
    let trained: Vec<usize> =
        (0..runs.len()).filter(|run| runs[*run].no_training().is_none()).collect();
    let evaluated = trained.iter().all(|run| runs[*run].curves.eval.len() > 1);
    let held_out = evaluated && texts.held_out;
    if !held_out && !texts.train {
        return None;
    }

    let window = trained.iter().map(|run| runs[*run].tokens as f64 / WINDOWS).fold(0.0, f64::max);
    let curve = |run: &usize| -> Vec<(f64, f64)> {
        let run = &runs[*run];
        let scale = if per_byte { run.bits(held_out).unwrap_or(1.0) } else { 1.0 };
        let points = match held_out {
            true => run.curves.eval.clone(),
            false => smoothed(&run.curves.smooth, window * run.steps as f64 / run.tokens as f64),
        };
        points.iter().map(|(step, loss)| (*step, loss * scale)).collect()
    };

    let curves: Vec<Vec<(f64, f64)>> = trained.iter().map(curve).collect();
    let best = |points: &Vec<(f64, f64)>| points.iter().map(|(_, loss)| *loss).reduce(f64::min);
    let loss =
        curves.iter().map(best).collect::<Option<Vec<f64>>>()?.into_iter().reduce(f64::max)?;
    let reached = |(run, curve): (&usize, &Vec<(f64, f64)>)| {
        let steps = crossing(curve, loss)?;
        let seconds = at(&runs[*run].curves.clock, steps)?;
        let at_first = curve.first().is_some_and(|(first, _)| *first == steps);
        Some(Reached { run: *run, step_s: seconds / steps, steps, seconds, at_first })
    };
    let runs = trained.iter().zip(&curves).map(reached).collect::<Option<_>>()?;
    Some(ToLoss { held_out, loss, runs })
}

/// Losses of training are averaged over a share of the longest run, of each over as many tokens.
const WINDOWS: f64 = 50.0;

/// Means of neighbours that are so many steps together, about.
fn smoothed(points: &[(f64, f64)], steps: f64) -> Vec<(f64, f64)> {
    let apart = points.last().map_or(1.0, |(last, _)| last / points.len() as f64);
    let group = (steps / apart).round().max(1.0) as usize;
    let mean = |points: &[(f64, f64)]| {
        let sum: f64 = points.iter().map(|(_, loss)| loss).sum();
        Some((points.last()?.0, sum / points.len() as f64))
    };
    points.chunks(group).filter_map(mean).collect()
}

/// The value of a curve at a step, between its points by a straight line.
fn at(points: &[(f64, f64)], step: f64) -> Option<f64> {
    let after = points.partition_point(|(x, _)| *x < step).min(points.len().checked_sub(1)?);
    let (x, y) = points[after];
    let (before, below) = after.checked_sub(1).map_or((0.0, 0.0), |before| points[before]);
    let share = if x > before { (step - before) / (x - before) } else { 1.0 };
    Some(below + share * (y - below))
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
    use serde_json::json;

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
        let of = |tokens: &str, bytes: f64| json!({"tokens": tokens, "bytes_per_token": bytes, "train_bytes_per_token": bytes, "stages": 2, "train": "text", "held_out": "other"});
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
        assert!(to_loss.runs.iter().all(|run| !run.at_first));

        let other = run("c", 5.0, 0.5, of("y", 4.0));
        let found = Comparison::new(&[run("a", 4.0, 0.5, of("x", 2.0)), other]);
        assert!(found.per_byte && found.unit().contains("per byte"));
        assert!(found.notes[0].contains("is not known"), "{:?}", found.notes);
        let unknown = run("d", 5.0, 0.5, Value::Null);
        let found = Comparison::new(&[run("a", 4.0, 0.5, of("x", 2.0)), unknown]);
        assert!(found.incomparable.is_some() && found.to_loss.is_none());
        assert!(found.notes.is_empty(), "{:?}", found.notes);

        // What is no training on a grid takes no time that could be compared.
        let mut facts = of("x", 2.0);
        facts["oracle"] = true.into();
        let runs = [("a", 4.0, of("x", 2.0)), ("e", 4.0, facts), ("f", 2.0, of("x", 2.0))];
        let found = Comparison::new(&runs.map(|(name, first, facts)| run(name, first, 0.5, facts)));
        let to_loss = found.to_loss.unwrap();
        let at: Vec<(usize, bool)> =
            to_loss.runs.iter().map(|run| (run.run, run.at_first)).collect();
        assert_eq!(at, [(0, false), (2, true)]);
        assert!(found.notes[0].contains("e is a run of kind oracle"), "{:?}", found.notes);

        // Other texts of the same tokens.
        let mut facts = of("x", 2.0);
        facts["train"] = "other".into();
        let found = Comparison::new(&[run("a", 4.0, 0.5, of("x", 2.0)), run("g", 4.0, 0.5, facts)]);
        assert!(found.to_loss.is_none() && found.incomparable.is_none());
        assert!(found.notes[0].contains("trained on other texts"), "{:?}", found.notes);
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
        let clock = [(10.0, 4.0), (20.0, 6.0)];
        assert_eq!(
            [5.0, 15.0, 20.0, 25.0].map(|step| at(&clock, step)),
            [2.0, 5.0, 6.0, 7.0].map(Some)
        );
        assert_eq!(smoothed(&points, 20.0), [(20.0, 3.5), (30.0, 2.0)]);
    }
}
