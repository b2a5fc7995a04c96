//! The type of the numbers that a model computes with.
//!
//! With `bf16` layers, activations and their gradients are bf16, and so are the versions of the
//! weights that steps run on. What is added up over time stays f32: the master weights that updates
//! change, the optimizer's moments, the gradient over microbatches and replicas, and the loss from
//! the logits on.
//!
//! ```text
//! master W[t]  f32  --round-->  version t  bf16  --forward, backward-->  gradient of a microbatch  bf16
//!      ^                                                                        | added up
//!      '------------- optimizer, f32 <-- all-reduce over replicas, f32 <-- sum  f32
//! ```

use tch::Kind;

/// What a config calls it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    F32,
    /// f32, but products of matrices on a GPU's tensor cores, which read 10 bits of the mantissa.
    Tf32,
    Bf16,
}

impl Precision {
    /// libtorch's name of the type of weights and activations.
    pub fn kind(self) -> Kind {
        match self {
            Precision::F32 | Precision::Tf32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        }
    }

    /// Bytes of a weight or an activation.
    pub fn bytes(self) -> usize {
        match self {
            Precision::F32 | Precision::Tf32 => 4,
            Precision::Bf16 => 2,
        }
    }
}
