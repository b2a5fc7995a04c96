//! What comes of a study, written: `NAME.json`, `NAME.md` with the same figures as tables,
//! `NAME.svg` with the curves.

use std::fmt::Write as _;
use std::path::Path;

use super::curves::{self, Curve};
use super::findings::{Findings, Row, SpeedUp, Tax};
use super::times::StepTimes;
use crate::error::{Error, Result};
use crate::files;

impl Findings {
    /// Writes all files into the study's folder.
    ///
    /// # Errors
    /// [`Error::Config`] about `--out`.
    pub fn write(&self, out: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| Error::Internal(error.to_string()))?;
        for (ending, text) in [("json", json), ("md", self.table())] {
            let path = out.join(format!("{}.{ending}", self.name));
            let wrong = |error| {
                Error::config("--out", path.display(), format!("cannot be written ({error})"))
            };

            files::write(&path, text.as_bytes()).map_err(wrong)?;
        }

        let curve = |row: &Row| Curve {
            name: row.name.clone(),
            points: row.curve.iter().map(|(tokens, loss)| (*tokens as f64, *loss)).collect(),
        };

        let path = out.join(format!("{}.svg", self.name));
        let title = format!(
            "{}: each variant at its best rate, means of {} seeds",
            self.name,
            self.seeds.len()
        );

        curves::draw(&path, &title, &self.variants.iter().map(curve).collect::<Vec<_>>()).map_err(
            |error| Error::config("--out", path.display(), format!("cannot be written ({error})")),
        )
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

        text.push_str(
            "| variant | grid | delays | rate | loss | bits/byte | difference | token tax | of the best |\n",
        );

        text.push_str("|---|---|---|---|---|---|---|---|---|\n");
        for row in &self.variants {
            let delays: Vec<String> = row.delays.iter().map(ToString::to_string).collect();
            let rate = format!("{}{}", row.rate, if row.rate_at_edge { "*" } else { "" });
            let difference = row.difference.as_ref().map_or("-".into(), |mean| mean.show(4));
            let bits = row.bits_per_byte.as_ref().map_or("-".into(), |mean| mean.show(4));
            let tax = |tax: &Option<Tax>| tax.as_ref().map_or("-".into(), show_tax);

            let _ = writeln!(
                text,
                "| {} | {} | {} | {rate} | {} | {bits} | {difference} | {} | {} |",
                row.name,
                row.grid,
                delays.join(","),
                row.loss.show(4),
                tax(&row.tax),
                tax(&row.tax_of_best)
            );
        }

        if self.variants.iter().any(|row| row.rate_at_edge) {
            text.push_str("\n*: the lowest or the highest rate that was tried; a better one may lie beyond.\n");
        }

        let taxes = self.variants.iter().flat_map(|row| [&row.tax, &row.tax_of_best]).flatten();
        if taxes.into_iter().any(|tax| tax.extrapolated) {
            text.push_str(
                "\n~: a loss beyond those of the reference's runs; extrapolated, not measured.\n",
            );
        }

        for row in &self.variants {
            if let Some((name, difference)) = &row.beside {
                let _ = writeln!(text, "\n{} less {name}: {}", row.name, difference.show(4));
            }
        }

        text.push('\n');
        self.add_times(&mut text);
        text
    }

    /// The second table: time to the loss that each variant ends with.
    fn add_times(&self, text: &mut String) {
        text.push_str("times by simulation; speed-ups to the loss that the variant ends with\n\n");
        text.push_str("| variant | rows | step | one device | 1F1B, best m | GPipe, best m | over 1F1B | over GPipe | over one device |\n");
        text.push_str("|---|---|---|---|---|---|---|---|---|\n");
        for row in &self.variants {
            let StepTimes { rows, step, one_device, one_f_one_b, gpipe } = &row.times;
            let best = |(step, m): &(f64, usize)| format!("{} (m = {m})", time(*step));
            let speed_up = |of: fn(&SpeedUp) -> f64| {
                row.speed_up.as_ref().map_or("-".into(), |s| format!("{:.2}", of(s)))
            };

            let _ = writeln!(
                text,
                "| {} | {rows} | {} | {} | {} | {} | {} | {} | {} |",
                row.name,
                time(*step),
                time(*one_device),
                best(one_f_one_b),
                best(gpipe),
                speed_up(|s| s.over_1f1b),
                speed_up(|s| s.over_gpipe),
                speed_up(|s| s.over_one_device)
            );
        }
    }
}

fn show_tax(tax: &Tax) -> String {
    let sign = if tax.extrapolated { "~" } else { "" };
    format!("{sign}{}", tax.value.show(2))
}

/// A time in three or four digits.
fn time(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}
