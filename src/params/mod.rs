//! Weights in flat buffers: the layout of a set of parameters, whose values are views of one
//! buffer.
//!
//! Every parameter starts at a multiple of 256 bytes of its buffer, as libtorch's own tensors do at
//! least of 64 (on a GPU of 512, of which products look at 256): matrix products may take another
//! path (and so round in another way) for other alignments, and the oracle must see the same
//! numbers.

mod add;
mod publish;
mod versions;

use std::ops::Range;

use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

pub use add::add;
pub use publish::{Published, publish};
pub use versions::{Master, UpdateBuffers, Versions};

use crate::error::Result;
use crate::model::{Parameter, initial};

/// 256 bytes of bf16.
const ALIGN: usize = 128;

/// Where one parameter stands in the flat buffers.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub parameter: Parameter,
    pub offset: usize,
}

/// The order of the parameters in the flat buffers of a stage.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    pub entries: Vec<Entry>,
    /// Length of a flat buffer, padding included (always 0).
    pub len: usize,
}

impl Layout {
    /// Parameters one after the other, each aligned.
    pub fn new(parameters: &[Parameter]) -> Layout {
        let mut len: usize = 0;
        let entries = parameters
            .iter()
            .map(|parameter| {
                let offset = len;
                len = (offset + parameter.count()).next_multiple_of(ALIGN);
                Entry { parameter: parameter.clone(), offset }
            })
            .collect();
        Layout { entries, len }
    }

    /// Where a parameter begins; behind the last one the end of the buffer.
    pub fn offset(&self, parameter: usize) -> usize {
        self.entries.get(parameter).map_or(self.len, |entry| entry.offset)
    }

    /// Values of all parameters, padding not counted.
    pub fn count(&self) -> usize {
        self.entries.iter().map(|entry| entry.parameter.count()).sum()
    }

    /// Views of a flat buffer, one a parameter.
    pub fn views(&self, flat: &Tensor) -> Result<Vec<Tensor>> {
        let view = |entry: &Entry| -> Result<Tensor> {
            let (offset, count) = (entry.offset as i64, entry.parameter.count() as i64);
            Ok(flat.f_narrow(0, offset, count)?.f_view(&entry.parameter.shape[..])?)
        };
        self.entries.iter().map(view).collect()
    }

    /// A flat buffer of the initial weights, which all of the process' cores make.
    pub fn initial(&self, seed: u64) -> Result<Tensor> {
        let mut flat = Tensor::f_empty([self.len as i64], (Kind::Float, Device::Cpu))?;
        let mut rest = slice_mut(&mut flat);
        let mut parts = Vec::with_capacity(self.entries.len());
        for (i, Entry { parameter, offset }) in self.entries.iter().enumerate() {
            let (part, behind) = rest.split_at_mut(self.offset(i + 1) - offset);
            parts.push((parameter, part));
            rest = behind;
        }

        parts.into_par_iter().for_each(|(parameter, part)| {
            let (values, padding) = part.split_at_mut(parameter.count());
            initial(parameter, seed, values);
            padding.fill(0.0);
        });
        Ok(flat)
    }
}

/// A flat f32 buffer of zeros.
pub fn zeros(len: usize, device: Device) -> Result<Tensor> {
    Ok(Tensor::f_zeros([len as i64], (Kind::Float, device))?)
}

/// A buffer's values where the processor can read them.
pub fn to_host(flat: &Tensor) -> Result<Tensor> {
    Ok(flat.f_to_device(Device::Cpu)?)
}

/// Values of one piece on its way from a GPU: 64 MiB.
const PIECE: usize = 16 << 20;

/// Appends values of a flat buffer to `memory`. Those of a GPU go through `pinned` memory, which is made
/// when it is needed, and from there by all of the process' cores: memory that is touched for the first time
/// takes the kernel longer than the copy, and these cores have little else to do.
///
/// # Errors
/// What libtorch reports.
pub fn append(
    flat: &Tensor,
    range: Range<usize>,
    memory: &mut Vec<f32>,
    pinned: &mut Option<Tensor>,
) -> Result<()> {
    if flat.device() == Device::Cpu {
        memory.extend_from_slice(&slice(flat)[range]);
        return Ok(());
    }

    let room = match pinned {
        Some(room) => room,
        None => {
            let room = zeros(PIECE, Device::Cpu)?;
            // Where there is no such memory left, or none allowed, it is slower.
            pinned.insert(room.f_internal_pin_memory(flat.device()).unwrap_or(room))
        }
    };
    for from in range.clone().step_by(PIECE) {
        let count = PIECE.min(range.end - from);
        let mut piece = room.f_narrow(0, 0, count as i64)?;
        piece.f_copy_(&flat.f_narrow(0, from as i64, count as i64)?)?;
        memory.par_extend(slice(&piece).par_iter());
    }
    Ok(())
}

/// The values of a flat buffer.
///
/// # Panics
/// Unless `flat` is one-dimensional, contiguous, f32 and on the CPU.
pub fn slice(flat: &Tensor) -> &[f32] {
    check_flat(flat);
    if flat.numel() == 0 {
        return &[]; // libtorch has no address for it.
    }

    // SAFETY: checked above: `numel` f32 values lie at `data_ptr`. The borrow of `flat` keeps the
    // storage alive. Other handles of the storage exist: parameters are views, used inside calls of
    // the thread that owns the stage, which holds this borrow; and buckets of the gradient that are
    // being reduced, by other processes too, which are complete when they are handed over, overlap
    // nothing that a backward still writes, and are waited for before anybody looks at the whole
    // buffer.
    unsafe { std::slice::from_raw_parts(flat.data_ptr().cast::<f32>(), flat.numel()) }
}

/// The bytes of a flat buffer's values.
///
/// # Panics
/// As [`slice()`].
pub fn bytes(flat: &Tensor) -> &[u8] {
    as_bytes(slice(flat))
}

/// The bytes of values.
pub fn as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four bytes without padding, and the slice's memory is borrowed for as
    // long.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// The values of a flat buffer, to be changed.
///
/// # Panics
/// As [`slice()`].
pub fn slice_mut(flat: &mut Tensor) -> &mut [f32] {
    check_flat(flat);
    if flat.numel() == 0 {
        return &mut [];
    }

    // SAFETY: as in `slice`; the exclusive borrow of the handle keeps a second slice from being
    // made of it. The write passes by libtorch's version counter, on purpose: no graph that is
    // still to be run backward points at this buffer (the schedule's `check` proves it for every
    // action list).
    unsafe { std::slice::from_raw_parts_mut(flat.data_ptr().cast::<f32>(), flat.numel()) }
}

fn check_flat(flat: &Tensor) {
    assert!(
        flat.dim() == 1
            && flat.is_contiguous()
            && flat.kind() == Kind::Float
            && flat.device() == Device::Cpu,
        "a flat buffer is one contiguous row of f32 on the CPU"
    );
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::{Init, Role, initial_tensor};

    /// Two matrices and a vector.
    pub(crate) fn layout() -> Layout {
        let parameter = |name: &str, shape: &[i64]| Parameter {
            name: name.into(),
            shape: shape.into(),
            init: Init::Normal(1.0),
            role: Role::Matrix,
            tied: false,
            fused: 1,
        };

        Layout::new(&[parameter("a", &[3, 5]), parameter("b", &[7]), parameter("c", &[2, 2])])
    }

    #[test]
    fn parameters_are_aligned_views() {
        let layout = layout();
        assert_eq!(layout.entries.iter().map(|e| e.offset).collect::<Vec<_>>(), [0, 128, 256]);
        assert_eq!((layout.len, layout.count()), (384, 26));
        let flat = layout.initial(1).unwrap();
        for (view, entry) in layout.views(&flat).unwrap().iter().zip(&layout.entries) {
            assert_eq!(view.data_ptr().addr() % 64, 0);
            assert_eq!(*view, initial_tensor(&entry.parameter, 1));
        }
        assert!(slice(&flat)[15..128].iter().all(|padding| *padding == 0.0));
        assert!(slice(&flat)[260..].iter().all(|padding| *padding == 0.0));
    }
}
