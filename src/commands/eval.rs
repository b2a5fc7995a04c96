//! `ouroboros eval`: loss of saved weights on held-out text.

use tch::Tensor;

use crate::checkpoint::Checkpoint;
use crate::cli::EvalArgs;
use crate::config::{Config, HeldOut};
use crate::data::{self, Corpus, held_out, held_out_windows};
use crate::error::{Error, Result};
use crate::metrics::thousands;
use crate::model::{Dimensions, Memory, Stack};
use crate::setup::check_settings;

/// Rows of one forward.
const ROWS: usize = 16;

/// Prints loss, bits per byte and perplexity.
///
/// # Errors
/// Weights or text that cannot be used.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let config = Config::parse(&checkpoint.manifest.config.to_toml(), &args.set)?;
    check_settings(&config)?;
    tch::set_num_threads(config.threads as i32);
    let (model, weights) = load(&checkpoint, &config)?;
    let sequence = config.data.sequence;
    let (text, floor) = match &config.data.held_out {
        HeldOut::File(path) => (Corpus::open_text(path, sequence)?, None),
        HeldOut::Fraction(_) => {
            let corpus = Corpus::open(&config.data, config.seed)?;
            (corpus.held_out, corpus.floor)
        }
    };
    let windows = held_out_windows(&text, sequence);
    let wanted = config.eval.as_ref().and_then(|eval| eval.tokens).map_or(windows, |n| n.div_ceil(sequence));
    let windows = windows.min(wanted.max(1));
    let mut sum = 0.0;
    for start in (0..windows).step_by(ROWS) {
        let batch = held_out(&text, sequence, start..(start + ROWS).min(windows));
        let mean = tch::no_grad(|| -> Result<f64> {
            let hidden = model.forward(&weights, &batch.tokens, &mut Memory::default(), None)?;
            Ok(model.loss(&weights, &hidden, &batch.targets, None)?.f_double_value(&[])?)
        })?;
        sum += mean * batch.targets.numel() as f64;
    }
    let loss = sum / (windows * sequence) as f64;
    println!("weights         {} (step {})", checkpoint.path.display(), checkpoint.manifest.step);
    println!("tokens          {}", thousands((windows * sequence) as u64));
    println!("loss            {loss:.4} nats per byte");
    println!("bits per byte   {:.4}", loss / std::f64::consts::LN_2);
    println!("perplexity      {:.3} per byte", loss.exp());
    if let Some(floor) = floor {
        println!(
            "entropy floor   {floor:.4} nats per byte; the loss is {:.1} % above it",
            (loss / floor - 1.0) * 100.0
        );
    }
    Ok(())
}

/// The whole model with its saved weights.
///
/// # Errors
/// [`Error::Checkpoint`] if they do not fit the config.
pub(super) fn load(checkpoint: &Checkpoint, config: &Config) -> Result<(Stack, Vec<Tensor>)> {
    let saved = &checkpoint.manifest.config;
    if config.data.sequence > saved.data.sequence {
        let remedy = format!("the model has positions for {} tokens only", saved.data.sequence);
        return Err(Error::config("data.sequence", config.data.sequence, remedy));
    }
    let dimensions = Dimensions::new(&config.model, data::VOCABULARY, saved.data.sequence);
    let model = Stack::new(&dimensions, 0..dimensions.layers);
    let weights = checkpoint.values(model.parameters())?;
    Ok((model, weights))
}
