//! Faults on purpose, where they happen.

use std::time::Duration;

use tch::{Kind, Tensor};

use super::Worker;
use crate::comm::Header;
use crate::error::Result;
use crate::grid::Place;
use crate::inject::{Fault, SLOW_MS, crash};
use crate::schedule::Action;

impl Worker {
    pub(super) fn injected(&self, fault: Fault, action: &Action) -> bool {
        let place = Place { stage: action.stage, ..self.posts[0].place };
        self.mode.inject.is_some_and(|injection| injection.hits(fault, place, action))
    }

    pub(super) fn run_injection(&mut self, action: &Action) -> Result<()> {
        if self.mode.inject.is_none() {
            return Ok(());
        }
        if self.injected(Fault::Panic, action) {
            panic!("injected panic at {action}");
        }
        if self.injected(Fault::Crash, action) {
            crash();
        }
        if self.injected(Fault::Exit, action) {
            std::process::exit(1);
        }
        while self.injected(Fault::Hang, action) {
            std::thread::sleep(Duration::from_secs(1));
        }
        if self.injected(Fault::Slow, action) {
            std::thread::sleep(Duration::from_millis(SLOW_MS));
        }
        if self.injected(Fault::Nan, action) {
            let spoil = |weight: &mut Tensor| {
                let _ = weight.f_fill_(f64::NAN)?;
                Ok(())
            };
            self.post(action).stage.versions.alter(spoil)?;
        }
        Ok(())
    }

    pub(super) fn disguised(&self, header: Header, action: &Action) -> Header {
        let wrong = self.injected(Fault::CorruptMessage, action);
        Header { step: if wrong { header.step + 1 } else { header.step }, ..header }
    }
}

/// Changes the lowest bit of a weight.
pub(super) fn flip(weight: &mut Tensor) -> Result<()> {
    let flipped = weight.f_view_dtype(Kind::Int)?.f_bitwise_xor(1)?;
    Ok(weight.f_copy_(&flipped.f_view_dtype(Kind::Float)?)?)
}
