//! GPT-2 (Radford et al. 2019) exactly, so that its published weights can be used: the layers of a
//! `transformer` with GELU by the tangent, and an embedding that is not scaled where it is tied.

use std::ops::Range;

use super::architecture::{Blocks, EmbeddingScale};
use super::{Architecture, Dimensions, gpt};

/// The family.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "gpt2",
    embedding_scale: EmbeddingScale::Never,
    blocks,
    ..gpt::ARCHITECTURE
};

fn blocks(d: &Dimensions, run: Range<usize>) -> Blocks {
    gpt::blocks(d, run, gpt::Gelu::Tanh)
}
