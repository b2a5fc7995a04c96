//! How a token is chosen from the scores of all.

use std::collections::BTreeSet;

use crate::error::{Error, Result};

/// How a token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0: always the likeliest.
    pub temperature: f64,
    /// Only among this many likeliest tokens.
    pub top_k: Option<usize>,
    /// Only among the fewest likeliest tokens that together have this probability (nucleus
    /// sampling, Holtzman et al. 2020), at the temperature.
    pub top_p: Option<f64>,
    /// Only among tokens that are at least this times as likely as the likeliest (Nguyen et al.
    /// 2024), at the temperature.
    pub min_p: Option<f64>,
    /// What the scores of tokens that stand in the text are divided by, or negative ones multiplied
    /// (Keskar et al. 2019).
    pub repetition_penalty: f64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_k: None,
        top_p: None,
        min_p: None,
        repetition_penalty: 1.0,
    };

    /// Whether these make a distribution.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn check(&self) -> Result<()> {
        let (temperature, penalty) = (self.temperature, self.repetition_penalty);
        Error::unless(temperature >= 0.0, "--temperature", temperature, "must be 0 or more")?;
        Error::unless(penalty > 0.0, "--repetition-penalty", penalty, "must be above 0")?;
        if self.top_k == Some(0) {
            return Err(Error::config("--top-k", 0, "must be at least 1"));
        }

        let shares = [("--top-p", self.top_p), ("--min-p", self.min_p)];
        for (option, share) in shares {
            let share = share.unwrap_or(1.0);
            let good = share > 0.0 && share <= 1.0;
            Error::unless(good, option, share, "must be above 0 and at most 1")?;
        }
        Ok(())
    }

    /// The token at `u` in [0, 1) of the distribution softmax(scores / temperature), cut as asked
    /// for, that follows `text`.
    pub fn pick(&self, scores: &[f64], text: &[i64], u: f64) -> usize {
        let mut logits = scores.to_vec();
        if self.repetition_penalty != 1.0 {
            let seen: BTreeSet<i64> = text.iter().copied().collect();
            let seen = seen.into_iter().filter_map(|token| usize::try_from(token).ok());
            for token in seen.filter(|token| *token < scores.len()) {
                let score = &mut logits[token];
                let penalty = self.repetition_penalty;
                *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
            }
        }

        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        if self.temperature == 0.0 {
            return order[0];
        }

        let weight = |i: &usize| ((logits[*i] - logits[order[0]]) / self.temperature).exp();
        let mut weights: Vec<f64> = order.iter().map(weight).collect();
        if let Some(top_p) = self.top_p {
            let wanted = top_p * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let enough = weights.iter().position(|w| {
                sum += w;
                sum >= wanted
            });

            weights.truncate(enough.map_or(weights.len(), |last| last + 1));
        }

        weights.truncate(self.top_k.unwrap_or(weights.len()));
        if let Some(min_p) = self.min_p {
            let unlikely = weights.iter().position(|weight| *weight < min_p);
            weights.truncate(unlikely.unwrap_or(weights.len()));
        }

        let mut left = u * weights.iter().sum::<f64>();
        for (token, weight) in order.iter().zip(&weights) {
            left -= weight;
            if left < 0.0 {
                return *token;
            }
        }
        order[weights.len() - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(
        logits: &[f64],
        temperature: f64,
        top_k: Option<usize>,
        top_p: Option<f64>,
        u: f64,
    ) -> usize {
        let of = Sampling { temperature, top_k, top_p, ..Sampling::GREEDY };
        of.pick(logits, &[], u)
    }

    #[test]
    fn tokens_are_picked_by_their_probability() {
        let logits = [1.0, 3.0, 2.0];
        assert_eq!(pick(&logits, 0.0, None, None, 0.99), 1);
        assert_eq!(pick(&logits, 1.0, Some(1), None, 0.99), 1);
        let e = std::f64::consts::E;
        let total = e + e.powi(2) + e.powi(3);
        let (first, second) = (e.powi(3) / total, e.powi(2) / total);
        assert_eq!(pick(&logits, 1.0, None, None, first - 1e-9), 1);
        assert_eq!(pick(&logits, 1.0, None, None, first + 1e-9), 2);
        assert_eq!(pick(&logits, 1.0, None, None, first + second + 1e-9), 0);
        assert_eq!(pick(&logits, 1.0, Some(2), None, 0.999), 2);
        // 0.665, 0.245, 0.090: the nucleus of 0.6 is one token, that of 0.7 two.
        assert_eq!(pick(&logits, 1.0, None, Some(0.6), 0.999), 1);
        assert_eq!(pick(&logits, 1.0, None, Some(0.7), 0.999), 2);
        assert_eq!(pick(&logits, 1.0, None, Some(1.0), 0.999), 0);
    }

    #[test]
    fn unlikely_tokens_are_left_out() {
        let logits = [1.0, 3.0, 2.0];
        let of = |min_p: f64| Sampling { temperature: 1.0, min_p: Some(min_p), ..Sampling::GREEDY };
        // 1, exp(-1) = 0.37 and exp(-2) = 0.14 times the likeliest.
        assert_eq!(of(0.1).pick(&logits, &[], 0.9999), 0);
        assert_eq!(of(0.2).pick(&logits, &[], 0.9999), 2);
        assert_eq!(of(0.5).pick(&logits, &[], 0.9999), 1);
        // At a temperature of 2 they are its root.
        let warm = Sampling { temperature: 2.0, ..of(0.2) };
        assert_eq!(warm.pick(&logits, &[], 0.9999), 0);
    }

    #[test]
    fn what_stands_in_the_text_is_less_likely() {
        let of = |repetition_penalty| Sampling { repetition_penalty, ..Sampling::GREEDY };
        assert_eq!(of(1.0).pick(&[1.0, 3.0, 2.0], &[1], 0.0), 1);
        assert_eq!(of(1.6).pick(&[1.0, 3.0, 2.0], &[1, 7], 0.0), 2);
        assert_eq!(of(1.6).pick(&[-1.0, -1.5, -9.0], &[0, 0], 0.0), 1, "negative scores fall");
        assert_eq!(of(1.4).pick(&[-1.0, -1.5, -9.0], &[0, 0], 0.0), 0, "once a token");
    }

    #[test]
    fn what_makes_no_distribution_is_refused() {
        let table = [
            (Sampling { temperature: -1.0, ..Sampling::GREEDY }, "--temperature"),
            (Sampling { temperature: f64::NAN, ..Sampling::GREEDY }, "--temperature"),
            (Sampling { top_k: Some(0), ..Sampling::GREEDY }, "--top-k"),
            (Sampling { top_p: Some(0.0), ..Sampling::GREEDY }, "--top-p"),
            (Sampling { min_p: Some(1.5), ..Sampling::GREEDY }, "--min-p"),
            (Sampling { repetition_penalty: 0.0, ..Sampling::GREEDY }, "--repetition-penalty"),
        ];
        for (sampling, option) in table {
            let error = sampling.check().unwrap_err().to_string();
            assert!(error.contains(&format!("`{option}`")), "{error}");
        }
        assert!(Sampling::GREEDY.check().is_ok());
    }
}
