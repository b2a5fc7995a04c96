//! The control plane: what a run does besides moving tensors.
//!
//! ```text
//! every rank                                             rank 0
//! worker, writer, signals --- Report ------------------> coordinator: metrics, commits of states, watchdog
//!   heartbeat: what is being done                          |
//!   gate: the first step that may not begin yet  <-- Control: limit, stop, ask for a heartbeat, end
//!   flight recorder: the last words of a rank that is killed, which a neighbour reads (post-mortem)
//! ```

mod early;
mod flight_recorder;
mod gate;
mod heartbeat;
mod post_mortem;
mod protocol;
mod signals;
mod stop;

pub use early::not_expected;
pub use flight_recorder::FlightRecorder;
pub use gate::{Gate, GateDecision};
pub use heartbeat::{Activity, Heartbeat, HeartbeatReport};
pub use post_mortem::{Card, Neighbours};
pub use protocol::{Control, Controls, Report, Reporter};
pub use signals::{SignalWatch, survive_file_limit};
pub use stop::{Limits, STOPPED, Watch, left_of_job, limit};

use crate::emulated_compute::EmulatedCompute;
use crate::inject::Injection;
use crate::trace::Window;

/// How a run differs from plain training.
#[derive(Debug, Clone, Default)]
pub struct Mode {
    pub inject: Option<Injection>,
    /// Only measures: nothing is saved.
    pub bench: bool,
    pub emulated: Option<EmulatedCompute>,
    /// Heed signals, which belong to the whole process.
    pub signals: bool,
    pub limits: Limits,
    /// Steps that are traced.
    pub trace: Option<Window>,
}
