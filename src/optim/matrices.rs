//! The matrices of a set of weights, for rules that take them whole. Those of one shape are taken
//! at once:
//!
//! ```text
//! flat     [ norm1 | q | k | v | bias | out | ... | q | k | v | ... ]      a fused q/k/v is three matrices
//! batch            --------------------gather-------------->  [B, D, D]    a copy, contiguous and aligned as libtorch does it
//! ```
//!
//! so that a product, and with it every bit, depends on shapes only, not on where a matrix stands.
//! A batch is as large as the products need it, and not larger: its copies stay in the cache, and
//! are what an update needs for a moment.

use tch::Tensor;

use crate::error::Result;
use crate::model::Role;
use crate::params::{Layout, Published};

/// Values of a batch, unless one matrix has more.
const VALUES: usize = 1 << 18;

/// Matrices of one shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    pub rows: usize,
    pub columns: usize,
    pub members: Vec<Member>,
}

/// One matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// The parameter that it is, or is a part of.
    pub name: String,
    pub part: usize,
    /// Where it begins in the flat buffers.
    pub offset: usize,
    /// Its layer in the model, and its place among the matrices of the layer, as far as those are
    /// here.
    pub layer: usize,
    pub number: usize,
}

impl Batch {
    /// Values of all of them.
    pub fn len(&self) -> usize {
        self.members.len() * self.rows * self.columns
    }

    /// Where each begins.
    pub fn offsets(&self) -> Vec<usize> {
        self.members.iter().map(|member| member.offset).collect()
    }
}

/// The flat buffers of an update, and what it goes by, as tensors on their device.
pub struct Target<'a> {
    /// The newest weights, where `new` does not hold them.
    pub old: Option<&'a Tensor>,
    pub new: &'a Tensor,
    /// The version that steps use, and how far it is ahead; none where somebody else publishes it.
    pub published: Option<Published<'a>>,
    pub gradient: &'a Tensor,
    /// What makes the clipped mean of the gradient, f32 without dimensions.
    pub scale: Tensor,
    /// Whether the update is made at all, without dimensions; none: it is.
    pub made: Option<Tensor>,
}

impl Target<'_> {
    /// The clipped mean gradient of a batch, [B, rows, columns].
    pub fn gradient(&self, batch: &Batch) -> Result<Tensor> {
        let mut gradient = gather(self.gradient, &batch.offsets(), [batch.rows, batch.columns])?;
        Ok(gradient.f_mul_(&self.scale)?)
    }

    /// `new`, or `old` if the update is not made.
    pub fn chosen(&self, new: Tensor, old: &Tensor) -> Result<Tensor> {
        match &self.made {
            Some(made) => Ok(new.f_where_self(made, old)?),
            None => Ok(new),
        }
    }

    /// The next weights of a batch, and its version, by what makes them of the newest, [B, rows,
    /// columns].
    ///
    /// # Errors
    /// What libtorch reports, and those of `step`.
    pub fn advance(
        &self,
        batch: &Batch,
        step: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let (offsets, shape) = (batch.offsets(), [batch.rows, batch.columns]);
        let before = read(self.old.unwrap_or(self.new), &offsets, shape)?;
        let after = self.chosen(step(&before)?, &before)?;

        if let Some(Published { version, horizon }) = &self.published {
            let ahead = after.f_sub(&before)?.f_mul_scalar_(f64::from(*horizon))?.f_add_(&after)?;
            scatter(version, &offsets, &ahead)?;
        }

        scatter(self.new, &offsets, &after)
    }
}

/// The matrices among the parameters of a layout, in batches.
pub fn batches(layout: &Layout) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    let (mut layer, mut number) = (0, 0);
    for entry in layout.entries.iter().filter(|entry| entry.parameter.role == Role::Matrix) {
        let parameter = &entry.parameter;
        let of = layer_of(&parameter.name);
        if of != layer {
            (layer, number) = (of, 0);
        }

        let (rows, columns) =
            (parameter.shape[0] as usize / parameter.fused, parameter.shape[1] as usize);
        for part in 0..parameter.fused {
            let offset = entry.offset + part * rows * columns;
            let member = Member { name: parameter.name.clone(), part, offset, layer, number };
            number += 1;

            let fits = |batch: &&mut Batch| {
                (batch.rows, batch.columns) == (rows, columns)
                    && batch.len() + rows * columns <= VALUES
            };

            match batches.iter_mut().find(fits) {
                Some(batch) => batch.members.push(member),
                None => batches.push(Batch { rows, columns, members: vec![member] }),
            }
        }
    }
    batches
}

/// The number in `layers.7.mlp.up.weight`.
fn layer_of(name: &str) -> usize {
    let number = name.strip_prefix("layers.").and_then(|rest| rest.split('.').next());
    number.and_then(|number| number.parse().ok()).unwrap_or_default()
}

/// [B, rows, columns]: a copy of the matrices that begin at `offsets` of a flat buffer.
pub fn gather(flat: &Tensor, offsets: &[usize], [rows, columns]: [usize; 2]) -> Result<Tensor> {
    let views = offsets
        .iter()
        .map(|offset| view(flat, *offset, [rows, columns]))
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_stack(&views, 0)?)
}

/// The same for what takes values one by one: of one matrix not copied.
pub fn read(flat: &Tensor, offsets: &[usize], shape: [usize; 2]) -> Result<Tensor> {
    match offsets {
        [offset] => Ok(view(flat, *offset, shape)?.f_unsqueeze(0)?),
        _ => gather(flat, offsets, shape),
    }
}

/// Copies matrices [B, rows, columns] to where they begin in a flat buffer.
pub fn scatter(flat: &Tensor, offsets: &[usize], matrices: &Tensor) -> Result<()> {
    let size = matrices.size();
    for (offset, matrix) in offsets.iter().zip(matrices.f_unbind(0)?) {
        view(flat, *offset, [size[1] as usize, size[2] as usize])?.f_copy_(&matrix)?;
    }
    Ok(())
}

fn view(flat: &Tensor, offset: usize, [rows, columns]: [usize; 2]) -> Result<Tensor> {
    let values = flat.f_narrow(0, offset as i64, (rows * columns) as i64)?;
    Ok(values.f_view([rows as i64, columns as i64])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Init, Parameter};
    use crate::params::zeros;
    use tch::Device;

    fn parameter(name: &str, shape: &[i64], role: Role, fused: usize) -> Parameter {
        Parameter {
            name: name.into(),
            shape: shape.to_vec(),
            init: Init::Zeros,
            role,
            tied: false,
            fused,
        }
    }

    fn layout() -> Layout {
        Layout::new(&[
            parameter("embedding.tokens", &[8, 4], Role::Table, 1),
            parameter("layers.3.qkv", &[12, 4], Role::Matrix, 3),
            parameter("layers.3.bias", &[4], Role::Vector, 1),
            parameter("layers.3.up", &[8, 4], Role::Matrix, 1),
            parameter("layers.4.out", &[4, 4], Role::Matrix, 1),
            parameter("layers.4.large", &[2048, 1024], Role::Matrix, 2),
        ])
    }

    #[test]
    fn matrices_of_one_shape_are_a_batch() {
        let found = batches(&layout());
        let of = |batch: &Batch| {
            let members = batch.members.iter();
            let members =
                members.map(|Member { offset, layer, number, .. }| (*offset, *layer, *number));
            (batch.rows, batch.columns, members.collect::<Vec<_>>())
        };
        let expected = [
            (4, 4, vec![(128, 3, 0), (144, 3, 1), (160, 3, 2), (512, 4, 0)]),
            (8, 4, vec![(384, 3, 3)]),
            // Too large to be taken at once.
            (1024, 1024, vec![(640, 4, 1)]),
            (1024, 1024, vec![(640 + (1 << 20), 4, 2)]),
        ];
        assert_eq!(found.iter().map(of).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_is_gathered_can_be_put_back() {
        let flat = Tensor::arange(60, (tch::Kind::Float, Device::Cpu));
        let matrices = gather(&flat, &[6, 40], [2, 3]).unwrap();
        assert_eq!(matrices.size(), [2, 2, 3]);
        assert_eq!(matrices.double_value(&[1, 1, 0]), 43.0);

        let other = zeros(60, Device::Cpu).unwrap();
        scatter(&other, &[6, 40], &matrices).unwrap();
        let sum = f64::try_from(other.sum(tch::Kind::Double)).unwrap();
        assert_eq!(sum, f64::from((6..12).chain(40..46).sum::<i32>()));
        assert_eq!(other.double_value(&[45]), 45.0);
    }
}
