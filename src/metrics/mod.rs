//! What is measured of a run, and how it is shown: sinks of steps, evaluations, times and events, the
//! table of a benchmark, the summary.

mod bench;
mod events;
mod sink;
mod jsonl;
mod places;
mod progress;
mod prometheus;
mod summary;
mod records;
mod tensorboard;

pub use bench::Bench;
pub use events::{EventKind, EventLine, EventLog};
pub use jsonl::JsonLines;
pub use places::{PlaceRecord, Places, PlacesFile, Spent};
pub use progress::{Progress, thousands};
pub use prometheus::Prometheus;
pub use sink::{EvalLine, PlaceLine, Sink, StageStaleness, StalenessLine, StepLine};
pub use summary::{Summary, print_memory};
pub use tensorboard::TensorBoard;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::data::{Measure, Unit};

/// Seconds since 1970.
pub fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Minutes and seconds, or hours.
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match seconds {
        3600.. => format!("{}:{:02}:{:02} h", seconds / 3600, seconds / 60 % 60, seconds % 60),
        _ => format!("{}:{:02}", seconds / 60, seconds % 60),
    }
}

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
