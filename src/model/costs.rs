//! What layers cost: what the partition balances.

use super::{Dimensions, head};

/// Multiply-adds a token of one forward: what the partition balances.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerCosts {
    pub embedding: f64,
    pub block: f64,
    pub head: f64,
}

/// The stated costs: what the family says of a block, `D V` for the head (of an adaptive one the
/// first cluster, and of the others what falls into them), and the additions of the embedding, `2
/// D`.
pub fn costs(d: &Dimensions) -> LayerCosts {
    let head = head::Head::new(d).cost();
    LayerCosts { embedding: 2.0 * d.d_model as f64, block: (d.architecture.block_cost)(d), head }
}
