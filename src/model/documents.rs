//! Documents in one window: attention and positions that end at their borders.
//!
//! ```text
//! tokens      b c . | d e f g . | h i        starts     0 0 0  3 3 3 3 3  8 8
//!                                            positions  0 1 2  0 1 2 3 4  0 1
//! a token sees those from its document's start up to its own
//! ```

use tch::{Device, Tensor};

use super::rotary::Places;
use crate::device::to_device;
use crate::error::Result;

/// What the attention of a microbatch's rows sees, the same in all layers.
#[derive(Debug)]
pub struct Documents {
    /// [B, T], int64: where tokens stand in their documents.
    places: Tensor,
    /// [B, 1, T, T], bool: which keys a query sees.
    seen: Tensor,
}

impl Documents {
    /// Of `starts` [B, T], int64, on the host: where in the row each token's document begins.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn new(starts: &Tensor, device: Device) -> Result<Documents> {
        let t = starts.size()[1];
        let starts = to_device(starts, device)?;
        let places = Tensor::f_arange(t, (tch::Kind::Int64, device))?;
        let (keys, queries) = (places.f_view([1, 1, 1, t])?, places.f_view([1, 1, t, 1])?);
        let from = keys.f_ge_tensor(&starts.f_view([-1, 1, t, 1])?)?;
        let seen = from.f_logical_and(&keys.f_le_tensor(&queries)?)?;
        Ok(Documents { places: places.f_unsqueeze(0)?.f_sub(&starts)?, seen })
    }

    /// Another handle of the same.
    pub(super) fn shallow_clone(&self) -> Documents {
        Documents { places: self.places.shallow_clone(), seen: self.seen.shallow_clone() }
    }

    /// Where the tokens stand.
    pub(super) fn places(&self) -> Places {
        Places::Each { numbers: self.places.shallow_clone(), end: self.places.size()[1] }
    }

    /// Which keys a query sees.
    pub(super) fn seen(&self) -> &Tensor {
        &self.seen
    }

    /// Bytes of rows of T tokens.
    pub fn bytes(rows: usize, sequence: usize) -> usize {
        rows * sequence * (sequence + size_of::<i64>())
    }
}
