//! Measured staleness: how old the gradients are that are applied, and how far the weights have moved
//! meanwhile. Every so many steps (`staleness.every`), two steps before the multiples, for every stage and the tied table.
//!
//! The update of step t takes `W[t]` to `W[t+1]` by a gradient that was taken at `V[v]`, the weights as
//! steps use them, v = max(s, t - D): `W[v]` itself, or a prediction of `W[t]` made of it.
//!
//! ```text
//! age         t - v, updates
//! travelled   |W[v] - W[t]|                 how far the weights have moved, where W[v] is known
//! distance    |V[v] - W[t]|                 how far those of the gradient are off: with a prediction its error, else what
//!                                           the weights have travelled; relative: over |W[t]|, of all and by role
//! cosine      of g_t and g_{t+1}, the gradients of successive updates; told with the second of them
//! ```
//!
//! One flat buffer serves both: it keeps `W[v]` from its making to the update t, then g_t for one more
//! update. So the measured steps must be further apart than the longest delay ([`least`]).
//!
//! Sums are made in f64, in one order: the oracle has the same bits.

use std::collections::BTreeMap;

use multiversion::multiversion;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::model::Role;
use crate::params::{Layout, slice, zeros};

/// Values that are looked at together, so that nothing of a parameter's size is needed beside it; of a
/// chunk that is summed at once, and independent partial sums in it, so that additions do not wait for
/// each other.
const PIECE: i64 = 1 << 22;
const CHUNK: usize = 4096;
const LANES: usize = 8;

/// The least steps between two measured ones, at a longest delay.
pub fn least(delay: usize) -> usize {
    delay + 2
}

/// What is measured at one update.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Staleness {
    /// Updates between the weights of the gradient and those that it is applied to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub age: Option<usize>,
    /// Seconds between the beginning of the gradient's first forward and its update.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distance: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub travelled: Option<f64>,
    /// Relative distances by what the parameters are in the model, and the distances themselves.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, f64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub role_distances: BTreeMap<String, f64>,
    /// Of this gradient and that of the update before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cosine: Option<f64>,
    /// Of the gradient that is applied and the one of the same batch at the newest weights; by the
    /// oracle.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fresh_cosine: Option<f64>,
}

/// Measured steps are so many before the multiples.
const BEFORE: usize = 2;

/// What the buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    /// The weights of a version.
    Weights(usize),
    /// The gradient of a step.
    Gradient(usize),
}

/// Measures the staleness of one set of weights.
pub struct Meter {
    layout: Layout,
    every: usize,
    buffer: Tensor,
    kept: Kept,
}

/// The weights at an update: as the gradient's step used them, with the number of that version, and
/// as they are now.
pub struct AtUpdate<'a> {
    pub version: usize,
    /// None of a table whose gradient has parts of several steps.
    pub used: Option<&'a Tensor>,
    pub newest: &'a Tensor,
    pub gradient: &'a Tensor,
}

impl Meter {
    /// Of weights of this layout on a device, every so many steps.
    pub fn new(layout: &Layout, every: usize, device: Device) -> Result<Meter> {
        let buffer = zeros(layout.len, device)?;
        Ok(Meter { layout: layout.clone(), every, buffer, kept: Kept::Nothing })
    }

    /// Measures nothing, so that a device has loaded all kernels: `used` is a version as steps use it.
    pub fn rehearse(&self, used: &Tensor) -> Result<()> {
        let few = |flat: &Tensor| flat.f_narrow(0, 0, flat.size()[0].min(8));
        let (used, buffer) = (few(used)?, few(&self.buffer)?);
        over_pieces(&used, &buffer, squares, apart)?;
        over_pieces(&used, &buffer, products, product)?;
        Ok(())
    }

    /// Whether the distance is measured at the update of a step: two steps before the multiples, where
    /// pipelines are drained, so that the delay is whole and the step after it is still of the same
    /// process.
    pub fn measures(&self, step: usize) -> bool {
        (step + BEFORE).is_multiple_of(self.every)
    }

    /// The first step from `step` on that is measured.
    pub fn next(&self, step: usize) -> usize {
        (step + BEFORE).next_multiple_of(self.every) - BEFORE
    }

    /// Before the update of a step: what there is to tell of it.
    pub fn before(&mut self, step: usize, at: &AtUpdate) -> Result<Option<Staleness>> {
        if self.measures(step) {
            let measured = match at.used {
                Some(used) => self.distances(step, at, used)?,
                None => Staleness::default(),
            };
            self.buffer.f_copy_(at.gradient)?;
            self.kept = Kept::Gradient(step);
            return Ok(Some(measured).filter(|measured| *measured != Staleness::default()));
        }

        if step.checked_sub(1).is_none_or(|before| self.kept != Kept::Gradient(before)) {
            return Ok(None);
        }

        self.kept = Kept::Nothing;
        let cosine = cosine(&self.buffer, at.gradient)?;
        Ok(Some(Staleness { cosine, ..Staleness::default() }))
    }

    /// Version `version`, of which these are the weights, is made; `used` is the version that the
    /// next measured step uses.
    pub fn made(&mut self, version: usize, weights: &Tensor, used: usize) -> Result<()> {
        let free = !matches!(self.kept, Kept::Gradient(_));
        if free && version == used && !self.measures(version) {
            self.buffer.f_copy_(weights)?;
            self.kept = Kept::Weights(version);
        }
        Ok(())
    }

    fn distances(&self, step: usize, at: &AtUpdate, used: &Tensor) -> Result<Staleness> {
        let known = self.kept == Kept::Weights(at.version);
        let mut sums: BTreeMap<&str, [f64; 2]> = BTreeMap::new();
        let (mut all, mut whole, mut travelled) = (0.0, 0.0, 0.0);
        for entry in &self.layout.entries {
            let (from, count) = (entry.offset as i64, entry.parameter.count() as i64);
            let part = |flat: &Tensor| flat.f_narrow(0, from, count);
            let newest = part(at.newest)?;
            let used = part(used)?;
            let distance = over_pieces(&used, &newest, squares, apart)?;
            let norm = over_pieces(&newest, &newest, products, product)?;
            if known {
                travelled += over_pieces(&part(&self.buffer)?, &newest, squares, apart)?;
            }

            all += distance;
            whole += norm;
            let of_role = sums.entry(name(entry.parameter.role)).or_default();
            of_role[0] += distance;
            of_role[1] += norm;
        }

        // What is no number is not told: not every message could carry it.
        let number = |value: f64| Some(value).filter(|value| value.is_finite());
        let relative =
            |[apart, whole]: [f64; 2]| number((apart / whole.max(f64::MIN_POSITIVE)).sqrt());
        let by_role = |of: &dyn Fn([f64; 2]) -> Option<f64>| -> BTreeMap<String, f64> {
            let of_role = |(role, sums): (&&str, &[f64; 2])| Some(((*role).to_owned(), of(*sums)?));
            sums.iter().filter_map(of_role).collect()
        };
        // Of the newest version itself nothing is kept: it has not moved.
        let still = (at.version == step).then_some(0.0);
        Ok(Staleness {
            age: Some(step - at.version),
            distance: number(all.sqrt()),
            relative: relative([all, whole]),
            travelled: if known { number(travelled.sqrt()) } else { still },
            roles: by_role(&relative),
            role_distances: by_role(&|[apart, _]| number(apart.sqrt())),
            ..Staleness::default()
        })
    }
}

/// A role in a word.
fn name(role: Role) -> &'static str {
    match role {
        Role::Table => "tables",
        Role::Head => "head",
        Role::Matrix => "matrices",
        Role::Vector => "vectors",
    }
}

/// The cosine of two flat buffers; none where it is no number.
pub fn cosine(a: &Tensor, b: &Tensor) -> Result<Option<f64>> {
    let dot = |a: &Tensor, b: &Tensor| over_pieces(a, b, products, product);
    let cosine = dot(a, b)? / (dot(a, a)? * dot(b, b)?).sqrt();
    Ok(Some(cosine).filter(|cosine| cosine.is_finite()))
}

/// A sum over the values of two buffers, on the processor by `here`, on a device by `there`.
fn over_pieces(
    a: &Tensor,
    b: &Tensor,
    here: fn(&[f32], &[f32]) -> f64,
    there: fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<f64> {
    let (mut sum, mut on_device) = (0.0, None);
    let count = a.numel() as i64;
    for from in (0..count).step_by(PIECE as usize) {
        let piece =
            |flat: &Tensor| flat.f_narrow(0, from, PIECE.min(count - from))?.f_to_kind(Kind::Float);
        let (a, b) = (piece(a)?, piece(b)?);
        if a.device() == Device::Cpu {
            sum += over_chunks(slice(&a), slice(&b), here);
            continue;
        }

        let part = there(&a, &b)?.f_sum(Kind::Double)?;
        on_device = Some(match on_device {
            None => part,
            Some(sum) => part.f_add(&sum)?,
        });
    }
    Ok(sum + on_device.map_or(Ok(0.0), |sum: Tensor| sum.f_double_value(&[]))?)
}

fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.f_mul(b)?)
}

fn apart(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(a.f_sub(b)?.f_square()?)
}

fn over_chunks(a: &[f32], b: &[f32], sum: fn(&[f32], &[f32]) -> f64) -> f64 {
    a.chunks(CHUNK).zip(b.chunks(CHUNK)).map(|(a, b)| sum(a, b)).sum()
}

#[multiversion(targets("x86_64+avx2", "aarch64+neon"))]
fn products(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        lanes[i % LANES] += f64::from(*a) * f64::from(*b);
    }
    lanes.iter().sum()
}

#[multiversion(targets("x86_64+avx2", "aarch64+neon"))]
fn squares(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let apart = f64::from(*a) - f64::from(*b);
        lanes[i % LANES] += apart * apart;
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::tests::layout;

    fn flat(layout: &Layout, value: f32) -> Tensor {
        let flat = zeros(layout.len, Device::Cpu).unwrap();
        for entry in &layout.entries {
            let count = entry.parameter.count() as i64;
            let _ = flat.narrow(0, entry.offset as i64, count).fill_(f64::from(value));
        }
        flat
    }

    /// A gradient that is not finite, or nothing, is at no angle.
    #[test]
    fn what_has_no_cosine_has_none() {
        let one = Tensor::from_slice(&[1f32, 2.0]);
        for value in [0.0, f32::NAN, f32::INFINITY] {
            let other = Tensor::from_slice(&[value, value]);
            assert_eq!(cosine(&one, &other).unwrap(), None, "{value}");
        }
        assert!(cosine(&one, &one).unwrap().is_some_and(|cosine| (cosine - 1.0).abs() < 1e-12));
    }

    #[test]
    fn distances_and_cosines_by_hand() {
        let mut layout = layout();
        layout.entries[1].parameter.role = Role::Vector;
        let count = layout.count() as f64;
        let mut meter = Meter::new(&layout, 4, Device::Cpu).unwrap();
        assert_eq!((meter.next(0), meter.next(3), meter.next(6)), (2, 6, 6));

        // Delay 2, predicted: step 6 uses version 4, which was 1 and stood for 1.5; by now it is 2.
        meter.made(3, &flat(&layout, 0.5), 4).unwrap();
        meter.made(4, &flat(&layout, 1.0), 4).unwrap();
        let (used, newest) = (flat(&layout, 1.5), flat(&layout, 2.0));
        let gradient = flat(&layout, 3.0);
        let at = |gradient| AtUpdate { version: 4, used: Some(&used), newest: &newest, gradient };
        assert_eq!(meter.before(5, &at(&gradient)).unwrap(), None);
        let found = meter.before(6, &at(&gradient)).unwrap().unwrap();
        let close = |found: Option<f64>, value: f64| (found.unwrap() - value).abs() < 1e-9;
        assert_eq!(found.age, Some(2));
        assert!(
            close(found.distance, 0.5 * count.sqrt()) && close(found.relative, 0.25),
            "{found:?}"
        );
        assert!(close(found.travelled, count.sqrt()) && found.cosine.is_none());
        let found: Vec<(&str, f64)> =
            found.roles.iter().map(|(role, value)| (role.as_str(), *value)).collect();
        assert_eq!(found, [("matrices", 0.25), ("vectors", 0.25)]);

        let opposite = flat(&layout, -1.0);
        let found = meter.before(7, &at(&opposite)).unwrap().unwrap();
        assert!(close(found.cosine, -1.0) && found.distance.is_none());
        assert_eq!(meter.before(8, &at(&opposite)).unwrap(), None);

        // One role alone has moved.
        let (vectors, entry) = (flat(&layout, 2.0), &layout.entries[1]);
        let count = entry.parameter.count() as i64;
        let _ = vectors.narrow(0, entry.offset as i64, count).fill_(4.0);
        let moved =
            AtUpdate { version: 4, used: Some(&vectors), newest: &newest, gradient: &gradient };
        let found =
            Meter::new(&layout, 4, Device::Cpu).unwrap().before(6, &moved).unwrap().unwrap();
        assert_eq!((found.roles["matrices"], found.roles["vectors"]), (0.0, 1.0));
        let distances = (found.role_distances["matrices"], found.role_distances["vectors"]);
        assert!(distances.0 == 0.0 && close(Some(distances.1), 2.0 * (count as f64).sqrt()));

        // Nothing is known of what it was; nothing has moved.
        let found = meter.before(10, &at(&gradient)).unwrap().unwrap();
        assert_eq!((found.age, found.travelled), (Some(6), None));
        let still =
            AtUpdate { version: 14, used: Some(&newest), newest: &newest, gradient: &gradient };
        let found = meter.before(14, &still).unwrap().unwrap();
        assert_eq!((found.age, found.distance, found.travelled), (Some(0), Some(0.0), Some(0.0)));
    }
}
