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

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::super::{Arch, Memory, ModelConfig, Parameter, Stack, initial_tensor};
    use super::*;
    use crate::model::Dimensions;
    use crate::schedule::Tie;

    /// Losses of every document of a row, by itself and in the row, for every family that takes
    /// documents; short rows, and rows that are taken by blocks.
    #[test]
    fn documents_are_as_sequences_of_their_own() {
        for arch in [Arch::Transformer, Arch::Gpt2, Arch::Llama] {
            for lengths in [&[5i64, 1, 8, 2][..], &[70, 3, 55], &[128]] {
                let t: i64 = lengths.iter().sum();
                let config = ModelConfig {
                    arch,
                    layers: 3,
                    d_model: 32,
                    heads: 4,
                    tie: Tie::Untied,
                    init_std: Some(0.2),
                    ..ModelConfig::default()
                };
                let d = Dimensions::new(&config, 50, t as usize);
                let stack = Stack::new(&d, 0..3);
                let values = |parameter: &Parameter| initial_tensor(parameter, 5);
                let weights: Vec<Tensor> = stack.parameters().iter().map(values).collect();

                let tokens = (Tensor::arange(t + 1, (Kind::Int64, Device::Cpu)) * 37).remainder(50);
                let starts: Vec<i64> = lengths
                    .iter()
                    .scan(0, |end, length| {
                        *end += length;
                        Some(vec![*end - length; *length as usize])
                    })
                    .flatten()
                    .collect();
                let starts = Tensor::from_slice(&starts).view([1, t]);
                let losses = |from: i64, length: i64, memory: &mut Memory| {
                    let row = |shift: i64| tokens.narrow(0, from + shift, length).view([1, length]);
                    let hidden = stack.forward(&weights, &row(0), memory, None).unwrap();
                    let loss = stack.losses(&weights, &hidden, &row(1)).unwrap();
                    (hidden, loss.double_value(&[]))
                };

                let documents = Documents::new(&starts, Device::Cpu).unwrap();
                let (whole, sum) = losses(0, t, &mut Memory::of_documents(documents));
                let (mut from, mut apart) = (0, 0.0);
                for length in lengths {
                    let (alone, loss) = losses(from, *length, &mut Memory::new(0));
                    let far =
                        (whole.narrow(1, from, *length) - alone).abs().max().double_value(&[]);
                    assert!(far < 1e-5, "{arch:?} {lengths:?}: {far:e}");
                    (from, apart) = (from + length, apart + loss);
                }
                let far = (sum - apart).abs() / t as f64;
                assert!(far < 1e-6, "{arch:?} {lengths:?}: {sum} {apart}");
            }
        }
    }
}
