//! What comes of a study: the figures of every variant. As JSON they are `NAME.json`, whose schema
//! is in docs/delay.md.

use serde::Serialize;

use super::plan::{Plan, Variant};
use super::runs::Runs;
use super::statistics::{Mean, Share, share_at};
use super::times::StepTimes;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::schedule::word;
use crate::setup::plan::schedule;

/// A study's figures. Losses are held-out, in nats a token, at the end of each run.
#[derive(Debug, Serialize)]
pub struct Findings {
    pub(super) name: String,
    pub(super) seeds: Vec<u64>,
    pub(super) steps: usize,
    pub(super) tokens: usize,
    pub(super) variants: Vec<Row>,
}

/// A variant at its best learning rate.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) grid: String,
    pub(super) delays: Vec<usize>,
    pub(super) optimizer: String,
    pub(super) predict: String,
    pub(super) lead: String,
    pub(super) rate: f64,
    /// Whether it is the lowest or the highest of the rates that were tried: a better one may lie
    /// beyond.
    pub(super) rate_at_edge: bool,
    /// One a seed.
    pub(super) losses: Vec<f64>,
    pub(super) loss: Mean,
    /// The same in bits per byte of the text, which compare between tokenizers; none where its
    /// bytes are not known.
    pub(super) bits_per_byte: Option<Mean>,
    /// Of a reference: the mean losses at shares of the steps.
    pub(super) shares: Vec<(f64, f64)>,
    pub(super) against: Option<String>,
    /// Seed by seed, from the reference's loss.
    pub(super) difference: Option<Mean>,
    /// Tokens over those that the reference needs to the same loss; seed by seed.
    pub(super) tax: Option<Tax>,
    /// The same of the mean losses, against the reference that is best of all.
    pub(super) tax_of_best: Option<Tax>,
    /// Seed by seed, from the losses of the variant that it stands beside.
    pub(super) beside: Option<(String, Mean)>,
    /// Mean held-out losses on the way: tokens, loss.
    pub(super) curve: Vec<(usize, f64)>,
    pub(super) times: StepTimes,
    pub(super) speed_up: Option<SpeedUp>,
    pub(super) goal_tax: Option<f64>,
    pub(super) goal_speed_up: Option<f64>,
    pub(super) goal_not_worse: bool,
}

/// How much sooner than others a variant has the loss that it ends with: they need fewer tokens,
/// and longer for each. Of the mean tax.
#[derive(Debug, Serialize)]
pub(super) struct SpeedUp {
    pub(super) over_1f1b: f64,
    pub(super) over_gpipe: f64,
    pub(super) over_one_device: f64,
}

impl SpeedUp {
    /// Of a step, beside those of the reference, whose updates may take another time.
    fn new(step: f64, reference: &StepTimes, tax: f64) -> SpeedUp {
        let over = |other: f64| other / step / tax;
        SpeedUp {
            over_1f1b: over(reference.one_f_one_b.0),
            over_gpipe: over(reference.gpipe.0),
            over_one_device: over(reference.one_device),
        }
    }
}

/// The tokens that a variant needs, over those that a reference needs to the same loss.
#[derive(Debug, Serialize)]
pub(super) struct Tax {
    #[serde(flatten)]
    pub(super) value: Mean,
    /// Whether a loss lies beyond those of the reference's runs: a guess, not a measurement.
    pub(super) extrapolated: bool,
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

        against_references(&mut rows, plan, best, runs)?;

        for (i, variant) in plan.variants().enumerate() {
            let other = rows.iter().find(|row| variant.beside.as_ref() == Some(&row.name));
            let beside = other.map(|other| {
                let pairs = rows[i].losses.iter().zip(&other.losses);
                (
                    other.name.clone(),
                    Mean::of(&pairs.map(|(loss, of_other)| loss - of_other).collect::<Vec<_>>()),
                )
            });

            let tax = rows[i].tax.as_ref().map(|tax| tax.value.mean);
            // A reference is what it is compared with.
            let tax = tax.or(rows[i].against.is_none().then_some(1.0));
            let reference = rows
                .iter()
                .find(|row| rows[i].against.as_ref() == Some(&row.name))
                .unwrap_or(&rows[i]);
            rows[i].speed_up =
                tax.map(|tax| SpeedUp::new(rows[i].times.step, &reference.times, tax));
            rows[i].beside = beside;
        }

        let references = rows.iter().filter(|row| row.against.is_none());
        let top = references
            .min_by(|a, b| a.loss.mean.total_cmp(&b.loss.mean))
            .map(|row| row.shares.clone());
        for row in &mut rows {
            row.tax_of_best =
                top.as_ref().and_then(|curve| Some(Tax::of(&[share_at(curve, row.loss.mean)?])));
        }

        let tokens = config.steps * config.batch * config.data.sequence;
        Ok(Findings {
            name: plan.name.clone(),
            seeds: plan.seeds.clone(),
            steps: config.steps,
            tokens,
            variants: rows,
        })
    }

    /// The goals of the study that are missed, each in words.
    pub fn missed(&self) -> Vec<String> {
        self.variants.iter().flat_map(Row::missed).collect()
    }
}

/// Differences and token taxes, by the curves of the references, seed by seed.
fn against_references(rows: &mut [Row], plan: &Plan, best: &[f64], runs: &Runs) -> Result<()> {
    for i in 0..rows.len() {
        let Some(name) = rows[i].against.clone() else { continue };
        let reference = rows.iter().position(|row| row.name == name);
        let reference = reference.ok_or_else(|| Error::Internal(format!("no reference {name}")))?;
        let (variant, rate) = (&plan.list[reference], best[reference]);
        let curves: Vec<Vec<(f64, f64)>> = plan
            .seeds
            .iter()
            .map(|seed| curve(plan, variant, rate, *seed, runs))
            .collect::<Result<_>>()?;

        let pairs = rows[i].losses.iter().zip(&rows[reference].losses);
        let differences: Vec<f64> = pairs.map(|(loss, of_reference)| loss - of_reference).collect();
        rows[i].difference = Some(Mean::of(&differences));

        let shares = rows[i].losses.iter().zip(&curves).map(|(loss, curve)| share_at(curve, *loss));
        let shares: Option<Vec<Share>> = shares.collect();
        rows[i].tax = shares.map(|shares| Tax::of(&shares));
    }

    Ok(())
}

impl Row {
    fn new(plan: &Plan, variant: &Variant, rate: f64, runs: &Runs) -> Result<Row> {
        let config = plan.config(variant)?;
        let seeds = plan.seeds.iter();
        let losses: Vec<f64> = seeds
            .map(|seed| runs.finite_loss(&plan.run(variant, rate, *seed, 1.0)?))
            .collect::<Result<_>>()?;
        let seeds = plan.seeds.iter();
        let bits: Option<Vec<f64>> = seeds
            .map(|seed| Ok(runs.bits_per_byte(&plan.run(variant, rate, *seed, 1.0)?)))
            .collect::<Result<_>>()?;
        let mut shares = Vec::new();
        if variant.is_reference() {
            for share in &plan.shares {
                let seeds = plan.seeds.iter();
                let all: Vec<f64> = seeds
                    .map(|seed| runs.finite_loss(&plan.run(variant, rate, *seed, *share)?))
                    .collect::<Result<_>>()?;
                shares.push((*share, Mean::of(&all).mean));
            }
        }

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
            bits_per_byte: bits.map(|bits| Mean::of(&bits)),
            losses,
            shares,
            against: variant.against.clone(),
            difference: None,
            tax: None,
            tax_of_best: None,
            beside: None,
            curve: mean_curve(plan, variant, rate, &config, runs)?,
            times: plan.times_of(variant)?,
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
            missed
                .push(format!("{}: a token tax of {tax:.3}, {goal} at most is wanted", self.name));
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
            let shown = difference.show(4);
            missed.push(format!(
                "{}: a loss above that of {other} by {shown}, none beyond the interval is wanted",
                self.name
            ));
        }
        missed
    }
}

/// A variant's mean held-out losses on the way to its end.
fn mean_curve(
    plan: &Plan,
    variant: &Variant,
    rate: f64,
    config: &Config,
    runs: &Runs,
) -> Result<Vec<(usize, f64)>> {
    let of_seed = |seed: &u64| Ok(runs.evaluations(&plan.run(variant, rate, *seed, 1.0)?));
    let seeds: Vec<Vec<(usize, f64)>> = plan.seeds.iter().map(of_seed).collect::<Result<_>>()?;
    let tokens = config.batch * config.data.sequence;
    let mean = |i: usize, step: usize| {
        let losses: Option<Vec<f64>> =
            seeds.iter().map(|seed| seed.get(i).map(|(_, loss)| *loss)).collect();
        Some((step * tokens, Mean::of(&losses?).mean))
    };

    Ok(seeds[0].iter().enumerate().filter_map(|(i, (step, _))| mean(i, *step)).collect())
}

/// A reference's losses at shares of the steps, of one seed.
fn curve(
    plan: &Plan,
    variant: &Variant,
    rate: f64,
    seed: u64,
    runs: &Runs,
) -> Result<Vec<(f64, f64)>> {
    let of_share =
        |share: &f64| Ok((*share, runs.finite_loss(&plan.run(variant, rate, seed, *share)?)?));
    plan.shares.iter().map(of_share).collect()
}
