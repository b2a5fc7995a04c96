//! How places talk: a `Link` to each neighbour of the pipeline, a `ReplicaGroup` over the replicas
//! of a stage.
//!
//! `local` carries tensors between threads of one process, `mpi` between processes, `nccl` between
//! GPUs with `mpi` beside it; `staged` lets GPUs go over `mpi` alone. All check every message
//! against the one that the schedule calls for.

pub mod local;
pub mod mpi;
pub mod nccl;
pub mod staged;
mod permits;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use tch::Tensor;

use crate::control::{Gate, Reporter};
use crate::error::{Error, Result};
use crate::grid::Place;
use crate::schedule::{Action, Op, Pass};
use crate::trace::{Event, Moment, Span};
use crate::wire::Wire;

/// What a message carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Down the pipeline.
    Activation,
    /// Up the pipeline.
    Gradient,
    /// The head's part of the tied table's gradient, from the last stage to the first.
    Part,
    /// The reduced sum of the parts, back.
    Sum,
}

impl Content {
    const ALL: [Content; 4] = [Content::Activation, Content::Gradient, Content::Part, Content::Sum];
}

/// The tag of a message: what it is, so that a wrong one is found where it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub content: Content,
    pub pass: Pass,
    pub step: usize,
    pub microbatch: usize,
    /// Rows, tokens, values: [b, T, D].
    pub shape: [i64; 3],
    pub wire: Wire,
    /// The values do not follow: they travel another way.
    pub payload_elsewhere: bool,
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let content = match self.content {
            Content::Activation => "activation",
            Content::Gradient => "gradient",
            Content::Part => "part of the table's gradient",
            Content::Sum => "gradient of the table",
        };

        let pass = if self.pass == Pass::Eval { " of evaluation" } else { "" };
        write!(
            f,
            "{content}{pass} {}.{} {} {:?}",
            self.step,
            self.microbatch,
            self.wire.word(),
            self.shape
        )
    }
}

impl Header {
    /// Words of the header on the wire.
    pub const WORDS: usize = 10;
    /// The first word: tells a header from stray bytes, and one layout of headers from the next.
    const MAGIC: i64 = 0x6f75_726f_0004;

    /// The header as it travels.
    pub fn encode(&self) -> [i64; Header::WORDS] {
        let [b, t, d] = self.shape;
        let content = self.content as i64;
        let pass = i64::from(self.pass == Pass::Eval);
        let (wire, beside) = (self.wire as i64, i64::from(self.payload_elsewhere));
        [
            Header::MAGIC,
            content,
            pass,
            self.step as i64,
            self.microbatch as i64,
            b,
            t,
            d,
            wire,
            beside,
        ]
    }

    /// The action by which a stage sends it.
    pub fn action(&self, stage: usize) -> Action {
        let op = match self.content {
            Content::Activation => Op::SendActivation,
            Content::Gradient => Op::SendGradient,
            Content::Part => Op::Part,
            Content::Sum => Op::SendTable,
        };

        Action { stage, op, pass: self.pass, step: self.step, microbatch: self.microbatch }
    }

    /// Bytes of its values on the wire.
    fn bytes(&self) -> u64 {
        (self.values().unwrap_or(0) * self.wire.bytes()) as u64
    }

    /// How many values it tells of; none if that is beyond any number.
    pub fn values(&self) -> Option<usize> {
        self.shape
            .iter()
            .try_fold(1usize, |values, n| values.checked_mul(usize::try_from(*n).ok()?))
    }

    /// The header out of what travelled, `None` if that is none.
    pub fn decode(words: [i64; Header::WORDS]) -> Option<Header> {
        let [magic, content, pass, step, microbatch, b, t, d, wire, beside] = words;
        let content = Content::ALL.get(usize::try_from(content).ok()?).copied()?;
        let pass = [Pass::Train, Pass::Eval].get(usize::try_from(pass).ok()?).copied()?;
        let wire = [Wire::F32, Wire::Bf16].get(usize::try_from(wire).ok()?).copied()?;
        let header = Header {
            content,
            pass,
            step: usize::try_from(step).ok()?,
            microbatch: usize::try_from(microbatch).ok()?,
            shape: [b, t, d],
            wire,
            payload_elsewhere: [false, true].get(usize::try_from(beside).ok()?).copied()?,
        };

        (magic == Header::MAGIC && header.shape.iter().all(|n| (0..1 << 31).contains(n)))
            .then_some(header)
    }
}

/// A message under way, of a trace.
struct Transfer {
    action: Action,
    bytes: u64,
    begin: Moment,
}

impl Transfer {
    /// A message of a stage is handed over.
    fn begin(header: &Header, stage: usize) -> Transfer {
        Transfer { action: header.action(stage), bytes: header.bytes(), begin: Moment::now() }
    }

    /// It has left.
    fn end(self) -> Event {
        let Transfer { action, bytes, begin } = self;
        Event::Transfer { action, bytes, span: Span { begin, end: Moment::now() } }
    }
}

/// The channel between two neighbours of a pipeline, both ways.
pub trait Link: Send {
    /// Hands a tensor to the transport. Waits only if the neighbour is further behind than any
    /// schedule of training allows.
    ///
    /// # Errors
    /// [`Error::Lost`] if the neighbour is gone.
    fn send(&mut self, header: Header, tensor: Tensor) -> Result<()>;

    /// Sleeps until the next message may be handed over without a wait; whether that was not at once.
    ///
    /// # Errors
    /// [`Error::Lost`] if the neighbour is gone.
    fn await_room(&mut self) -> Result<bool> {
        Ok(false) // Others have room always.
    }

    /// A message that will be received when those that are expected already have been: the
    /// transport may begin with it.
    fn prepare(&mut self, _expected: Header) -> Result<()> {
        Ok(()) // Most begin by themselves.
    }

    /// The next message from the neighbour, which must be `expected`. Sleeps while there is none.
    ///
    /// # Errors
    /// [`Error::Lost`] if the neighbour is gone, [`Error::Message`] if it sent something else.
    fn receive(&mut self, expected: Header) -> Result<Tensor>;
}

/// The R places of one stage.
///
/// A sum over the group has two halves: every value is added up by the replica that owns it
/// (`reduce`), and handed to the others (`gather`). Both one after the other are an `all_reduce`:
/// the same bits, since a sum is made in the order of the replicas by whoever owns it. All members
/// must start the same sums, in the same order.
///
/// A transport that cannot do the halves by themselves lets every replica own everything.
pub trait ReplicaGroup: Send {
    /// Memory for the gradient of the stage in which sums cost least, if there is such: zeros, the
    /// same every time.
    fn memory(&self) -> Option<Tensor> {
        None
    }

    /// Starts the sum of `flat` over the group, in place. Nobody may touch its memory before the
    /// reduction is over.
    ///
    /// # Errors
    /// [`Error::Lost`] if a member is gone.
    fn all_reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction>;

    /// The values of a buffer of `len` values that this replica owns.
    fn owned(&self, len: usize) -> Range<usize> {
        0..len
    }

    /// Starts the first half, in place: once it is over this replica has the sum of what it owns;
    /// the other values mean nothing.
    ///
    /// # Errors
    /// [`Error::Lost`] if a member is gone.
    fn reduce(&mut self, step: usize, flat: Tensor) -> Result<Reduction> {
        self.all_reduce(step, flat)
    }

    /// Starts the second half, in place: once it is over this replica has the values of all owners,
    /// rounded as they travel, like the owners themselves. A `reduce` of the same buffer must have
    /// been waited for.
    ///
    /// # Errors
    /// [`Error::Lost`] if a member is gone.
    fn gather(&mut self, _step: usize, _flat: Tensor) -> Result<Reduction> {
        Ok(Reduction::new(|| Ok(())))
    }
}

/// An all-reduce, or a half of one, under way; what it brings is there once it has been waited for.
#[must_use = "nothing is reduced before `wait` returns"]
pub struct Reduction(Box<dyn FnOnce() -> Result<()> + Send>);

impl Reduction {
    fn new(wait: impl FnOnce() -> Result<()> + Send + 'static) -> Reduction {
        Reduction(Box::new(wait))
    }

    /// Sleeps until the sum is there.
    ///
    /// # Errors
    /// [`Error::Lost`] if a member is gone.
    pub fn wait(self) -> Result<()> {
        (self.0)()
    }
}

/// What works beside the host for a rank.
pub trait AsyncTransfers: Send + Sync {
    /// What has gone wrong there meanwhile.
    fn check(&self) -> Result<()>;

    /// Waits until everything that was asked for is done.
    fn settle(&self) -> Result<()>;
}

/// What one place talks through.
#[derive(Default)]
pub struct Endpoints {
    pub upstream: Option<Box<dyn Link>>,
    pub downstream: Option<Box<dyn Link>>,
    /// To the other copy of the tied table, where that is on another device.
    pub twin: Option<Box<dyn Link>>,
    /// None where R = 1.
    pub group: Option<Box<dyn ReplicaGroup>>,
}

/// Everything that one rank talks through.
pub struct Ports {
    /// One for each place that the rank holds.
    pub places: Vec<Endpoints>,
    pub reports: Reporter,
    pub gate: Arc<Gate>,
    /// Where values travel by themselves.
    pub transfers: Option<Arc<dyn AsyncTransfers>>,
}

/// Compares the header that came with the one that the schedule calls for.
fn checked(from: Place, to: Place, expected: Header, found: Header) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Message { from, to, expected: expected.to_string(), found: found.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_travel(content in prop::sample::select(Content::ALL.to_vec()), eval: bool, half: bool, payload_elsewhere: bool, step in 0usize..1 << 40, microbatch in 0usize..1 << 20,
                          shape in prop::array::uniform3(0i64..1 << 31)) {
            let pass = if eval { Pass::Eval } else { Pass::Train };
            let wire = if half { Wire::Bf16 } else { Wire::F32 };
            let header = Header { content, pass, step, microbatch, shape, wire, payload_elsewhere };
            prop_assert_eq!(Header::decode(header.encode()), Some(header));
        }

        #[test]
        fn stray_bytes_are_no_header(words: [i64; Header::WORDS]) {
            prop_assert_eq!(Header::decode(words), None);
        }
    }
}
