//! Where the time and the memory of a run's places went, beside what other schedules would make of it.

use std::collections::BTreeMap;

use maud::{Markup, html};
use serde_json::Value;

use super::super::chart::{bars, heat, short};
use super::super::compare::Comparison;
use super::super::figures::{Figures, PlaceFigures};
use super::super::proof::Proof;
use super::Charts;
use super::losses::to_the_same_loss;
use crate::clock::TimeKind;
use crate::schedule::word;

pub(super) fn grid(run: &Figures, charts: &mut Charts) -> Markup {
    if run.places.is_empty() {
        return html! {};
    }

    let columns: Vec<(String, usize)> =
        TimeKind::ALL.iter().map(|(kind, name)| ((*name).to_owned(), color_of(*kind))).collect();
    let (rows, of) = rows(run);
    let legend = ["work", "waits", "evaluations and saves"];
    let legend: Vec<(String, usize)> =
        legend.iter().enumerate().map(|(color, name)| ((*name).to_owned(), color)).collect();
    html! {
        h2 { "The grid of " (run.name) }
        (charts.figure(&format!("Where the time went{of}"), &legend, heat(&columns, &rows)))
        p class="soft" {
            "compute: forwards and backwards; upstream, downstream: waiting for the stage before, for the one behind (its messages, or room for one); \
             reduce: waiting for the replicas; update: the optimizer; copies: batches and messages; table: the tied embedding, waits for its other end in it; \
             idle: between actions; evaluation: all of it; save: copying the state, waiting for the save before"
        }
    }
}

/// Work, waits, and what is no part of the steps.
fn color_of(kind: TimeKind) -> usize {
    match kind {
        TimeKind::Compute | TimeKind::Update | TimeKind::Copies | TimeKind::Table => 0,
        TimeKind::Upstream | TimeKind::Downstream | TimeKind::Reduce | TimeKind::Idle => 1,
        TimeKind::Evaluation | TimeKind::Save => 2,
    }
}

/// Places that have a row each; of more there is one a stage.
const ROWS: usize = 24;

/// The shares of time of the places, or of the stages; and what is to be said of that.
fn rows(run: &Figures) -> (Vec<(String, Vec<f64>)>, &'static str) {
    let shares = |place: &PlaceFigures| -> Vec<f64> {
        TimeKind::ALL.iter().map(|(_, kind)| place.spent.share(kind)).collect()
    };
    if run.places.len() <= ROWS {
        let row = |place: &PlaceFigures| (place.name.clone(), shares(place));
        return (run.places.iter().map(row).collect(), "");
    }

    let mean = |(stages, places): (String, Vec<&PlaceFigures>)| {
        let mut sum = vec![0.0; TimeKind::ALL.len()];
        for place in &places {
            sum.iter_mut().zip(shares(place)).for_each(|(sum, share)| *sum += share);
        }
        (stages, sum.into_iter().map(|sum| sum / places.len() as f64).collect())
    };
    (by_stage(run).into_iter().map(mean).collect(), ", means over the replicas of a stage")
}

/// The places of every stage, or of both that a device has.
fn by_stage(run: &Figures) -> Vec<(String, Vec<&PlaceFigures>)> {
    let mut stages: BTreeMap<&Vec<usize>, Vec<&PlaceFigures>> = BTreeMap::new();
    for place in &run.places {
        stages.entry(&place.stages).or_default().push(place);
    }
    let name = |stages: &Vec<usize>| {
        let numbers: Vec<String> = stages.iter().map(usize::to_string).collect();
        format!("stage {}", numbers.join(" and "))
    };
    stages.into_iter().map(|(stages, places)| (name(stages), places)).collect()
}

pub(super) fn proof(runs: &[Figures], comparison: &Comparison, charts: &mut Charts) -> Markup {
    let names: Vec<String> = ["measured", "decoupled", "1f1b", "gpipe"].map(str::to_owned).to_vec();
    let known: Vec<(&Figures, &Proof)> =
        runs.iter().filter_map(|run| Some((run, run.proof.as_ref()?))).collect();
    let groups: Vec<(String, Vec<Option<f64>>)> = known
        .iter()
        .map(|(run, proof)| {
            let ideals = proof.schedules.iter().map(|ideal| Some(100.0 * ideal.idle));
            let measured = std::iter::once(Some(100.0 * proof.measured_idle));
            let values = measured.chain(ideals).chain(std::iter::repeat(None)).take(names.len());
            (run.name.clone(), values.collect())
        })
        .collect();
    let colors: Vec<(String, usize)> =
        names.iter().enumerate().map(|(color, name)| (name.clone(), color)).collect();

    html! {
        @let several = comparison.to_loss.as_ref().is_some_and(|to_loss| to_loss.runs.len() > 1);
        @if !known.is_empty() || several { h2 { "The proof" } }
        @if !known.is_empty() {
            p { "Was no device idle? The measured share of the devices' time that was a wait, beside what each schedule would have with the stage times of this very run, where messages and sums over replicas take no time. What is measured is of the steps of the last process, filling and draining in it, evaluations and saves not."
                @if known.iter().any(|(_, proof)| proof.schedules.is_empty()) { " Very large grids are not simulated." } }
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
        (to_the_same_loss(runs, comparison))
    }
}

pub(super) fn memory(runs: &[Figures], charts: &mut Charts) -> Markup {
    const MIB: f64 = 1048576.0;
    let names = ["predicted".to_owned(), "measured".to_owned()];
    let mut figure = |run: &Figures| {
        let mib = |bytes: u64| bytes as f64 / MIB;
        let group = |(name, places): (String, Vec<&PlaceFigures>)| {
            let predicted = places.iter().map(|place| place.predicted).max().map(mib);
            let measured = places.iter().filter_map(|place| place.memory).max().map(mib);
            (name, vec![predicted, measured])
        };
        let (all, of) = match run.places.len() <= ROWS {
            true => {
                (run.places.iter().map(|place| (place.name.clone(), vec![place])).collect(), "")
            }
            false => (by_stage(run), ", the most of its replicas"),
        };
        let groups: Vec<_> = all.into_iter().map(group).collect();
        let title = format!("Memory of {}, MiB{of}", run.name);
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

pub(super) fn slack(runs: &[Figures]) -> Markup {
    let known: Vec<(&Figures, &Proof)> =
        runs.iter().filter_map(|run| Some((run, run.proof.as_ref()?))).collect();
    html! {
        @if !known.is_empty() {
            h2 { "Slack" }
            p { "The device with most work sets the pace; the others have time to spare, and may be late now and then without the run's end being later by more than a hundredth of a step. Times are those of the slowest replica"
                @if known.iter().any(|(_, proof)| proof.absorbs_s.is_none()) { "; how late is not looked for where that takes long, as in large grids" } "." }
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
