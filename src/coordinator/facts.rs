//! What a run is, for whoever looks at it later: it stands in the event of its start.

use serde_json::{Value, json};

use super::Ranks;
use crate::memory::Prediction;
use crate::setup::Setup;

/// What is made of a setup.
#[derive(Debug, Clone, Copy)]
pub struct Made {
    pub oracle: bool,
    pub bench: bool,
    pub emulated: bool,
}

/// The facts of a run.
pub fn facts(setup: &Setup, ranks: Ranks, made: Made) -> Value {
    let config = &setup.config;
    let (measure, text) = (setup.corpus.measure(), setup.corpus.fingerprint());
    let predicted = |rank| Prediction::new(setup, rank).of_device(setup);
    json!({
        "program": concat!("ouroboros ", env!("CARGO_PKG_VERSION")),
        "name": config.name,
        "grid": setup.grid.to_string(),
        "stages": setup.grid.stages,
        "replicas": setup.grid.replicas,
        "ring": setup.grid.devices() < setup.grid.stages,
        "places": (0..setup.grid.size()).map(|rank| setup.grid.name(rank)).collect::<Vec<_>>(),
        "threads": ranks == Ranks::Threads,
        "oracle": made.oracle,
        "bench": made.bench,
        "emulated": made.emulated,
        "schedule": config.schedule,
        "microbatches": config.microbatches,
        "delays": setup.schedule.delays,
        "ahead": setup.schedule.ahead,
        "start": setup.start(),
        "steps": config.steps,
        "tokens_a_step": config.batch * config.data.sequence,
        "parameters": setup.parameters(),
        "unit": measure.unit.name(),
        "bytes_per_token": measure.bytes_per_token,
        "train_bytes_per_token": setup.corpus.train_bytes_per_token(),
        "vocabulary": setup.corpus.vocabulary.len(),
        "tokens": text.vocabulary,
        "train": text.train,
        "held_out": text.held_out,
        "device": if setup.device.is_cuda() { "cuda" } else { "cpu" },
        "floor": setup.corpus.held_out.floor,
        "predicted_bytes": (0..setup.grid.size()).map(predicted).collect::<Vec<_>>(),
    })
}
