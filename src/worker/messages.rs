//! Hidden states and their gradients on their way between places.

use tch::Tensor;

use super::Worker;
use super::post::Post;
use crate::comm::{Content, Header, Link};
use crate::error::{Error, Result};
use crate::inject::Fault;
use crate::schedule::{Action, Pass};

impl Worker {
    /// What a message of hidden states or their gradients about this action must look like.
    fn header(&self, content: Content, action: &Action) -> Header {
        let (rows, sequence) = match action.pass {
            Pass::Train => (self.setup.rows, self.setup.config.data.sequence),
            Pass::Eval => {
                let rows = self.setup.eval_rows(self.posts[0].place.replica, action.microbatch);
                (rows.len(), self.setup.config.eval_sequence())
            }
        };
        let shape = [rows as i64, sequence as i64, self.setup.dimensions.d_model];
        let wire = self.setup.hidden_wire();
        Header { content, pass: action.pass, step: action.step, microbatch: action.microbatch, shape, wire }
    }

    /// Hidden states come down the pipeline, gradients up.
    pub(super) fn receive(&mut self, content: Content, action: &Action) -> Result<()> {
        let (header, kind) = (self.header(content, action), self.setup.config.precision.kind());
        let Post { ends, registers, .. } = self.post(action);
        let (end, register) = match content {
            Content::Activation => (&mut ends.upstream, &mut registers.activation),
            _ => (&mut ends.downstream, &mut registers.gradient),
        };
        let received = link(end, action)?.receive(header)?;
        *register = Some(header.wire.unpack(&received, kind)?);
        Ok(())
    }

    /// Hidden states go down the pipeline, gradients up.
    pub(super) fn send(&mut self, content: Content, action: &Action) -> Result<()> {
        let header = self.disguised(self.header(content, action), action);
        let dropped = self.injected(Fault::DropMessage, action);
        let Post { ends, registers, .. } = self.post(action);
        let (end, register) = match content {
            Content::Activation => (&mut ends.downstream, &mut registers.activation),
            _ => (&mut ends.upstream, &mut registers.gradient),
        };
        let tensor = header.wire.pack(&taken(register, action)?)?;
        if dropped { Ok(()) } else { link(end, action)?.send(header, tensor) }
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
pub(super) fn link<'a>(end: &'a mut Option<Box<dyn Link>>, action: &Action) -> Result<&'a mut dyn Link> {
    match end {
        Some(link) => Ok(link.as_mut()),
        None => Err(Error::Internal(format!("{action} has no link"))),
    }
}
