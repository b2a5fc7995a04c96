//! What layers cost: what the partition balances.

use super::{Dimensions, head};
use crate::config::Arch;

/// Multiply-adds a token of one forward: what the partition balances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerCosts {
    pub embedding: f64,
    pub block: f64,
    pub head: f64,
}

/// The stated costs: `4 D^2 + 2 D F` for a block's matrices and `T D` for its causal attention, `D V` for the head (of
/// an adaptive one the first cluster, and of the others what falls into them), and the additions of the embedding,
/// `2 D`. A Transformer-XL makes keys and values of the memory too, `2 D^2 M / T` more, and three products over the
/// whole context, `3 (M + T) D`.
pub fn costs(d: &Dimensions) -> LayerCosts {
    let (dm, f, t, m) = (d.d_model as f64, d.d_ff as f64, d.sequence as f64, d.mem_len as f64);
    let attention = match d.arch {
        Arch::Transformer => t * dm,
        Arch::TransformerXl => 2.0 * dm * dm * m / t + 3.0 * (m + t) * dm,
    };
    let head = head::Head::new(d).cost();
    LayerCosts { embedding: 2.0 * dm, block: 4.0 * dm * dm + 2.0 * dm * f + attention, head }
}
