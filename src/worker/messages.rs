//! Hidden states and their gradients on their way between places.

use tch::Tensor;

use super::Worker;
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

    pub(super) fn receive_activation(&mut self, action: &Action) -> Result<()> {
        let header = self.header(Content::Activation, action);
        let kind = self.setup.config.precision.kind();
        let post = self.post(action);
        let received = link(&mut post.ends.upstream, action)?.receive(header)?;
        post.registers.activation = Some(header.wire.unpack(&received, kind)?);
        Ok(())
    }

    pub(super) fn send_activation(&mut self, action: &Action) -> Result<()> {
        let header = self.disguised(self.header(Content::Activation, action), action);
        let dropped = self.injected(Fault::DropMessage, action);
        let post = self.post(action);
        let tensor = header.wire.pack(&taken(&mut post.registers.activation, action)?)?;
        if dropped {
            return Ok(());
        }
        link(&mut post.ends.downstream, action)?.send(header, tensor)
    }

    pub(super) fn receive_gradient(&mut self, action: &Action) -> Result<()> {
        let header = self.header(Content::Gradient, action);
        let kind = self.setup.config.precision.kind();
        let post = self.post(action);
        let received = link(&mut post.ends.downstream, action)?.receive(header)?;
        post.registers.gradient = Some(header.wire.unpack(&received, kind)?);
        Ok(())
    }

    pub(super) fn send_gradient(&mut self, action: &Action) -> Result<()> {
        let header = self.disguised(self.header(Content::Gradient, action), action);
        let dropped = self.injected(Fault::DropMessage, action);
        let post = self.post(action);
        let tensor = header.wire.pack(&taken(&mut post.registers.gradient, action)?)?;
        if dropped {
            return Ok(());
        }
        link(&mut post.ends.upstream, action)?.send(header, tensor)
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
