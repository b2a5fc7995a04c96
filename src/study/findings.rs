//! What comes of a study: `NAME.json` (its schema is in docs/studies.md), `NAME.md` with the same figures as tables, `NAME.svg` with
//! the curves.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::curves::{self, Curve};
use super::plan::{Plan, Variant};
use super::runs::Runs;
use super::statistics::{Mean, Share, share_at};
use super::times::StepTimes;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::setup::plan::schedule;

/// A study's figures. Losses are held-out, in nats a token, at the end of each run.
#[derive(Debug, Serialize)]
pub struct Findings {
    name: String,
    seeds: Vec<u64>,
    steps: usize,
    tokens: usize,
    variants: Vec<Row>,
}

/// A variant at its best learning rate.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    grid: String,
    delays: Vec<usize>,
    optimizer: String,
    predict: String,
    lead: String,
    rate: f64,
    /// Whether it is the lowest or the highest of the rates that were tried: a better one may lie beyond.
    rate_at_edge: bool,
    /// One a seed.
    losses: Vec<f64>,
    loss: Mean,
    /// Of a reference: the mean losses at shares of the steps.
    shares: Vec<(f64, f64)>,
    against: Option<String>,
    /// Seed by seed, from the reference's loss.
    difference: Option<Mean>,
    /// Tokens over those that the reference needs to the same loss; seed by seed.
    tax: Option<Tax>,
    /// The same of the mean losses, against the reference that is best of all.
    tax_of_best: Option<Tax>,
    /// Seed by seed, from the losses of the variant that it stands beside.
    beside: Option<(String, Mean)>,
    /// Mean held-out losses on the way: tokens, loss.
    curve: Vec<(usize, f64)>,
    times: StepTimes,
    speed_up: Option<SpeedUp>,
    goal_tax: Option<f64>,
    goal_speed_up: Option<f64>,
    goal_not_worse: bool,
}

/// How much sooner than others a variant has the loss that it ends with: they need fewer tokens, and longer for each. Of the mean tax.
#[derive(Debug, Serialize)]
struct SpeedUp {
    over_1f1b: f64,
    over_gpipe: f64,
    over_one_device: f64,
}

impl SpeedUp {
    fn new(times: &StepTimes, tax: f64) -> SpeedUp {
        let over = |step: f64| step / times.step / tax;
        SpeedUp {
            over_1f1b: over(times.one_f_one_b.0),
            over_gpipe: over(times.gpipe.0),
            over_one_device: over(times.one_device),
        }
    }
}

/// The tokens that a variant needs, over those that a reference needs to the same loss.
#[derive(Debug, Serialize)]
struct Tax {
    #[serde(flatten)]
    value: Mean,
    /// Whether a loss lies beyond those of the reference's runs: a guess, not a measurement.
    extrapolated: bool,
}

impl Tax {
    /// Of the shares at which the reference has each of the losses.
    fn of(shares: &[Share]) -> Tax {
        let taxes: Vec<f64> = shares.iter().map(|share| 1.0 / share.share).collect();
        Tax { value: Mean::of(&taxes), extrapolated: shares.iter().any(|share| share.extrapolated) }
    }
}

impl Findings {
    /// Reads the losses of all runs.
    ///
    /// # Errors
    /// A run that is not complete.
    pub fn new(plan: &Plan, best: &[f64], runs: &Runs) -> Result<Findings> {
        let config = plan.config(&plan.list[0])?;
        let mut rows = Vec::new();
        for (variant, rate) in plan.variants().zip(best) {
            rows.push(Row::new(plan, variant, *rate, runs)?);
        }

        // The curves of the references, seed by seed.
        for i in 0..rows.len() {
            let Some(name) = rows[i].against.clone() else { continue };
            let reference = rows.iter().position(|row| row.name == name);
            let reference = reference.ok_or_else(|| Error::Internal(format!("no reference {name}")))?;
            let (variant, rate) = (&plan.list[reference], best[reference]);
            let curves: Vec<Vec<(f64, f64)>> =
                plan.seeds.iter().map(|seed| curve(plan, variant, rate, *seed, runs)).collect::<Result<_>>()?;

            let pairs = rows[i].losses.iter().zip(&rows[reference].losses);
            let differences: Vec<f64> = pairs.map(|(loss, of_reference)| loss - of_reference).collect();
            rows[i].difference = Some(Mean::of(&differences));

            let shares = rows[i].losses.iter().zip(&curves).map(|(loss, curve)| share_at(curve, *loss));
            let shares: Option<Vec<Share>> = shares.collect();
            rows[i].tax = shares.map(|shares| Tax::of(&shares));
        }

        for (i, variant) in plan.variants().enumerate() {
            let other = rows.iter().find(|row| variant.beside.as_ref() == Some(&row.name));
            let beside = other.map(|other| {
                let pairs = rows[i].losses.iter().zip(&other.losses);
                (other.name.clone(), Mean::of(&pairs.map(|(loss, of_other)| loss - of_other).collect::<Vec<_>>()))
            });
            let tax = rows[i].tax.as_ref().map(|tax| tax.value.mean);
            // A reference is what it is compared with.
            let tax = tax.or(rows[i].against.is_none().then_some(1.0));
            rows[i].speed_up = tax.map(|tax| SpeedUp::new(&rows[i].times, tax));
            rows[i].beside = beside;
        }

        let references = rows.iter().filter(|row| row.against.is_none());
        let top = references.min_by(|a, b| a.loss.mean.total_cmp(&b.loss.mean)).map(|row| row.shares.clone());
        for row in &mut rows {
            row.tax_of_best = top.as_ref().and_then(|curve| Some(Tax::of(&[share_at(curve, row.loss.mean)?])));
        }

        let tokens = config.steps * config.batch * config.data.sequence;
        Ok(Findings { name: plan.name.clone(), seeds: plan.seeds.clone(), steps: config.steps, tokens, variants: rows })
    }

    /// Writes all files into the study's folder.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out`.
    pub fn write(&self, out: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).map_err(|error| Error::Internal(error.to_string()))?;
        for (ending, text) in [("json", json), ("md", self.table())] {
            let path = out.join(format!("{}.{ending}", self.name));
            let wrong = |error| Error::config("--out", path.display(), format!("cannot be written ({error})"));
            fs::write(&path, text).map_err(wrong)?;
        }

        let curve = |row: &Row| Curve {
            name: row.name.clone(),
            points: row.curve.iter().map(|(tokens, loss)| (*tokens as f64, *loss)).collect(),
        };
        let path = out.join(format!("{}.svg", self.name));
        let title = format!("{}: each variant at its best rate, means of {} seeds", self.name, self.seeds.len());
        curves::draw(&path, &title, &self.variants.iter().map(curve).collect::<Vec<_>>())
            .map_err(|error| Error::config("--out", path.display(), format!("cannot be written ({error})")))
    }

    /// The figures as a table.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{}: {} steps, {} tokens a run, {} paired seeds; held-out nats a token, 95 % intervals\n\n",
            self.name,
            self.steps,
            self.tokens,
            self.seeds.len()
        );
        text.push_str("| variant | grid | delays | rate | loss | difference | token tax | of the best |\n");
        text.push_str("|---|---|---|---|---|---|---|---|\n");
        for row in &self.variants {
            let delays: Vec<String> = row.delays.iter().map(ToString::to_string).collect();
            let rate = format!("{}{}", row.rate, if row.rate_at_edge { "*" } else { "" });
            let difference = row.difference.as_ref().map_or("-".into(), |mean| show(mean, 4));
            let tax = |tax: &Option<Tax>| tax.as_ref().map_or("-".into(), show_tax);

            let _ = writeln!(
                text,
                "| {} | {} | {} | {rate} | {} | {difference} | {} | {} |",
                row.name,
                row.grid,
                delays.join(","),
                show(&row.loss, 4),
                tax(&row.tax),
                tax(&row.tax_of_best)
            );
        }

        if self.variants.iter().any(|row| row.rate_at_edge) {
            text.push_str("\n*: the lowest or the highest rate that was tried; a better one may lie beyond.\n");
        }
        let taxes = self.variants.iter().flat_map(|row| [&row.tax, &row.tax_of_best]).flatten();
        if taxes.into_iter().any(|tax| tax.extrapolated) {
            text.push_str("\n~: a loss beyond those of the reference's runs; extrapolated, not measured.\n");
        }
        for row in &self.variants {
            if let Some((name, difference)) = &row.beside {
                let _ = writeln!(text, "\n{} less {name}: {}", row.name, show(difference, 4));
            }
        }
        text.push('\n');
        self.add_times(&mut text);
        text
    }

    /// The second table: time to the loss that each variant ends with.
    fn add_times(&self, text: &mut String) {
        let rows = self.variants.first().map_or(0, |row| row.times.rows);
        let _ = writeln!(
            text,
            "times by simulation, {rows} rows a step and replica; speed-ups to the loss that the variant ends with\n"
        );
        text.push_str("| variant | step | one device | 1F1B, best m | GPipe, best m | over 1F1B | over GPipe | over one device |\n");
        text.push_str("|---|---|---|---|---|---|---|---|\n");
        for row in &self.variants {
            let StepTimes { step, one_device, one_f_one_b, gpipe, .. } = &row.times;
            let best = |(step, m): &(f64, usize)| format!("{step:.4} (m = {m})");
            let speed_up =
                |of: fn(&SpeedUp) -> f64| row.speed_up.as_ref().map_or("-".into(), |s| format!("{:.2}", of(s)));
            let _ = writeln!(
                text,
                "| {} | {step:.4} | {one_device:.4} | {} | {} | {} | {} | {} |",
                row.name,
                best(one_f_one_b),
                best(gpipe),
                speed_up(|s| s.over_1f1b),
                speed_up(|s| s.over_gpipe),
                speed_up(|s| s.over_one_device)
            );
        }
    }

    /// The goals of the study that are missed, each in words.
    pub fn missed(&self) -> Vec<String> {
        self.variants.iter().flat_map(Row::missed).collect()
    }

    /// What a document says of a loss or a tax that was not found again, each in words.
    ///
    /// # Errors
    /// [`Error::Config`] about `quoted` if there is no such table.
    pub fn misquoted(&self, document: &Path) -> Result<Vec<String>> {
        let wrong = |problem: String| Error::config("quoted", document.display(), problem);
        let text = fs::read_to_string(document).map_err(|error| wrong(format!("cannot be read ({error})")))?;
        let quoted = quoted(&text, &self.name).ok_or_else(|| {
            wrong(format!(
                "has no table between `<!-- study {} -->` and `<!-- end -->`; quote NAME.md there",
                self.name
            ))
        })?;

        let mut missed = Vec::new();
        for row in &self.variants {
            let Some(cells) = quoted.iter().find(|cells| cells.first() == Some(&row.name)) else {
                missed.push(format!("{}: {} does not quote it", row.name, document.display()));
                continue;
            };
            for (what, column, found, least) in [
                ("loss", LOSS_COLUMN, Some(&row.loss), LEAST_LOSS),
                ("token tax", TAX_COLUMN, row.tax.as_ref().map(|tax| &tax.value), LEAST_TAX),
            ] {
                let (Some(found), Some(said)) = (found, cells.get(column).and_then(|cell| number(cell))) else {
                    continue;
                };
                let far = (said - found.mean).abs();
                if far > found.half_interval.unwrap_or(0.0).max(least) {
                    missed.push(format!("{}: a {what} of {}, {said} is quoted", row.name, show(found, 4)));
                }
            }
        }
        Ok(missed)
    }
}

impl Row {
    fn new(plan: &Plan, variant: &Variant, rate: f64, runs: &Runs) -> Result<Row> {
        let config = plan.config(variant)?;
        let seeds = plan.seeds.iter();
        let losses: Vec<f64> =
            seeds.map(|seed| runs.finite_loss(&plan.run(variant, rate, *seed, 1.0))).collect::<Result<_>>()?;
        let mut shares = Vec::new();
        if variant.is_reference() {
            for share in &plan.shares {
                let seeds = plan.seeds.iter();
                let all: Vec<f64> = seeds
                    .map(|seed| runs.finite_loss(&plan.run(variant, rate, *seed, *share)))
                    .collect::<Result<_>>()?;
                shares.push((*share, Mean::of(&all).mean));
            }
        }

        let word = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        Ok(Row {
            name: variant.name.clone(),
            grid: config.grid().to_string(),
            delays: schedule(&config)?.delays,
            optimizer: word(&config.optimizer.common.kind),
            predict: word(&config.optimizer.predict()),
            lead: word(&config.optimizer.adamw.lead()),
            rate,
            rate_at_edge: plan.at_edge(variant, rate),
            loss: Mean::of(&losses),
            losses,
            shares,
            against: variant.against.clone(),
            difference: None,
            tax: None,
            tax_of_best: None,
            beside: None,
            curve: mean_curve(plan, variant, rate, &config, runs),
            times: StepTimes::new(&plan.time, &plan.folder, &config)?,
            speed_up: None,
            goal_tax: variant.goal_tax,
            goal_speed_up: variant.goal_speed_up,
            goal_not_worse: variant.goal_not_worse,
        })
    }

    /// Its goals that are missed, each in words.
    fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        let tax = self.tax.as_ref().map_or(f64::INFINITY, |tax| tax.value.mean);
        if let Some(goal) = self.goal_tax.filter(|goal| tax > *goal) {
            missed.push(format!("{}: a token tax of {tax:.3}, {goal} at most is wanted", self.name));
        }
        let speed_up = self.speed_up.as_ref().map_or(0.0, |speed_up| speed_up.over_1f1b);
        if let Some(goal) = self.goal_speed_up.filter(|goal| speed_up < *goal) {
            missed.push(format!(
                "{}: a speed-up over 1F1B of {speed_up:.3} to a loss, {goal} at least is wanted",
                self.name
            ));
        }
        if let Some((other, difference)) = self.beside.as_ref().filter(|_| self.goal_not_worse)
            && difference.mean > difference.half_interval.unwrap_or(0.0)
        {
            let shown = show(difference, 4);
            missed.push(format!(
                "{}: a loss above that of {other} by {shown}, none beyond the interval is wanted",
                self.name
            ));
        }
        missed
    }
}

/// Columns of the first table, and how far at least a quoted figure may be off: other processors round in other ways.
const LOSS_COLUMN: usize = 4;
const TAX_COLUMN: usize = 6;
const LEAST_LOSS: f64 = 0.01;
const LEAST_TAX: f64 = 0.03;

/// The rows of the table of a study that a document quotes, cell by cell.
fn quoted(text: &str, name: &str) -> Option<Vec<Vec<String>>> {
    let (_, rest) = text.split_once(&format!("<!-- study {name} -->"))?;
    let (table, _) = rest.split_once("<!-- end -->")?;
    let cells = |line: &str| line.trim().trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    Some(table.lines().filter(|line| line.trim_start().starts_with('|')).map(cells).collect())
}

/// The number that a cell begins with.
fn number(cell: &str) -> Option<f64> {
    cell.trim_start_matches('~').split_whitespace().next()?.parse().ok()
}

/// A variant's mean held-out losses on the way to its end.
fn mean_curve(plan: &Plan, variant: &Variant, rate: f64, config: &Config, runs: &Runs) -> Vec<(usize, f64)> {
    let seeds: Vec<Vec<(usize, f64)>> =
        plan.seeds.iter().map(|seed| runs.evaluations(&plan.run(variant, rate, *seed, 1.0))).collect();
    let tokens = config.batch * config.data.sequence;
    let mean = |i: usize, step: usize| {
        let losses: Option<Vec<f64>> = seeds.iter().map(|seed| seed.get(i).map(|(_, loss)| *loss)).collect();
        Some((step * tokens, Mean::of(&losses?).mean))
    };
    seeds[0].iter().enumerate().filter_map(|(i, (step, _))| mean(i, *step)).collect()
}

/// A reference's losses at shares of the steps, of one seed.
fn curve(plan: &Plan, variant: &Variant, rate: f64, seed: u64, runs: &Runs) -> Result<Vec<(f64, f64)>> {
    plan.shares.iter().map(|share| Ok((*share, runs.finite_loss(&plan.run(variant, rate, seed, *share))?))).collect()
}

fn show(mean: &Mean, digits: usize) -> String {
    match mean.half_interval {
        Some(half) => format!("{:.digits$} ± {half:.digits$}", mean.mean),
        None => format!("{:.digits$}", mean.mean),
    }
}

fn show_tax(tax: &Tax) -> String {
    let sign = if tax.extrapolated { "~" } else { "" };
    format!("{sign}{}", show(&tax.value, 2))
}
