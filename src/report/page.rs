//! The page: one HTML file with everything in it, which a browser opens from a disk.

use std::collections::BTreeSet;
use std::time::Duration;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use super::chart::{Chart, Series, Shown, bars, css, heat, lines, short};
use super::compare::Comparison;
use super::figures::{Figures, POINTS};
use super::proof::{Proof, SIMULATED};
use super::thin::thin;
use crate::clock::TimeKind;
use crate::metrics::{clock, thousands};
use crate::schedule::word;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Charts so far, each with a number of its own.
#[derive(Default)]
struct Charts {
    count: usize,
}

impl Charts {
    /// A chart under a title, with a legend of names and colours; nothing where there is no chart.
    fn figure(&mut self, title: &str, legend: &[(String, usize)], chart: Option<Chart>) -> Markup {
        let Some(Chart { svg, data }) = chart else { return html! {} };
        self.count += 1;
        let id = format!("chart-{}", self.count);
        // A `<` within the data must not end the element.
        let text = data.to_string().replace('<', "\\u003c");
        html! {
            figure data-chart=(id) {
                h3 { (title) }
                @if legend.len() > 1 {
                    div class="legend" {
                        @for (name, color) in legend {
                            span { i style={ "background:" (css(*color)) } {} (name) }
                        }
                    }
                }
                div class="scroll" { (PreEscaped(svg)) }
                details { summary { "numbers" } div class="scroll" { table {} } }
                script type="application/json" id=(id) { (PreEscaped(text)) }
            }
        }
    }
}

/// The page of some runs.
pub fn page(runs: &[Figures], comparison: &Comparison) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let mut charts = Charts::default();

    let whole = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (names.join(", ")) " - ouroboros report" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (names.join(", ")) }
                p class="soft" { "made by ouroboros " (env!("CARGO_PKG_VERSION")) " of " (folders(runs)) }
                (overview(runs))
                (what_was_run(runs, comparison))
                (losses(runs, comparison, &mut charts))
                (speed(runs, &mut charts))
                @for run in runs { (grid(run, &mut charts)) }
                (proof(runs, comparison, &mut charts))
                (staleness(runs, &mut charts))
                (memory(runs, &mut charts))
                (slack(runs))
                (events(runs))
                div id="tip" {}
                script { (PreEscaped(SCRIPT)) }
            }
        }
    };

    whole.into_string()
}

fn folders(runs: &[Figures]) -> String {
    runs.iter().map(|run| run.folder.clone()).collect::<Vec<_>>().join(", ")
}

fn number(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), short)
}

/// Seconds as people say them.
fn duration(seconds: f64) -> String {
    clock(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

fn overview(runs: &[Figures]) -> Markup {
    html! {
        div class="scroll" { table {
            tr { th { "run" } th { "grid" } th { "parameters" } th { "steps" } th { "tokens" } th { "time" } th { "loss" } th { "held out" } th { "bits/byte" } th { "step, s" } th { "tokens/s" } }
            @for run in runs {
                tr {
                    td { (run.name) }
                    td { (run.facts["grid"].as_str().unwrap_or("-")) @if let Some(what) = run.no_training() { " (" (what) ")" } }
                    td { (run.facts["parameters"].as_u64().map_or("-".to_owned(), thousands)) }
                    td { (thousands(run.steps)) }
                    td { (thousands(run.tokens)) }
                    td { (duration(run.seconds)) }
                    td { (number(run.loss)) }
                    td { (number(run.eval_loss)) }
                    td { (number(run.bits_per_byte)) }
                    td { (number(run.step_s)) }
                    td { (run.tokens_per_s.map_or("-".to_owned(), |rate| thousands(rate as u64))) }
                }
            }
        } }
        p class="soft" { "loss: nats per token, mean of the last tenth of the steps; step and tokens/s: medians" }
        @for run in runs {
            @for note in &run.notes { p class="soft" { (run.name) ": " (note) } }
        }
    }
}

fn what_was_run(runs: &[Figures], comparison: &Comparison) -> Markup {
    let shown = |value: &Option<Value>| {
        value.as_ref().map_or("-".to_owned(), |value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
    };
    let differs = |key: &str| comparison.differences.iter().any(|(of, _)| of == key);
    let keys: BTreeSet<&String> = runs.iter().flat_map(|run| run.settings.keys()).collect();

    html! {
        h2 { "What was run" }
        @if runs.len() > 1 {
            @if comparison.differences.is_empty() { p { "The configs are the same." } }
            @else {
                p { "Where the configs differ:" }
                div class="scroll" { table {
                    tr { th { "setting" } @for run in runs { th { (run.name) } } }
                    @for (key, values) in &comparison.differences {
                        tr class="differs" { td { (key) } @for value in values { td { (shown(value)) } } }
                    }
                } }
            }
        }
        details {
            summary { "all settings" }
            div class="scroll" { table {
                tr { th { "setting" } @for run in runs { th { (run.name) } } }
                @for key in &keys {
                    tr class=[differs(key).then_some("differs")] {
                        td { (key) }
                        @for run in runs { td { (shown(&run.settings.get(*key).cloned())) } }
                    }
                }
            } }
        }
    }
}

/// A run's name and the colour of its curves.
fn legend(runs: &[Figures]) -> Vec<(String, usize)> {
    runs.iter().enumerate().map(|(color, run)| (run.name.clone(), color)).collect()
}

fn losses(runs: &[Figures], comparison: &Comparison, charts: &mut Charts) -> Markup {
    type Pick = fn(&Figures) -> (&Vec<(f64, f64)>, &Vec<(f64, f64)>);
    let picks: [(&str, &str, Pick); 3] = [
        ("Loss over steps", "step", |run| (&run.curves.loss, &run.curves.eval)),
        ("Loss over tokens", "tokens", |run| {
            (&run.curves.loss_by_tokens, &run.curves.eval_by_tokens)
        }),
        ("Loss over time of steps", "seconds, without evaluations and pauses", |run| {
            (&run.curves.loss_by_seconds, &run.curves.eval_by_seconds)
        }),
    ];
    let mut figure = |(title, x, pick): (&str, &str, Pick)| {
        let mut series = Vec::new();
        for (color, run) in runs.iter().enumerate() {
            let scale = comparison.scale(run);
            let scaled = |points: &Vec<(f64, f64)>| {
                points.iter().map(|(x, loss)| (*x, loss * scale)).collect::<Vec<_>>()
            };
            let (train, held_out) = pick(run);
            series.push(Series {
                name: run.name.clone(),
                points: scaled(train),
                color,
                dots: false,
            });
            if !held_out.is_empty() {
                let name = format!("{}, held out", run.name);
                series.push(Series { name, points: scaled(held_out), color, dots: true });
            }
        }
        charts.figure(title, &legend(runs), lines(x, comparison.unit(), &series, Shown::Losses))
    };

    html! {
        h2 { "Loss" }
        @if let Some(why) = &comparison.incomparable { p { (why) "." } }
        @for note in &comparison.notes { p { (note) "." } }
        @if comparison.per_byte { p { "The runs have other tokens: losses are shown as bits per byte of the text, which compare." } }
        @for pick in picks { (figure(pick)) }
        p class="soft" { "Lines: training; dots: held out. Thinned so that no peak is lost; what lies above the frame, as the first steps may, is drawn on its edge." }
    }
}

fn speed(runs: &[Figures], charts: &mut Charts) -> Markup {
    let series: Vec<Series> = runs
        .iter()
        .enumerate()
        .map(|(color, run)| Series {
            name: run.name.clone(),
            points: run.curves.tokens_per_s.clone(),
            color,
            dots: false,
        })
        .collect();
    html! {
        h2 { "Speed" }
        (charts.figure("Tokens a second", &legend(runs), lines("step", "tokens/s", &series, Shown::FromZero)))
    }
}

fn grid(run: &Figures, charts: &mut Charts) -> Markup {
    let columns: Vec<String> = TimeKind::ALL.iter().map(|(_, name)| (*name).to_owned()).collect();
    let rows: Vec<(String, Vec<f64>)> = run
        .places
        .iter()
        .map(|place| {
            (place.name.clone(), columns.iter().map(|column| place.spent.share(column)).collect())
        })
        .collect();
    if rows.is_empty() {
        return html! {};
    }

    html! {
        h2 { "The grid of " (run.name) }
        (charts.figure("Where the time went", &[], heat(&columns, &rows)))
        p class="soft" {
            "compute: forwards and backwards; upstream, downstream: waiting for activations, for gradients; reduce: waiting for the replicas; \
             update: the optimizer; copies: batches and messages; table: the tied embedding; idle: between actions"
        }
    }
}

fn proof(runs: &[Figures], comparison: &Comparison, charts: &mut Charts) -> Markup {
    let known: Vec<(&Figures, &Proof)> =
        runs.iter().filter_map(|run| Some((run, run.proof.as_ref()?))).collect();
    let groups: Vec<(String, Vec<Option<f64>>)> = known
        .iter()
        .map(|(run, proof)| {
            let ideals = proof.schedules.iter().map(|ideal| Some(100.0 * ideal.idle));
            (
                run.name.clone(),
                std::iter::once(Some(100.0 * proof.measured_idle)).chain(ideals).collect(),
            )
        })
        .collect();
    let names: Vec<String> = ["measured", "decoupled", "1f1b", "gpipe"].map(str::to_owned).to_vec();
    let colors: Vec<(String, usize)> =
        names.iter().enumerate().map(|(color, name)| (name.clone(), color)).collect();

    html! {
        @if !known.is_empty() || comparison.to_loss.is_some() { h2 { "The proof" } }
        @if !known.is_empty() {
            p { "Was no device idle? The measured share of the devices' time that was a wait, beside what each schedule would have with the stage times of this very run, where messages and sums over replicas take no time. What is measured is of all the last process did: filling, draining and evaluations are in it." }
            (charts.figure("Idle, % of the devices' time", &colors, bars("idle, %", &names, &groups)))
            div class="scroll" { table {
                tr { th { "run" } th { "schedule" } th { "idle, %" } th { "step, s" } th { "of the measured step" } }
                @for (run, proof) in &known {
                    tr { td { (run.name) } td { (word(&run.facts["schedule"])) ", measured" } td { (short(100.0 * proof.measured_idle)) } td { (short(proof.measured_step_s)) } td { "1" } }
                    @for ideal in &proof.schedules {
                        tr { td {} td { (word(&ideal.schedule)) ", simulated" } td { (short(100.0 * ideal.idle)) } td { (short(ideal.step_s)) } td { (short(ideal.step_s / proof.measured_step_s)) } }
                    }
                }
            } }
        }
        @if let Some(to_loss) = comparison.to_loss.as_ref().filter(|_| runs.len() > 1) {
            h3 { "Time to the same loss, without evaluations and pauses" }
            p {
                "To " (if to_loss.held_out { "a held-out" } else { "a training" }) " " (comparison.unit()) " of " (short(to_loss.loss)) ", which all runs reach: the time of a step times the steps."
            }
            div class="scroll" { table {
                tr { th { "run" } th { "stages K" } th { "step, s" } th { "steps" } th { "time" } th { "of the first run's" } }
                @for (run, reached) in runs.iter().zip(&to_loss.runs) {
                    tr {
                        td { (run.name) }
                        td { (run.facts["stages"].as_u64().map_or("-".to_owned(), |stages| stages.to_string())) }
                        td { (short(reached.step_s)) }
                        td { (thousands(reached.steps.round() as u64)) }
                        td { (duration(reached.seconds)) }
                        td { (short(reached.seconds / to_loss.runs[0].seconds)) }
                    }
                }
            } }
        }
    }
}

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
fn staleness(runs: &[Figures], charts: &mut Charts) -> Markup {
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
            Series { name, points: thin(&found, points), color, dots: false }
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

fn memory(runs: &[Figures], charts: &mut Charts) -> Markup {
    const MIB: f64 = 1048576.0;
    let names = ["predicted".to_owned(), "measured".to_owned()];
    let mut figure = |run: &Figures| {
        let group = |place: &super::figures::PlaceFigures| {
            let measured = place.memory.map(|bytes| bytes as f64 / MIB);
            (place.name.clone(), vec![Some(place.predicted as f64 / MIB), measured])
        };
        let groups: Vec<_> = run.places.iter().map(group).collect();
        let title = format!("Memory of {}, MiB", run.name);
        charts.figure(
            &title,
            &[(names[0].clone(), 0), (names[1].clone(), 1)],
            bars("MiB", &names, &groups),
        )
    };

    html! {
        @if runs.iter().any(|run| !run.places.is_empty()) { h2 { "Memory" } }
        @for run in runs.iter().filter(|run| !run.places.is_empty()) {
            (figure(run))
            @if run.facts["threads"] == Value::Bool(true) {
                p class="soft" { "The places are threads of one process: what is measured is that of all." }
            }
        }
    }
}

fn slack(runs: &[Figures]) -> Markup {
    let known: Vec<(&Figures, &Proof)> =
        runs.iter().filter_map(|run| Some((run, run.proof.as_ref()?))).collect();
    html! {
        @if !known.is_empty() {
            h2 { "Slack" }
            p { "The device with most work sets the pace; the others have time to spare, and may be late now and then without the run's end being later by more than a hundredth of a step. From the mean times of the replicas"
                @if known.iter().any(|(_, proof)| proof.absorbs_s.is_none()) { "; how late is not looked for in grids of more than " (SIMULATED) " microbatches on all stages" } "." }
            div class="scroll" { table {
                tr { th { "run" } th { "device" } th { "work a step, ms" } th { "to spare, ms" } th { "may be late once by, ms" } }
                @for (run, proof) in &known {
                    @let pace = proof.work_s.iter().copied().fold(0.0, f64::max);
                    @for (device, work) in proof.work_s.iter().enumerate() {
                        tr {
                            td { @if device == 0 { (run.name) } }
                            td { (device) @if *work >= pace { ", sets the pace" } }
                            td { (short(1e3 * work)) }
                            td { (short(1e3 * (pace - work))) }
                            td { (late(proof, device).unwrap_or_else(|| "-".to_owned())) }
                        }
                    }
                }
            } }
        }
    }
}

/// How late a device may be once, in milliseconds.
fn late(proof: &Proof, device: usize) -> Option<String> {
    let absorbs_s = proof.absorbs_s.as_ref()?.get(device)?;
    // The search ends just below the most that it looks for.
    let all = proof.absorbs_most_s.is_some_and(|most| *absorbs_s > 0.99 * most);
    Some(format!("{}{}", if all { "≥ " } else { "" }, short(1e3 * absorbs_s)))
}

/// Of a run's events the first ones, and all that are shown.
const FIRST_EVENTS: usize = 20;
const MOST_EVENTS: usize = 200;

/// Events between the first and the last ones, which have no room.
fn left_out(run: &Figures) -> usize {
    run.events.len().saturating_sub(MOST_EVENTS)
}

fn events(runs: &[Figures]) -> Markup {
    html! {
        @if runs.iter().any(|run| !run.events.is_empty()) { h2 { "Events" } }
        @for run in runs.iter().filter(|run| !run.events.is_empty()) {
            @let began = run.events[0].time;
            details open[run.events.len() <= 12] {
                summary { (run.name) ": " (run.events.len()) " events" }
                div class="scroll" { table {
                    tr { th { "after" } th { "step" } th { "kind" } th { "what" } }
                    @for (number, event) in run.events.iter().enumerate() {
                      @if number == FIRST_EVENTS && left_out(run) > 0 {
                        tr { td {} td {} td {} td class="text" { "and " (left_out(run)) " more, in events.jsonl" } }
                      }
                      @if number < FIRST_EVENTS || number >= FIRST_EVENTS + left_out(run) {
                        tr { td { (duration(event.time - began)) } td { (event.step) } td { (word(&event.kind)) } td class="text" { (event.text) } }
                      }
                    }
                } }
            }
        }
    }
}
