//! The one place where the weights that steps use are made from the master weights, which updates change:
//!
//! ```text
//! master W[n]  f32  --publish-->  version n, read by forward and backward of the steps that use it
//! ```
//!
//! It rounds, where versions are not f32. On a GPU the fused pass of an update publishes what it has just written
//! (`optim/update.cu`); the oracle rounds by itself.

use tch::Tensor;

use crate::error::Result;

/// Writes the version that steps use of the master weights, a flat buffer of the same length.
pub fn publish(master: &Tensor, version: &mut Tensor) -> Result<()> {
    Ok(version.f_copy_(master)?)
}
