//! What is measured of a run, and how it is shown: sinks of steps and evaluations, the table of a
//! benchmark, the summary.

mod bench;
mod jsonl;
mod progress;
mod sink;
mod summary;

pub use bench::Bench;
pub use jsonl::JsonLines;
pub use progress::{Progress, thousands};
pub use sink::{EvalLine, Sink, StepLine};
pub use summary::{Summary, print_memory};

use crate::data::Tokenizer;

/// What a loss in nats per token is called in the field: bits per byte or character, perplexity per
/// word.
pub fn quality(loss: f64, tokenizer: Tokenizer) -> String {
    match tokenizer {
        Tokenizer::Words => format!("perplexity {:.2} per word", loss.exp()),
        _ => format!("{:.4} bits per {}", loss / std::f64::consts::LN_2, tokenizer.unit()),
    }
}
