//! The one place where the weights that steps use are made from the master weights, which updates
//! change:
//!
//! ```text
//! master W[n]  f32  --publish-->  version V[n], read by forward and backward of the steps that use it
//! ```
//!
//! It moves them on, where they are predicted (`optim/predict.rs`), then rounds, where versions are
//! not f32. On a GPU the fused pass of an update publishes what it has just written
//! (`optim/update.cu`); the oracle does all of it by itself.

use multiversion::multiversion;
use tch::{Kind, Tensor};

use super::{slice, slice_mut};
use crate::error::Result;

/// A version to be made.
pub struct Published<'a> {
    pub version: &'a mut Tensor,
    /// H: how many updates like the one that is made the version is ahead of the master.
    pub horizon: f32,
}

/// The master weights before an update, where the version that it makes needs them.
pub struct Before(Option<Tensor>);

impl Published<'_> {
    /// To be taken before the update; the version's own buffer, where that is f32.
    pub fn before(&mut self, master: &Tensor) -> Result<Before> {
        if self.horizon == 0.0 {
            return Ok(Before(None));
        }

        if self.version.kind() != Kind::Float {
            return Ok(Before(Some(master.f_detach_copy()?)));
        }

        self.version.f_copy_(master)?;
        Ok(Before(Some(self.version.shallow_clone())))
    }

    /// Makes the version, after the update.
    pub fn publish(self, master: &Tensor, before: Before) -> Result<()> {
        let Before(Some(mut values)) = before else { return publish(master, self.version) };
        move_on(slice(master), slice_mut(&mut values), self.horizon);
        match self.version.kind() {
            Kind::Float => Ok(()),
            _ => Ok(self.version.f_copy_(&values)?),
        }
    }
}

/// Writes the version that steps use of the master weights as they are, a flat buffer of the same
/// length.
pub fn publish(master: &Tensor, version: &mut Tensor) -> Result<()> {
    Ok(version.f_copy_(master)?)
}

/// `values` are the weights before the update, and become `W + H (W - before)`.
#[multiversion(targets("x86_64+avx2", "aarch64+neon"))]
fn move_on(master: &[f32], values: &mut [f32], horizon: f32) {
    for (value, weight) in values.iter_mut().zip(master) {
        *value = weight + horizon * (weight - *value);
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn versions_are_moved_on_then_rounded() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let mut master = Tensor::from_slice(&[1.0f32, -2.0, 0.5]);
            let mut version = Tensor::zeros([3], (kind, Device::Cpu));
            let mut published = Published { version: &mut version, horizon: 1.5 };
            let before = published.before(&master).unwrap();
            let _ = master.g_add_(&Tensor::from_slice(&[0.001f32, 0.5, 0.0]));
            published.publish(&master, before).unwrap();
            let expected =
                Tensor::from_slice(&[1.0025f32, -0.75, 0.5]).to_kind(kind).to_kind(Kind::Float);
            let far = (version.to_kind(Kind::Float) - expected).abs().max().double_value(&[]);
            assert!(far < 1e-6, "{kind:?}: {far:e}");
        }
    }

    #[test]
    fn without_a_horizon_a_version_is_the_master() {
        let master = Tensor::from_slice(&[1.001f32, -0.0]);
        let mut version = Tensor::zeros([2], (Kind::BFloat16, Device::Cpu));
        let mut published = Published { version: &mut version, horizon: 0.0 };
        let before = published.before(&master).unwrap();
        published.publish(&master, before).unwrap();
        assert_eq!(version, master.to_kind(Kind::BFloat16));
    }
}
