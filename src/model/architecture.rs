//! What tells one family of models from another, as a record: every question that the rest of the
//! program has is a field, so a new family cannot leave one unanswered. A family is a file with its
//! layer and its record (`gpt`, `gpt2`, `llama`, `xl`) and a line in the list here.

use std::ops::Range;

use super::{Arch, Dimensions, Layer, Norm, gpt, gpt2, llama, xl};
use crate::error::Error;

/// Layers, from the first to the last.
pub(super) type Blocks = Vec<Box<dyn Layer>>;

/// A family of models.
#[derive(Debug)]
pub struct Architecture {
    /// As in a config.
    pub name: &'static str,
    pub positions: Positions,
    /// Where its layers may normalise; the first is the default. With [`Norm::Pre`] the head
    /// normalises once more.
    pub norms: &'static [Norm],
    /// Normalisations divide by the root of the mean square, and have no bias.
    pub rms_norm: bool,
    pub embedding_scale: EmbeddingScale,
    /// Logits have a bias.
    pub head_bias: bool,
    /// Hidden states are dropped before the head.
    pub head_dropout: bool,
    /// Layers remember earlier segments: `mem_len`, `clamp_len`, `same_length`.
    pub has_memory: bool,
    pub has_attention_dropout: bool,
    /// Multiply-adds a token of one layer's forward.
    pub block_cost: fn(&Dimensions) -> f64,
    /// The layers of a run, counted in the whole model.
    pub(super) blocks: fn(&Dimensions, Range<usize>) -> Blocks,
}

/// How a model knows where a token stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    /// A learned row for each of the T positions of a sequence, and for no other.
    Learned,
    /// In the attention, by distance: any length.
    Relative,
    /// Queries and keys are turned by their place: any length.
    Rotary,
}

/// Where the embedding is multiplied by sqrt(D) on its way in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmbeddingScale {
    Always,
    /// Where head and embedding share a table, whose rows are small enough for the head and would be
    /// lost among the other inputs (Vaswani et al. 2017, section 3.4).
    WhereTied,
    Never,
}

/// All of them.
const ALL: [Arch; 4] = [Arch::Transformer, Arch::Gpt2, Arch::Llama, Arch::TransformerXl];

impl Arch {
    /// What it is.
    pub fn architecture(self) -> &'static Architecture {
        match self {
            Arch::Transformer => &gpt::ARCHITECTURE,
            Arch::Gpt2 => &gpt2::ARCHITECTURE,
            Arch::Llama => &llama::ARCHITECTURE,
            Arch::TransformerXl => &xl::ARCHITECTURE,
        }
    }
}

impl Architecture {
    /// Whether queries and keys are turned by their place, and those that share keys come in groups.
    pub fn is_rotary(&self) -> bool {
        self.positions == Positions::Rotary
    }

    /// A key that this family does not have, and those that `have` it.
    pub fn refuse(
        setting: &str,
        found: impl ToString,
        have: impl Fn(&Architecture) -> bool,
    ) -> Error {
        let families =
            ALL.iter().map(|arch| arch.architecture()).filter(|architecture| have(architecture));
        let names: Vec<String> =
            families.map(|architecture| format!("\"{}\"", architecture.name)).collect();
        Error::config(
            setting,
            found,
            format!("only model.arch = {} has it; leave it out", names.join(" or ")),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_called_as_in_a_config() {
        for arch in ALL {
            assert_eq!(serde_json::to_value(arch).unwrap(), arch.architecture().name);
            assert!(!arch.architecture().norms.is_empty());
        }
    }

    #[test]
    fn who_has_a_key_is_told() {
        let error = Architecture::refuse("model.mem_len", 4, |other| other.has_memory).to_string();
        assert_eq!(
            error,
            "setting `model.mem_len`: found 4; only model.arch = \"transformer-xl\" has it; leave it out"
        );
    }
}
