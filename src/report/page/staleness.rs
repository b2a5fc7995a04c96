//! The staleness that runs have measured.

use std::collections::BTreeSet;

use maud::{Markup, html};
use serde_json::Value;

use super::super::chart::{Form, Series, Shown, lines};
use super::super::figures::{Figures, POINTS};
use super::super::thin::thin;
use super::Charts;

/// Curves of a stage's staleness; points of all of them on a page, and of each at least.
const KINDS_OF_STALENESS: usize = 7;
const MOST_POINTS: usize = 20_000;
const LEAST_POINTS: usize = 40;

/// The stages whose staleness a run has measured, in order, then the table.
fn measured(run: &Figures) -> Vec<Value> {
    let told = run.staleness.iter().filter_map(|(_, told)| told.as_array()).flatten();
    let mut numbers = BTreeSet::new();
    let mut table = false;
    for of in told {
        match of["stage"].as_u64() {
            Some(number) => drop(numbers.insert(number)),
            None => table |= of["stage"] == "table",
        }
    }
    numbers.into_iter().map(Value::from).chain(table.then(|| Value::from("table"))).collect()
}

/// The staleness that a run has measured: over steps, a curve for every stage.
pub(super) fn staleness(runs: &[Figures], charts: &mut Charts) -> Markup {
    // A page of many runs has no more points of them all than one of a few.
    let all: usize = runs.iter().map(|run| KINDS_OF_STALENESS * measured(run).len()).sum();
    let points = (MOST_POINTS / all.max(1)).clamp(LEAST_POINTS, POINTS);
    let curves = |run: &Figures, key: &str| -> Vec<Series> {
        let of = |(color, stage): (usize, Value)| {
            let point = |(step, told): &(u64, Value)| {
                let told = told.as_array()?.iter().find(|told| told["stage"] == stage)?;
                Some((*step as f64, told[key].as_f64()?))
            };
            let found: Vec<(f64, f64)> = run.staleness.iter().filter_map(point).collect();
            let name = match stage.as_u64() {
                Some(number) => format!("stage {number}"),
                None => "table".to_owned(),
            };
            Series { name, points: thin(&found, points), color, form: Form::Line }
        };
        let series = measured(run).into_iter().enumerate().map(of);
        series.filter(|series| !series.points.is_empty()).collect()
    };
    let kinds = [
        ("age", "Age of the applied gradients", "updates", Shown::FromZero),
        ("seconds", "Age of the applied gradients in time", "seconds", Shown::FromZero),
        ("travelled", "How far the weights have moved since", "norm", Shown::FromZero),
        (
            "distance",
            "How far the weights of the gradient are off: with a prediction its error",
            "norm",
            Shown::FromZero,
        ),
        ("relative", "The same over the norm of the weights", "share", Shown::FromZero),
        ("cosine", "Cosine between gradients of successive steps", "cosine", Shown::All),
        (
            "fresh_cosine",
            "Cosine between the applied gradient and a fresh one",
            "cosine",
            Shown::All,
        ),
    ];

    html! {
        @for run in runs.iter().filter(|run| !run.staleness.is_empty()) {
            h2 { "Staleness of " (run.name) }
            @for (key, title, unit, shown) in kinds {
                @let series = curves(run, key);
                @let names: Vec<(String, usize)> = series.iter().map(|of| (of.name.clone(), of.color)).collect();
                (charts.figure(title, &names, lines("step", unit, &series, shown)))
            }
        }
    }
}
