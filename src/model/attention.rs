//! Causal attention of queries in groups that share keys and values (Ainslie et al. 2023), over a
//! whole text at once, or over a text that grows, whose keys and values are kept:
//!
//! ```text
//! training     q, k, v of all T tokens                     every query sees the keys up to its own
//! generation   q of the new tokens    k, v are kept  [ read before | new ]
//! ```
//!
//! On a processor libtorch's fused attention makes products of 64 queries of one head at a time,
//! which are too small to be fast. Texts of up to [`LONGEST`] tokens are taken by [`by_blocks`], all
//! heads at once, and the sooner done; but what it keeps for the backward grows with T.

use tch::{Device, Kind, Tensor};

use super::Remembered;
use crate::error::Result;

/// `softmax(q k' / sqrt(W)) v` a head: `q` [B, H, T, W], `k` and `v` [B, H / n, T, W], of which each
/// head serves n queries -> [B, H, T, W].
pub(super) fn causal(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    remembered: &mut Remembered,
) -> Result<Tensor> {
    let (b, h, t, w) = q.size4()?;
    let seen = remembered.documents().map(|documents| documents.seen().shallow_clone());
    let Some(cache) = remembered.cache() else {
        let plain = q.device() == Device::Cpu && q.kind() == Kind::Float;
        let causal = seen.is_none();
        return match plain && takes_blocks(t) {
            true => by_blocks(q, k, v, seen.as_ref()),
            false => product(q, &grouped(k, h)?, &grouped(v, h)?, seen.as_ref(), causal),
        };
    };

    let mask = cache.mask(t, q.device())?;
    let [keys, values] = cache.append([k, v])?;
    cache.advance(t);
    if t > 1 {
        return product(
            q,
            &grouped(&keys, h)?,
            &grouped(&values, h)?,
            mask.as_ref(),
            mask.is_none(),
        );
    }

    // One query: those of a group are as good as tokens, and keys need not be copied.
    let groups = k.size()[1];
    let y =
        product(&q.f_reshape([b, groups, h / groups, w])?, &keys, &values, mask.as_ref(), false)?;
    Ok(y.f_reshape([b, h, 1, w])?)
}

/// Queries of a block.
const BLOCK: i64 = 64;

/// The longest text that is taken by blocks, tokens: of longer ones too much would be kept.
const LONGEST: i64 = 512;

/// Whether a text of `t` tokens is taken by blocks.
fn takes_blocks(t: i64) -> bool {
    t % BLOCK == 0 && (2 * BLOCK..=LONGEST).contains(&t)
}

/// f32 values a token that a backward needs of the attention of H heads over T tokens besides its
/// inputs and its output: the probabilities where it is made by blocks, else the sums of them.
pub(super) fn kept_per_token(heads: i64, t: i64, on_processor: bool) -> usize {
    let blocks = on_processor && takes_blocks(t);
    if blocks { (heads * (t + BLOCK) / 2) as usize } else { heads as usize }
}

/// Block i of the queries sees the keys up to its end, of all heads at once:
///
/// ```text
///           keys
/// queries   [ \ ]                 p = softmax(q k' / sqrt(W) + mask),  y = p v
///           [    . \ ]            half of the products of a whole square
///           [    .    . \ ]
/// ```
///
/// Where rows have documents, `seen` [B, 1, T, T] says which keys a query sees.
fn by_blocks(q: &Tensor, k: &Tensor, v: &Tensor, seen: Option<&Tensor>) -> Result<Tensor> {
    let (b, h, t, w) = q.size4()?;
    let groups = k.size()[1];
    let (n, all) = (h / groups, b * groups);
    let scale = 1.0 / (w as f64).sqrt();
    // The queries of a group are rows of one product.
    let q = q.f_view([b, groups, n, t, w])?;
    let k = k.f_reshape([all, t, w])?.f_transpose(1, 2)?;
    let v = v.f_reshape([all, t, w])?;

    let mut blocks = Vec::new();
    for start in (0..t).step_by(BLOCK as usize) {
        let end = start + BLOCK;
        let rows = q.f_narrow(3, start, BLOCK)?.f_reshape([all, n * BLOCK, w])?;
        let mask = Tensor::f_full([BLOCK, end], f64::NEG_INFINITY, (q.kind(), q.device()))?
            .f_triu(start + 1)?
            .f_repeat([n, 1])?;
        let mut scores = mask.f_baddbmm(&rows, &k.f_narrow(2, 0, end)?, 1.0, scale)?;
        if let Some(seen) = seen {
            let unseen = seen.f_narrow(2, start, BLOCK)?.f_narrow(3, 0, end)?.f_logical_not()?;
            let each = scores.f_view([b, groups * n, BLOCK, end])?;
            let masked = each.f_masked_fill(&unseen, f64::NEG_INFINITY)?;
            scores = masked.f_view([all, n * BLOCK, end])?;
        }

        let y = scores.f_softmax(-1, q.kind())?.f_bmm(&v.f_narrow(1, 0, end)?)?;
        blocks.push(y.f_view([b, groups, n, BLOCK, w])?.f_permute([0, 3, 1, 2, 4])?);
    }

    Ok(Tensor::f_cat(&blocks, 1)?.f_view([b, t, h, w])?.f_transpose(1, 2)?)
}

fn product(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    causal: bool,
) -> Result<Tensor> {
    Ok(Tensor::f_scaled_dot_product_attention(q, k, v, mask, 0.0, causal, None, false)?)
}

/// Every head of keys or values as often as it has queries: [B, H / n, T, W] -> [B, H, T, W].
fn grouped(x: &Tensor, heads: i64) -> Result<Tensor> {
    let (b, groups, t, w) = x.size4()?;
    if groups == heads {
        return Ok(x.shallow_clone());
    }

    let n = heads / groups;
    Ok(x.f_unsqueeze(2)?.f_expand([b, groups, n, t, w], false)?.f_reshape([b, heads, t, w])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values and gradients of the two ways, of which each rounds in its own way.
    #[test]
    fn blocks_are_the_attention() {
        for (b, h, groups, t, w) in [(2, 4, 2, 128, 8), (1, 6, 6, 192, 4), (3, 2, 1, 320, 6)] {
            let wave = |heads: i64, pace: f64| {
                let count = b * t * heads * w;
                let values = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * pace).sin();
                values.view([b, t, heads, w]).set_requires_grad(true)
            };
            let leaves = [wave(h, 0.37), wave(groups, 0.11), wave(groups, 0.7)];
            let toward = wave(h, 0.53).detach().transpose(1, 2);
            let all = |y: Tensor| -> Vec<Tensor> {
                let sum = (&y * &toward).sum(Kind::Float);
                let mut all = Tensor::run_backward(&[sum], &leaves.each_ref(), false, false);
                all.push(y.detach());
                all
            };
            let [q, k, v] = leaves.each_ref().map(|x| x.transpose(1, 2));
            let blocks = all(by_blocks(&q, &k, &v, None).unwrap());
            let (k, v) = (grouped(&k, h).unwrap(), grouped(&v, h).unwrap());
            let fused = all(product(&q, &k, &v, None, true).unwrap());
            for (one, other) in blocks.iter().zip(&fused) {
                let far = (one - other).abs().max().double_value(&[]);
                assert!(far < 2e-4, "{t}: {far:e}");
            }
        }
    }

    #[test]
    fn texts_of_some_lengths_are_taken_by_blocks() {
        let taken = |t: &i64| takes_blocks(*t);
        let lengths = [1, 64, 127, 128, 130, 192, 512, 576, 1024];
        assert_eq!(lengths.into_iter().filter(taken).collect::<Vec<_>>(), [128, 192, 512]);
        assert_eq!(kept_per_token(4, 256, true), 640);
        assert_eq!([kept_per_token(4, 256, false), kept_per_token(4, 1024, true)], [4, 4]);
    }
}
