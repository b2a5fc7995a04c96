//! Progress for people: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};

use super::{EvalLine, EventKind, EventLine, Sink, StepLine, clock, quality};
use crate::data::Measure;
use crate::error::Result;

/// Lines of a whole run where there is no terminal.
const LINES: usize = 20;

/// What a step of the one after it counts in the rate that is shown: that is of about the last
/// twenty.
const FADING: f64 = 0.95;

/// The terminal.
pub struct Progress {
    steps: usize,
    /// The step that the run began with.
    start: usize,
    measure: Measure,
    bar: Option<ProgressBar>,
    started: Instant,
    /// Of the last steps, each with the weight of a step times [`FADING`] for every step since
    /// then. One step alone tells little: where the pipeline drains, reports come close together.
    tokens: f64,
    seconds: f64,
}

impl Progress {
    /// Of a run of `steps` steps that begins with step `start`.
    pub fn new(steps: usize, start: usize, measure: Measure) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps as u64);
            let style = ProgressStyle::with_template(
                "{bar:30} {pos}/{len}  {msg}  {elapsed} gone, {eta} left",
            );

            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.with_position(start as u64)
        });
        Progress { steps, start, measure, bar, started: Instant::now(), tokens: 0.0, seconds: 0.0 }
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => say!("{text}"),
        }
    }
}

impl Sink for Progress {
    fn step(&mut self, line: &StepLine) -> Result<()> {
        let StepLine { step, loss, step_s, tokens_per_s, .. } = *line;
        self.tokens = self.tokens * FADING + tokens_per_s * step_s;
        self.seconds = self.seconds * FADING + step_s;
        let rate = thousands((self.tokens / self.seconds) as u64);

        if let Some(bar) = &self.bar {
            bar.set_message(format!("loss {loss:.4}  {rate} tokens/s"));
            bar.set_position(step as u64);
        } else if step == self.start + 1
            || step.is_multiple_of((self.steps / LINES).max(1))
            || step == self.steps
        {
            let left = self
                .started
                .elapsed()
                .div_f64((step - self.start) as f64)
                .mul_f64((self.steps - step) as f64);
            say!(
                "step {step:>6}/{}  loss {loss:.4}  {rate} tokens/s  {} left",
                self.steps,
                clock(left)
            );
        }

        Ok(())
    }

    fn eval(&mut self, line: &EvalLine) -> Result<()> {
        let EvalLine { step, eval_loss, .. } = *line;
        self.say(&format!(
            "step {step:>6}  eval loss {eval_loss:.4}  {}",
            quality(eval_loss, self.measure)
        ));
        Ok(())
    }

    fn event(&mut self, line: &EventLine) -> Result<()> {
        // The others are told by whoever begins or ends the run.
        if !matches!(line.kind, EventKind::Start | EventKind::Fault | EventKind::End) {
            self.say(&line.text);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.bar.iter().for_each(ProgressBar::finish);
        Ok(())
    }
}

/// `1234567` as `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }

        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!([0, 999, 1000, 1234567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(clock(Duration::from_millis(61_600)), "1:02");
        assert_eq!(clock(Duration::from_secs(3_661)), "1:01:01 h");
    }
}
