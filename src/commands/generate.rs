//! `ouroboros generate`: continues a text, one token at a time.

use tch::{Kind, Tensor};

use super::eval::load;
use crate::checkpoint::Checkpoint;
use crate::cli::GenerateArgs;
use crate::data::Vocabulary;
use crate::error::{Error, Result};
use crate::model::{Memory, Stack};
use crate::random;

/// Prints the prompt and what follows it.
///
/// # Errors
/// Weights that cannot be used, or settings that make no distribution.
pub fn generate(args: &GenerateArgs) -> Result<()> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(Error::config("--temperature", args.temperature, "must be 0 or more"));
    }

    if args.top_k == Some(0) {
        return Err(Error::config("--top-k", 0, "must be at least 1"));
    }

    if let Some(top_p) = args.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
        return Err(Error::config("--top-p", top_p, "must be above 0 and at most 1"));
    }

    tch::set_num_threads(args.threads.max(1) as i32);
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let config = checkpoint.manifest.config.clone();
    let (model, weights) = load(&checkpoint, &config)?;
    let mut text = prompt(&checkpoint.vocabulary, args.prompt.as_deref())?;
    // A token is read by itself: with so much memory it sees what the last token of a segment has
    // seen in training.
    let more = if config.model.same_length || config.model.mem_len == 0 {
        0
    } else {
        config.data.sequence - 1
    };

    let memory = Memory::new(config.model.mem_len + more);
    let mut reader = Reader { model, weights, memory, read: 0, config: &config };
    let mut rng = random::sampling(args.seed);
    for _ in 0..args.tokens {
        let last = reader.next(&text)?;
        text.push(
            DeviceSetting { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p }
                .pick(&last, random::unit(&mut rng)) as i64,
        );
    }

    say!("{}", checkpoint.vocabulary.decode(&text));
    Ok(())
}

/// The tokens of the prompt.
fn prompt(vocabulary: &Vocabulary, given: Option<&str>) -> Result<Vec<i64>> {
    let tokens = match given {
        Some(text) => vocabulary.encode_prompt(text)?,
        None => vocabulary.encode_prompt("\n").unwrap_or_else(|_| vec![0]),
    };

    if tokens.is_empty() {
        let found = format!("`{}`", given.unwrap_or_default());
        return Err(Error::config(
            "--prompt",
            found,
            "give at least one character, or one word to a model of words",
        ));
    }

    Ok(tokens.into_iter().map(i64::from).collect())
}

/// A model that reads a text as it grows.
struct Reader<'a> {
    model: Stack,
    weights: Vec<Tensor>,
    memory: Memory,
    /// Tokens that the memory has taken in.
    read: usize,
    config: &'a crate::config::Config,
}

impl Reader<'_> {
    /// Logarithms of the probabilities of what follows `text`. A model with a memory reads what is
    /// new, a segment at a time; one without reads as much as it was trained on, each time.
    fn next(&mut self, text: &[i64]) -> Result<Vec<f64>> {
        let sequence = self.config.data.sequence;
        if self.config.model.mem_len == 0 {
            self.read = text.len().saturating_sub(sequence);
        }

        let mut last = None;
        while self.read < text.len() {
            let segment = &text[self.read..text.len().min(self.read + sequence)];
            last = Some(self.forward(segment)?);
            self.read += segment.len();
        }

        last.ok_or_else(|| Error::Internal("nothing new to read".into()))
    }

    fn forward(&mut self, segment: &[i64]) -> Result<Vec<f64>> {
        let tokens = Tensor::f_from_slice(segment)?.f_unsqueeze(0)?;
        tch::no_grad(|| {
            let hidden = self.model.forward(&self.weights, &tokens, &mut self.memory, None)?;
            let end = hidden.f_narrow(1, segment.len() as i64 - 1, 1)?;
            let logits = self.model.log_probabilities(&self.weights, &end)?;
            logits.f_view([-1])?.f_to_kind(Kind::Double)?.try_into().map_err(Error::from)
        })
    }
}

/// How a token is chosen.
struct DeviceSetting {
    temperature: f64,
    /// Only among this many likeliest tokens.
    top_k: Option<usize>,
    /// Only among the fewest likeliest tokens that together have this probability (nucleus
    /// sampling, Holtzman et al. 2020), at the temperature.
    top_p: Option<f64>,
}

impl DeviceSetting {
    /// The token at `u` in [0, 1) of the distribution softmax(logits / temperature), cut as asked
    /// for.
    fn pick(&self, logits: &[f64], u: f64) -> usize {
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
        DeviceSetting { temperature, top_k, top_p }.pick(logits, u)
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
}
