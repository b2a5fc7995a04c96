//! The norm of a gradient, and clipping by it.

use multiversion::multiversion;
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::number::{Number, Readback};
use crate::params::slice;

/// Values whose squares are added up before they join the total: the order of the sum does not
/// depend on threads.
const CHUNK: usize = 4096;
/// Independent partial sums, so that the additions do not wait for each other.
const LANES: usize = 8;

/// Euclidean norm of a flat buffer: on the processor summed in f64.
pub fn norm(flat: &Tensor, readback: Readback) -> Result<Number> {
    match (flat.device(), readback) {
        (Device::Cpu, Readback::Now) => Ok(Number::Known(norm_of(slice(flat)))),
        (Device::Cpu, Readback::Deferred) => {
            Ok(Number::Pending(Tensor::from(norm_of(slice(flat)))))
        }

        // What is computed with it on the way to the report is f64, as on the processor.
        _ => Ok(Number::Pending(
            flat.f_norm_scalaropt_dtype(2, Kind::Float)?.f_to_kind(Kind::Double)?,
        )),
    }
}

fn norm_of(values: &[f32]) -> f64 {
    values.chunks(CHUNK).map(sum_of_squares).sum::<f64>().sqrt()
}

#[multiversion(targets("x86_64+avx2", "aarch64+neon"))]
fn sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }

    lanes.iter().sum::<f64>() + rest
}

/// What a gradient of this norm is multiplied by so that its norm is at most `clip` (as PyTorch's
/// `clip_grad_norm_`).
pub fn clip_factor(norm: f64, clip: Option<f64>) -> f64 {
    clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms() {
        assert_eq!(norm_of(&[3.0, 4.0]), 5.0);
        assert_eq!(norm_of(&[]), 0.0);
        assert_eq!(norm_of(&vec![2.0; 10_000]), 200.0);
        assert!(norm_of(&[1.0, f32::NAN]).is_nan());
        assert!(norm_of(&[f32::INFINITY]).is_infinite());
        // Larger than f32 holds when squared.
        assert_eq!(norm_of(&[3e30, 4e30]) as f32, 5e30);
    }

    #[test]
    fn clipping() {
        assert_eq!(clip_factor(10.0, None), 1.0);
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert!((clip_factor(10.0, Some(1.0)) - 0.1).abs() < 1e-7);
    }
}
