//! What every place did, and when, in a file that Perfetto and `chrome://tracing` open: `--trace
//! FROM..TO`, or a file `TRACE` in the run's folder.
//!
//! ```text
//! a rank     worker    actions, waits, counters --.
//!            mpi       transfers, sums ------------+--> Tracer --> thread "trace" --> .trace-3-5.rank-1.part
//!            writer    states ---------------------'                                        |
//!                                                                                           | report: traced
//! rank 0     parts of all ranks, clocks aligned (Alignment) --> Chrome's JSON ---> trace-3-5.json.gz
//! ```
//!
//! A rank's window begins with its first action of step FROM and ends when all its stages have begun
//! a backward of step TO, and have the table of that step, so that it is whole: what other steps do meanwhile is in it too. While
//! there is no window a place reads one number before an action, and nothing else is done.
//!
//! On a GPU the moments are the device's: marks in its queues, read when it has come past them
//! ([`Later`]).
//!
//! The lanes of a place, as the file has them (pid = replica, tid = 4 * stage + lane):
//!
//! ```text
//! compute   F5.0 | wait | B2.0 | U2 | ...      every moment is somebody's: an action, a wait, idle
//! link      what the place sends, from its handing over until it has left
//! group     sums over the replicas
//! writer    states on their way to the disk
//! ```

mod alignment;
mod chrome;
mod event;
mod later;
mod moment;
mod part;
mod tracer;
mod window;

pub use alignment::{Alignment, Offset};
pub use chrome::{About, merge};
pub use event::{Count, Event, Lane, Span, Wait};
pub use later::Later;
pub use moment::{ClockName, Moment};
pub use part::{Part, remove_left, reserve};
pub use tracer::Tracer;
pub use window::Window;
