//! Single numbers that a device computes: losses, norms. On the processor they are known at once. A
//! GPU is many operations behind, and asking it for a number would make everybody wait: there they
//! are read later.

use tch::{Kind, Tensor};

use crate::error::Result;

/// Steps that a number may be read late.
pub const READBACK_STEPS: usize = 2;

/// When the host reads what a device has computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readback {
    /// At once, waiting for it.
    Now,
    /// Up to [`READBACK_STEPS`] steps later, so that nobody waits.
    Deferred,
}

/// One number.
#[derive(Debug)]
pub enum Number {
    Known(f64),
    /// A tensor without dimensions, whose value need not be there yet.
    Pending(Tensor),
}

impl Number {
    /// The value of a tensor of one number: waited for, or left for later.
    pub fn from_tensor(tensor: &Tensor, readback: Readback) -> Result<Number> {
        match readback {
            Readback::Deferred => Ok(Number::Pending(tensor.f_detach()?.f_to_kind(Kind::Double)?)),
            Readback::Now => Ok(Number::Known(tensor.f_double_value(&[])?)),
        }
    }

    /// The sum of two.
    pub fn plus(self, other: Number) -> Result<Number> {
        Ok(match (self, other) {
            (Number::Known(one), Number::Known(other)) => Number::Known(one + other),
            (Number::Known(known), Number::Pending(pending))
            | (Number::Pending(pending), Number::Known(known)) => {
                Number::Pending(pending.f_add_scalar(known)?)
            }
            (Number::Pending(one), Number::Pending(other)) => Number::Pending(one.f_add(&other)?),
        })
    }

    /// The number times a factor.
    pub fn times(self, factor: f64) -> Result<Number> {
        Ok(match self {
            Number::Known(known) => Number::Known(known * factor),
            Number::Pending(pending) => Number::Pending(pending.f_mul_scalar(factor)?),
        })
    }

    /// The value, which is waited for.
    pub fn now(&self) -> Result<f64> {
        match self {
            Number::Known(known) => Ok(*known),
            Number::Pending(pending) => Ok(pending.f_double_value(&[])?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_the_same_now_and_later() {
        let tensor = Tensor::from(0.1f32);
        for readback in [Readback::Now, Readback::Deferred] {
            let sum =
                Number::Known(1.5).plus(Number::from_tensor(&tensor, readback).unwrap()).unwrap();
            let sum = sum.plus(Number::from_tensor(&tensor, readback).unwrap()).unwrap();
            assert_eq!(
                sum.times(0.25).unwrap().now().unwrap(),
                (1.5 + 2.0 * f64::from(0.1f32)) * 0.25
            );
        }
    }
}
