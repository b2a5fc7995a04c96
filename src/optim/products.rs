//! Products of matrices in batches, by the faster of libtorch's two libraries.
//!
//! On the processor `bmm` is MKL's, whose kernels for processors of other makers than Intel are the
//! slower ones; convolutions are oneDNN's. A convolution of one pixel is the same product: the rows
//! of the left matrix are the pixels of one image whose channels are last, the right one is its
//! weights. Both ways of weights are there, so that no copy turns them:
//!
//! ```text
//! X W'   conv2d,           W [out, in]          X [pixels, in] -> [pixels, out]
//! X W    conv_transpose2d, W [in, out]
//! ```
//!
//! On an AMD EPYC a step with SOAP takes 1.18 times that of AdamW by it, instead of 1.29
//! (`scripts/bench-rules.sh`).

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::runtime::mkl_is_slow;

/// Multiplications below which it does not pay.
const LARGE: i64 = 1 << 23;

/// Sides are vectors of so many: then all matrices of a batch are aligned.
const VECTOR: i64 = 16;

/// [B, m, k] times [B, k, n]; either may be a transposed view.
pub fn bmm(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    match suits(left, right) {
        true => convolutions(left, right),
        false => Ok(left.f_bmm(right)?),
    }
}

/// `beta base + alpha left right`.
pub fn baddbmm(
    base: &Tensor,
    left: &Tensor,
    right: &Tensor,
    beta: f64,
    alpha: f64,
) -> Result<Tensor> {
    if !suits(left, right) {
        return Ok(base.f_baddbmm(left, right, beta, alpha)?);
    }

    let mut product = convolutions(left, right)?;
    if alpha != 1.0 {
        product = product.f_mul_scalar_(alpha)?;
    }

    Ok(product.f_add_(&base.f_mul_scalar(beta)?)?)
}

/// By sizes and kind alone, so that every grid makes the same product.
fn suits(left: &Tensor, right: &Tensor) -> bool {
    let (Ok((_, m, k)), Ok((_, _, n))) = (left.size3(), right.size3()) else { return false };
    let sides = [m, k, n];
    let large =
        sides.iter().product::<i64>() >= LARGE && sides.iter().all(|side| side % VECTOR == 0);
    large && left.kind() == Kind::Float && left.device() == Device::Cpu && mkl_is_slow()
}

fn convolutions(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let images = left.f_contiguous()?.f_unbind(0)?;
    let weights = right.f_unbind(0)?;
    let products = images
        .iter()
        .zip(&weights)
        .map(|(image, weight)| convolution(image, weight))
        .collect::<Result<Vec<_>>>()?;
    match &products[..] {
        [one] => Ok(one.f_unsqueeze(0)?),
        all => Ok(Tensor::f_stack(all, 0)?),
    }
}

/// [m, k] times [k, n]. Dilation changes nothing about one pixel, and is what libtorch asks of a
/// single image to hand it to oneDNN, whatever the threads.
fn convolution(image: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let ((m, k), (_, n)) = (image.size2()?, weight.size2()?);
    let pixels = image.f_view([1, m, 1, k])?.f_permute([0, 3, 1, 2])?;
    let turned = weight.f_transpose(0, 1)?;

    let (none, once, twice) = ([0i64, 0], [1i64, 1], [2i64, 2]);
    let product = match turned.is_contiguous() {
        true => {
            pixels.f_conv2d(&turned.f_view([n, k, 1, 1])?, None::<&Tensor>, once, none, twice, 1)?
        }
        false => {
            let weight = weight.f_contiguous()?.f_view([k, n, 1, 1])?;
            pixels.f_conv_transpose2d(&weight, None::<&Tensor>, once, none, none, 1, twice)?
        }
    };

    Ok(product.f_permute([0, 2, 3, 1])?.f_reshape([m, n])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(shape: [i64; 3], pace: f64) -> Tensor {
        let values =
            Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)) * pace;
        values.sin().view(shape)
    }

    /// Both ways round in their own way; one matrix has the same bits whatever stands beside it.
    #[test]
    fn both_ways_make_one_product() {
        for ([m, k, n], count) in [([48, 64, 32], 1), ([32, 16, 80], 3), ([16, 16, 16], 2)] {
            let stored = [
                (wave([count, m, k], 0.37), wave([count, k, n], 0.11)),
                (wave([count, k, m], 0.37), wave([count, n, k], 0.11)),
            ];
            let [(left, right), (left_stored, right_stored)] = &stored;
            let (left_turned, right_turned) =
                (left_stored.transpose(1, 2), right_stored.transpose(1, 2));
            for (left, right) in [
                (left, right),
                (left, &right_turned),
                (&left_turned, right),
                (&left_turned, &right_turned),
            ] {
                let one = convolutions(left, right).unwrap();
                let other = left.bmm(right);
                assert_eq!(one.size(), [count, m, n]);
                assert!(
                    one.is_contiguous() && one.allclose(&other, 1e-4, 1e-4, false),
                    "{one} {other}"
                );
                let alone =
                    convolutions(&left.narrow(0, count - 1, 1), &right.narrow(0, count - 1, 1))
                        .unwrap();
                assert_eq!(one.narrow(0, count - 1, 1), alone);
            }
        }
    }

    /// A product that is large enough for it, added to something.
    #[test]
    fn what_is_added_is_the_same_by_both_ways() {
        let (base, left) = (wave([2, 256, 256], 0.7), wave([2, 256, 128], 0.3));
        let right = left.transpose(1, 2);
        let one = baddbmm(&base, &left, &right, 0.9, -0.1).unwrap();
        assert!(one.allclose(&base.baddbmm(&left, &right, 0.9, -0.1), 1e-4, 1e-4, false));
        assert!(bmm(&left, &right).unwrap().allclose(&left.bmm(&right), 1e-4, 1e-4, false));
    }
}
