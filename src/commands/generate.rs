//! `ouroboros generate`: continues a text, one token at a time.

use std::io::Write;

use tch::{Kind, Tensor};

use super::eval::load;
use crate::checkpoint::Checkpoint;
use crate::cli::GenerateArgs;
use crate::error::{Error, Result};
use crate::model::Memory;
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
    if args.prompt.is_empty() {
        return Err(Error::config("--prompt", "an empty text", "give at least one character"));
    }
    tch::set_num_threads(args.threads.max(1) as i32);
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let config = checkpoint.manifest.config.clone();
    let (model, weights) = load(&checkpoint, &config)?;
    let mut rng = random::sampling(args.seed);
    let mut text: Vec<i64> = args.prompt.bytes().map(i64::from).collect();
    for _ in 0..args.tokens {
        let window = &text[text.len().saturating_sub(config.data.sequence)..];
        let tokens = Tensor::f_from_slice(window)?.f_unsqueeze(0)?;
        let logits = tch::no_grad(|| -> Result<Tensor> {
            let hidden = model.forward(&weights, &tokens, &mut Memory::new(0), None)?;
            model.log_probabilities(&weights, &hidden)
        })?;
        let last: Vec<f64> =
            logits.f_select(0, 0)?.f_select(0, -1)?.f_to_kind(Kind::Double)?.try_into().map_err(Error::from)?;
        text.push(pick(&last, args.temperature, args.top_k, random::unit(&mut rng)) as i64);
    }
    let bytes: Vec<u8> = text.into_iter().map(|token| token as u8).collect();
    let mut out = std::io::stdout().lock();
    let printed = writeln!(out, "{}", String::from_utf8_lossy(&bytes)).and_then(|()| out.flush());
    printed.map_err(|error| Error::Internal(format!("standard output: {error}")))
}

/// The token at `u` in [0, 1) of the distribution softmax(logits / temperature) over the `top_k` likeliest.
fn pick(logits: &[f64], temperature: f64, top_k: Option<usize>, u: f64) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    if temperature == 0.0 {
        return order[0];
    }
    order.truncate(top_k.unwrap_or(order.len()));
    let weights: Vec<f64> = order.iter().map(|i| ((logits[*i] - logits[order[0]]) / temperature).exp()).collect();
    let mut left = u * weights.iter().sum::<f64>();
    for (token, weight) in order.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return *token;
        }
    }
    order[order.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_picked_by_their_probability() {
        let logits = [1.0, 3.0, 2.0];
        assert_eq!(pick(&logits, 0.0, None, 0.99), 1);
        assert_eq!(pick(&logits, 1.0, Some(1), 0.99), 1);
        let e = std::f64::consts::E;
        let total = e + e.powi(2) + e.powi(3);
        let (first, second) = (e.powi(3) / total, e.powi(2) / total);
        assert_eq!(pick(&logits, 1.0, None, first - 1e-9), 1);
        assert_eq!(pick(&logits, 1.0, None, first + 1e-9), 2);
        assert_eq!(pick(&logits, 1.0, None, first + second + 1e-9), 0);
        assert_eq!(pick(&logits, 1.0, Some(2), 0.999), 2);
    }
}
