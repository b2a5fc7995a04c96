//! Hidden states and their gradients on their way between places.

use tch::Tensor;

use super::Worker;
use super::place::{PlaceState, Registers};
use crate::clock::TimeKind;
use crate::comm::{Content, Endpoints, Header, Link};
use crate::error::{Error, Result};
use crate::inject::Fault;
use crate::schedule::{Action, Pass};

impl Worker {
    /// What a message of hidden states or their gradients about this action must look like.
    fn header(&self, content: Content, action: &Action) -> Header {
        let (rows, sequence) = match action.pass {
            Pass::Train => (self.context.setup.rows, self.context.setup.config.data.sequence),
            Pass::Eval => {
                let rows = self.context.setup.eval_rows(self.context.replica, action.microbatch);
                (rows.len(), self.context.setup.config.eval_sequence())
            }
        };

        let shape = [rows as i64, sequence as i64, self.context.setup.dimensions.d_model];
        let wire = self.context.setup.hidden_wire();
        Header {
            content,
            pass: action.pass,
            step: action.step,
            microbatch: action.microbatch,
            shape,
            wire,
            payload_elsewhere: false,
        }
    }

    /// A message that a later action will receive.
    pub(super) fn prepare(&mut self, content: Content, action: &Action) -> Result<()> {
        let header = self.header(content, action);
        let PlaceState { ends, registers, .. } = self.place(action);
        let (end, _) = incoming(ends, registers, content);
        link(end, action)?.prepare(header)
    }

    /// Hidden states come down the pipeline, gradients up.
    pub(super) fn receive(&mut self, content: Content, action: &Action) -> Result<()> {
        let (header, kind) =
            (self.header(content, action), self.context.setup.config.precision.kind());
        let PlaceState { ends, registers, .. } = self.place(action);
        let (end, register) = incoming(ends, registers, content);
        let received = link(end, action)?.receive(header)?;
        *register = Some(header.wire.unpack(&received, kind)?);
        Ok(())
    }

    /// Hidden states go down the pipeline, gradients up.
    pub(super) fn send(&mut self, content: Content, action: &Action) -> Result<()> {
        let header = self.context.faults.disguised(self.header(content, action), action);
        let dropped = self.context.faults.hit(Fault::DropMessage, action);
        let PlaceState { ends, registers, .. } = self.place(action);
        let (end, _, neighbour) = outgoing(ends, registers, content);
        if !dropped && link(end, action)?.await_room()? {
            self.probes.waited(neighbour)?;
        }

        let PlaceState { ends, registers, .. } = self.place(action);
        let (end, register, _) = outgoing(ends, registers, content);
        let tensor = header.wire.pack(&taken(register, action)?)?;
        if dropped { Ok(()) } else { link(end, action)?.send(header, tensor) }
    }
}

/// Where a message comes from and goes to.
fn incoming<'a>(
    ends: &'a mut Endpoints,
    registers: &'a mut Registers,
    content: Content,
) -> (&'a mut Option<Box<dyn Link>>, &'a mut Option<Tensor>) {
    match content {
        Content::Activation => (&mut ends.upstream, &mut registers.activation),
        _ => (&mut ends.downstream, &mut registers.gradient),
    }
}

/// Where a message comes from and goes to, and how a wait for room there is counted.
fn outgoing<'a>(
    ends: &'a mut Endpoints,
    registers: &'a mut Registers,
    content: Content,
) -> (&'a mut Option<Box<dyn Link>>, &'a mut Option<Tensor>, TimeKind) {
    match content {
        Content::Activation => {
            (&mut ends.downstream, &mut registers.activation, TimeKind::Downstream)
        }
        _ => (&mut ends.upstream, &mut registers.gradient, TimeKind::Upstream),
    }
}

/// What a register holds, which is empty from then on.
///
/// # Errors
/// If it is empty already.
pub(super) fn taken(register: &mut Option<Tensor>, action: &Action) -> Result<Tensor> {
    register.take().ok_or_else(|| Error::Internal(format!("{action} finds its register empty")))
}

/// The link of an action.
///
/// # Errors
/// If there is none.
pub(super) fn link<'a>(
    end: &'a mut Option<Box<dyn Link>>,
    action: &Action,
) -> Result<&'a mut dyn Link> {
    match end {
        Some(link) => Ok(link.as_mut()),
        None => Err(Error::Internal(format!("{action} has no link"))),
    }
}
