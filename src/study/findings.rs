//! What comes of a study: `NAME.json`, and `NAME.md` with the same figures as a table.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::plan::{Plan, Variant};
use super::runs::Runs;
use super::statistics::{Mean, Share, share_at};
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
    goal_tax: Option<f64>,
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

        let references = rows.iter().filter(|row| row.against.is_none());
        let top = references.min_by(|a, b| a.loss.mean.total_cmp(&b.loss.mean)).map(|row| row.shares.clone());
        for row in &mut rows {
            row.tax_of_best = top.as_ref().and_then(|curve| Some(Tax::of(&[share_at(curve, row.loss.mean)?])));
        }

        let tokens = config.steps * config.batch * config.data.sequence;
        Ok(Findings { name: plan.name.clone(), seeds: plan.seeds.clone(), steps: config.steps, tokens, variants: rows })
    }

    /// Writes both files into the study's folder.
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
        Ok(())
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
        text
    }

    /// The goals of the study that are missed, each in words.
    pub fn missed(&self) -> Vec<String> {
        let missed = |row: &Row| {
            let goal = row.goal_tax?;
            let tax = row.tax.as_ref().map_or(f64::INFINITY, |tax| tax.value.mean);
            (tax > goal).then(|| format!("{}: a token tax of {tax:.3}, {goal} at most is wanted", row.name))
        };
        self.variants.iter().filter_map(missed).collect()
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
            predict: word(&config.optimizer.common.predict),
            lead: word(&config.optimizer.adamw.lead),
            rate,
            rate_at_edge: plan.at_edge(variant, rate),
            loss: Mean::of(&losses),
            losses,
            shares,
            against: variant.against.clone(),
            difference: None,
            tax: None,
            tax_of_best: None,
            goal_tax: variant.goal_tax,
        })
    }
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
