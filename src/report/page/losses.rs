//! Losses of runs beside each other, and how long each takes to one of them.

use maud::{Markup, html};

use super::super::chart::{Form, Series, Shown, lines, short};
use super::super::compare::Comparison;
use super::super::figures::{Curves, Figures};
use super::{Charts, duration, legend};
use crate::metrics::thousands;

/// Steps of a run that has means to be drawn.
const FEW: u64 = 200;

type Points = Vec<(f64, f64)>;

/// The losses of every step, their means, and held-out ones over one x.
type Pick = fn(&Curves) -> [&Points; 3];

pub(super) fn losses(runs: &[Figures], comparison: &Comparison, charts: &mut Charts) -> Markup {
    let picks: [(&str, &str, Pick); 3] = [
        ("Loss over steps", "step", |of| [&of.loss, &of.smooth, &of.eval]),
        ("Loss over tokens", "tokens", |of| {
            [&of.loss_by_tokens, &of.smooth_by_tokens, &of.eval_by_tokens]
        }),
        ("Loss over wall-clock time", "seconds, without pauses between processes", |of| {
            [&of.loss_by_seconds, &of.smooth_by_seconds, &of.eval_by_seconds]
        }),
    ];
    let mut figure = |(title, x, pick): (&str, &str, Pick)| {
        let series = loss_curves(runs, comparison, pick);
        charts.figure(title, &legend(runs), lines(x, comparison.unit(), &series, Shown::Losses))
    };

    html! {
        h2 { "Loss" }
        @if let Some(why) = &comparison.incomparable { p { (why) "." } }
        @for note in &comparison.notes { p { (note) "." } }
        @if comparison.per_byte { p { "The runs have other tokens: losses are shown as bits per byte of the text." } }
        @for pick in picks { (figure(pick)) }
        p class="soft" { "Pale: the losses of training, thinned so that no peak is lost; lines: their means over a hundredth of the run; dots: held out. What lies above the frame, as the first steps may, is drawn on its edge." }
    }
}

/// Those of the steps first, so that nothing lies under them.
fn loss_curves(runs: &[Figures], comparison: &Comparison, pick: Pick) -> Vec<Series> {
    let mut layers: [Vec<Series>; 3] = Default::default();
    for (color, run) in runs.iter().enumerate() {
        let [all, means, held_out] = pick(&run.curves);
        let mut add = |layer: usize, what: &str, points: &Points, form| {
            let scale = comparison.scale(run, form == Form::Dots);
            let points = points.iter().map(|(x, loss)| (*x, loss * scale)).collect();
            layers[layer].push(Series { name: format!("{}{what}", run.name), points, color, form });
        };

        match run.steps < FEW {
            true => add(1, "", all, Form::Line),
            false => {
                add(0, "", all, Form::Pale);
                add(1, ", means", means, Form::Line);
            }
        }
        if !held_out.is_empty() {
            add(2, ", held out", held_out, Form::Dots);
        }
    }
    layers.into_iter().flatten().collect()
}

/// How long each run takes to a loss that all reach.
pub(super) fn to_the_same_loss(runs: &[Figures], comparison: &Comparison) -> Markup {
    html! {
        @if let Some(to_loss) = comparison.to_loss.as_ref().filter(|to_loss| to_loss.runs.len() > 1) {
            h3 { "Time to the same loss, without evaluations and pauses" }
            p {
                "To " (if to_loss.held_out { "a held-out" } else { "a training" }) " " (comparison.unit()) " of " (short(to_loss.loss)) ", which all runs reach: the mean time of a step up to there, times the steps. "
                @if to_loss.runs.iter().any(|reached| reached.at_first) { "≤: the loss was that low when it was first told." }
            }
            div class="scroll" { table {
                tr { th { "run" } th { "stages K" } th { "step, s" } th { "steps" } th { "time" } th { "of the first run's" } }
                @for reached in &to_loss.runs {
                    @let run = &runs[reached.run];
                    @let most = if reached.at_first { "≤ " } else { "" };
                    tr {
                        td { (run.name) }
                        td { (run.facts["stages"].as_u64().map_or("-".to_owned(), |stages| stages.to_string())) }
                        td { (short(reached.step_s)) }
                        td { (most) (thousands(reached.steps.round() as u64)) }
                        td { (most) (duration(reached.seconds)) }
                        td { (short(reached.seconds / to_loss.runs[0].seconds)) }
                    }
                }
            } }
        }
    }
}
