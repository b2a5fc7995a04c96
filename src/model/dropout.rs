//! Dropout as a function of where it stands: a mask has the same bits on the host and on a GPU.
//!
//! A GPU makes its masks itself (`dropout.cu`), a thread sixteen numbers: what a host could make
//! and send takes longer than the step.

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use crate::device::compiler::Source;
use crate::device::kernels::kept;
use crate::error::{Error, Result};
use crate::random::{DropoutKey, dropout_bound, dropout_mask};

const SOURCE: Source = Source { name: "dropout.cu", text: include_str!("dropout.cu") };
/// Numbers of a block of ChaCha8, which a thread makes.
const BLOCK: u64 = 16;

/// Dropout of one microbatch: the same masks whenever it is run. Evaluation has none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    pub rate: f64,
    /// Of the probabilities of the attention.
    pub attention_rate: f64,
    pub seed: u64,
    pub step: usize,
    pub replica: usize,
    pub microbatch: usize,
}

impl Dropout {
    /// The same for the probabilities of the attention.
    pub(super) fn attention(self) -> Dropout {
        Dropout { rate: self.attention_rate, ..self }
    }

    pub(super) fn apply(self, x: Tensor, layer: usize, site: usize) -> Result<Tensor> {
        if self.rate == 0.0 {
            return Ok(x);
        }

        let Dropout { rate, seed, step, replica, microbatch, .. } = self;
        let key = DropoutKey { seed, step, replica, microbatch, layer, site };
        let mask = match x.device() {
            Device::Cuda(index) => on_gpu(index, key, rate, &x.size(), x.kind())?,
            _ => on_host(key, rate, &x.size(), x.kind())?,
        };

        Ok(x.f_mul(&mask)?)
    }
}

fn on_host(key: DropoutKey, rate: f64, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let mut mask = vec![0.0; shape.iter().product::<i64>() as usize];
    dropout_mask(key, rate, &mut mask);
    Ok(Tensor::f_from_slice(&mask)?.f_view(shape)?.f_to_kind(kind)?)
}

/// The same, on libtorch's stream of a device.
fn on_gpu(index: usize, key: DropoutKey, rate: f64, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let entry = match kind {
        Kind::Float => "dropout_f32",
        Kind::BFloat16 => "dropout_bf16",
        other => return Err(Error::Internal(format!("a mask of {other:?}"))),
    };

    let kernel = kept(index, &SOURCE, entry)?;
    let mask = Tensor::f_empty(shape, (kind, Device::Cuda(index)))?;

    let mut arguments =
        Arguments::new(mask.data_ptr() as u64, mask.numel() as u64, key, rate, kind);
    // SAFETY: the arguments are those of the kernel's declaration, in their order; the mask has so
    // many numbers of its kind, and is memory of libtorch's on its own stream (the null one), so
    // all work on it that comes before or after is in order.
    unsafe {
        kernel.launch(
            arguments.count.div_ceil(BLOCK),
            std::ptr::null_mut(),
            &mut arguments.pointers(),
        )?;
    }

    Ok(mask)
}

/// What a kernel is given, in the order of its declaration.
struct Arguments {
    mask: u64,
    count: u64,
    key: [u32; 8],
    bound: u32,
    /// f32, or the bits of bf16 in the lower half.
    kept: u32,
}

impl Arguments {
    fn new(mask: u64, count: u64, key: DropoutKey, rate: f64, kind: Kind) -> Arguments {
        let (bound, kept) = dropout_bound(rate);
        let kept = if kind == Kind::BFloat16 { u32::from(bf16(kept)) } else { kept.to_bits() };
        Arguments { mask, count, key: key.words(), bound, kept }
    }

    fn pointers(&mut self) -> [*mut c_void; 5] {
        [
            (&raw mut self.mask).cast(),
            (&raw mut self.count).cast(),
            (&raw mut self.key).cast(),
            (&raw mut self.bound).cast(),
            (&raw mut self.kept).cast(),
        ]
    }
}

/// The bits of the nearest bf16, ties to even, of a finite number.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use libloading::os::unix::Symbol;

    use super::*;
    use crate::device::kernels::tests::{compiles_for_gpus_of_today, for_processor};

    #[repr(C)]
    struct Key([u32; 8]);

    type OfF32 = unsafe extern "C" fn(*mut f32, u64, Key, u32, f32);
    type OfBf16 = unsafe extern "C" fn(*mut u16, u64, Key, u32, u16);

    #[test]
    fn the_masks_compile_for_gpus_of_today() {
        compiles_for_gpus_of_today(&SOURCE, &["dropout_f32", "dropout_bf16"]);
    }

    /// Compiled for the processor, the kernels give the host's bits.
    #[test]
    fn a_gpu_makes_the_masks_of_the_host() {
        let folder = tempfile::tempdir().unwrap();
        let library = for_processor(&SOURCE, folder.path());
        // SAFETY: the types are those of the source's declarations.
        let (of_f32, of_bf16): (Symbol<OfF32>, Symbol<OfBf16>) = unsafe {
            (library.get(b"dropout_f32").unwrap(), library.get(b"dropout_bf16").unwrap())
        };

        for (count, rate, layer) in
            [(1usize, 0.5, 0), (16, 0.1, 7), (1003, 0.1, 3), (70_000, 0.25, 65), (5000, 0.9, 1)]
        {
            let key = DropoutKey {
                seed: 1 << 40,
                step: 5_000_000_000,
                replica: 3,
                microbatch: 2,
                layer,
                site: 9,
            };
            for kind in [Kind::Float, Kind::BFloat16] {
                let expected = on_host(key, rate, &[count as i64], kind).unwrap();
                let Arguments { bound, kept, key: words, .. } =
                    Arguments::new(0, count as u64, key, rate, kind);
                match kind {
                    Kind::Float => {
                        let mut mask = vec![f32::NAN; count];
                        // SAFETY: the mask has `count` numbers.
                        unsafe {
                            of_f32(
                                mask.as_mut_ptr(),
                                count as u64,
                                Key(words),
                                bound,
                                f32::from_bits(kept),
                            )
                        };
                        assert_eq!(Vec::<f32>::try_from(expected).unwrap(), mask, "{count} {rate}");
                    }
                    _ => {
                        let mut mask = vec![0x7fc0u16; count];
                        // SAFETY: the mask has `count` numbers.
                        unsafe {
                            of_bf16(mask.as_mut_ptr(), count as u64, Key(words), bound, kept as u16)
                        };
                        let bits: Vec<i16> =
                            Vec::try_from(expected.view_dtype(Kind::Int16)).unwrap();
                        assert_eq!(
                            bits,
                            mask.iter().map(|bits| *bits as i16).collect::<Vec<_>>(),
                            "{count} {rate}"
                        );
                    }
                }
            }
        }
    }
}
