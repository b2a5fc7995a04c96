//! How values travel between devices: as they are, or rounded to bf16 in half the bytes.
//!
//! What is rounded, with `wire = "bf16"`: activations and their gradients on every link between two
//! stages, and the all-reduce of R > 1 replicas, `round(round(g_0) + round(g_1) + ...)`, added in
//! f32 in the order of the replicas. The parts of a tied table's gradient that cross a line keep
//! f32: they are few, and both copies must make one sum of them. With `precision = "bf16"`
//! activations and their gradients are bf16 anyway.

use tch::{Kind, TchError, Tensor};

/// The type of the values on the wire; everything else stays f32.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    F32,
    Bf16,
}

impl Wire {
    /// As a config names it.
    pub fn word(self) -> &'static str {
        match self {
            Wire::F32 => "f32",
            Wire::Bf16 => "bf16",
        }
    }

    /// libtorch's name of the type.
    pub fn kind(self) -> Kind {
        match self {
            Wire::F32 => Kind::Float,
            Wire::Bf16 => Kind::BFloat16,
        }
    }

    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Wire::F32 => 4,
            Wire::Bf16 => 2,
        }
    }

    /// Values as they travel.
    pub fn pack(self, values: &Tensor) -> Result<Tensor, TchError> {
        values.f_to_kind(self.kind())
    }

    /// What has travelled, as the values that it was.
    pub fn unpack(self, values: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
        values.f_to_kind(kind)
    }

    /// Values as the other end sees them. Autograd takes the gradient through the same rounding, as
    /// it travels back the same way.
    pub fn cross(self, values: &Tensor) -> Result<Tensor, TchError> {
        self.unpack(&self.pack(values)?, values.kind())
    }

    /// Rounds values in place.
    pub fn round(self, values: &mut Tensor) -> Result<(), TchError> {
        match self {
            Wire::F32 => Ok(()),
            Wire::Bf16 => values.f_copy_(&values.f_to_kind(Kind::BFloat16)?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_keeps_eight_bits_both_ways() {
        let x =
            Tensor::from_slice(&[1.0f32, 1.001, 1.0 + 1.0 / 128.0, -3e30]).set_requires_grad(true);
        let y = Wire::Bf16.cross(&x).unwrap();
        assert_eq!(Vec::<f32>::try_from(&y).unwrap()[..3], [1.0, 1.0, 1.007_812_5]);
        (&y * Tensor::from_slice(&[1.001f32, 2.0, 1.0, 1.0])).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [1.0, 2.0, 1.0, 1.0]);
        let same = Wire::F32.cross(&x).unwrap();
        assert_eq!(same, x);
        let mut z = Tensor::from_slice(&[1.001f32]);
        Wire::Bf16.round(&mut z).unwrap();
        assert_eq!(z, Tensor::from_slice(&[1.0f32]));
    }
}
