//! Products with a matrix of weights, `x W' + b`, by the faster of libtorch's two libraries.
//!
//! libtorch's linear layers are MKL's, whose kernels for processors of other makers than Intel are
//! the slower ones; its convolutions are oneDNN's. A convolution of one pixel is the same product:
//! tokens are the pixels, and [N, tokens / N, 1, D] is the memory of an image with its channels
//! last. On an AMD EPYC a training step of 2,048 tokens is 4 to 5 % shorter by it.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::runtime::mkl_is_slow;

/// Images: libtorch hands convolutions of one pixel to oneDNN from so many on, whatever the
/// threads.
const IMAGES: i64 = 16;

/// Tokens below which it does not pay: oneDNN puts the weights in its own order, for each of the
/// three products anew.
const TOKENS: i64 = 1024;

/// Features come in vectors of so many.
const VECTOR: i64 = 16;

/// `x` is [.., I], `weight` [O, I], `bias` \[O\]; the product is [.., O].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let shape = x.size();
    let (rows, features) =
        (x.numel() as i64 / shape.last().copied().unwrap_or(1).max(1), weight.size());
    let suits = rows >= TOKENS && rows % IMAGES == 0 && features.iter().all(|n| n % VECTOR == 0);
    match suits && x.kind() == Kind::Float && x.device() == Device::Cpu && mkl_is_slow() {
        true => convolution(x, weight, bias),
        false => Ok(x.f_linear(weight, bias)?),
    }
}

/// The product as a convolution of one pixel; the tokens are a multiple of `IMAGES`.
fn convolution(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let [output, input] = weight.size()[..] else { return Ok(x.f_linear(weight, bias)?) };
    let mut shape = x.size();
    let images = x.f_reshape([IMAGES, -1, 1, input])?.f_permute([0, 3, 1, 2])?;
    let pixel = weight.f_reshape([output, input, 1, 1])?;
    let y = images.f_conv2d(&pixel, bias, [1, 1], [0, 0], [1, 1], 1)?;
    shape.pop();
    shape.push(output);
    Ok(y.f_permute([0, 2, 3, 1])?.f_reshape(shape)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(shape: &[i64], pace: f64) -> Tensor {
        let values =
            Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)) * pace;
        values.sin().view(shape).set_requires_grad(true)
    }

    /// Values and all gradients of the two ways, of which each rounds in its own way.
    #[test]
    fn both_ways_make_one_product() {
        for (shape, output, with_bias) in [([8, 128, 32], 48, true), ([4, 12, 16], 16, false)] {
            let (x, weight) = (wave(&shape, 0.37), wave(&[output, shape[2]], 0.11));
            let bias = with_bias.then(|| wave(&[output], 0.7));
            let toward = wave(&[shape[0], shape[1], output], 0.53).detach();
            let mut leaves = vec![&x, &weight];
            leaves.extend(bias.as_ref());
            let all = |y: Tensor| -> Vec<Tensor> {
                let mut all =
                    Tensor::run_backward(&[(&y * &toward).sum(Kind::Float)], &leaves, false, false);
                all.push(y.detach());
                all
            };
            let one = all(convolution(&x, &weight, bias.as_ref()).unwrap());
            let other = all(x.linear(&weight, bias.as_ref()));
            for (one, other) in one.iter().zip(&other) {
                assert_eq!(one.size(), other.size());
                assert!(one.allclose(other, 1e-4, 1e-4, false), "{shape:?}: {one} {other}");
            }
        }
    }

    /// Where memory is saved a forward is made without a graph first, and must give the same bits
    /// as the one with it.
    #[test]
    fn a_product_is_the_same_with_and_without_a_graph() {
        let (x, weight, bias) =
            (wave(&[16, 64, 32], 0.37), wave(&[48, 32], 0.11), wave(&[48], 0.7));
        let with = convolution(&x, &weight, Some(&bias)).unwrap();
        let without = tch::no_grad(|| convolution(&x, &weight, Some(&bias)).unwrap());
        assert_eq!(with.detach(), without);
    }
}
