//! What is kept of a text that grows: the keys and values of its tokens.
//!
//! ```text
//! rows of a batch are as long as the longest        - - a b c d | e     pads, which nobody sees
//!                                                   f g h i j k | l
//! ```

use tch::{Device, Kind, Tensor};

use super::rotary::Places;
use crate::error::Result;

/// Tokens that there is room for at first.
const ROOM: i64 = 256;

/// Keys and values of a layer, as far as a text has been read.
#[derive(Debug)]
pub(super) struct Cache {
    /// Tokens that there will be at most.
    capacity: i64,
    /// How many pads every row begins with, \[B\]; none: no row has any.
    pads: Option<Tensor>,
    read: i64,
    /// [B, heads, room, W] each, from the first tokens on; the room doubles as the text grows.
    kept: Option<[Tensor; 2]>,
}

impl Cache {
    pub fn new(capacity: i64, pads: Option<&Tensor>) -> Cache {
        Cache { capacity, pads: pads.map(Tensor::shallow_clone), read: 0, kept: None }
    }

    /// Where the next `t` tokens of every row stand.
    pub fn places(&self, t: i64, device: Device) -> Result<Places> {
        let Some(pads) = &self.pads else { return Ok(Places::From(self.read)) };
        let numbers = Tensor::f_arange_start(self.read, self.read + t, (Kind::Int64, Device::Cpu))?
            .f_unsqueeze(0)?
            .f_sub(&pads.f_unsqueeze(1)?)?
            .f_clamp_min(0)?;
        Ok(Places::Each { numbers: numbers.f_to_device(device)?, end: self.read + t })
    }

    /// So many tokens have been read.
    pub fn advance(&mut self, t: i64) {
        self.read += t;
    }

    /// Keeps the keys and values of new tokens, [B, heads, t, W]; gives those of all.
    pub fn append(&mut self, new: [&Tensor; 2]) -> Result<[Tensor; 2]> {
        let (b, heads, t, w) = new[0].size4()?;
        let wanted = self.read + t;
        let kept = match self.kept.take() {
            Some(kept) if kept[0].size()[2] >= wanted => kept,
            before => {
                let room = (2 * wanted).max(ROOM).min(self.capacity).max(wanted);
                let grown = |number: usize| -> Result<Tensor> {
                    let like = (new[number].kind(), new[number].device());
                    let all = Tensor::f_zeros([b, heads, room, w], like)?;
                    if let Some(before) = &before {
                        let before = before[number].f_narrow(2, 0, self.read)?;
                        all.f_narrow(2, 0, self.read)?.f_copy_(&before)?;
                    }
                    Ok(all)
                };
                [grown(0)?, grown(1)?]
            }
        };

        let end = self.read + t;
        for (kept, new) in kept.iter().zip(new) {
            kept.f_narrow(2, self.read, t)?.f_copy_(new)?;
        }

        let all = [kept[0].f_narrow(2, 0, end)?, kept[1].f_narrow(2, 0, end)?];
        self.kept = Some(kept);
        Ok(all)
    }

    /// Which keys of all the `t` newest queries see, [B or 1, 1, t, all]; none: those up to their
    /// own, of one query all.
    pub fn mask(&self, t: i64, device: Device) -> Result<Option<Tensor>> {
        if self.pads.is_none() && (t == 1 || self.read == 0) {
            return Ok(None);
        }

        let options = (Kind::Int64, Device::Cpu);
        let keys = Tensor::f_arange(self.read + t, options)?.f_view([1, 1, 1, -1])?;
        let queries =
            Tensor::f_arange_start(self.read, self.read + t, options)?.f_view([1, 1, -1, 1])?;
        let mut seen = keys.f_le_tensor(&queries)?;
        if let Some(pads) = &self.pads {
            // A pad sees itself: a softmax over nothing is not a number.
            let real = keys.f_ge_tensor(&pads.f_view([-1, 1, 1, 1])?)?;
            seen = seen.f_logical_and(&real.f_logical_or(&keys.f_eq_tensor(&queries)?)?)?;
        }

        Ok(Some(seen.f_to_device(device)?))
    }
}
