//! Adds gradients of parameters to the f32 sum of a step.

use std::ffi::c_void;

use tch::{Device, Kind, Tensor};

use crate::device::compiler::Source;
use crate::device::kernels::{Kernel, kept};
use crate::error::Result;

const SOURCE: Source = Source {
    name: "add.cu",
    text: concat!(include_str!("../device/bf16.cu"), include_str!("add.cu")),
};
/// Values that a thread takes at a time, and bytes that buffers must be aligned to for it.
const EIGHT: u64 = 8;
const ALIGNED: usize = 16;

/// `sum += part`, of one shape; `sum` is contiguous. On a GPU a gradient of bf16 is added by a
/// kernel of our own: libtorch's takes the values of sums of two kinds one by one.
pub fn add(sum: &mut Tensor, part: &Tensor) -> Result<()> {
    let aligned = |tensor: &Tensor| (tensor.data_ptr() as usize).is_multiple_of(ALIGNED);
    let fits = part.is_contiguous() && aligned(part) && aligned(sum) && sum.numel() == part.numel();
    match (sum.device(), part.kind()) {
        (Device::Cuda(index), Kind::BFloat16) if fits && part.device() == sum.device() => {
            on_gpu(index, sum, part)
        }
        _ => {
            let _ = sum.f_add_(part)?;
            Ok(())
        }
    }
}

fn on_gpu(index: usize, sum: &Tensor, part: &Tensor) -> Result<()> {
    let kernel = kept(index, &SOURCE, "add_bf16")?;
    let mut arguments = (sum.data_ptr() as u64, part.data_ptr() as u64, sum.numel() as u64);
    let pointers: &mut [*mut c_void] = &mut [
        (&raw mut arguments.0).cast(),
        (&raw mut arguments.1).cast(),
        (&raw mut arguments.2).cast(),
    ];
    launch(&kernel, arguments.2, pointers)
}

fn launch(kernel: &Kernel, count: u64, pointers: &mut [*mut c_void]) -> Result<()> {
    // SAFETY: the arguments are those of the kernel's declaration: buffers of f32 and of bf16 on
    // one device, as long as each other, contiguous and aligned, as `add` has looked; on libtorch's
    // stream (the null one), which orders all other work on them.
    unsafe { kernel.launch(count.div_ceil(EIGHT), std::ptr::null_mut(), pointers) }
}

#[cfg(test)]
mod tests {
    use libloading::os::unix::Symbol;

    use super::*;
    use crate::device::kernels::tests::{compiles_for_gpus_of_today, for_processor};

    #[test]
    fn the_kernel_compiles_for_gpus_of_today() {
        compiles_for_gpus_of_today(&SOURCE, &["add_bf16"]);
    }

    /// Compiled for the processor, the kernel gives the bits of libtorch's sum, whatever the
    /// length.
    #[test]
    fn the_kernel_adds_as_the_processor_does() {
        type Add = unsafe extern "C" fn(*mut f32, *const u16, u64);
        let folder = tempfile::tempdir().unwrap();
        let library = for_processor(&SOURCE, folder.path());
        // SAFETY: the type is that of the source's declaration.
        let kernel: Symbol<Add> = unsafe { library.get(b"add_bf16") }.unwrap();
        for count in [1i64, 7, 8, 1000, 4099] {
            let wave = Tensor::arange(count, (Kind::Float, Device::Cpu)).sin();
            let part = (&wave * 1.7).to_kind(Kind::BFloat16);
            let (mut ours, theirs) = (&wave * 0.3, &wave * 0.3);
            add(&mut ours, &part).unwrap();
            // SAFETY: both buffers have `count` values, and libtorch's memory is aligned to 64
            // bytes.
            unsafe { kernel(theirs.data_ptr().cast(), part.data_ptr().cast(), count as u64) };
            assert_eq!(ours, theirs, "{count}");
        }
    }
}
