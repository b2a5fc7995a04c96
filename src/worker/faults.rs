//! Faults on purpose, where they happen.

use std::time::Duration;

use tch::{Kind, Tensor};

use super::place::PlaceState;
use super::probes::Probe;
use crate::comm::Header;
use crate::error::Result;
use crate::grid::Place;
use crate::inject::{Fault, Injection, SLOW_MS, crash};
use crate::schedule::Action;

/// The fault that is asked for, if one is, as the places of a replica meet it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Faults {
    pub(super) injection: Option<Injection>,
    pub(super) replica: usize,
}

impl Faults {
    /// Whether a fault comes with an action.
    pub(super) fn hit(&self, fault: Fault, action: &Action) -> bool {
        let place = Place { stage: action.stage, replica: self.replica };
        self.injection.is_some_and(|injection| injection.hits(fault, place, action))
    }

    /// A header as it is sent: that of another step, if it is to be corrupt.
    pub(super) fn disguised(&self, header: Header, action: &Action) -> Header {
        let wrong = self.hit(Fault::CorruptMessage, action);
        Header { step: if wrong { header.step + 1 } else { header.step }, ..header }
    }
}

impl Probe for Faults {
    fn begin(&mut self, action: &Action, place: &mut PlaceState) -> Result<()> {
        if self.injection.is_none() {
            return Ok(());
        }

        if self.hit(Fault::Panic, action) {
            panic!("injected panic at {action}");
        }

        if self.hit(Fault::Crash, action) {
            crash();
        }

        if self.hit(Fault::Exit, action) {
            std::process::exit(1);
        }

        while self.hit(Fault::Hang, action) {
            std::thread::sleep(Duration::from_secs(1));
        }

        if self.hit(Fault::Slow, action) {
            std::thread::sleep(Duration::from_millis(SLOW_MS));
        }

        if self.hit(Fault::Nan, action) {
            place.versions.alter(|weight| {
                let _ = weight.f_fill_(f64::NAN)?;
                Ok(())
            })?;
        }

        Ok(())
    }
}

/// Changes a bit in the middle of a weight's: the lowest one may be rounded away by an update.
pub(super) fn flip(weight: &mut Tensor) -> Result<()> {
    let flipped = weight.f_view_dtype(Kind::Int)?.f_bitwise_xor(1 << 12)?;
    Ok(weight.f_copy_(&flipped.f_view_dtype(Kind::Float)?)?)
}
