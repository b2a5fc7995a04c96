//! Whether every setting can be used by itself, and with those that it belongs to.

use crate::config::{Arch, Config, HeldOut, ModelConfig, Norm, OnNonfinite, Order, Tokenizer};
use crate::error::{Error, Result};
use crate::grid::Placement;
use crate::optim;
use crate::schedule::Tie;

/// Sizes of a bucket of gradients.
const BUCKET_KIB: std::ops::RangeInclusive<usize> = 1..=1 << 20;

/// Checks every setting by itself.
///
/// # Errors
/// [`Error::Config`] for the first that cannot be used.
pub fn check_settings(config: &Config) -> Result<()> {
    check_numbers(config)?;
    check_model(config)?;
    optim::check(&config.optimizer)?;
    check_data(config)
}

/// Whether K stages can be placed so; what to do if not.
///
/// # Errors
/// The remedy.
pub fn check_placement(placement: Placement, stages: usize) -> std::result::Result<(), String> {
    match placement {
        Placement::Ring if stages < 3 => {
            Err(format!("needs at least 3 stages, there are {stages}; take more or `line`"))
        }
        _ => Ok(()),
    }
}

fn at_least_one(setting: &str, value: usize) -> Result<()> {
    if value >= 1 { Ok(()) } else { Err(Error::config(setting, value, "must be at least 1")) }
}

fn within(setting: &str, value: f64, good: bool, remedy: &str) -> Result<()> {
    if good && value.is_finite() { Ok(()) } else { Err(Error::config(setting, value, remedy)) }
}

fn check_numbers(config: &Config) -> Result<()> {
    at_least_one("steps", config.steps)?;
    at_least_one("batch", config.batch)?;
    at_least_one("microbatches", config.microbatches)?;
    at_least_one("slack", config.slack)?;
    at_least_one("threads", config.threads)?;
    if !BUCKET_KIB.contains(&config.bucket_kib) {
        let remedy = format!("from {} to {} KiB", BUCKET_KIB.start(), BUCKET_KIB.end());
        return Err(Error::config("bucket_kib", config.bucket_kib, remedy));
    }
    let stall = config.stall_seconds;
    within("stall_seconds", stall, (1.0..=1e6).contains(&stall), "from 1 to a million seconds")?;
    if config.on_nonfinite == OnNonfinite::Skip && config.model.mem_len > 0 {
        let remedy = "a memory would carry what is not finite into the next steps; take \"stop\" or model.mem_len = 0";
        return Err(Error::config("on_nonfinite", "skip", remedy));
    }
    at_least_one("verify_every", config.verify_every.unwrap_or(1))?;
    at_least_one("grid.stages", config.grid.stages)?;
    at_least_one("grid.replicas", config.grid.replicas)?;
    check_placement(config.grid.placement, config.grid.stages)
        .map_err(|remedy| Error::config("grid.placement", "`ring`", remedy))?;
    if let Some(at) = config.sync_at.iter().find(|at| **at >= config.steps) {
        return Err(Error::config("sync_at", at, format!("must be below steps = {}", config.steps)));
    }
    let saves = &config.checkpoint;
    at_least_one("checkpoint.every", saves.every.unwrap_or(1))?;
    at_least_one("checkpoint.keep_last", saves.keep_last)?;
    at_least_one("checkpoint.keep_every", saves.keep_every.unwrap_or(1))?;
    match &config.eval {
        Some(eval) => {
            at_least_one("eval.every", eval.every)?;
            at_least_one("eval.tokens", eval.tokens.unwrap_or(1))?;
            at_least_one("eval.sequence", eval.sequence.unwrap_or(1))?;
            at_least_one("eval.batch", eval.batch.unwrap_or(1))
        }
        None => Ok(()),
    }
}

fn check_model(config: &Config) -> Result<()> {
    let model = &config.model;
    at_least_one("model.layers", model.layers)?;
    at_least_one("model.d_model", model.d_model)?;
    at_least_one("model.heads", model.heads)?;
    at_least_one("model.d_ff", model.d_ff)?;
    if !model.d_model.is_multiple_of(model.heads) {
        let remedy = format!("must be a multiple of model.heads = {}", model.heads);
        return Err(Error::config("model.d_model", model.d_model, remedy));
    }
    for (setting, rate) in [("model.dropout", model.dropout), ("model.attention_dropout", model.attention_dropout)] {
        within(setting, rate, (0.0..1.0).contains(&rate), "must be at least 0 and below 1")?;
    }
    check_widths(model)?;
    check_arch(config)?;
    if config.grid.stages > model.layers {
        let remedy = format!("at most model.layers = {} stages, one layer each", model.layers);
        return Err(Error::config("grid.stages", config.grid.stages, remedy));
    }
    Ok(())
}

/// Whether the clusters of the vocabulary fit it.
///
/// # Errors
/// [`Error::Config`] about `model.cutoffs`.
pub fn check_cutoffs(model: &ModelConfig, vocabulary: usize) -> Result<()> {
    let cutoffs = &model.cutoffs;
    let rising = cutoffs.windows(2).all(|pair| pair[0] < pair[1]);
    if rising && cutoffs.first() != Some(&0) && cutoffs.last().is_none_or(|last| *last < vocabulary) {
        return Ok(());
    }
    let remedy = format!("rising numbers above 0 and below the size of the vocabulary, {vocabulary}");
    Err(Error::config("model.cutoffs", format!("{cutoffs:?}"), remedy))
}

/// Widths of embedding and head, and what a tie needs of them.
fn check_widths(model: &ModelConfig) -> Result<()> {
    at_least_one("model.div_val", model.div_val)?;
    let widths = [("model.embedding_width", model.embedding_width), ("model.head_width", model.head_width)];
    for (setting, width) in widths {
        at_least_one(setting, width.unwrap_or(1))?;
    }
    if model.div_val > 1 && model.cutoffs.is_empty() {
        return Err(Error::config("model.div_val", model.div_val, "means something with model.cutoffs only"));
    }
    let (embedding, head) = (model.embedding_width.unwrap_or(model.d_model), model.head_width.unwrap_or(model.d_model));
    let (narrowest, clusters) = (embedding.min(head), model.cutoffs.len() as u32);
    if model.div_val.checked_pow(clusters).is_none_or(|scale| scale > narrowest) {
        let remedy = format!("{clusters} further clusters leave less than one value of a width of {narrowest}");
        return Err(Error::config("model.div_val", model.div_val, remedy));
    }
    if model.tie != Tie::Untied && embedding != head {
        let found = format!("{embedding}, and a head_width of {head}");
        let remedy = "a tied table has one width: make them equal, or set model.tie = \"none\"";
        return Err(Error::config("model.embedding_width", found, remedy));
    }
    Ok(())
}

/// Settings that only one architecture has, and those that a memory needs.
fn check_arch(config: &Config) -> Result<()> {
    let model = &config.model;
    if model.arch == Arch::Transformer {
        let found = [
            ("model.mem_len", (model.mem_len > 0).then(|| model.mem_len.to_string())),
            ("model.clamp_len", model.clamp_len.map(|clamp| clamp.to_string())),
            ("model.same_length", model.same_length.then(|| "true".to_owned())),
            ("model.norm", model.norm.filter(|norm| *norm == Norm::Post).map(|_| "post".to_owned())),
            ("model.attention_dropout", (model.attention_dropout > 0.0).then(|| model.attention_dropout.to_string())),
            ("eval.mem_len", (config.eval_mem_len() > 0).then(|| config.eval_mem_len().to_string())),
        ];
        for (setting, found) in found {
            if let Some(found) = found {
                return Err(Error::config(setting, found, "only model.arch = \"transformer-xl\" has it; leave it out"));
            }
        }
        if config.eval_sequence() > config.data.sequence {
            let remedy = format!("the model has positions for data.sequence = {} tokens only", config.data.sequence);
            return Err(Error::config("eval.sequence", config.eval_sequence(), remedy));
        }
    }
    let memory = model.mem_len.max(config.eval_mem_len());
    if memory > 0 && config.order() == Order::Shuffled {
        let remedy = "a memory of shuffled windows means nothing; take data.order = \"streams\" or mem_len = 0";
        return Err(Error::config("model.mem_len", format!("{memory} with data.order = \"shuffled\""), remedy));
    }
    let streams = config.eval.as_ref().and_then(|eval| eval.batch);
    if let Some(streams) = streams.filter(|_| config.order() == Order::Shuffled) {
        return Err(Error::config("eval.batch", streams, "counts streams; windows need none, so leave it out"));
    }
    if model.same_length && (model.mem_len == 0 || config.eval_mem_len() == 0) {
        return Err(Error::config("model.same_length", "true with mem_len = 0", "every query looks at mem_len keys"));
    }
    Ok(())
}

fn check_data(config: &Config) -> Result<()> {
    let data = &config.data;
    at_least_one("data.sequence", data.sequence)?;
    at_least_one("data.min_count", data.min_count)?;
    if data.tokenizer != Tokenizer::Words {
        let remedy = "only data.tokenizer = \"words\" has it; leave it out";
        if data.min_count > 1 {
            return Err(Error::config("data.min_count", data.min_count, remedy));
        }
        if let Some(path) = &data.vocabulary {
            return Err(Error::config("data.vocabulary", path.display(), remedy));
        }
    }
    let named =
        usize::from(data.path.is_some()) + usize::from(data.paths.is_some()) + usize::from(data.synthetic.is_some());
    if named > 1 {
        return Err(Error::config("data", "more than one of path, paths, synthetic", "keep one of them"));
    }
    match data.held_out {
        HeldOut::Fraction(f) => within("data.held_out", f, f > 0.0 && f < 1.0, "a fraction lies between 0 and 1"),
        HeldOut::File(_) => Ok(()),
    }
}
