//! How a stage works.

use super::MicrobatchId;
use crate::config::{Config, OnNonfinite, Recompute};
use crate::model::Dropout;
use crate::number::Readback;

/// What a stage has of the config.
#[derive(Debug, Clone)]
pub struct Settings {
    pub recompute: Recompute,
    /// Rates of dropout: of hidden states, of the attention's probabilities.
    pub dropout: f64,
    pub attention_dropout: f64,
    pub seed: u64,
    /// Tokens that the layers remember, in training and in evaluation.
    pub mem_len: usize,
    pub eval_mem_len: usize,
    /// m, and the values of a bucket of gradients; none where nothing is reduced.
    pub microbatches: usize,
    pub bucket: Option<usize>,
    /// What an output that is not finite does.
    pub on_nonfinite: OnNonfinite,
    /// Where losses are read later nothing is known of an output when it is sent.
    pub readback: Readback,
}

impl Settings {
    /// Those of a config.
    pub fn new(config: &Config, readback: Readback) -> Settings {
        Settings {
            readback,
            on_nonfinite: config.on_nonfinite,
            recompute: config.recompute,
            dropout: config.model.dropout,
            attention_dropout: config.model.attention_dropout,
            seed: config.seed,
            mem_len: config.model.mem_len,
            eval_mem_len: config.eval_mem_len(),
            microbatches: config.microbatches,
            bucket: (config.grid.replicas > 1)
                .then_some(config.bucket_kib * 1024 / size_of::<f32>()),
        }
    }

    /// Dropout of one microbatch; none if both rates are 0.
    pub fn dropout(&self, slot: MicrobatchId, replica: usize) -> Option<Dropout> {
        let MicrobatchId { step, microbatch } = slot;
        let Settings { dropout: rate, attention_dropout: attention_rate, seed, .. } = *self;
        let any = rate > 0.0 || attention_rate > 0.0;
        any.then_some(Dropout { rate, attention_rate, seed, step, replica, microbatch })
    }
}
