//! The key `recompute`.

use serde::{Deserialize, Serialize};

/// What of a forward is run again in the backward, to keep less of it meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(from = "RecomputeKey", into = "RecomputeKey")]
pub enum Recompute {
    /// Everything is kept: `false`.
    Nothing,
    /// The whole stage, of whose input only is kept: `true`.
    Stage,
    /// Layer by layer, of each of which the input is kept: `"blocks"`.
    Layers,
}

/// The key as it is written.
#[derive(Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged, expecting = "`true`, `false` or `\"blocks\"`")]
enum RecomputeKey {
    Whole(bool),
    Word(Blocks),
}

#[derive(Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Blocks {
    Blocks,
}

impl From<RecomputeKey> for Recompute {
    fn from(key: RecomputeKey) -> Recompute {
        match key {
            RecomputeKey::Whole(false) => Recompute::Nothing,
            RecomputeKey::Whole(true) => Recompute::Stage,
            RecomputeKey::Word(Blocks::Blocks) => Recompute::Layers,
        }
    }
}

impl From<Recompute> for RecomputeKey {
    fn from(recompute: Recompute) -> RecomputeKey {
        match recompute {
            Recompute::Nothing => RecomputeKey::Whole(false),
            Recompute::Stage => RecomputeKey::Whole(true),
            Recompute::Layers => RecomputeKey::Word(Blocks::Blocks),
        }
    }
}
