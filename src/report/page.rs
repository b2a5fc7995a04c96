//! The page: one HTML file with everything in it, which a browser opens from a disk.

mod losses;
mod places;
mod staleness;

use std::collections::BTreeSet;
use std::time::Duration;

use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;

use losses::losses;
use places::{grid, memory, proof, slack};
use staleness::staleness;

use super::chart::{Chart, Form, Series, Shown, css, lines, short};
use super::compare::Comparison;
use super::figures::Figures;
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
            tr { th { "run" } th { "state" } th { "grid" } th { "parameters" } th { "steps" } th { "tokens" } th { "time" } th { "loss" } th { "held out" } th { "bits/byte" } th { "step, s" } th { "tokens/s" } }
            @for run in runs {
                tr {
                    td { (run.name) }
                    td { (run.state) }
                    td { (run.facts["grid"].as_str().unwrap_or("-")) @if let Some(what) = run.no_training() { " (" (what) ")" } }
                    td { (run.facts["parameters"].as_u64().map_or("-".to_owned(), thousands)) }
                    td { (thousands(run.steps)) @if let Some(all) = run.of_steps.filter(|all| *all != run.steps) { " of " (thousands(all)) } }
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
        p class="soft" { "time: of the run's processes, evaluations and saves in it, pauses between two processes not; loss: nats per token, mean of the last tenth of the steps; step and tokens/s: medians" }
        @if runs.iter().any(|run| run.processes.len() > 1) {
            div class="scroll" { table {
                tr { th { "run" } th { "process" } th { "grid" } th { "from step" } th { "to" } th { "tokens/s" } th { "end" } }
                @for run in runs.iter().filter(|run| run.processes.len() > 1) {
                    @for (number, process) in run.processes.iter().enumerate() {
                        tr {
                            td { @if number == 0 { (run.name) } }
                            td { (number + 1) }
                            td { (process.grid) }
                            td { (thousands(process.from)) }
                            td { (process.to.map_or("-".to_owned(), thousands)) }
                            td { (process.tokens_per_s.map_or("-".to_owned(), |rate| thousands(rate as u64))) }
                            td class="text" { (process.end) }
                        }
                    }
                }
            } }
        }
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

fn speed(runs: &[Figures], charts: &mut Charts) -> Markup {
    let series: Vec<Series> = runs
        .iter()
        .enumerate()
        .map(|(color, run)| Series {
            name: run.name.clone(),
            points: run.curves.tokens_per_s.clone(),
            color,
            form: Form::Line,
        })
        .collect();
    html! {
        h2 { "Speed" }
        (charts.figure("Tokens a second", &legend(runs), lines("step", "tokens/s", &series, Shown::FromZero)))
    }
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
