//! Whether the settings of a run can be used: each section by itself, then those that belong
//! together.

use super::{Config, OnNonfinite, SinkKind, bounds};
use crate::data::Order;
use crate::error::{Error, Result};
use crate::files;
use crate::model::Architecture;
use crate::optim;

/// Sizes of a bucket of gradients.
const BUCKET_KIB: std::ops::RangeInclusive<usize> = 1..=1 << 20;

/// Checks everything that can be known without the corpus.
///
/// # Errors
/// [`Error::Config`] for the first setting that cannot be used.
pub(super) fn check(config: &Config) -> Result<()> {
    bounds::check(config)?;
    check_run(config)?;
    config.grid.check()?;
    if let Some(at) = config.sync_at.iter().find(|at| **at >= config.steps) {
        return Err(Error::config(
            "sync_at",
            at,
            format!("must be below steps = {}", config.steps),
        ));
    }

    config.checkpoint.check()?;
    config.eval.as_ref().map_or(Ok(()), |eval| eval.check())?;

    config.model.check()?;
    check_evaluation(config)?;
    check_memory(config)?;
    check_decay(config)?;
    check_documents(config)?;
    if config.grid.stages > config.model.layers {
        let remedy =
            format!("at most model.layers = {} stages, one layer each", config.model.layers);
        return Err(Error::config("grid.stages", config.grid.stages, remedy));
    }

    if config.model.shared_biases && config.grid.stages > 1 {
        let remedy = "one stage's layers can share them; with several it would be one parameter with as many delays";
        return Err(Error::config(
            "model.shared_biases",
            format!("true with {} stages", config.grid.stages),
            remedy,
        ));
    }

    optim::check(&config.optimizer)?;
    config.data.check()
}

/// The keys outside of sections.
fn check_run(config: &Config) -> Result<()> {
    check_name(&config.name)?;
    Error::unless_at_least_one("steps", config.steps)?;
    Error::unless_at_least_one("batch", config.batch)?;
    Error::unless_at_least_one("microbatches", config.microbatches)?;
    Error::unless_at_least_one("slack", config.slack)?;
    Error::unless_at_least_one("threads", config.threads)?;
    if !BUCKET_KIB.contains(&config.bucket_kib) {
        let remedy = format!("from {} to {} KiB", BUCKET_KIB.start(), BUCKET_KIB.end());
        return Err(Error::config("bucket_kib", config.bucket_kib, remedy));
    }

    let twice = |(i, kind): (usize, &SinkKind)| config.sink[..i].contains(kind);
    if config.sink.iter().enumerate().any(twice) {
        let found = serde_json::to_string(&config.sink).unwrap_or_default();
        return Err(Error::config("sink", found, "a sink stands there twice; name each once"));
    }

    let stall = config.stall_seconds;
    Error::unless(
        (1.0..=1e6).contains(&stall),
        "stall_seconds",
        stall,
        "from 1 to a million seconds",
    )?;

    if config.on_nonfinite == OnNonfinite::Skip && config.model.mem_len > 0 {
        let remedy = "a memory would carry what is not finite into the next steps; take \"stop\" or model.mem_len = 0";
        return Err(Error::config("on_nonfinite", "skip", remedy));
    }

    Error::unless_at_least_one("staleness.every", config.staleness.every.unwrap_or(1))?;
    Error::unless_at_least_one("verify_every", config.verify_every.unwrap_or(1))
}

/// A run's name is that of a folder in `runs/`.
pub(super) fn check_name(name: &str) -> Result<()> {
    if files::is_plain_name(name) {
        return Ok(());
    }
    Err(Error::config(
        "name",
        format!("`{}`", name.escape_debug()),
        "a folder of this name is made in runs/: write a plain name",
    ))
}

/// What an evaluation may ask of the model's family.
fn check_evaluation(config: &Config) -> Result<()> {
    let architecture = config.model.architecture();
    if config.eval_mem_len() > 0 && !architecture.has_memory {
        return Err(Architecture::refuse("eval.mem_len", config.eval_mem_len(), |other| {
            other.has_memory
        }));
    }

    let Some(positions) = config.model.learned_positions(config.data.sequence) else {
        return Ok(());
    };

    let of = if config.model.positions.is_some() { "model.positions" } else { "data.sequence" };
    let remedy = format!("the model has positions for {of} = {positions} tokens only");
    let read = [("data.sequence", config.data.sequence), ("eval.sequence", config.eval_sequence())];
    match read.into_iter().find(|(_, tokens)| *tokens > positions) {
        Some((setting, tokens)) => Err(Error::config(setting, tokens, remedy)),
        None => Ok(()),
    }
}

/// Whether the decay of the rate fits into the run.
fn check_decay(config: &Config) -> Result<()> {
    let common = &config.optimizer.common;
    let after = config.steps.saturating_sub(common.warmup);
    match common.decay_steps.filter(|steps| *steps > after) {
        Some(steps) => {
            let remedy = format!("{after} steps are left after the warm-up");
            Err(Error::config("optimizer.decay_steps", steps, remedy))
        }
        None => Ok(()),
    }
}

/// What documents of their own need of the model's family.
fn check_documents(config: &Config) -> Result<()> {
    if config.data.document_mask && config.model.architecture().has_memory {
        let remedy = "the memory of a transformer-xl goes over the borders of documents; take another model.arch, or leave it out";
        return Err(Error::config("data.document_mask", true, remedy));
    }
    Ok(())
}

/// What a memory needs of the order in which the text is read.
fn check_memory(config: &Config) -> Result<()> {
    let model = &config.model;
    let memory = model.mem_len.max(config.eval_mem_len());
    if memory > 0 && config.order() == Order::Shuffled {
        let remedy = "a memory of shuffled windows means nothing; take data.order = \"streams\" or mem_len = 0";
        return Err(Error::config(
            "model.mem_len",
            format!("{memory} with data.order = \"shuffled\""),
            remedy,
        ));
    }

    if config.order() == Order::Streams && !config.data.source.is_empty() {
        let remedy = "streams go through one text: take data.order = \"shuffled\" and no memory, or one data.path";
        let found = format!("{} sources with streams", config.data.source.len());
        return Err(Error::config("data.source", found, remedy));
    }

    let streams = config.eval.as_ref().and_then(|eval| eval.batch);
    if let Some(streams) = streams.filter(|_| config.order() == Order::Shuffled) {
        return Err(Error::config(
            "eval.batch",
            streams,
            "counts streams; windows need none, so leave it out",
        ));
    }

    if model.same_length && (model.mem_len == 0 || config.eval_mem_len() == 0) {
        return Err(Error::config(
            "model.same_length",
            "true with mem_len = 0",
            "every query looks at mem_len keys",
        ));
    }

    Ok(())
}
