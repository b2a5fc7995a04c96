//! Rotary positions (Su et al. 2021): queries and keys are turned by angles that grow with a token's
//! place, so that their product depends on the distance between two tokens.
//!
//! A head's values are taken as W / 2 pairs, value i with value i + W / 2, as Hugging Face pairs
//! them (the paper pairs neighbours). At place p pair i is turned by `p f_i`:
//!
//! ```text
//! f_i = theta^(-2 i / W)
//! y_i          =  x_i cos(p f_i) - x_{i + W/2} sin(p f_i)
//! y_{i + W/2}  =  x_{i + W/2} cos(p f_i) + x_i sin(p f_i)
//! ```
//!
//! that is `x cos + roll(x, W / 2) sin'`, where the first half of sin' is negative.
//!
//! Frequencies and angles are f32, by libtorch, since that is what published models were trained
//! with: at place 1,000 an angle's rounding is already 6e-5.

use std::collections::BTreeMap;
use std::sync::Mutex;

use tch::{Device, Kind, Tensor};

use super::config::RopeScaling;
use crate::error::Result;

/// What the angles are made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Option<RopeScaling>,
}

impl Rope {
    /// The frequencies of a head's pairs, [W / 2] in f32: radians a place.
    fn frequencies(&self, width: i64) -> Result<Tensor> {
        let exponents = Tensor::f_arange_start_step(0, width, 2, (Kind::Int64, Device::Cpu))?
            .f_to_kind(Kind::Float)?
            .f_div_scalar(width as f64)?;
        let frequencies = Tensor::f_pow_scalar(self.theta, &exponents)?.f_reciprocal()?;

        match &self.scaling {
            None => Ok(frequencies),
            Some(RopeScaling::Linear { factor }) => Ok(frequencies.f_div_scalar(*factor)?),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            }) => {
                let scale = |frequency: f32| {
                    let wave = 2.0 * std::f32::consts::PI / frequency;
                    let original = *original_positions as f32;
                    let slow = frequency / *factor as f32;
                    let (low, high) = (*low_freq_factor as f32, *high_freq_factor as f32);

                    // Fast waves stay, slow ones are stretched, and those between go over from one
                    // to the other.
                    if wave < original / high {
                        frequency
                    } else if wave > original / low {
                        slow
                    } else {
                        let share = (original / wave - low) / (high - low);
                        (1.0 - share) * slow + share * frequency
                    }
                };

                let mut values: Vec<f32> = frequencies.try_into()?;
                values.iter_mut().for_each(|value| *value = scale(*value));
                Ok(Tensor::f_from_slice(&values)?)
            }
        }
    }

    /// Cosines and signed sines of the places 0 .. `length`, [length, W] each.
    fn tables(&self, length: i64, width: i64) -> Result<[Tensor; 2]> {
        let places = Tensor::f_arange(length, (Kind::Float, Device::Cpu))?.f_unsqueeze(1)?;
        let angles = places.f_mul(&self.frequencies(width)?.f_unsqueeze(0)?)?;
        let (cosines, sines) = (angles.f_cos()?, angles.f_sin()?);
        let twice = Tensor::f_cat(&[&cosines, &cosines], 1)?;
        let signed = Tensor::f_cat(&[&sines.f_neg()?, &sines], 1)?;
        Ok([twice, signed])
    }
}

/// Places that tables have at least.
const SHORTEST: i64 = 4096;

/// The tables of a model's layers, made when they are first asked for.
#[derive(Debug, Default)]
pub(super) struct Tables {
    made: Mutex<BTreeMap<Key, [Tensor; 2]>>,
}

/// Width of a head, the number of the kind, that of the device.
type Key = (i64, i32, i64);

impl Tables {
    /// Cosines and signed sines of the places 0 .. `length` at least, as `like` in kind and device.
    fn upto(&self, rope: &Rope, length: i64, like: &Tensor) -> Result<[Tensor; 2]> {
        let width = like.size().last().copied().unwrap_or(0);
        let device = if let Device::Cuda(number) = like.device() { number as i64 } else { -1 };
        let key = (width, like.kind() as i32, device);
        let mut made = self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(tables) = made.get(&key).filter(|[cosines, _]| cosines.size()[0] >= length) {
            return Ok(tables.each_ref().map(Tensor::shallow_clone));
        }

        // A text that grows asks for one place more each time; an evaluation may be longer than a
        // training, and nothing new is to be sent to a device then.
        let length = (length.max(SHORTEST) as u64).next_power_of_two() as i64;
        let [cosines, sines] = rope.tables(length, width)?;
        let there = |table: Tensor| table.f_to_kind(like.kind())?.f_to_device(like.device());
        let tables = [there(cosines)?, there(sines)?];
        made.insert(key, tables.each_ref().map(Tensor::shallow_clone));
        Ok(tables)
    }

    /// The rows of the places of T tokens: [T, 1, W] each, or [B, T, 1, W] where rows of a batch
    /// have places of their own.
    pub fn rows(&self, rope: &Rope, places: &Places, t: i64, like: &Tensor) -> Result<[Tensor; 2]> {
        let [cosines, sines] = self.upto(rope, places.end(t), like)?;
        let rows = |table: Tensor| match places {
            Places::From(first) => table.f_narrow(0, *first, t)?.f_unsqueeze(1),
            Places::Each { numbers, .. } => {
                let size = numbers.size();
                let width = table.size()[1];
                table
                    .f_index_select(0, &numbers.f_reshape([-1])?)?
                    .f_view([size[0], size[1], 1, width])
            }
        };
        Ok([rows(cosines)?, rows(sines)?])
    }
}

/// Where tokens stand in their texts.
#[derive(Debug)]
pub(super) enum Places {
    /// One behind the other from this place on, in every row.
    From(i64),
    /// The number of each, [B, T], all of them below `end`.
    Each { numbers: Tensor, end: i64 },
}

impl Places {
    /// One more than the largest of `t` tokens.
    pub fn end(&self, t: i64) -> i64 {
        match self {
            Places::From(first) => first + t,
            Places::Each { end, .. } => *end,
        }
    }
}

/// `x` [B, T, heads, W], turned by the rows of the tables.
pub(super) fn turn(x: &Tensor, [cosines, sines]: &[Tensor; 2]) -> Result<Tensor> {
    let half = x.size().last().copied().unwrap_or(0) / 2;
    let other = x.f_roll([half], [-1])?;
    Ok(x.f_mul(cosines)?.f_addcmul(&other, sines)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Rope = Rope { theta: 10000.0, scaling: None };

    fn values(tensor: &Tensor) -> Vec<f64> {
        tensor.to_kind(Kind::Double).contiguous().view([-1]).try_into().unwrap()
    }

    /// Pair by pair, in float64.
    #[test]
    fn pairs_are_turned_by_the_angle_of_their_place() {
        let (t, width) = (5, 6);
        let x = Tensor::arange(2 * t * 3 * width, (Kind::Double, Device::Cpu))
            .sin()
            .view([2, t, 3, width]);
        for first in [0, 7] {
            let rows = Tables::default().rows(&PLAIN, &Places::From(first), t, &x).unwrap();
            let found = turn(&x, &rows).unwrap();
            for (row, place, head, i) in
                (0..2 * t * 3 * 3).map(|n| (n / (t * 9), n / 9 % t, n / 3 % 3, n % 3))
            {
                let at = |x: &Tensor, i: i64| x.double_value(&[row, place, head, i]);
                let angle = (first + place) as f64 / 10000f64.powf(2.0 * i as f64 / width as f64);
                let (a, b) = (at(&x, i), at(&x, i + 3));
                let expected =
                    [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()];
                for (j, expected) in [i, i + 3].into_iter().zip(expected) {
                    assert!((at(&found, j) - expected).abs() < 1e-5, "{row} {place} {head} {j}");
                }
            }
        }
    }

    #[test]
    fn rows_of_a_batch_may_have_places_of_their_own() {
        let x = Tensor::arange(2 * 3 * 4, (Kind::Float, Device::Cpu)).sin().view([2, 3, 1, 4]);
        let numbers = Tensor::from_slice(&[0i64, 1, 2, 4, 5, 6]).view([2, 3]);
        let tables = Tables::default();
        let each = Places::Each { numbers, end: 7 };
        let together = turn(&x, &tables.rows(&PLAIN, &each, 3, &x).unwrap()).unwrap();
        for (row, first) in [(0, 0), (1, 4)] {
            let rows = tables.rows(&PLAIN, &Places::From(first), 3, &x).unwrap();
            let alone = turn(&x.narrow(0, row, 1), &rows).unwrap();
            assert_eq!(together.narrow(0, row, 1), alone);
        }
    }

    /// Fast waves stay, slow ones are stretched by the factor.
    #[test]
    fn frequencies_are_scaled_as_asked_for() {
        let of = |scaling| values(&Rope { theta: 500000.0, scaling }.frequencies(64).unwrap());
        let plain = of(None);
        let linear = of(Some(RopeScaling::Linear { factor: 4.0 }));
        assert!(plain.iter().zip(&linear).all(|(a, b)| (a / b / 4.0 - 1.0).abs() < 1e-6));

        let llama3 = of(Some(RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 8192,
        }));
        let ratios: Vec<f64> = plain.iter().zip(&llama3).map(|(a, b)| a / b).collect();
        assert_eq!(ratios[0], 1.0);
        assert!((ratios[31] / 32.0 - 1.0).abs() < 1e-6);
        assert!(ratios.windows(2).all(|pair| pair[0] <= pair[1] * (1.0 + 1e-6)), "{ratios:?}");
        assert!(ratios.iter().any(|ratio| *ratio > 1.01 && *ratio < 31.0));
    }
}
