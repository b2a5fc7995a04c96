//! Causal attention of queries in groups that share keys and values (Ainslie et al. 2023), over a
//! whole text at once, or over a text that grows, whose keys and values are kept:
//!
//! ```text
//! training     q, k, v of all T tokens                     every query sees the keys up to its own
//! generation   q of the new tokens    k, v are kept  [ read before | new ]
//! ```

use tch::Tensor;

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
    let Some(cache) = remembered.cache() else {
        return product(q, &grouped(k, h)?, &grouped(v, h)?, None, true);
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
