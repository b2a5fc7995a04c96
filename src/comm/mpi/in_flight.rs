//! Messages under way, out and in. Each is a small state machine that the progress engine advances.

use std::sync::mpsc::{SyncSender, TrySendError};

use mpi::topology::SimpleCommunicator;
use tch::{Device, Tensor};

use super::super::permits::Permit;
use super::raw::{self, Address, MpiResult, Pending};
use crate::comm::{Content, Header};

/// Tags of a header; its tensor has the next one.
fn tag(content: Content) -> i32 {
    match content {
        Content::Activation => 1,
        Content::Gradient => 3,
        Content::Part => 5,
        Content::Sum => 7,
    }
}

/// What arrives on a link.
pub type Arrival = Result<(Header, Tensor), String>;

/// Where the messages of one neighbour go.
pub struct Inbox {
    pub from: usize,
    pub content: Content,
    /// Values of a message, at most.
    pub largest: usize,
    pub sender: SyncSender<Arrival>,
}

/// A message on its way out.
pub struct Outgoing {
    header: Pending<Box<[i64; Header::WORDS]>>,
    tensor: Option<Pending<Tensor>>,
    permit: Option<Permit>,
}

/// One neighbour's messages on their way in.
pub struct Incoming {
    inbox: Inbox,
    header: Pending<Box<[i64; Header::WORDS]>>,
    tensor: Option<(Header, Pending<Tensor>)>,
    /// An arrival that finds its inbox full.
    held: Option<Arrival>,
    /// The worker has ended; its error is on its way.
    deserted: bool,
}

impl Outgoing {
    /// Starts to send a message; `permit` is given back when its tensor has left.
    pub fn start(
        links: &SimpleCommunicator,
        to: usize,
        header: &Header,
        tensor: Tensor,
        permit: Permit,
    ) -> MpiResult<Outgoing> {
        let tag = tag(header.content);
        let first = raw::send_header(address(links, to, tag), header)?;

        if header.payload_elsewhere {
            return Ok(Outgoing { header: first, tensor: None, permit: None });
        }

        let second = raw::send(address(links, to, tag + 1), tensor)?;
        Ok(Outgoing { header: first, tensor: Some(second), permit: Some(permit) })
    }

    /// True when the whole message has left.
    pub fn advance(&mut self) -> MpiResult<bool> {
        if let Some(tensor) = &mut self.tensor
            && tensor.test()?.is_some()
        {
            self.tensor = None;
            self.permit = None;
        }
        Ok(self.tensor.is_none() && self.header.test()?.is_some())
    }
}

impl Incoming {
    /// Posts the first receive of a neighbour's messages.
    pub fn start(links: &SimpleCommunicator, inbox: Inbox) -> MpiResult<Incoming> {
        let header = raw::receive_header(address(links, inbox.from, tag(inbox.content)))?;
        Ok(Incoming { inbox, header, tensor: None, held: None, deserted: false })
    }

    /// Tells whoever waits that nothing will come any more.
    pub fn fail(self, error: &str) {
        let _ = self.inbox.sender.try_send(Err(error.to_owned()));
    }

    /// Whether values are on their way in.
    pub fn arrives(&self) -> bool {
        self.tensor.is_some()
    }

    /// Takes back the receive of a header that nobody will send.
    pub fn stop(self) -> MpiResult<()> {
        self.header.cancel()
    }

    /// True if anything moved.
    pub fn advance(&mut self, links: &SimpleCommunicator) -> MpiResult<bool> {
        if self.deserted {
            return Ok(false);
        }

        if let Some(arrival) = self.held.take() {
            return Ok(self.hand_over(arrival));
        }

        let (from, tag) = (self.inbox.from, tag(self.inbox.content));
        if let Some((header, pending)) = &mut self.tensor {
            let Some(tensor) = pending.test()? else { return Ok(false) };
            let arrival = Ok((*header, tensor));
            self.tensor = None;
            self.header = raw::receive_header(address(links, from, tag))?;
            self.hand_over(arrival);
            return Ok(true);
        }

        let Some(words) = self.header.test()? else { return Ok(false) };
        let header = Header::decode(*words)
            .ok_or_else(|| format!("rank {from} sent something that is no message"))?;
        if header.values().is_none_or(|values| values > self.inbox.largest) {
            return Err(format!("rank {from} tells of a larger message than any: {header}"));
        }

        if header.payload_elsewhere {
            self.header = raw::receive_header(address(links, from, tag))?;
            self.hand_over(Ok((header, Tensor::new())));
            return Ok(true);
        }

        let room = Tensor::f_empty(header.shape, (header.wire.kind(), Device::Cpu))
            .map_err(|error| error.to_string())?;
        self.tensor = Some((header, raw::receive(address(links, from, tag + 1), room)?));
        Ok(true)
    }

    /// True if the inbox had room.
    fn hand_over(&mut self, arrival: Arrival) -> bool {
        match self.inbox.sender.try_send(arrival) {
            Ok(()) => true,
            Err(TrySendError::Full(arrival)) => {
                self.held = Some(arrival);
                false
            }
            Err(TrySendError::Disconnected(_)) => {
                self.deserted = true;
                false
            }
        }
    }
}

/// A rank and a tag on a communicator.
pub fn address(comm: &SimpleCommunicator, rank: usize, tag: i32) -> Address<'_> {
    Address { comm, rank, tag }
}
