//! Sizes beyond which a number is a mistake: sums and products of what is below stay far from the
//! end of 64 bits, and nothing is asked of memory that no machine has.

use super::{Config, LayersPerStage};
use crate::error::{Error, Result};

/// Steps, and what counts them or tokens.
const COUNT: usize = 1 << 50;
/// Tokens of a row, rows of a batch, streams.
const ROWS: usize = 1 << 24;
/// Widths of a model.
const WIDTH: usize = 1 << 20;
/// Layers, stages, and what delays them.
const DEPTH: usize = 1 << 12;
const REPLICAS: usize = 1 << 16;
/// Threads of a rank.
const THREADS: usize = 1 << 10;
/// Bytes of the synthetic text, which is made in memory.
const TEXT: usize = 1 << 32;

/// Refuses what is larger.
///
/// # Errors
/// [`Error::Config`] for the first number that is.
pub(super) fn check(config: &Config) -> Result<()> {
    let Config { grid, model, data, .. } = config;
    let eval = config.eval.as_ref();
    let table = [
        ("steps", Some(config.steps), COUNT),
        ("sync_steps", Some(config.sync_steps), COUNT),
        ("verify_every", config.verify_every, COUNT),
        ("staleness.every", config.staleness.every, COUNT),
        ("batch", Some(config.batch), ROWS),
        ("microbatches", Some(config.microbatches), ROWS),
        ("slack", Some(config.slack), DEPTH),
        ("threads", Some(config.threads), THREADS),
        ("grid.stages", Some(grid.stages), DEPTH),
        ("grid.replicas", Some(grid.replicas), REPLICAS),
        ("grid.delays", grid.delays.iter().flatten().max().copied(), DEPTH),
        ("grid.layers_per_stage", most(&grid.layers_per_stage), DEPTH),
        ("model.layers", Some(model.layers), DEPTH),
        ("model.d_model", Some(model.d_model), WIDTH),
        ("model.heads", Some(model.heads), WIDTH),
        (
            "model.heads times model.d_head",
            model.d_head.map(|width| width.saturating_mul(model.heads)),
            WIDTH,
        ),
        ("model.kv_heads", model.kv_heads, WIDTH),
        ("model.d_ff", Some(model.d_ff), WIDTH),
        ("model.vocabulary", model.vocabulary, ROWS),
        ("model.positions", model.positions, ROWS),
        ("model.loss_chunk_mib", Some(model.loss_chunk_mib), WIDTH),
        ("model.embedding_width", model.embedding_width, WIDTH),
        ("model.head_width", model.head_width, WIDTH),
        ("model.mem_len", Some(model.mem_len), ROWS),
        ("model.clamp_len", model.clamp_len, ROWS),
        ("data.sequence", Some(data.sequence), ROWS),
        ("data.vocabulary_size", data.vocabulary_size, ROWS),
        ("optimizer.decay_steps", config.optimizer.common.decay_steps, COUNT),
        ("data.synthetic", data.synthetic, TEXT),
        ("optimizer.warmup", Some(config.optimizer.common.warmup), COUNT),
        ("eval.every", eval.map(|eval| eval.every), COUNT),
        ("eval.tokens", eval.and_then(|eval| eval.tokens), COUNT),
        ("eval.sequence", eval.and_then(|eval| eval.sequence), ROWS),
        ("eval.mem_len", eval.and_then(|eval| eval.mem_len), ROWS),
        ("eval.batch", eval.and_then(|eval| eval.batch), ROWS),
        ("checkpoint.every", config.checkpoint.every, COUNT),
        ("checkpoint.keep_last", Some(config.checkpoint.keep_last), COUNT),
        ("checkpoint.keep_every", config.checkpoint.keep_every, COUNT),
    ];

    match table.into_iter().find(|(_, value, most)| value.is_some_and(|value| value > *most)) {
        Some((setting, Some(value), most)) => Err(Error::config(
            setting,
            value,
            format!("more than {most} is a mistake, or beyond any machine"),
        )),
        _ => Ok(()),
    }
}

fn most(layers: &LayersPerStage) -> Option<usize> {
    match layers {
        LayersPerStage::Balanced => None,
        LayersPerStage::Counts(counts) => counts.iter().max().copied(),
    }
}
