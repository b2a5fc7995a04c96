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

use crate::data::{Measure, Unit};

/// What a loss in nats per token is called in the field: bits per byte or character, perplexity per
/// word or token; and bits per byte of the original text, which compare between tokenizers.
pub fn quality(loss: f64, measure: Measure) -> String {
    let unit = measure.unit.name();
    let mut told: Vec<String> = Vec::new();
    told.extend(measure.bits_per_unit(loss).map(|bits| format!("{bits:.4} bits per {unit}")));
    told.extend(measure.perplexity(loss).map(|ppl| format!("perplexity {ppl:.2} per {unit}")));
    if measure.unit != Unit::Bytes {
        told.extend(measure.bits_per_byte(loss).map(|bits| format!("{bits:.4} bits per byte")));
    }
    told.join(", ")
}
