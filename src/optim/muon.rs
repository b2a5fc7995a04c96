//! Muon (Keller Jordan 2024) with Moonlight's scale (Liu et al. 2025, arXiv 2502.16982), for the
//! matrices of attention and feed-forward; tables, head, norms and biases take AdamW's steps by its
//! own keys. G is the clipped mean gradient of one matrix [out, in], of fused ones each by itself:
//!
//! ```text
//! M = mu M + (1-mu) G;   U = c M + (1-c) G           c = mu (Nesterov's), or mu^max(D, 1) with lead = "delay"
//! X = U / (|U| + 1e-7), lying on its long side
//! five times:  A = X X';  X = 3.4445 X + (-4.7750 A + 2.0315 A A) X
//! W = W (1 - lr wd) - lr 0.2 sqrt(max(out, in)) X
//! ```
//!
//! X is about the nearest matrix whose singular values are 1. A step is about as long as one of
//! AdamW, whose rate and decay carry over. With `precision = "bf16"` X is bf16.
//!
//! Key: `muon_momentum`, beside AdamW's. State: `first` (M, and AdamW's m), `second` (AdamW's v, of
//! what is no such matrix).

use std::sync::Once;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::StateBuffer;
use super::adamw::{self, Adamw, Lead};
use super::matrices::{Batch, Target, batches, read, scatter};
use super::products::{baddbmm, bmm};
use super::rule::{Rule, Step, Weights};
use crate::error::{Error, Result};
use crate::model::{Parameter, Role};
use crate::params::{Entry, Layout, UpdateBuffers};
use crate::precision::Precision;

/// Iterations of Newton and Schulz, and their polynomial.
const ITERATIONS: usize = 5;
const POLYNOMIAL: [f64; 3] = [3.4445, -4.7750, 2.0315];
/// What the root mean square of AdamW's steps is about.
const SCALE: f64 = 0.2;

/// Of a larger gradient the norm is not finite in f32.
const LARGEST: f64 = 1e19;

/// Its key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct Keys {
    /// How much of the average of gradients stays.
    pub muon_momentum: f64,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { muon_momentum: 0.95 }
    }
}

impl Keys {
    /// Whether it can be used.
    pub fn check(&self) -> Result<()> {
        let good = (0.0..1.0).contains(&self.muon_momentum);
        Error::unless(
            good,
            "optimizer.muon_momentum",
            self.muon_momentum,
            "must be at least 0 and below 1",
        )
    }
}

/// The rule.
pub struct Muon {
    momentum: f64,
    /// c.
    lead: f64,
    precision: Precision,
    /// Of what is no matrix.
    rest: Adamw,
}

impl Muon {
    pub fn new(keys: &Keys, adamw: &adamw::Keys, delay: usize, precision: Precision) -> Muon {
        let momentum = keys.muon_momentum;
        let lead = match adamw.lead() {
            Lead::Delay => momentum.powi(delay.max(1) as i32),
            // What has no lead has Nesterov's.
            Lead::Off | Lead::One | Lead::WhereDelayed => momentum,
        };
        Muon { momentum, lead, precision, rest: Adamw::new(adamw, delay) }
    }

    fn batch(&self, batch: &Batch, target: &Target, average: &Tensor, step: &Step) -> Result<()> {
        let (offsets, shape) = (batch.offsets(), [batch.rows, batch.columns]);
        let gradient = target.gradient(batch)?;
        let before = read(average, &offsets, shape)?;
        let now = before.f_lerp(&gradient, 1.0 - self.momentum)?;
        let update = gradient.f_lerp(&now, self.lead)?;
        scatter(average, &offsets, &target.chosen(now, &before)?)?;

        let steps = orthogonal(&update, self.precision)?;
        let longest = batch.rows.max(batch.columns) as f64;
        let by = step.lr * SCALE * longest.sqrt();
        target.advance(batch, |before| {
            Ok(before.f_mul_scalar(step.keep)?.f_sub_(&steps.f_mul_scalar(by)?)?)
        })
    }
}

impl Rule for Muon {
    fn state(&self, layout: &Layout) -> Vec<(&'static str, Layout)> {
        let rest = layout.entries.iter().filter(|entry| !self.takes_whole(&entry.parameter));
        let rest: Vec<Parameter> = rest.map(|Entry { parameter, .. }| parameter.clone()).collect();
        vec![("first", layout.clone()), ("second", Layout::new(&rest))]
    }

    fn takes_whole(&self, parameter: &Parameter) -> bool {
        parameter.role == Role::Matrix
    }

    fn step(
        &self,
        buffers: UpdateBuffers,
        state: &mut [StateBuffer],
        step: &Step,
        weights: &Weights,
    ) -> Result<()> {
        self.rest.step(buffers, state, step, weights)
    }

    fn matrices(
        &mut self,
        target: &Target,
        state: &mut [StateBuffer],
        step: &Step,
        batches: &[Batch],
    ) -> Result<()> {
        batches.iter().try_for_each(|batch| self.batch(batch, target, &state[0].values, step))
    }

    fn kernel(&self) -> &'static str {
        self.rest.kernel()
    }

    fn constants(&self, step: &Step) -> Vec<f32> {
        self.rest.constants(step)
    }

    fn largest(&self) -> f64 {
        LARGEST
    }

    /// Of one batch: the gradient, the average before and after, the update, X before and after a
    /// product, twice A.
    fn workspace(&self, layout: &Layout) -> usize {
        let of = |batch: &Batch| {
            6 * batch.len() + 2 * batch.members.len() * batch.rows.min(batch.columns).pow(2)
        };
        batches(layout).iter().map(of).max().unwrap_or(0)
    }
}

/// [B, m, n] -> about the nearest matrices whose singular values are 1. Those for which the
/// products overflow in bf16 are made again in f32; on a GPU, where that would have to be waited
/// for, they keep their direction and a norm of 1.
fn orthogonal(matrices: &Tensor, precision: Precision) -> Result<Tensor> {
    let found = iterated(matrices, precision)?;
    if precision != Precision::Bf16 {
        return Ok(found);
    }

    let good = converged(&found)?;
    if matrices.device().is_cuda() {
        return Ok(found.f_where_self(&good, &normalised(matrices)?)?);
    }

    if good.f_all()?.f_int64_value(&[])? != 0 {
        return Ok(found);
    }
    static TOLD: Once = Once::new();
    TOLD.call_once(|| {
        tracing::warn!("Muon's products overflow in bf16: matrices for which they do take f32")
    });

    Ok(found.f_where_self(&good, &iterated(matrices, Precision::F32)?)?)
}

/// Whether singular values are about 1, [B, 1, 1]: those of what the polynomial keeps are at most
/// 1.21, and from 1.27 on it diverges.
fn converged(found: &Tensor) -> Result<Tensor> {
    let size = found.size();
    let most = 2.0 * size[1].min(size[2]) as f64;
    let squares = found.f_mul(found)?.f_sum_dim_intlist([1i64, 2].as_slice(), true, Kind::Float)?;
    Ok(squares.f_le(most)?)
}

/// [B, m, n], each by its norm.
fn normalised(matrices: &Tensor) -> Result<Tensor> {
    let norms =
        matrices.f_norm_scalaropt_dim(2, [1i64, 2].as_slice(), true)?.f_add_scalar_(1e-7)?;
    Ok(matrices.f_div(&norms)?)
}

/// The iterations in one precision; what comes out is f32.
fn iterated(matrices: &Tensor, precision: Precision) -> Result<Tensor> {
    let size = matrices.size();
    let high = size[1] > size[2];
    let mut x = normalised(matrices)?.f_to_kind(precision.kind())?;
    if high {
        x = x.f_transpose(1, 2)?.f_contiguous()?;
    }

    // The short way needs all of f32's mantissa.
    let long = size[1].max(size[2]) >= 2 * size[1].min(size[2]);
    x = if long && precision == Precision::F32 { by_squares(&x)? } else { by_itself(x)? };
    let x = if high { x.f_transpose(1, 2)?.f_contiguous()? } else { x };
    Ok(x.f_to_kind(Kind::Float)?)
}

/// The iterations as they stand: 5 (4 m^2 n + 2 m^3) operations a matrix.
fn by_itself(mut x: Tensor) -> Result<Tensor> {
    for _ in 0..ITERATIONS {
        let square = bmm(&x, &x.f_transpose(1, 2)?)?;
        let [a, _, _] = POLYNOMIAL;
        x = baddbmm(&x, &polynomial(&square)?, &x, a, 1.0)?;
    }
    Ok(x)
}

/// The same for long matrices in 4 m^2 n + 34 m^3. With P = a + b A + c A A the next X is P X, and
/// the next A is P A P: so all iterations can be made with A alone, and X is multiplied once.
fn by_squares(x: &Tensor) -> Result<Tensor> {
    let [a, _, _] = POLYNOMIAL;
    let mut square = bmm(x, &x.f_transpose(1, 2)?)?;
    // The product of all P so far, or none: 1.
    let mut product: Option<Tensor> = None;
    for iteration in 1..=ITERATIONS {
        let rest = polynomial(&square)?; // P - a
        let next = match &product {
            None => rest.f_add(&identity(&rest)?.f_mul_scalar(a)?)?,
            Some(product) => baddbmm(product, &rest, product, a, 1.0)?,
        };

        product = Some(next);
        if iteration < ITERATIONS {
            let half = baddbmm(&square, &rest, &square, a, 1.0)?;
            square = baddbmm(&half, &half, &rest, a, 1.0)?;
        }
    }

    match product {
        Some(product) => bmm(&product, x),
        None => Ok(x.shallow_clone()),
    }
}

/// `b A + c A A`.
fn polynomial(square: &Tensor) -> Result<Tensor> {
    let [_, b, c] = POLYNOMIAL;
    baddbmm(square, square, square, b, c)
}

fn identity(like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_eye(like.size()[1], (like.kind(), like.device()))?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Five iterations bring every singular value near 1, of high, of wide matrices and in bf16, at
    /// any scale.
    #[test]
    fn singular_values_come_near_one() {
        tch::manual_seed(7);
        for (rows, columns, scale) in [(24, 24, 1.0), (48, 12, 1e-6), (12, 40, 1e6)] {
            let matrices = Tensor::randn([3, rows, columns], (Kind::Float, Device::Cpu)) * scale;
            for (precision, far) in [(Precision::F32, 0.35), (Precision::Bf16, 0.4)] {
                let found = orthogonal(&matrices, precision).unwrap();
                assert_eq!(found.size(), matrices.size());
                let (_, values, _) = found.svd(true, true);
                let (least, most) =
                    (values.min().double_value(&[]), values.max().double_value(&[]));
                // A random square has singular values near 0, which stay behind.
                assert!(
                    most < 1.0 + far && (rows == columns || least > 1.0 - far),
                    "{least} {most}"
                );
            }
        }
    }

    /// Of each matrix by itself: one is good, one has grown, one is no number.
    #[test]
    fn what_has_not_converged_is_seen() {
        let matrices = Tensor::eye(4, (Kind::Float, Device::Cpu)).repeat([3, 1, 1]);
        let _ = matrices.select(0, 1).g_mul_scalar_(1.5);
        let _ = matrices.select(0, 2).fill_(f64::NAN);
        assert_eq!(
            Vec::<bool>::try_from(converged(&matrices).unwrap().view(-1)).unwrap(),
            [true, false, false]
        );
    }

    /// Both ways to the same end, for singular values that are far apart too.
    #[test]
    fn the_short_way_is_as_good() {
        tch::manual_seed(5);
        for spread in [0.0, 3.0] {
            let scales = (Tensor::arange(20, (Kind::Float, Device::Cpu)) * (-spread / 4.0))
                .exp()
                .view([1, 20, 1]);
            let x = Tensor::randn([2, 20, 80], (Kind::Float, Device::Cpu)) * scales;
            let x = &x / x.norm_scalaropt_dim(2, [1i64, 2].as_slice(), true);
            let (short, long) = (by_squares(&x).unwrap(), by_itself(x.shallow_clone()).unwrap());
            let far = (short - long).abs().max().double_value(&[]);
            assert!(far < 1e-3, "{spread}: {far:e}");
        }
    }

    #[test]
    fn a_matrix_of_zeros_stays_where_it_is() {
        let found =
            orthogonal(&Tensor::zeros([1, 4, 3], (Kind::Float, Device::Cpu)), Precision::F32)
                .unwrap();
        assert_eq!(f64::try_from(found.abs().sum(Kind::Double)).unwrap(), 0.0);
    }
}
