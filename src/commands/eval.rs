//! `ouroboros eval`: loss of saved weights on held-out text.

use std::ops::Range;

use tch::Tensor;

use crate::bar::Bar;
use crate::checkpoint::Checkpoint;
use crate::cli::EvalArgs;
use crate::config::Config;
use crate::data::{Corpus, Order, Tokens, Unit};
use crate::device::{self, DeviceSetting, Local};
use crate::error::{Error, Result};
use crate::generation::load;
use crate::metrics::thousands;
use crate::model::{Documents, Memory, ModelConfig, Stack};

/// Rows of one forward.
const ROWS: usize = 16;

/// Prints loss, bits per byte or character, and perplexity.
///
/// # Errors
/// Weights or text that cannot be used.
pub fn eval(args: &EvalArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    let config = config(&checkpoint, &args.set)?;
    config.check()?;
    let device = device::choose(config.device, Local::ALONE, false)?.device();
    tch::set_num_threads(config.threads as i32);
    let (model, weights) = load(&checkpoint, &config)?;
    let weights: Vec<Tensor> =
        weights.iter().map(|w| w.f_to_device(device)).collect::<std::result::Result<_, _>>()?;
    let vocabulary = &checkpoint.vocabulary;
    let sequence = config.eval_sequence();
    let text = Corpus::open_held_out(&config.data, config.seed, sequence, vocabulary)?;
    if config.data.document_mask && !text.tokens.has_documents() {
        let remedy = "nobody knows where this text's documents begin; set it to false, or name data.end_token";
        return Err(Error::config("data.document_mask", true, remedy));
    }

    let (sum, scored) = loss_sum(&model, &weights, &config, &text.tokens, vocabulary.len())?;
    let loss = sum / scored as f64;
    say!("weights         {} (step {})", checkpoint.path.display(), checkpoint.manifest.step);
    say!(
        "scored          {} of {} tokens",
        thousands(scored as u64),
        thousands(text.tokens.len() as u64)
    );
    let (measure, unit) = (text.measure(vocabulary), vocabulary.name());
    say!("loss            {loss:.6} nats per {unit}");
    if let Some(bits) = measure.bits_per_unit(loss) {
        say!("{:<15} {bits:.6}", format!("bits per {unit}"));
    }

    if let Some(bits) = measure.bits_per_byte(loss).filter(|_| vocabulary.unit() != Unit::Bytes) {
        say!("bits per byte   {bits:.6}");
    }

    say!("perplexity      {:.3} per {unit}", loss.exp());
    if let Some(floor) = text.floor {
        say!(
            "entropy floor   {floor:.4} nats per byte; the loss is {:.1} % above it",
            (loss / floor - 1.0) * 100.0
        );
    }

    Ok(())
}

/// The saved config with `sets` over it. The whole held-out text is read unless they say otherwise;
/// the model and its tokens are what they are.
fn config(checkpoint: &Checkpoint, sets: &[String]) -> Result<Config> {
    let saved = &checkpoint.manifest.config;
    let mut config = Config::parse(&saved.to_toml(), sets)?;
    // Where it was trained says nothing of this machine.
    if config.device == DeviceSetting::Cuda
        && !sets.iter().any(|set| set.trim_start().starts_with("device"))
    {
        config.device = DeviceSetting::Auto;
    }

    if let Some(eval) = config
        .eval
        .as_mut()
        .filter(|_| !sets.iter().any(|set| set.trim_start().starts_with("eval.tokens")))
    {
        eval.tokens = None;
    }

    let ModelConfig { mem_len, clamp_len, same_length, loss_chunk_mib, z_loss, .. } = config.model;
    let free = ModelConfig {
        mem_len,
        clamp_len,
        same_length,
        loss_chunk_mib,
        z_loss,
        ..saved.model.clone()
    };
    if config.model != free {
        let remedy = "of a saved model only mem_len, clamp_len, same_length, loss_chunk_mib and z_loss can be changed";
        return Err(Error::config("--set model", "another model than the saved one", remedy));
    }

    if config.data.tokenizer != saved.data.tokenizer {
        let found = config.data.tokenizer.as_ref().map_or("none".to_owned(), ToString::to_string);
        let unit = checkpoint.vocabulary.unit().word();
        let remedy = format!("the model was trained on {unit}; leave it out");
        return Err(Error::config("data.tokenizer", found, remedy));
    }

    Ok(config)
}

/// The losses of all targets, added up, and how many there are: windows one by one, or streams with
/// their memory.
fn loss_sum(
    model: &Stack,
    weights: &[Tensor],
    config: &Config,
    text: &Tokens,
    vocabulary: usize,
) -> Result<(f64, usize)> {
    let evaluation = config.reading().evaluation(text);
    let rows = evaluation.rows();
    let parts: Vec<(Range<usize>, usize)> = match evaluation.order {
        Order::Shuffled => {
            (0..rows).step_by(ROWS).map(|start| (start..(start + ROWS).min(rows), 0)).collect()
        }
        Order::Streams => (0..evaluation.segments()).map(|segment| (0..rows, segment)).collect(),
    };

    if evaluation.scored() == 0 {
        let remedy = "two are needed at least; change data.held_out";
        return Err(Error::config(
            "data.held_out",
            format!("{} tokens of text", text.len()),
            remedy,
        ));
    }

    let (mut sum, mut scored, mut memory) = (0.0, 0, Memory::new(config.eval_mem_len()));
    let bar = Bar::of_steps(parts.len() as u64, "evaluating");
    for (rows, segment) in parts {
        if evaluation.order == Order::Shuffled {
            memory = Memory::new(0);
        }

        if config.data.document_mask {
            let device = weights.first().map_or(tch::Device::Cpu, Tensor::device);
            let starts = evaluation.documents(text, rows.clone(), segment);
            memory = Memory::of_documents(Documents::new(&starts, device)?);
        }

        let batch = evaluation.batch(text, vocabulary, rows, segment)?;
        sum += tch::no_grad(|| -> Result<f64> {
            let hidden = model.forward(weights, &batch.tokens, &mut memory, None)?;
            Ok(model.losses(weights, &hidden, &batch.targets)?.f_double_value(&[])?)
        })?;
        scored += batch.counted;
        bar.advance(1);
    }

    Ok((sum, scored))
}
